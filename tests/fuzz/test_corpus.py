"""The inputs of the corpora run without the fuzzer."""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from relay.core.allocation import Allocation, ChannelBinding
from relay.core.allocations import Allocations
from relay.core.limiter import Limiter
from relay.core.server import Server
from tests.fuzz import lines, registry
from tests.fuzz.__main__ import RUNS, main
from tests.fuzz.relays import CONFIG
from tests.fuzz.targets import http, server

ROOT = Path(__file__).parents[2]
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
MOST_FILES, MOST_BYTES = 250, 300 << 10


def inputs_of(name: str) -> list[bytes]:
    """Initial inputs and inputs of the corpus."""
    return [*registry.load(name).SEEDS, *(path.read_bytes() for path in registry.corpus(name))]


@pytest.mark.parametrize("name", registry.TARGETS)
def test_every_input_of_the_corpus_passes(name: str) -> None:
    target = registry.load(name)
    inputs = registry.corpus(name)
    assert inputs
    for path in inputs:
        try:
            target.run(path.read_bytes())
        except Exception as error:
            error.add_note(f"the input is {path}")
            raise


def test_http_inputs_of_the_corpus_get_responses_over_tcp() -> None:
    for path in registry.corpus("http"):
        data = path.read_bytes()[1:]
        answered = http.ask_for_real(data)
        if answered:
            assert http.read_answer(answered, "HEAD" if data.startswith(b"HEAD") else "GET") != 500


@pytest.mark.parametrize("name", registry.TARGETS)
def test_the_corpus_covers_most_of_the_fuzzed_code(name: str) -> None:
    target = registry.load(name)
    reached = lines.arcs(target.MODULES, functools.partial(registry.run_all, target, inputs_of(name)))
    every = lines.of(target.MODULES)
    missed = every - {(path, line) for path, _, line in reached}
    assert len(missed) < len(every) / 5, f"{len(missed)} of {len(every)} lines are not reached: make fuzz TARGET={name}"


def test_the_corpora_are_small() -> None:
    sizes = [path.stat().st_size for name in registry.TARGETS for path in registry.corpus(name)]
    assert len(sizes) <= MOST_FILES
    assert sum(sizes) <= MOST_BYTES


def test_a_channel_left_in_a_table_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Allocations.unbind_channel

    def wrong(tables: Allocations, allocation: Allocation, binding: ChannelBinding) -> None:
        right(tables, allocation, binding)
        allocation.live[binding.number] = binding

    monkeypatch.setattr(Allocations, "unbind_channel", wrong)
    with pytest.raises((AssertionError, KeyError)):
        registry.run_all(registry.load("server"), inputs_of("server"))


def test_a_response_above_the_rate_limit_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limiter, "allows", lambda *_: True)
    with pytest.raises(AssertionError):
        registry.run_all(registry.load("server"), inputs_of("server"))


@pytest.mark.parametrize("quota", ["max_allocations", "max_allocations_per_address", "max_channels"])
def test_an_exceeded_quota_is_detected(monkeypatch: pytest.MonkeyPatch, quota: str) -> None:
    """A relay with a higher quota than the checked quota."""
    generous = dataclasses.replace(CONFIG, **{quota: 1000})  # type: ignore[arg-type] # a number each
    monkeypatch.setattr(server, "Server", lambda _, random: Server(generous, random))
    with pytest.raises(AssertionError):
        registry.run_all(registry.load("server"), inputs_of("server"))


def test_a_single_input_can_be_run(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"info,relay.core=debug")
    assert main(["--input", str(tmp_path / "input"), "log_filter"]) == 0


def test_each_target_has_a_number_of_runs() -> None:
    assert [*RUNS] == [*registry.TARGETS]


@pytest.mark.skipif(HAS_ATHERIS, reason="only a machine without the fuzzer shows this: atheris is installed")
def test_without_atheris_a_short_run_is_skipped_and_a_long_run_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--short"]) == 0
    assert capsys.readouterr().out.startswith("not fuzzed: atheris is not installed")
    assert main([]) == 1


@pytest.mark.skipif(not HAS_ATHERIS, reason="the fuzzer is not installed: make fuzz installs it")
def test_the_fuzzer_runs_and_prints_a_table(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "tests.fuzz", "--seconds", "1", "log_filter"]
    ran = subprocess.run(
        arguments, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True, timeout=100
    )
    header, outcome = ran.stdout.splitlines()[-2:]
    assert header.split()[:3] == ["target", "seconds", "executions"]
    name, _, executions, *_ = outcome.split()
    assert name == "log_filter"
    assert int(executions) > 0
