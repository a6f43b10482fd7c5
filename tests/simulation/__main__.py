"""Runs the simulation for some seeds, tells how far it is, and says how to repeat what failed.

``python -m tests.simulation 1-20`` runs the world that each seed stands for; with ``--days 30`` the same worlds run for so
long.
"""

import argparse
import dataclasses
import gc
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.simulation.parameters import Parameters
from tests.simulation.world import World

_TABLE = "{:>10}  {:>7}  {:>9}  {:>9}  {:>9}  {:>8}  {:>7}  {:>7}  {:>8}  {:<8}"
_HEADER = ("seed", "days", "events", "packets", "requests", "relays", "clients", "MiB", "events/s", "trace")


def main() -> int:
    """Run what the command line asks for; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", type=_seeds, help="one seed, or a range as 1-20")
    parser.add_argument("--days", type=float, help="of simulated time")
    parser.add_argument("--clients", type=int, help="instead of as many as the seed says")
    parser.add_argument("--without", default="", help="troubles left out: " + ", ".join(Parameters.TROUBLES))
    parser.add_argument("--as-is", action="store_true", help="look for no smaller world in which a seed fails")
    parser.add_argument("--trace", action="store_true", help="write all that goes in and out")
    options = parser.parse_args()
    print(_TABLE.format(*_HEADER), flush=True)
    for seed in options.seeds:
        parameters = Parameters.of(seed)
        if options.days is not None:
            parameters = parameters.for_days(options.days)
        if options.clients is not None:
            parameters = dataclasses.replace(parameters, clients=options.clients)
        parameters = parameters.without(filter(None, options.without.split(",")))
        failure = run(World(seed, parameters), is_traced=options.trace)
        if failure is not None:
            print(failure.account)
            print(
                f"\nseed {seed} failed. To repeat it:\n    {command(seed, options.days, options.clients, options.without)}"
            )
            if not (options.as_is or options.clients or options.days):
                print("Looking for a smaller world in which it fails ...", flush=True)
                print(f"    {smaller(seed, parameters, failure.kind)}")
            return 1
    return 0


def command(seed: int, days: float | None = None, clients: int | None = None, without: str = "") -> str:
    """Give the command that runs one seed again."""
    settings = {"DAYS": days, "CLIENTS": clients, "WITHOUT": without}
    return " ".join(("make simulate", f"SEEDS={seed}", *(f"{name}={value}" for name, value in settings.items() if value)))


class Failure(NamedTuple):
    """Something broke."""

    kind: str
    """What, but for the names and numbers of a run."""
    account: str
    """What happened before."""


def run(world: World, *, is_traced: bool = False) -> Failure | None:
    """Run one world; None if nothing breaks."""
    began = time.process_time()
    world.trace.is_printed = is_traced
    try:
        world.run(lambda world, day: show(world, f"{world.seed} day {day}", began) if world.parameters.hours > 24 else None)
    except Exception as error:  # noqa: BLE001 - what is no BrokenError is a bug of the relay, most likely: what led to it is of use
        return Failure(f"{type(error)} {''.join(re.findall('[a-z ]{5,}', str(error)))}", world.account_of(error))
    show(world, str(world.seed), began)
    return None


def show(world: World, name: str, began: float) -> None:
    """Write a line about a world."""
    # Relays that are over are in cycles: what they held is not what this is about.
    gc.collect()
    events, seconds = world.scheduler.events, max(time.process_time() - began, 1e-3)
    packets, requests = world.relayed, world.answers
    print(
        _TABLE.format(
            name, f"{(world.scheduler.now - 1000) / 86400:.2f}", events, packets, requests, world.machines,
            len(world.clients), f"{_resident():.1f}", f"{events / seconds:.0f}", world.trace.digest[:8],
        ),
        flush=True,
    )  # fmt: skip


def smaller(seed: int, parameters: Parameters, kind: str) -> str:
    """Look for a smaller world in which a seed fails the same way, and give the command that runs it."""

    def fails(smaller_one: Parameters) -> bool:
        failure = run(World(seed, smaller_one))
        return failure is not None and failure.kind == kind

    clients = parameters.clients
    without: list[str] = []
    while clients > 1 and fails(dataclasses.replace(parameters, clients=clients // 2)):
        clients //= 2
    parameters = dataclasses.replace(parameters, clients=clients)
    for trouble in Parameters.TROUBLES:
        if fails(parameters.without([*without, trouble])):
            without.append(trouble)
    return command(seed, None, clients, ",".join(without))


def _seeds(text: str) -> Iterator[int]:
    first, _, last = text.partition("-")
    return iter(range(int(first), int(last or first) + 1))


def _resident() -> float:
    """Give the memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
