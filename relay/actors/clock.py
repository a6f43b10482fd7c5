"""The clock of the actors: handed to them, so that tests can hand them another."""

import time
from typing import Protocol

from relay.core.instant import Instant


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> Instant:
        """Give this moment."""

    def monotonic(self) -> float:
        """Give the first half of it, for who needs no more."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> Instant:
        """Give this moment."""
        # Half the cost of calling Instant, which does this by way of a function in Python.
        return tuple.__new__(Instant, (time.monotonic(), time.time()))

    monotonic = staticmethod(time.monotonic)
