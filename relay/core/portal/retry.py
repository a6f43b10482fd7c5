"""Retry: the intervals between attempts, and the time to give up."""

import math

from relay.core.portal import limits
from relay.core.randomness import RandomSource


class Retry:
    """The intervals between attempts, shortened at random, and the time to give up."""

    def __init__(self, random: RandomSource) -> None:
        self._random = random
        self._has_joined = False
        self._interval: float = limits.BACKOFF_START
        self._outage_since = 0.0
        self.give_up_at = math.inf
        """Monotonic time to give up. Infinite while joined."""

    @property
    def patience(self) -> str:
        """Return the total time of retries in words."""
        seconds = self.give_up_at - self._outage_since
        for unit, length in (("hours", 3600), ("minutes", 60)):
            if seconds >= 2 * length:
                return f"{seconds / length:.0f} {unit}"
        return f"{seconds:.0f} s"

    def note_outage(self, now: float, *, restarts: bool) -> None:
        """Begin an outage, or go on with it. After a join that lasted, the intervals start again."""
        if restarts:
            self._interval = limits.BACKOFF_START
        if self.give_up_at == math.inf:
            self._outage_since = now
            self.give_up_at = now + (limits.RETRY_LIMIT if self._has_joined else limits.FIRST_RETRY_LIMIT)

    def note_joined(self) -> None:
        """End the outage."""
        self._has_joined = True
        self.give_up_at = math.inf

    def cease(self) -> None:
        """Stop retrying."""
        self.give_up_at = math.inf

    def next_wait(self) -> float:
        """Return the seconds before the next attempt."""
        if not self._has_joined:
            return limits.FIRST_RETRY_INTERVAL
        interval, self._interval = self._interval, min(self._interval * limits.BACKOFF_FACTOR, limits.BACKOFF_CAP)
        return interval * (1 - self._random.randrange(limits.JITTER_PERCENT * 10 + 1) / 1000)

    def grant_wait(self, seconds: float, now: float) -> float:
        """Return the seconds to wait after a Retry-After of ``seconds``.

        The wait extends the retries, up to RETRY_LIMIT in total. The wait always leaves time for one last attempt.
        """
        self.give_up_at = min(self.give_up_at + seconds, self._outage_since + limits.RETRY_LIMIT)
        left = self.give_up_at - now
        return seconds if seconds < left else max(left - limits.BACKOFF_CAP, limits.BACKOFF_CAP)
