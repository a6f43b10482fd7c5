"""The kernel's ticks, in which the XDP program counts time, and the monotonic clock."""

import time
from typing import Final, NamedTuple

from relay.offload.bpf import Program

_JIFFIES = b"\x85\x00\x00\x00\x76\x00\x00\x00"
"""Call bpf_jiffies64 (118)."""
_SHIFT_RIGHT_BY_32 = b"\x77\x00\x00\x00\x20\x00\x00\x00"
_EXIT = b"\x95\x00\x00\x00\x00\x00\x00\x00"

_COARSE: Final = 6
"""CLOCK_MONOTONIC_COARSE (linux/time.h), which Python has no name for."""

_TRIES: Final = 20
"""To see the beginning of a tick, on a machine that is busy."""

_EXACT: Final = 0.25
"""The part of a tick that is near enough."""

_FRAME: Final = bytes(60)
"""What a program is run on that does not look at it."""


class Ticks(NamedTuple):
    """How long ticks are, and since when they are counted.

    The kernel makes a tick of as many nanoseconds of its monotonic clock as that one's coarse sister is coarse, whatever
    happens to the clock: so this stays true for as long as the machine runs.
    """

    epoch: float
    """Monotonic seconds at which tick 0 would have begun."""
    per_second: float

    def at(self, seconds: float) -> int:
        """Give the tick of a moment, in monotonic seconds."""
        return int((seconds - self.epoch) * self.per_second)

    def seconds(self, tick: int) -> float:
        """Give the beginning of a tick, in monotonic seconds."""
        return self.epoch + tick / self.per_second


def measure() -> Ticks:
    """See how the kernel counts; takes as long as a tick or two, 2 to 20 ms, and a capability to load programs.

    On a machine that has other work it takes longer: a beginning counts as seen if nothing held this thread up meanwhile.

    Raises:
        OSError: the kernel does not take the two programs of three instructions that tell.
    """
    per_second = 1 / time.clock_getres(_COARSE)
    with (
        Program(_JIFFIES + _EXIT, license="Dual MIT/GPL", name="ticks_low") as low,
        Program(_JIFFIES + _SHIFT_RIGHT_BY_32 + _EXIT, license="Dual MIT/GPL", name="ticks_high") as high,
    ):
        seen = _see_beginning(low)
        for _ in range(_TRIES):
            if seen.within < _EXACT / per_second:
                break
            seen = min(seen, _see_beginning(low))
        tick = high.test_run(_FRAME).verdict << 32 | seen.tick
    return Ticks(seen.at - tick / per_second, per_second)


class _Beginning(NamedTuple):
    """Of a tick."""

    within: float
    """Seconds by which it may have been earlier."""
    at: float
    """Monotonic seconds."""
    tick: int
    """The lower half of its number."""


def _see_beginning(low: Program) -> _Beginning:
    """Wait for the next one: in the middle of a tick, nobody could tell how old it is."""
    first, before = low.test_run(_FRAME).verdict, time.monotonic()
    while True:
        tick, now = low.test_run(_FRAME).verdict, time.monotonic()
        if tick != first:
            return _Beginning(now - before, now, tick)
        before = now
