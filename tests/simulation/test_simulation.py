"""Whole systems in simulated time: each seed is a world of its own, and ends with all tables empty."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from relay.core import allocations
from relay.core.nonces import Nonces
from tests.simulation.__main__ import command, main, run
from tests.simulation.parameters import Parameters

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3, 7, 9, 11, 12, 13, 18, 20)
"""As many as `make test` has time for, and large and small ones; `make simulate` runs any others."""


@pytest.mark.parametrize("seed", SEEDS)
def test_every_packet_and_every_client_gets_what_is_owed_and_nothing_is_left(seed: int) -> None:
    failure = run(seed, Parameters.of(seed))
    assert failure is None, f"{failure.account}\n\nTo repeat it:\n    {command(seed)}"


def test_the_seeds_of_the_tests_are_worlds_of_every_kind() -> None:
    worlds = [Parameters.of(seed) for seed in SEEDS]
    assert {world.setting.offloads for world in worlds} == {True, False}
    assert {world.batching > 0 for world in worlds} == {True, False}
    assert {len(world.setting.ports) < world.clients for world in worlds} == {True, False}
    assert {world.setting.tells for world in worlds} == {True, False}
    assert {world.hours > 1 for world in worlds} == {True, False}
    assert {world.setting.quota < world.clients for world in worlds} == {True, False}


def test_a_seed_is_the_same_world_in_every_process() -> None:
    traces = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-m", "tests.simulation", "3", "--clients", "20"]
        ran = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=100)
        traces.add(ran.stdout.split()[-1])
    assert len(traces) == 1


def test_other_seeds_are_other_worlds(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (3, 4):
        run(seed, dataclasses.replace(Parameters.of(seed).without(Parameters.TROUBLES), clients=5))
    one, other = capsys.readouterr().out.splitlines()
    assert one.split()[-1] != other.split()[-1]


def test_a_relay_whose_channels_live_too_long_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocations, "CHANNEL_LIFETIME", 601)
    monkeypatch.setattr(sys, "argv", ["simulation", "7-8", "--clients", "20"])
    assert main() == 1
    assert re.search("make simulate SEEDS=[78] CLIENTS=20", capsys.readouterr().out)


def test_a_failing_world_is_made_smaller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Nonces, "is_valid", lambda *_: True)
    monkeypatch.setattr(sys, "argv", ["simulation", "9"])
    assert main() == 1
    smallest = capsys.readouterr().out.splitlines()[-1].strip()
    assert smallest.startswith("make simulate SEEDS=9 CLIENTS=")
    assert "WITHOUT=" in smallest
