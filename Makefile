# Everything runs in a virtual environment here, made on first use; nothing is installed outside it but, where you are root,
# the Debian packages that a target says it needs.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test lint bench format wheel clean

run: $(INSTALLED) ## a standalone relay on loopback
	@exec $(BIN)/firezone-relay --standalone --public-ip4-addr 127.0.0.1 \
		$$(grep -q '^0\{31\}1 ' /proc/net/if_inet6 2>/dev/null && echo --public-ip6-addr ::1) \
		--allow-peer 127.0.0.0/8 --allow-peer ::1/128 --max-allocations 1000

test: $(INSTALLED) ## all tests, foreign clients included
	@tests/install-foreign-clients
	$(BIN)/pytest

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) ## ten minutes beside coturn, if that is installed (apt-get install coturn gcc); QUICK=1: one minute
	@$(BIN)/python -m benchmarks $(if $(filter-out 0,$(QUICK)),--quick)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED) ## dist/firezone_relay-*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/pip:
	@./bootstrap $(VENV) $(PYTHON)

$(INSTALLED): $(BIN)/pip pyproject.toml constraints.txt
	@echo "installing into $(VENV)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	@touch $@
