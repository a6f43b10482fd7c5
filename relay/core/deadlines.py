"""When the core must be woken, and for what."""

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_SLACK = 64
"""Stale entries that are not worth a rebuild."""


class Deadlines(Generic[K]):
    """One deadline for each key, the earliest at hand.

    A heap whose entries go stale when their key gets another deadline. Stale ones are dropped when they surface, and all of
    them once they are more than the live ones: so the heap is at most about twice as large as there are keys, however often
    deadlines move, and a move costs O(log n), amortised.
    """

    def __init__(self) -> None:
        self._at: dict[K, tuple[float, int, K]] = {}
        self._heap: list[tuple[float, int, K]] = []
        # Distinct, so that two entries never compare their keys; and entries of one moment come out in order.
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._at)

    def set(self, key: K, at: float) -> None:
        """Give a key a deadline, in the place of the one it had."""
        self._sequence += 1
        entry = (at, self._sequence, key)
        self._at[key] = entry
        heapq.heappush(self._heap, entry)
        self._tidy()

    def discard(self, key: K) -> None:
        """Take a key's deadline away, if it has one."""
        if self._at.pop(key, None) is not None:
            self._tidy()

    def __getitem__(self, key: K) -> float:
        """Give the deadline of a key that has one."""
        return self._at[key][0]

    def get(self, key: K) -> float | None:
        """Give a key's deadline, None if it has none; any thread may ask."""
        entry = self._at.get(key)
        return None if entry is None else entry[0]

    def earliest(self) -> float | None:
        """Give the next deadline; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> Iterator[tuple[float, K]]:
        """Give, and forget, each deadline at ``now`` or before with its key, earliest first.

        Deadlines may be set while this runs; those that are due already come out too.
        """
        while self._heap and self._heap[0][0] <= now:
            at, _, key = self._heap[0]
            self.discard(key)
            yield at, key

    def _tidy(self) -> None:
        """Keep the top of the heap live, and the heap small."""
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            self._heap = list(self._at.values())
            heapq.heapify(self._heap)
        while self._heap and self._at.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
