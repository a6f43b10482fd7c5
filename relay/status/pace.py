"""Work in small portions: a thread that computes keeps the interpreter from all that relay packets."""

import time
from collections.abc import Callable

PORTION = 0.0004
"""Seconds of work in one go. A relay has its threads keep the interpreter for as long as they want it, and whoever relays
packets waits for that."""

REST = 0.0004
"""Seconds for which others then have it. To give it up for no time is too short: on another CPU, nobody wakes up so fast."""


class Pace:
    """Rests when it is time to; to be called between any two small pieces of work.

    Args:
        clock: gives seconds.
        rest: lets others have the interpreter for some seconds.
    """

    __slots__ = ("_clock", "_rest", "_until")

    def __init__(self, clock: Callable[[], float] = time.perf_counter, rest: Callable[[float], object] = time.sleep) -> None:
        self._clock = clock
        self._rest = rest
        self._until = clock() + PORTION

    def __call__(self) -> None:
        """Go on, or rest first."""
        if self._clock() >= self._until:
            self._rest(REST)
            self._until = self._clock() + PORTION
