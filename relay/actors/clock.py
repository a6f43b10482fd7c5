"""The clock of the actors: handed to them, so that tests can hand them another."""

import time
from typing import Protocol

from relay.core.instant import Instant


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> Instant:
        """Give this moment."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> Instant:
        """Give this moment."""
        return Instant(time.monotonic(), time.time())
