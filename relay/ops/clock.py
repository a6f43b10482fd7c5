"""The clock of the actors. Tests pass another clock."""

import time
from typing import Protocol

from relay.core.timestamp import Timestamp


class Clock(Protocol):
    """A source of timestamps."""

    def now(self) -> Timestamp:
        """Return the monotonic and the Unix time."""

    def monotonic(self) -> float:
        """Return the monotonic time alone."""


class SystemClock:
    """The clocks of this machine."""

    def now(self) -> Timestamp:
        """Return the monotonic and the Unix time."""
        # Half the cost of Timestamp(...), whose constructor is a Python function.
        return tuple.__new__(Timestamp, (time.monotonic(), time.time()))

    monotonic = staticmethod(time.monotonic)
