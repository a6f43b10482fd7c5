"""The time of an input. The core reads no clock: each input has its time."""

from typing import NamedTuple


class Timestamp(NamedTuple):
    """One moment on two clocks.

    A named tuple takes a third of the time of a frozen dataclass, and each message of packets has a new timestamp.
    """

    monotonic: float
    """Seconds on a clock that never goes back, for deadlines and nonces."""

    unix: float
    """Seconds since 1970 (UTC) on the wall clock, which may step. Only the expiry of credentials uses the wall clock."""
