"""Whole systems in simulated time: each seed is a separate world, and ends with empty tables."""

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
from relay.core.counters import FreeReason, NonceOutcome
from relay.core.nonces import Nonces
from tests.simulation import troubles, wire
from tests.simulation.__main__ import Chosen, Failure, chosen, main, run
from tests.simulation.parameters import Parameters
from tests.simulation.world import World

ROOT = Path(__file__).parents[2]
WORLDS = chosen("3,4/20,5/20,6/20,9/40,11/20,13/20,15/40,17/20")
"""The cheapest worlds that cover all outcomes; `make test-long` runs more and larger worlds."""

ANSWERS = {
    *((wire.ALLOCATE, code) for code in (0, 401, 437, 438, 440, 486, 508)),
    *((wire.REFRESH, code) for code in (0, 401, 437, 438, 441, 443)),
    *((wire.CHANNEL_BIND, code) for code in (0, 400, 403, 437, 438, 441, 443, 508)),
    *((wire.CREATE_PERMISSION, code) for code in (0, 403, 443)),
    (wire.BINDING, 0),
}
"""Responses by method and code, 0 for success."""

WITHHELD = {(wire.BINDING, 0), (wire.ALLOCATE, 401), (wire.ALLOCATE, 438)}
"""Responses suppressed by the rate limit."""


@pytest.mark.parametrize("chosen_one", WORLDS, ids=lambda each: f"{each.seed}/{each.clients}")
def test_every_world_follows_the_rules_and_ends_with_empty_tables(chosen_one: Chosen) -> None:
    failure, _ = _run(chosen_one)
    assert failure is None, f"{failure.account}\n\nTo repeat it:\n    {chosen_one.command}"


@functools.cache
def _run(chosen_one: Chosen) -> tuple[Failure | None, Counter[tuple[object, ...]]]:
    """Run a world, and return its failure, if any, and its outcomes."""
    world = World(chosen_one.seed, chosen_one.parameters)
    return run(world), world.happened


def test_the_tested_worlds_cover_all_parameters() -> None:
    worlds = [each.parameters for each in WORLDS]
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


def test_the_tested_worlds_cover_all_outcomes() -> None:
    happened = sum((_run(each)[1] for each in WORLDS), Counter())
    wanted: set[tuple[object, ...]] = {
        *(("trouble", kind) for kind in troubles.KINDS),
        *(("network", what) for what in ("lost", "doubled")),
        *(("freed", reason) for reason in FreeReason),
        *(("answered", *about) for about in ANSWERS),
        *(("withheld", *about) for about in WITHHELD),
        *(("dropped", reason) for reason in ("flood", "short", "unbound channel", "unbound peer")),
        *(("early", what) for what in ("held", "relayed")),
        *(("inside", what) for what in ("delivered", "dropped")),
        *(("recovered from", code) for code in (440, 486, 508)),
    }
    missing = wanted - happened.keys()
    assert not missing, "other worlds may have it"


def test_a_seed_gives_the_same_world_in_every_process() -> None:
    traces = set()
    for hash_seed, jobs in (("1", "1"), ("2", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-m", "tests.simulation", "6/10", "--jobs", jobs]
        ran = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=100)
        traces.add(ran.stdout.split()[-1])
    assert len(traces) == 1


def test_worlds_are_selected_by_lists_and_ranges_of_seeds() -> None:
    assert chosen("3") == [Chosen(3)]
    assert chosen("3,7-9/20,1-2") == [Chosen(3), *(Chosen(seed, 20) for seed in (7, 8, 9)), Chosen(1), Chosen(2)]
    assert chosen("9/20")[0].command == "make simulate SEEDS=9 CLIENTS=20"
    assert chosen("9/20")[0].parameters == dataclasses.replace(Parameters.of(9), clients=20)


def test_different_seeds_give_different_worlds(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (3, 4):
        run(World(seed, dataclasses.replace(Parameters.of(seed).without(Parameters.TROUBLES), clients=5)))
    one, other = capsys.readouterr().out.splitlines()
    assert one.split()[-1] != other.split()[-1]


def test_a_relay_with_a_too_long_channel_lifetime_is_detected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocations, "CHANNEL_LIFETIME", 601)
    assert main(["7-8", "--clients", "20"]) == 1
    assert re.search("make simulate SEEDS=[78] CLIENTS=20", capsys.readouterr().out)


def test_a_failing_world_is_reduced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Nonces, "check", lambda *_: NonceOutcome.OURS)
    assert main(["9"]) == 1
    smallest = capsys.readouterr().out.splitlines()[-1].strip()
    assert smallest.startswith("make simulate SEEDS=9 CLIENTS=")
    assert "WITHOUT=" in smallest
