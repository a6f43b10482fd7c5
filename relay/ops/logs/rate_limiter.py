"""Limit how often an event is written, so that no client, peer or portal can fill a disk by repetition."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from relay.logger import Fields, Level

Kind: TypeAlias = tuple[str, str]
"""A target and an event. Both are constants of the source, or the name of a library: there are about a hundred."""


class Rate(NamedTuple):
    """A token bucket's size and refill rate."""

    burst: int
    per_second: float


USUAL = Rate(burst=50, per_second=1)
"""All clients of a small network can reconnect at once and have a line each. A client that allocates and deletes endlessly
writes 20 MB a day."""

VERBOSE = Rate(burst=500, per_second=50)
"""Levels below `info` are enabled for a short time, by an operator who watches."""

EQUAL = 60.0
"""Seconds in which an event equal to the last of its kind is only counted."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float
    suppressed: int = 0
    last: Fields | None = None
    written_at: float = -math.inf


class RateLimiter:
    """A token bucket for each kind of event; thread-safe.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[Kind, _Bucket] = {}

    def admit(self, kind: Kind, level: int, fields: Fields | None = None) -> int | None:
        """Use a token; return the number of events suppressed since the last token, or None to suppress this event as well.

        Critical events are never suppressed. Given its fields, an event is also suppressed if the last one was equal.
        """
        rate = USUAL if level >= Level.INFO else VERBOSE
        with self._lock:
            now = self._clock()
            bucket = self._buckets.setdefault(kind, _Bucket(rate.burst, now))
            bucket.tokens = min(float(rate.burst), bucket.tokens + (now - bucket.at) * rate.per_second)
            bucket.at = now
            is_equal = fields is not None and fields == bucket.last and now < bucket.written_at + EQUAL
            if (is_equal or bucket.tokens < 1) and level < Level.CRITICAL:
                bucket.suppressed += 1
                return None
            bucket.tokens -= 1
            bucket.last, bucket.written_at = fields, now
            suppressed, bucket.suppressed = bucket.suppressed, 0
            return suppressed

    def take_suppressed(self) -> dict[Kind, int]:
        """Return and reset the number of suppressed events of each kind."""
        with self._lock:
            suppressed = {kind: bucket.suppressed for kind, bucket in self._buckets.items() if bucket.suppressed}
            for kind in suppressed:
                self._buckets[kind].suppressed = 0
        return suppressed
