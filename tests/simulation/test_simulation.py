"""Whole systems in simulated time: each seed is a world of its own, and ends with all tables empty."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from relay.core import allocations
from relay.core.counters import FreeReason
from relay.core.nonces import Nonces
from tests.simulation import troubles, wire
from tests.simulation.__main__ import Failure, command, main, run
from tests.simulation.parameters import Parameters
from tests.simulation.world import World

ROOT = Path(__file__).parents[2]
SEEDS = (1, 3, 9, 13, 14, 16, 18, 19, 20, 26)
"""As many as `make test` has time for, and large and small ones; `make simulate` runs any others."""

ANSWERS = {
    *((wire.ALLOCATE, code) for code in (0, 401, 437, 438, 440, 486, 508)),
    *((wire.REFRESH, code) for code in (0, 401, 437, 438, 441, 443)),
    *((wire.CHANNEL_BIND, code) for code in (0, 400, 403, 437, 438, 441, 443, 508)),
    *((wire.CREATE_PERMISSION, code) for code in (0, 403, 443)),
    (wire.BINDING, 0),
}
"""By method and code, 0 for success."""

WITHHELD = {(wire.BINDING, 0), (wire.ALLOCATE, 401), (wire.ALLOCATE, 438)}
"""Of those, as their address had had as many as it may."""


@pytest.mark.parametrize("seed", SEEDS)
def test_every_packet_and_every_client_gets_what_is_owed_and_nothing_is_left(seed: int) -> None:
    failure, _ = _run(seed)
    assert failure is None, f"{failure.account}\n\nTo repeat it:\n    {command(seed)}"


@functools.cache
def _run(seed: int) -> tuple[Failure | None, Counter[tuple[object, ...]]]:
    """Run one world, and tell what came to pass in it."""
    world = World(seed, Parameters.of(seed))
    return run(world), world.happened


def test_the_seeds_of_the_tests_are_worlds_of_every_kind() -> None:
    worlds = [Parameters.of(seed) for seed in SEEDS]
    assert {world.setting.offloads for world in worlds} == {True, False}
    assert {world.batching > 0 for world in worlds} == {True, False}
    assert {len(world.setting.ports) < world.clients for world in worlds} == {True, False}
    assert {world.setting.tells for world in worlds} == {True, False}
    assert {world.hours > 1 for world in worlds} == {True, False}
    assert {world.setting.quota < world.clients for world in worlds} == {True, False}
    assert {world.setting.max_channels < 4 for world in worlds} == {True, False}
    assert {world.setting.per_address is None for world in worlds} == {True, False}
    assert {world.setting.families for world in worlds} == {(1, 2), (1,), (2,)}
    assert {0, 1, 500} < {world.setting.rate for world in worlds}


def test_whatever_may_happen_happens_in_the_seeds_of_the_tests() -> None:
    happened = sum((_run(seed)[1] for seed in SEEDS), Counter())
    wanted: set[tuple[object, ...]] = {
        *(("trouble", kind) for kind in troubles.KINDS),
        *(("network", what) for what in ("lost", "doubled")),
        *(("freed", reason) for reason in FreeReason),
        *(("answered", *about) for about in ANSWERS),
        *(("withheld", *about) for about in WITHHELD),
        *(("dropped", reason) for reason in ("flood", "short", "unbound channel", "unbound peer")),
        *(("recovered from", code) for code in (440, 486, 508)),
    }
    missing = wanted - happened.keys()
    assert not missing, "other seeds may have it"


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
        run(World(seed, dataclasses.replace(Parameters.of(seed).without(Parameters.TROUBLES), clients=5)))
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
