"""As many packets as a subject carries, and what the kernel and it spend on each.

Sending, the kernel's part of receiving, and, where the kernel relays, all the rest are done by one CPU, inside the system
call that sends; another one has the subject's process. So what is spent on relaying is

    CPU time of the sender and of ksoftirqd, and of the subject's process
    - the packets sent, times what one costs up to the relay's interface, where a program drops it
    - how often the sender looked whether it may send again, times what that costs

by the packets that have arrived. The former cost is measured in each round, the latter just before and after. What is left
has in it: the relay's receiving (a socket's, or the program), relaying, sending, and what counts at the other end and drops.

Packets a second are those that were counted there. The sender's own time is in them: where the kernel relays, one CPU does
all. A subject of sockets has the second CPU besides.
"""

import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.failure import FailedError
from benchmarks.offload import frames
from benchmarks.offload.cases import MOST_IN_SOCKETS, SOCKET_WINDOW, WINDOW, Case, Plan
from benchmarks.offload.live import Counters, Live
from benchmarks.offload.network import Network
from benchmarks.offload.sessions import Session, Way
from benchmarks.offload.subjects import OFFLOADED
from benchmarks.packets import Metrics

_ALL = 1 << 30
"""Packets under way, where as many may be as there are."""
_IN_A_ROW = 24
"""Packets sent before sockets are read, where their contents are looked at."""
_PATIENCE_SECONDS = 0.5


class Floor(NamedTuple):
    """What the load itself costs, in nanoseconds of CPU time."""

    packet: float
    """Made, sent, and dropped as it arrives at the relay's interface."""
    wait: float = 0
    """Once looked whether a packet may be sent, and not."""


class Spent(NamedTuple):
    """Time and CPU time so far, in nanoseconds."""

    clock: int
    load: int
    process: int

    def __sub__(self, other: tuple[int, ...]) -> "Spent":
        return Spent(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


def measure_floor(live: Live, network: Network, case: Case, session: Session, plan: Plan) -> Floor:
    """Measure what is to be subtracted; any session will do, as its subject gets nothing."""
    way = Way(network, up=case.goes_up)
    sent = session.frames(way, case.flows, frames.payload(case.size))
    link = live.sink(network.relay, way.relay_end)
    try:
        live.prepare(sent, way.source_interface.ifindex, window=_ALL, arriving=len(sent[0]))
        packets, spent = _run(live, way, plan.calibration_seconds, None)
    finally:
        link.close()
    return Floor(spent.load / packets.sent)


def measure_saturated(live: Live, network: Network, case: Case, session: Session, plan: Plan, floor: Floor) -> Metrics:
    """Measure one case.

    Raises:
        FailedError: the subject does not relay, or not rightly.
    """
    way, data = Way(network, up=case.goes_up), frames.payload(case.size)
    sent = session.frames(way, case.flows, data)
    with session.relaying(case.direction):
        _check(live, session, way, sent, data)
        link = live.sink(way.sink, network.FAR_END)
        try:
            arriving = frames.frame_length(case.size, channel=not way.up)
            window = window_of(case, session.subject.name)
            live.prepare(sent, way.source_interface.ifindex, window=window, arriving=arriving)
            live.send(way.source, plan.warm_up_seconds)
            waits = [_wait_ns(live, way, plan)]
            live.set_window(window)
            packets, spent = _run(live, way, plan.seconds, session)
            waits.append(_wait_ns(live, way, plan))
        finally:
            link.close()
    session.check()
    if not packets.arrived:
        raise FailedError(f"none of {packets.sent:,} packets arrived")
    return metrics_of(packets, spent, floor._replace(wait=sum(waits) / len(waits)))


def metrics_of(packets: Counters, spent: Spent, floor: Floor) -> Metrics:
    """Work out the figures; see the top of this file."""
    load = spent.load - packets.sent * floor.packet - packets.waited * floor.wait
    return {
        "rate": packets.arrived * 1e9 / spent.clock,
        "cpu_ns": (load + spent.process) / packets.arrived,
        "process_ns": spent.process / packets.arrived,
        "loss": 100 * packets.lost / max(packets.sent, 1),
        "running": spent.load / spent.clock,
        "floor_ns": floor.packet,
        "wait_ns": floor.wait,
    }


def window_of(case: Case, subject: str) -> int:
    """Tell how many packets may be under way."""
    return WINDOW if subject in OFFLOADED else min(MOST_IN_SOCKETS, SOCKET_WINDOW * case.flows)


def _run(live: Live, way: Way, seconds: float, session: Session | None) -> tuple[Counters, Spent]:
    counters, before = live.counters(), _spent(session)
    live.send(way.source, seconds)
    after = _spent(session)
    return live.counters() - counters, after - before


def _wait_ns(live: Live, way: Way, plan: Plan) -> float:
    live.set_window(0)
    waits, spent = _run(live, way, plan.wait_seconds, None)
    return spent.load / waits.waited


def _spent(session: Session | None) -> Spent:
    load = time.thread_time_ns() + sum(int(each.read_text().split()[0]) for each in _soft_interrupts())
    return Spent(time.monotonic_ns(), load, 0 if session is None else session.cpu_ns())


@cache
def _soft_interrupts() -> tuple[Path, ...]:
    """Find the threads that do the kernel's network work when there is too much of it to be done in passing."""
    names = Path("/proc").glob("[0-9]*/comm")
    return tuple(each.with_name("schedstat") for each in names if _content(each).startswith("ksoftirqd/"))


def _content(file: Path) -> str:
    """Read a file of a process, which may have ended."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _check(live: Live, session: Session, way: Way, sent: list[bytes], data: bytes) -> None:
    """Have one packet of each flow relayed to the sockets, and look whether it is right."""
    session.drain(way, len(sent))
    live.prepare(sent, way.source_interface.ifindex, window=_ALL, arriving=0)
    flows = session.flows(len(sent))
    for first in range(0, len(flows), _IN_A_ROW):
        some = flows[first : first + _IN_A_ROW]
        live.send_once(way.source, len(some))
        arrived, end = 0, time.monotonic() + _PATIENCE_SECONDS
        while arrived < len(some) and time.monotonic() < end:
            arrived += session.arrivals(way, some, data)
        if arrived != len(some):
            raise FailedError(f"of one packet for each of {len(some)} flows, {arrived} arrived")
