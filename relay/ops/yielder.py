"""Long work in short steps: during a computation, no other thread can relay packets."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

STEP = 0.0004
"""Seconds of uninterrupted work. A thread may keep the interpreter for `--switch-interval`, and packets wait
meanwhile."""

PAUSE = 0.0004
"""Seconds for which other threads then have the interpreter. A yield without a pause is too short: a thread on another CPU
needs longer to wake up."""

_ITEMS = 16
"""Small items between two checks of the clock."""


class Yielder:
    """Function to call between small pieces of work. Pauses this thread after `STEP` seconds of work."""

    __slots__ = ("_clock", "_pause", "_until")

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, pause: Callable[[float], object] = time.sleep
    ) -> None:
        self._clock = clock
        self._pause = pause
        self._until = clock() + STEP

    def __call__(self) -> None:
        """Return at once, or after a pause if the pause is due."""
        if self._clock() >= self._until:
            self._pause(PAUSE)
            self._until = self._clock() + STEP

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, each of which takes a few microseconds, and call this function now and then."""
        for at, each in enumerate(items):
            if at % _ITEMS == 0:
                self()
            yield each
