"""How many answers go to addresses that have proven nothing.

Whoever has not proven who they are may have written somebody else's address on their request, so that the answer hits that
one. Each source address has a token bucket: a burst of answers, and so many a second after that. Ports don't count, as a
forger is free to choose them; of an IPv6 address only the first 64 bits do, since one customer has all that begin with them.

The table
=========

It has a fixed size and no entries that come and go, since whatever can be evicted can be made to be: a flood from enough
forged sources would push out the bucket of whoever it likes. Instead a keyed hash gives each source one bucket in each of
two rows, for good, which it shares with whoever else has it. The source has as many tokens as the fuller of its two buckets,
and an answer takes one from those that have more than it leaves (a count-min sketch with conservative update, made of
buckets). What follows:

- a source never gets more than its rate and burst: the tokens it takes are gone from both of its buckets;
- one that floods empties two buckets. Another source is held up only if *both* of its own are emptied by others, which for
  ``n`` flooding sources is so with a probability of about ``(n / BUCKETS)²``: one in 4,000 for a thousand of them;
- one answer to each of ``n`` sources takes ``n / BUCKETS`` tokens from a bucket. With 200,000 forged sources and 100,000
  answers a second, which is more than a relay can write, that is 1.5 a second of a rate of hundreds: nobody notices;
- nobody can aim at a victim's buckets: the key is the relay's own, and what the hash gives is never seen outside.

So the rate wants to be several times what the relay can answer in all, divided by `BUCKETS`; any but the lowest is.

A bucket is one number, the time at which it will be full again; asking costs a hash and two look-ups, 1 µs.
"""

import hashlib
from array import array

from relay.core.addresses import ClientAddress, network_of
from relay.core.randomness import RandomSource

BUCKETS = 1 << 16
"""In a row. Both rows are 1 MiB together, whatever happens."""

KEY_LENGTH = 16
_NANOSECONDS = 1_000_000_000


class Limiter:
    """Says whether one more answer may go to a source.

    What it knows is in `key` and `rows`, bytes and plain numbers: another one that is given them goes on where it was.

    Args:
        rate: answers a second, sustained; above 0, at most a million.
        burst: answers at once, to a source that has had none for ``burst / rate`` seconds; at least 1.
        random: draws the key.
    """

    def __init__(self, rate: int, burst: int, random: RandomSource) -> None:
        self.key = random.randbytes(KEY_LENGTH)
        self._hash = hashlib.blake2b(key=self.key, digest_size=4)
        self._cost = round(_NANOSECONDS / rate)
        # The half is between two numbers of tokens, so that rounding of times is never seen.
        self._allowance = (burst - 1) * self._cost + self._cost // 2
        self.rows = tuple(array("q", bytes(8 * BUCKETS)) for _ in range(2))
        """When each bucket is full again, in monotonic nanoseconds."""

    def allows(self, client: ClientAddress, now: float) -> bool:
        """Take a token of a source for one answer; False if it has none, and nothing is taken.

        Args:
            client: where the answer would go.
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
