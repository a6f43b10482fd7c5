"""Requests that are over: each makes or deletes an allocation once.

A request proves its author, and not its time. An attacker with a record of an Allocate can repeat the request from its
address while its nonce is valid, and a late duplicate does the same by accident. If the client has moved to another address
or has deleted its allocation, the repeated Allocate would free the client's current allocation or make another. So the relay
remembers the MESSAGE-INTEGRITY of each request that made or deleted an allocation, which only an identical request has. A
repeated Allocate is dropped; a client that allocates again writes a new request, so it never notices. A repeated deletion
gets its success response again and has no effect, because the client may have lost the first response.

The memory has `CAPACITY` requests. A request need not be remembered for longer than its nonce is valid. If a request has to
be forgotten earlier, all nonces up to its own are too old for requests of this kind: they get 438, and the client repeats
them with a new nonce. So a repeated request never passes, whatever the rate of requests.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from relay.core.nonces import NONCE_LIFETIME
from relay.core.overload import FORGOTTEN

CAPACITY: Final = 65_536
"""Requests in memory: 10 MB. 16,384 clients can allocate four times within an hour before a nonce is refused early."""


class Replays:
    """The requests that made or deleted an allocation."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._order: deque[tuple[float, int, bytes]] = deque()
        """When each was handled, the second of its nonce, and its MESSAGE-INTEGRITY, oldest first."""
        self._total = 0
        """Requests ever remembered."""
        self.too_old = -1
        """Nonces of this second or an earlier second are too old."""

    def __contains__(self, integrity: bytes) -> bool:
        """Check whether a request was handled before."""
        return integrity in self._known

    def is_too_old(self, issued: int) -> bool:
        """Check whether a request with a nonce of this second may have been forgotten."""
        return issued <= self.too_old

    def add(self, integrity: bytes, issued: int, now: float) -> None:
        """Remember a request.

        Args:
            integrity: its MESSAGE-INTEGRITY.
            issued: the second of its nonce.
            now: monotonic time.
        """
        self.forget(now)
        known, order = self._known, self._order
        if len(order) >= CAPACITY:
            _, forgotten, oldest = order.popleft()
            known.discard(oldest)
            self.too_old = max(self.too_old, forgotten)
        known.add(integrity)
        order.append((now, issued, integrity))
        self._total += 1

    def forget(self, now: float) -> None:
        """Forget a portion of the requests whose nonces are too old by now."""
        for _ in range(FORGOTTEN):
            if not self._order or self._order[0][0] + NONCE_LIFETIME > now:
                return
            self._known.discard(self._order.popleft()[2])

    def export(self, after: int, most: int | None = None) -> tuple[list[list[Any]], int]:
        """Return remembered requests as plain data, without the first ``after`` ever, and the number ever returned."""
        forgotten = self._total - len(self._order)
        start = max(after - forgotten, 0)
        wanted = itertools.islice(self._order, start, most and start + most)
        rows = [[at, issued, integrity.hex()] for at, issued, integrity in wanted]
        return rows, forgotten + start + len(rows)

    def restore(self, rows: Iterable[list[Any]]) -> None:
        """Remember the requests of another relay, oldest first."""
        for at, issued, integrity in rows:
            self.add(bytes.fromhex(integrity), issued, at)
