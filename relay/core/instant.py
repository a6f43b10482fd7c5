"""The moment at which an input reaches the core.

The core reads no clock: whoever hands it an input says when that was.
"""

from typing import NamedTuple


class Instant(NamedTuple):
    """One moment on two clocks.

    A named tuple, not a dataclass: one is made for every message of packets, and a frozen dataclass costs three times
    as much to make.
    """

    monotonic: float
    """Seconds on a clock that never goes back; deadlines and nonces are measured on it."""

    unix: float
    """Seconds since 1970 (UTC) on the wall clock, which may step; only the expiry of credentials is read from it."""
