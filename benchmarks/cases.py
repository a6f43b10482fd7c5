"""What is measured: the cases by name, and how much time each is given."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from benchmarks.servers import COTURN, DIRECT, PLAIN, RELAY

SIZES = (172, 1200)
"""Payloads: 20 ms of telephony (G.711 with RTP), and what a tunnel's full packets come near to."""

FLOWS = 20
"""Of cases that are not about their number."""

TRAIN = 54
"""Packets of 1200 B in a GSO train: as many as fit a message, 65,507 bytes, with their ChannelData headers."""

OVERLOAD = 2
"""Times of its own best that a server is offered."""

MOST_IN_FLIGHT = 1000
MOST_IN_FLIGHT_OF_ONE = 48
"""Packets under way in a saturated case, over all flows and in each. More would not fit all receive buffers (coturn's hold
56 packets of 1200 B for each allocation), so that losses would be measured; fewer might leave a server without work."""


class Kind(StrEnum):
    """How a case is measured."""

    SATURATED = "saturated"
    PACED = "paced"
    ECHO = "echo"
    TRAINS = "trains"
    OVERLOAD = "overload"
    ALLOCATIONS = "allocations"
    CROWD = "crowd"


@dataclass(frozen=True)
class Case:
    """Something that is measured of each server in turn."""

    name: str
    title: str
    kind: Kind
    direction: str = "up"
    size: int = 172
    flows: int = FLOWS
    rate: int = 0

    @property
    def servers(self) -> tuple[str, ...]:
        """Name those that it is measured of, in order."""
        if self.kind in {Kind.ALLOCATIONS, Kind.CROWD}:
            return RELAY, COTURN
        # Delays are compared with those of a path without any server, which comes first.
        return (*((DIRECT,) if self.is_delay else ()), RELAY, COTURN, PLAIN)

    @property
    def is_delay(self) -> bool:
        """Tell whether delays are what it is about, or also."""
        return self.kind in {Kind.PACED, Kind.ECHO}

    @property
    def has_packets(self) -> bool:
        """Tell whether it is measured with the load generator alone."""
        return self.kind not in {Kind.ALLOCATIONS, Kind.CROWD}

    @property
    def segments(self) -> int:
        """Packets in a message."""
        return TRAIN if self.kind is Kind.TRAINS else 1

    @property
    def window(self) -> int:
        """Packets under way at once in each lane, where that is how it is measured."""
        if self.kind is Kind.TRAINS:
            # One train is what fits the receive buffer that coturn gives to an allocation, and 20 what fits its listener's.
            return TRAIN * (2 if self.flows == 1 and self.direction == "up" else 1)
        lanes = self.flows * (2 if self.direction == "both" else 1)
        return max(1, min(MOST_IN_FLIGHT_OF_ONE, MOST_IN_FLIGHT // lanes))


class Plan(NamedTuple):
    """How much to measure."""

    rounds: int = 3
    seconds: float = 0.8
    """Of load in a saturated case."""
    paced_seconds: float = 1.5
    warm_up_seconds: float = 0.15
    allocations: int = 1000
    refreshes: int = 1000
    crowd: int = 16384
    """Allocations at once in the case of many: as many as there are ports, if descriptors allow."""
    crowd_rounds: int = 2


QUICK = Plan(
    rounds=1,
    seconds=0.25,
    paced_seconds=0.4,
    warm_up_seconds=0.05,
    allocations=300,
    refreshes=300,
    crowd=2048,
    crowd_rounds=1,
)


def all_cases() -> tuple[Case, ...]:
    """Give all cases. Those with more flows come later: flows are added, and few are there without being used."""
    packets = (*_saturated(), *_paced(), *_trains(), *_overload())
    return (
        *sorted(packets, key=lambda case: case.flows),
        Case("allocations", "Allocations, one after another", Kind.ALLOCATIONS),
        Case("crowd", "As many allocations as there are ports", Kind.CROWD),
    )


def expected_seconds(case: Case, plan: Plan) -> float:
    """Guess how long a case takes in a round."""
    if case.kind is Kind.CROWD:
        return 3 + plan.crowd * 0.0027
    if case.kind is Kind.ALLOCATIONS:
        return 3 + plan.allocations * 0.0025 + plan.refreshes * 0.0006
    seconds = plan.paced_seconds if case.is_delay else plan.seconds
    return len(case.servers) * (seconds + plan.warm_up_seconds + 0.08)


def _saturated() -> Iterator[Case]:
    for direction, flow_counts in (("up", (1, FLOWS, 500, 1000)), ("down", (1, FLOWS, 500, 1000)), ("both", (FLOWS, 500))):
        for flows in flow_counts:
            for size in SIZES:
                title = f"{_ARROWS[direction]}, {size} B, {_counted(flows)}, saturated"
                yield Case(f"saturated-{direction}-{size}-{flows}", title, Kind.SATURATED, direction, size, flows)


def _paced() -> Iterator[Case]:
    for rate in (2000, 20_000):
        for direction in ("up", "down"):
            for size in SIZES:
                title = f"{_ARROWS[direction]}, {size} B, {rate:,}/s over {FLOWS} flows"
                yield Case(f"paced-{direction}-{size}-{rate}", title, Kind.PACED, direction, size, rate=rate)
        title = f"{_ARROWS['echo']}, 172 B, {rate // 2:,}/s over {FLOWS} flows, there and back"
        yield Case(f"echo-172-{rate // 2}", title, Kind.ECHO, "echo", rate=rate // 2)


def _trains() -> Iterator[Case]:
    for direction in ("up", "down"):
        for flows in (1, FLOWS):
            title = f"{_ARROWS[direction]}, GSO trains of {TRAIN} × 1200 B, {_counted(flows)}"
            yield Case(f"trains-{direction}-{flows}", title, Kind.TRAINS, direction, 1200, flows)


def _overload() -> Iterator[Case]:
    for direction in ("up", "down"):
        for size in SIZES:
            title = f"{_ARROWS[direction]}, {size} B, {_counted(FLOWS)}, offered {OVERLOAD} × its best"
            yield Case(f"overload-{direction}-{size}", title, Kind.OVERLOAD, direction, size)


_ARROWS = {"up": "client→peer", "down": "peer→client", "both": "both ways", "echo": "echo"}


def _counted(flows: int) -> str:
    return "1 flow" if flows == 1 else f"{flows:,} flows"
