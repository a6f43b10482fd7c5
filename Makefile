# Everything runs in a virtual environment here, made on first use; nothing is installed outside it but, where you are root,
# the Debian packages that a target says it needs.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROGRAM := relay/offload/program.o

PYTHONS := $(VENV)/pythons
SIDE_BY_SIDE := --numprocesses auto --dist loadfile

# A simulation is repeated by its seed; the other variables make its world longer, smaller or quieter.
SEEDS ?= 1-20

.PHONY: run test test-long test-kernels simulate fuzz lint bench format docs wheel deb lock audit sbom clean debian-packages
# What a target needs is made in the order that it says: compilers before what they compile.
.NOTPARALLEL:

run: $(INSTALLED) $(PROGRAM) ## a standalone relay on loopback
	@exec $(BIN)/firezone-relay --standalone --public-ip4-addr 127.0.0.1 \
		$$(grep -q '^0\{31\}1 ' /proc/net/if_inet6 2>/dev/null && echo --public-ip6-addr ::1) \
		--allow-peer 127.0.0.0/8 --allow-peer ::1/128 --max-allocations 1000 --allow-root

# Bytecode is kept, whatever the shell says: every program that a test starts would compile all of the relay.
test: export PYTHONDONTWRITEBYTECODE :=
test: debian-packages $(INSTALLED) $(PROGRAM) ## all tests, foreign clients included
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not long"

# People's runs search for new examples, seeds and inputs; where CI is set, a commit has the same result each time.
test-long: export PYTHONDONTWRITEBYTECODE :=
test-long: debian-packages $(INSTALLED) $(PROGRAM) wheel ## a quarter of an hour: floods, mutants, fuzzing, new examples, other Pythons
	-@$(MAKE) --silent $(VENV)/.fuzzer
	-@$(MAKE) --silent deb
	-@tests/make-debian-root $(VENV)/debian.tar
	tests/install-for-each-python dist/firezone_relay-*.whl $(PYTHONS)
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "long or hypothesis" --hypothesis-profile long
	for python in $(PYTHONS)/*/bin/pytest; do \
		[ ! -x $$python ] || $$python $(SIDE_BY_SIDE) -m "not long" tests/core tests/net tests/actors tests/cli || exit; \
	done
	$(BIN)/python -m tests.simulation --new 60 --jobs 2
	$(BIN)/python -m tests.simulation.mutants
	$(BIN)/python -m tests.fuzz --short --jobs 2

test-kernels: $(INSTALLED) $(PROGRAM) ## half an hour: offload on Debian's kernels, in virtual machines (needs root); ONLY=trixie, STEPS=cards
	@$(BIN)/python -m tests.kernels $(if $(ONLY),--only $(ONLY)) $(if $(STEPS),--steps $(STEPS))

simulate: $(INSTALLED) ## whole systems in simulated time; SEEDS=1-20, DAYS=30, CLIENTS=100, WITHOUT=noise,restarts
	@$(BIN)/python -m tests.simulation $(SEEDS) $(if $(DAYS),--days $(DAYS)) $(if $(CLIENTS),--clients $(CLIENTS)) \
		$(if $(WITHOUT),--without $(WITHOUT))

fuzz: $(VENV)/.fuzzer ## decoder, server, portal frames, HTTP, log directives; TARGET=server, SECONDS=60 for each
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) $(TARGET)

debian-packages:
	@tests/install-debian-packages

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) $(PROGRAM) ## 15 minutes, beside coturn if installed (apt-get install coturn gcc clang ethtool); QUICK=1: two minutes
	@$(BIN)/python -m benchmarks $(if $(filter-out 0,$(QUICK)),--quick)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## docs/cli.md and docs/metrics.md, of what the command line and the metrics say of themselves
	@$(BIN)/python -m docs.command_line
	@$(BIN)/python -m docs.metric_table

wheel: $(INSTALLED) $(PROGRAM) ## dist/firezone_relay-*.whl
	@rm -f dist/firezone_relay-*.whl
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation --wheel-dir dist .

deb: wheel ## dist/firezone-relay_*.deb, for the release of Debian or Ubuntu that this machine has
	@rm -f dist/firezone-relay_*.deb
	PIP=$(BIN)/pip deploy/deb/build dist/firezone_relay-*.whl dist

lock: $(INSTALLED) ## update requirements/*.txt after a change of pyproject.toml; UPGRADE=1: newest versions
	@UV=$(BIN)/uv UPGRADE=$(filter-out 0,$(UPGRADE)) supply/lock

audit: $(INSTALLED) ## known vulnerabilities of requirements/*.txt; UNKNOWN=ok: succeed if the advisory service is no help
	@PIP_AUDIT=$(BIN)/pip-audit UNKNOWN=$(UNKNOWN) supply/audit

sbom: $(INSTALLED) ## dist/firezone-relay-*.cdx.json: the shipped packages, in CycloneDX
	@$(BIN)/python -m supply.sbom

clean:
	rm -rf $(VENV) $(PROGRAM) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis .fuzz

$(BIN)/pip:
	@./bootstrap $(VENV) $(PYTHON)

# Nothing is installed but what has a hash in requirements/; what is built here is built of that, too.
$(INSTALLED): $(BIN)/pip pyproject.toml requirements/all.txt hatch_build.py
	@echo "installing into $(VENV)"
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/all.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation --editable .
	@touch $@

$(VENV)/.fuzzer: $(INSTALLED) requirements/fuzz.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/fuzz.txt
	@touch $@

# As the installation does, but for a program that has changed since, or a compiler that has come. Without one, a line says so.
$(PROGRAM): relay/offload/program.c relay/offload/kernel.h hatch_build.py | $(INSTALLED)
	@$(BIN)/python hatch_build.py
