"""How often one kind of event is written: so that no client, peer or portal can fill a disk by repeating itself."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from relay.ops.logs.filter import Level

MOST_KINDS = 1000
"""Kinds of events that are told apart. There are some hundred; beyond that, all others are one kind."""


class Kind(NamedTuple):
    """What repeats: an event, whatever its fields are."""

    target: str
    event: str


class Rate(NamedTuple):
    """How often a kind may come."""

    burst: int
    """Events in a row."""
    per_second: float
    """In the long run."""


USUAL = Rate(burst=50, per_second=1)
"""All clients of a small network come back at once, and are seen one by one; a client that allocates and deletes without end
fills 20 MB a day."""

ASKED_FOR = Rate(burst=500, per_second=50)
"""What is below `info` is written for someone who looks on, and not for long."""

_OTHERS = Kind("", "other events")


class _Bucket:
    __slots__ = ("at", "left_out", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at
        self.left_out = 0


class Repeats:
    """Counts events by kind; any thread may use it.

    Args:
        clock: gives monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[Kind, _Bucket] = {}

    def admit(self, kind: Kind, level: Level) -> int | None:
        """Ask whether an event may be written; give how many were left out before it, or None if it is to be left out, too.

        Last words always may.
        """
        with self._lock:
            bucket = self._refilled(kind, level)
            if bucket.tokens < 1 and level < Level.CRITICAL:
                bucket.left_out += 1
                return None
            bucket.tokens -= 1
            left_out, bucket.left_out = bucket.left_out, 0
            return left_out

    def leaves_out(self, kind: Kind, level: Level) -> bool:
        """Tell whether an event is to be left out, and count it if so; else `admit` is to be asked, when there is a line."""
        with self._lock:
            bucket = self._refilled(kind, level)
            if bucket.tokens >= 1 or level >= Level.CRITICAL:
                return False
            bucket.left_out += 1
            return True

    def take_left_out(self) -> dict[Kind, int]:
        """Give how many of each kind were left out and not told of yet; they count as told of then."""
        with self._lock:
            left_out = {kind: bucket.left_out for kind, bucket in self._buckets.items() if bucket.left_out}
            for kind in left_out:
                self._buckets[kind].left_out = 0
        return left_out

    def _refilled(self, kind: Kind, level: Level) -> _Bucket:
        """Give the bucket of a kind, with the tokens that it has by now."""
        rate = USUAL if level >= Level.INFO else ASKED_FOR
        now = self._clock()
        bucket = self._bucket(kind, rate, now)
        bucket.tokens = min(float(rate.burst), bucket.tokens + (now - bucket.at) * rate.per_second)
        bucket.at = now
        return bucket

    def _bucket(self, kind: Kind, rate: Rate, now: float) -> _Bucket:
        bucket = self._buckets.get(kind)
        if bucket is None:
            if len(self._buckets) >= MOST_KINDS:
                kind = _OTHERS
            bucket = self._buckets.setdefault(kind, _Bucket(rate.burst, now))
        return bucket
