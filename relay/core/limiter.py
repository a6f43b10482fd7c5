"""Rate limit of responses to unauthenticated source addresses.

An unauthenticated request may have a forged source address, so the response may hit a victim. Each source address has a
token bucket: a burst of responses, then a number of responses per second. Ports do not count, since an attacker chooses them
freely. Of an IPv6 address only the first 64 bits count, because one customer usually has the whole /64.

The table
=========

The table has a fixed size and no evictions: an attacker with enough forged sources could evict the bucket of any victim.
Instead a keyed hash assigns each source one bucket in each of two rows, shared with other sources. A source has as many
tokens as the fuller of its two buckets. A response takes a token from each bucket that has more tokens than remain to the
source (a count-min sketch with conservative update, made of buckets). Consequences:

- a source never exceeds its rate and burst: both of its buckets lose the tokens that the source takes;
- a flooding source empties two buckets. Another source is limited only if other sources empty *both* of its buckets. For
  ``n`` flooding sources the probability is about ``(n / BUCKETS)²``: 1 in 4,000 for a thousand sources;
- one response to each of ``n`` sources takes ``n / BUCKETS`` tokens from a bucket. 200,000 forged sources with 100,000
  responses per second, more than a relay can send, take 1.5 tokens per second of a rate of hundreds: no source notices;
- an attacker can't target the buckets of a victim: the key and the hash values never leave the relay.

So the rate should be several times the relay's total responses per second, divided by `BUCKETS`. Only the lowest rates are
below this.

A bucket is one number, the time at which the bucket will be full again. A check takes one hash and two look-ups, 1 µs.
"""

import base64
import hashlib
import zlib
from array import array
from collections.abc import Iterable

from relay.core.addresses import ClientAddress, network_of
from relay.core.randomness import RandomSource

BUCKETS = 1 << 16
"""Buckets in a row. Both rows together always take 1 MiB."""

KEY_LENGTH = 16
_NANOSECONDS = 1_000_000_000


class Limiter:
    """The rate limit of all source addresses.

    The state is in `key` and `rows`, bytes and plain numbers, so another limiter can continue from the state.

    Args:
        rate: sustained responses per second; above 0, at most a million.
        burst: responses at once to a source without responses for ``burst / rate`` seconds; at least 1.
        random: draws the key.
    """

    def __init__(self, rate: int, burst: int, random: RandomSource) -> None:
        self.key = random.randbytes(KEY_LENGTH)
        self._hash = hashlib.blake2b(key=self.key, digest_size=4)
        self._cost = round(_NANOSECONDS / rate)
        # Half a token of tolerance, so that rounded times never change a decision.
        self._allowance = (burst - 1) * self._cost + self._cost // 2
        self.rows = tuple(array("q", (0,)) * BUCKETS for _ in range(2))
        """The time at which each bucket is full again, in monotonic nanoseconds."""

    def export(self) -> list[str]:
        """Return the rows as text. Without a flood, most of a row is zeros."""
        return [base64.b64encode(zlib.compress(row.tobytes(), 1)).decode() for row in self.rows]

    def restore(self, key: bytes, rows: Iterable[str]) -> None:
        """Continue with the state of another limiter."""
        self.key = key
        self._hash = hashlib.blake2b(key=key, digest_size=4)
        for mine, theirs in zip(self.rows, rows, strict=True):
            mine[:] = array("q", zlib.decompress(base64.b64decode(theirs)))

    def allows(self, client: ClientAddress, now: float) -> bool:
        """Consume a token of a source for one response. Return False if the source has no token.

        Args:
            client: the destination of the response.
            now: monotonic seconds.
        """
        hashed = self._hash.copy()
        hashed.update(network_of(client).encode())
        number = int.from_bytes(hashed.digest(), "big")
        (first, second), here, there = self.rows, number % BUCKETS, number // BUCKETS
        at = int(now * _NANOSECONDS)
        full_at = max(min(first[here], second[there]), at)
        if full_at - at > self._allowance:
            return False
        full_at += self._cost
        first[here] = max(first[here], full_at)
        second[there] = max(second[there], full_at)
        return True
