"""Run the simulation for some seeds, print the progress, and print commands that repeat failures.

``python -m tests.simulation 1-20`` runs the worlds of the seeds 1 to 20; with ``--days 30`` the same worlds run for
30 days. ``3,7-9/20`` is a list of seed 3, and of seeds 7 to 9 with 20 clients each. ``--new 60`` draws 60 seeds at random;
with ``CI`` set, each run draws the same seeds.
"""

import argparse
import dataclasses
import gc
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import SystemRandom
from typing import NamedTuple

from tests.simulation.parameters import Parameters
from tests.simulation.world import World

_FIRST_NEW = 10_001
"""The first new seed in CI."""

_TABLE = "{:>10}  {:>7}  {:>9}  {:>9}  {:>9}  {:>8}  {:>7}  {:>7}  {:>8}  {:<8}"
_HEADER = ("seed", "days", "events", "packets", "requests", "relays", "clients", "MiB", "events/s", "trace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", nargs="?", type=chosen, default=(), help="one seed, a range as 1-20, or a list of both")
    parser.add_argument("--new", type=int, default=0, help="as many seeds more, drawn at random unless CI is set")
    parser.add_argument("--days", type=float, help="of simulated time")
    parser.add_argument("--clients", type=int, help="instead of as many as the seed says")
    parser.add_argument("--without", default="", help="troubles left out: " + ", ".join(Parameters.TROUBLES))
    parser.add_argument("--as-is", action="store_true", help="look for no smaller world in which a seed fails")
    parser.add_argument("--trace", action="store_true", help="write all that goes in and out")
    parser.add_argument("--jobs", type=int, default=1, help="worlds that run at once")
    options = parser.parse_args(arguments)
    if not options.seeds and not options.new:
        parser.error("which seeds?")
    print(_TABLE.format(*_HEADER), flush=True)
    worlds = [
        each._replace(days=options.days, clients=options.clients or each.clients, without=options.without)
        for each in (*options.seeds, *_new(options.new))
    ]
    for world, failure in _run_all(worlds, options.jobs, is_traced=options.trace):
        if failure is not None:
            print(failure.account)
            print(f"\nseed {world.seed} failed. To repeat it:\n    {world.command}")
            if not (options.as_is or world.clients or world.days):
                print("Looking for a smaller world in which it fails ...", flush=True)
                print(f"    {smaller(world, failure.kind)}")
            return 1
    return 0


class Chosen(NamedTuple):
    """A requested world: a seed's world, perhaps with changes."""

    seed: int
    clients: int | None = None
    """Number of clients instead of the seed's number."""
    days: float | None = None
    without: str = ""
    """Omitted troubles, separated by commas."""

    @property
    def parameters(self) -> Parameters:
        parameters = Parameters.of(self.seed)
        if self.days is not None:
            parameters = parameters.for_days(self.days)
        if self.clients is not None:
            parameters = dataclasses.replace(parameters, clients=self.clients)
        return parameters.without(filter(None, self.without.split(",")))

    @property
    def command(self) -> str:
        """The command that runs this world."""
        settings = {"DAYS": self.days, "CLIENTS": self.clients, "WITHOUT": self.without}
        given = (f"{name}={value}" for name, value in settings.items() if value)
        return " ".join(("make simulate", f"SEEDS={self.seed}", *given))


def chosen(text: str) -> list[Chosen]:
    """Parse a list of seeds and ranges of seeds, each with an optional number of clients after a slash."""
    worlds: list[Chosen] = []
    for each in text.split(","):
        seeds, _, clients = each.partition("/")
        first, _, last = seeds.partition("-")
        worlds += [Chosen(seed, int(clients) if clients else None) for seed in range(int(first), int(last or first) + 1)]
    return worlds


def _new(count: int) -> Iterator[Chosen]:
    random = SystemRandom()
    for n in range(count):
        yield Chosen(_FIRST_NEW + n if os.environ.get("CI") else random.randrange(_FIRST_NEW, 1 << 32))


def _run_all(worlds: Iterable[Chosen], jobs: int, *, is_traced: bool) -> Iterator[tuple[Chosen, "Failure | None"]]:
    """Run worlds in parallel jobs, and yield each world with its failure, in order."""
    if jobs == 1:
        yield from ((world, _run_one(world, is_traced=is_traced)) for world in worlds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        running = [(world, pool.submit(_run_one, world, is_traced=is_traced)) for world in worlds]
        try:
            for world, future in running:
                yield world, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_one(world: Chosen, *, is_traced: bool) -> "Failure | None":
    return run(World(world.seed, world.parameters), is_traced=is_traced)


class Failure(NamedTuple):
    """A failure of a world."""

    kind: str
    """The error without names and numbers of the run."""
    account: str
    """The trace before the failure."""


def run(world: World, *, is_traced: bool = False) -> Failure | None:
    """Run a world, and return its failure or None."""
    began = time.process_time()
    world.trace.is_printed = is_traced
    try:
        world.run(lambda world, day: show(world, f"{world.seed} day {day}", began) if world.parameters.hours > 24 else None)
    except Exception as error:  # noqa: BLE001 - probably a bug of the relay, and the trace is useful
        return Failure(f"{type(error)} {''.join(re.findall('[a-z ]{5,}', str(error)))}", world.account_of(error))
    show(world, str(world.seed), began)
    return None


def show(world: World, name: str, began: float) -> None:
    """Print a line about a world."""
    # Free the reference cycles of stopped relays before the measurement.
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


def smaller(world: Chosen, kind: str) -> str:
    """Search for a smaller world with the same failure, and return its command."""

    def fails(smaller_one: Chosen) -> bool:
        failure = run(World(smaller_one.seed, smaller_one.parameters))
        return failure is not None and failure.kind == kind

    world = world._replace(clients=world.parameters.clients)
    while (clients := (world.clients or 0) // 2) and fails(world._replace(clients=clients)):
        world = world._replace(clients=clients)
    for trouble in Parameters.TROUBLES:
        without = world._replace(without=",".join(filter(None, (world.without, trouble))))
        if fails(without):
            world = without
    return world.command


def _resident() -> float:
    """Return the memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
