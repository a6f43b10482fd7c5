"""What is measured of the kernel's part: the cases by name, and how much time each is given."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from benchmarks.offload.subjects import ALL, NATIVE
from benchmarks.servers import DIRECT

SIZES: Final = (100, 200, 1400)
"""Payloads in bytes: telephony, what the targets are for, and what a tunnel's full packets come near to."""

FLOWS: Final = (1, 1000)

DELAY_FLOWS: Final = 20
DELAY_RATE: Final = 2000
"""Packets a second, over all flows: nobody has to wait for anybody."""

WINDOW: Final = 192
"""Packets under way at once, where the kernel relays: they fit a cable, which holds 256."""
SOCKET_WINDOW: Final = 40
MOST_IN_SOCKETS: Final = 1000
"""Where sockets do: in one flow, and in all. They fit coturn's receive buffers, the smallest."""


class Kind(StrEnum):
    """How a case is measured."""

    SATURATED = "saturated"
    PROGRAM = "program"
    DELAY = "delay"
    BINDINGS = "bindings"


@dataclass(frozen=True)
class Case:
    """Something that is measured of each subject in turn."""

    name: str
    title: str
    kind: Kind
    direction: str = "up"
    size: int = 200
    flows: int = 1

    @property
    def subjects(self) -> tuple[str, ...]:
        """Name those that it is measured of, in order."""
        if self.kind in {Kind.PROGRAM, Kind.BINDINGS}:
            return (NATIVE,)
        # Delays are compared with those of a path without any relay, which comes first.
        return (DIRECT, *ALL) if self.kind is Kind.DELAY else ALL

    @property
    def goes_up(self) -> bool:
        """Tell whether packets go from client to peer."""
        return self.direction == "up"


class Plan(NamedTuple):
    """How much to measure."""

    rounds: int = 5
    seconds: float = 0.4
    """Of a saturated case."""
    warm_up_seconds: float = 0.05
    calibration_seconds: float = 0.2
    """Of sending to nobody."""
    wait_seconds: float = 0.04
    """Of waiting, before and after each measurement."""
    delay_seconds: float = 1.5
    bindings: int = 10_000


QUICK: Final = Plan(
    rounds=1,
    seconds=0.1,
    warm_up_seconds=0.02,
    calibration_seconds=0.05,
    wait_seconds=0.02,
    delay_seconds=0.3,
    bindings=10_000,
)


def all_cases() -> tuple[Case, ...]:
    """Give all cases."""
    return (*_saturated(), *_program(), *_delays(), *_bindings())


def expected_seconds(case: Case, plan: Plan) -> float:
    """Guess how long a case takes in a round."""
    each = {
        Kind.SATURATED: plan.seconds + plan.warm_up_seconds + 2 * plan.wait_seconds + 0.35,
        Kind.PROGRAM: plan.seconds + plan.warm_up_seconds + 0.2,
        Kind.DELAY: plan.delay_seconds + 0.5,
        Kind.BINDINGS: 0.5,
    }[case.kind]
    calibration = plan.calibration_seconds if case.kind is Kind.SATURATED else 0
    return len(case.subjects) * each + calibration


def _saturated() -> Iterator[Case]:
    for flows in FLOWS:
        for size in SIZES:
            for direction in ("up", "down"):
                title = f"{_ARROWS[direction]}, {size} B, {_counted(flows)}"
                yield Case(f"saturated-{direction}-{size}-{flows}", title, Kind.SATURATED, direction, size, flows)


def _program() -> Iterator[Case]:
    for flows in FLOWS:
        for direction in ("up", "down"):
            title = f"{_ARROWS[direction]}, 200 B, {_counted(flows)}"
            yield Case(f"program-{direction}-{flows}", title, Kind.PROGRAM, direction, flows=flows)


def _delays() -> Iterator[Case]:
    for direction in ("up", "down"):
        title = f"{_ARROWS[direction]}, 200 B, {DELAY_RATE:,}/s over {DELAY_FLOWS} flows"
        yield Case(f"delay-{direction}", title, Kind.DELAY, direction, flows=DELAY_FLOWS)


def _bindings() -> Iterator[Case]:
    yield Case("bindings-distinct", "10,000 clients, each with a peer of its own", Kind.BINDINGS)
    yield Case("bindings-shared", "10,000 clients at 100 addresses, and 16 peers", Kind.BINDINGS)


_ARROWS: Final = {"up": "client→peer", "down": "peer→client"}


def _counted(flows: int) -> str:
    return "1 flow" if flows == 1 else f"{flows:,} flows"
