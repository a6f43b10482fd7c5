"""Packet rate and CPU time per packet with live frames.

One CPU sends, does the kernel's part of receiving and, with offload, all other work, inside the sending system call. Another
CPU runs the server's process. benchmarks/README.md defines the figures.
"""

import time
from functools import cache
from operator import sub
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import Case, Plan
from benchmarks.measure import MeasurementError
from benchmarks.offload.live import Counters, Live
from benchmarks.offload.network import FAR_END
from benchmarks.offload.sessions import OffloadSession, Way
from benchmarks.results import Metrics

_ALL = 1 << 30
"""A window without effect."""


class Floor(NamedTuple):
    """Costs of the load itself, in nanoseconds of CPU time."""

    packet: float
    """A packet, made, sent, and dropped at the relay's interface."""
    wait: float = 0


class Spent(NamedTuple):
    """Clock and CPU times so far, in nanoseconds."""

    clock: int
    load: int
    process: int


def measure_floor(live: Live, way: Way, case: Case, session: OffloadSession, plan: Plan) -> Floor:
    """Measure the cost of a packet of the load, with the flows of any session."""
    sent = session.frames(way, case.flows, bytes(case.size))
    with live.sink(way.network.relay, way.relay_end):
        live.prepare(sent, way.source_interface.ifindex, window=_ALL, growth=0)
        packets, spent = _run(live, way, plan.offload_seconds / 2, None)
    return Floor(spent.load / packets.sent)


def measure_saturated(live: Live, way: Way, case: Case, session: OffloadSession, plan: Plan, floor: Floor) -> Metrics:
    """Measure one case."""
    sent = session.frames(way, case.flows, bytes(case.size))
    with session.relaying(case.direction), live.sink(way.sink, FAR_END):
        window = case.offload_window(session.server.name)
        live.prepare(sent, way.source_interface.ifindex, window=window, growth=way.growth)
        live.send(way.source, plan.warm_up_seconds / 4)
        waits = [_wait_ns(live, way, plan)]
        live.set_window(window)
        packets, spent = _run(live, way, plan.offload_seconds, session)
        waits.append(_wait_ns(live, way, plan))
    session.check()
    if not packets.arrived:
        raise MeasurementError(f"none of {packets.sent:,} packets arrived")
    return metrics_of(packets, spent, floor._replace(wait=sum(waits) / len(waits)))


def metrics_of(packets: Counters, spent: Spent, floor: Floor) -> Metrics:
    """Compute the metrics. A wait is a check whether the window is full."""
    load = spent.load - packets.sent * floor.packet - packets.waited * floor.wait
    return {
        "rate": packets.arrived * 1e9 / spent.clock,
        "cpu_ns": (load + spent.process) / packets.arrived,
        "loss": 100 * packets.lost / max(packets.sent, 1),
        "load_running": spent.load / spent.clock,
    }


def _run(live: Live, way: Way, seconds: float, session: OffloadSession | None) -> tuple[Counters, Spent]:
    counters, before = live.counters(), _spent(session)
    live.send(way.source, seconds)
    after = _spent(session)
    return Counters(*map(sub, live.counters(), counters)), Spent(*map(sub, after, before))


def _wait_ns(live: Live, way: Way, plan: Plan) -> float:
    live.set_window(0)
    waits, spent = _run(live, way, plan.wait_seconds, None)
    return spent.load / waits.waited


def _spent(session: OffloadSession | None) -> Spent:
    load = time.thread_time_ns() + sum(int(each.read_text().split()[0]) for each in _ksoftirqd())
    return Spent(time.monotonic_ns(), load, 0 if session is None else session.cpu_ns())


@cache
def _ksoftirqd() -> tuple[Path, ...]:
    """Return the schedstat files of the threads that do the kernel's network work under load."""
    found = []
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            if file.read_text(encoding="utf-8", errors="replace").startswith("ksoftirqd/"):
                found.append(file.with_name("schedstat"))
        except OSError:
            continue
    return tuple(found)
