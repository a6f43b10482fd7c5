"""The cases of both suites by name, and the time for each."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Final, NamedTuple

from benchmarks.measure import MeasurementError
from benchmarks.servers import COTURN, DIRECT, PLAIN, RELAY

NATIVE: Final = "native"
GENERIC: Final = "generic"
SOCKETS: Final = "sockets"
"""The relay with offload in native and generic mode, and without offload; the last beside the others in one namespace."""

SIZES: Final = (172, 1200)
"""Payloads in bytes: 20 ms of telephony (G.711 with RTP), and nearly the full packets of a tunnel."""

FLOWS: Final = 20
"""Flows in cases without a number of their own."""

BATCH: Final = 54
"""Packets of 1200 B in a GSO batch: the most that fit a message of 65,507 bytes, with their ChannelData headers."""

OVERLOAD: Final = 2
"""Offered load, as a multiple of the saturated rate."""

_MOST_IN_FLIGHT: Final = 1000
_MOST_IN_FLOW: Final = 48
"""Packets in flight in a saturated case, over all flows and in each flow. More packets overflow some receive buffers:
coturn's hold 56 packets of 1200 B for each allocation. Fewer packets may leave a server idle."""

OFFLOAD_WINDOW: Final = 192
"""Packets in flight with offload: they fit the ring of a veth, which holds 256."""
_SOCKET_WINDOW: Final = 40
"""Packets in flight in each flow without offload: they fit coturn's receive buffers, the smallest."""


class Kind(StrEnum):
    """Kind of a case; each is measured in another way."""

    SATURATED = "saturated"
    PACED = "paced"
    BUSY = "busy"
    BATCHES = "batches"
    OVERLOAD = "overload"
    ALLOCATIONS = "allocations"
    ALL_PORTS = "all-ports"
    OFFLOAD = "offload"
    OFFLOAD_PROGRAM = "offload-program"
    OFFLOAD_DELAY = "offload-delay"
    OFFLOAD_CHANNELS = "offload-channels"


@dataclass(frozen=True)
class Case:
    """A measurement, repeated for each server in turn."""

    name: str
    label: str
    """Title without the direction."""
    kind: Kind
    direction: str = ""
    size: int = 200
    flows: int = FLOWS
    rate: int = 0

    @property
    def title(self) -> str:
        """Return the title for people."""
        return {"up": "client→peer, ", "down": "peer→client, "}.get(self.direction, "") + self.label

    @property
    def servers(self) -> tuple[str, ...]:
        """Return the names of the servers to measure, in order. A case about delays begins without a server, as baseline."""
        if self.kind in {Kind.ALLOCATIONS, Kind.ALL_PORTS}:
            return RELAY, COTURN
        if self.kind in {Kind.OFFLOAD_PROGRAM, Kind.OFFLOAD_CHANNELS}:
            return (NATIVE,)
        all_servers = (NATIVE, GENERIC, SOCKETS, COTURN, PLAIN) if self.is_offload else (RELAY, COTURN, PLAIN)
        return (DIRECT, *all_servers) if self.has_delays else all_servers

    @property
    def is_offload(self) -> bool:
        """Return whether the case belongs to the offload suite."""
        return self.kind.startswith("offload")

    @property
    def has_delays(self) -> bool:
        """Return whether delays are measured."""
        return self.kind in {Kind.PACED, Kind.OFFLOAD_DELAY}

    @property
    def window(self) -> int:
        """Return the packets in flight in each flow of a saturated case on loopback."""
        if self.kind is Kind.BATCHES:
            # One batch fits the receive buffer of a coturn allocation, and 20 batches fit its listener's.
            return BATCH * (2 if self.flows == 1 and self.direction == "up" else 1)
        return max(1, min(_MOST_IN_FLOW, _MOST_IN_FLIGHT // self.flows))

    def offload_window(self, server: str) -> int:
        """Return the packets in flight in a saturated case of the offload suite."""
        return OFFLOAD_WINDOW if server in {NATIVE, GENERIC} else min(_MOST_IN_FLIGHT, _SOCKET_WINDOW * self.flows)


class Plan(NamedTuple):
    """Rounds, durations and counts."""

    rounds: int = 3
    seconds: float = 0.8
    """Sending time of a saturated case."""
    paced_seconds: float = 1.5
    warm_up_seconds: float = 0.15
    busy_seconds: float = 3
    """Sending time before and in a case beside a busy loop: the relay looks at the use of its CPU once a second."""
    allocations: int = 1000
    """Also the number of Refresh requests."""
    all_ports: int = 16384
    """Allocations at the same time: the whole port range, if the descriptor limit permits."""
    offload_seconds: float = 0.4
    wait_seconds: float = 0.04
    """Waiting before and after each saturated measurement with live frames, to find the cost of waiting."""
    channels: int = 10_000


QUICK: Final = Plan(
    rounds=1, seconds=0.2, paced_seconds=0.3, warm_up_seconds=0.05, allocations=300, all_ports=2048, offload_seconds=0.1
)


def all_cases() -> tuple[Case, ...]:
    """Return all cases, sorted by the number of flows: flows are added during a round, and few are idle."""
    loopback = sorted(_loopback(), key=lambda case: case.flows)
    return (
        *loopback,
        Case("allocations", "allocations and refreshes, one after another", Kind.ALLOCATIONS),
        Case("all-ports", "as many allocations as ports", Kind.ALL_PORTS),
        *_offload(),
    )


def chosen(patterns: Sequence[str]) -> tuple[Case, ...]:
    """Return the cases with a name that begins with, or matches, one of the patterns; all cases without patterns."""
    cases = all_cases()
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in cases):
            raise MeasurementError(f"no case matches {pattern!r}: --list shows all names")
    return tuple(case for case in cases if not patterns or any(_matches(case, pattern) for pattern in patterns))


def _matches(case: Case, pattern: str) -> bool:
    return case.name.startswith(pattern) or fnmatch.fnmatchcase(case.name, pattern)


def _loopback() -> Iterator[Case]:
    for direction, size, flows in product(("up", "down"), SIZES, (1, FLOWS, 500)):
        label = f"{size} B, {_flows(flows)}, saturated"
        yield Case(f"saturated-{direction}-{size}-{flows}", label, Kind.SATURATED, direction, size, flows)
    for rate, direction, size in product((2000, 20_000), ("up", "down"), SIZES):
        label = f"{size} B, {rate:,}/s over {FLOWS} flows"
        yield Case(f"paced-{direction}-{size}-{rate}", label, Kind.PACED, direction, size, rate=rate)
    for direction in ("up", "down"):
        label = f"172 B, 1,000/s over {FLOWS} flows, beside a busy loop on its CPU"
        yield Case(f"busy-{direction}", label, Kind.BUSY, direction, 172, rate=1000)
    for direction, flows in product(("up", "down"), (1, FLOWS)):
        label = f"GSO batches of {BATCH} × 1200 B, {_flows(flows)}"
        yield Case(f"batches-{direction}-{flows}", label, Kind.BATCHES, direction, 1200, flows)
    for direction in ("up", "down"):
        label = f"1200 B, {_flows(FLOWS)}, offered {OVERLOAD} × its best"
        yield Case(f"overload-{direction}", label, Kind.OVERLOAD, direction, 1200)


def _offload() -> Iterator[Case]:
    for flows, size, direction in product((1, 1000), (200, 1400), ("up", "down")):
        label = f"{size} B, {_flows(flows)}"
        yield Case(f"offload-{direction}-{size}-{flows}", label, Kind.OFFLOAD, direction, size, flows)
    for flows, direction in product((1, 1000), ("up", "down")):
        label = f"200 B, {_flows(flows)}"
        yield Case(f"offload-program-{direction}-{flows}", label, Kind.OFFLOAD_PROGRAM, direction, flows=flows)
    for direction in ("up", "down"):
        label = f"200 B, 2,000/s over {FLOWS} flows"
        yield Case(f"offload-delay-{direction}", label, Kind.OFFLOAD_DELAY, direction, rate=2000)
    yield Case("offload-channels", "10,000 clients, each with a peer of its own", Kind.OFFLOAD_CHANNELS)


def _flows(count: int) -> str:
    return "1 flow" if count == 1 else f"{count:,} flows"
