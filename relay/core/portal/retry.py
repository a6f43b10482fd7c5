"""When to try again, and when to give up."""

import math

from relay.core.portal.limits import (
    BACKOFF_CAP,
    BACKOFF_FACTOR,
    BACKOFF_START,
    FIRST_RETRY_INTERVAL,
    FIRST_RETRY_LIMIT,
    JITTER_PERCENT,
    RETRY_LIMIT,
)
from relay.core.randomness import RandomSource


class Retry:
    """How long to wait between attempts, and until when at all.

    Args:
        random: shortens intervals.
    """

    def __init__(self, random: RandomSource) -> None:
        self._random = random
        self._has_joined = False
        self._interval: float = BACKOFF_START
        self._outage_since = 0.0
        self.give_up_at = math.inf
        """Monotonic time at which it is enough; infinite while joined."""

    @property
    def patience(self) -> str:
        """For how long it is tried, in words."""
        seconds = self.give_up_at - self._outage_since
        for unit, length in (("hours", 3600), ("minutes", 60)):
            if seconds >= 2 * length:
                return f"{seconds / length:.0f} {unit}"
        return f"{seconds:.0f} s"

    def note_outage(self, now: float) -> None:
        """There is no channel, from now on; may be told again while that lasts."""
        if self.give_up_at == math.inf:
            self._outage_since = now
            self.give_up_at = now + (RETRY_LIMIT if self._has_joined else FIRST_RETRY_LIMIT)

    def note_joined(self) -> None:
        """The channel is joined."""
        self._has_joined = True
        self.give_up_at = math.inf

    def note_stable(self) -> None:
        """A connection has proven itself: intervals begin small again.

        A join alone does not do: a portal that falls over whenever a relay joins would be joined every second.
        """
        self._interval = BACKOFF_START

    def cease(self) -> None:
        """It is over: nothing is tried any more, so nothing is given up."""
        self.give_up_at = math.inf

    def next_wait(self) -> float:
        """Give the seconds to wait before the next attempt."""
        if not self._has_joined:
            return FIRST_RETRY_INTERVAL
        interval, self._interval = self._interval, min(self._interval * BACKOFF_FACTOR, BACKOFF_CAP)
        return interval * (1 - self._random.randrange(JITTER_PERCENT * 10 + 1) / 1000)

    def grant_wait(self, seconds: float, now: float) -> float:
        """Give the seconds to wait where the portal asked for some.

        Such a wait isn't counted, but all in all a day is enough; and it leaves time for one last attempt before that is
        over, or a portal that asked for an hour in the last one would never be tried again.
        """
        self.give_up_at = min(self.give_up_at + seconds, self._outage_since + RETRY_LIMIT)
        left = self.give_up_at - now
        return seconds if seconds < left else max(left - BACKOFF_CAP, BACKOFF_CAP)
