"""The deadlines of allocations and channels, and of the core as a whole."""

import heapq
import math
from collections.abc import Iterator

from relay.core.addresses import AllocationId
from relay.core.overload import STALE_DEADLINES

_SLACK = 64
"""Stale entries that do not justify a rebuild of the heap."""


class Deadlines:
    """A heap with one deadline for each allocation, and one for early data.

    The earliest deadline costs O(1): the top of the heap is always live. An entry goes stale when its key gets another
    deadline. Stale entries are removed when they reach the top, and all of them once they outnumber the live entries. So the
    heap holds at most about twice as many entries as keys, and a change costs O(log n), amortised.
    """

    def __init__(self) -> None:
        self._at: dict[AllocationId, tuple[float, int, AllocationId]] = {}
        self._heap: list[tuple[float, int, AllocationId]] = []
        self.sequence = 0
        """The number of the last entry. As numbers are distinct, entries never compare their keys, and entries of one moment
        come out in order."""
        self.earliest = math.inf
        """The earliest deadline: comparing it is all that a packet pays for time."""

    def __len__(self) -> int:
        return len(self._at)

    @property
    def entries(self) -> int:
        """Entries in the heap, stale ones included."""
        return len(self._heap)

    def set(self, key: AllocationId, at: float) -> None:
        """Set the deadline of a key, instead of its former deadline."""
        self.sequence += 1
        self.restore(key, at, self.sequence)

    def restore(self, key: AllocationId, at: float, number: int) -> None:
        """Set the deadline of a key, with the number of its entry in other deadlines."""
        entry = (at, number, key)
        self._at[key] = entry
        heapq.heappush(self._heap, entry)
        self._tidy()

    def discard(self, key: AllocationId) -> None:
        """Remove the deadline of a key, if there is a deadline."""
        if self._at.pop(key, None) is not None:
            self._tidy()

    def entry(self, key: AllocationId) -> tuple[float, int]:
        """Return the deadline and the number of a key that has a deadline."""
        return self._at[key][:2]

    def get(self, key: AllocationId) -> float | None:
        """Return the deadline of a key, or None. Any thread may call this."""
        entry = self._at.get(key)
        return None if entry is None else entry[0]

    def pop_due(self, now: float) -> Iterator[tuple[float, AllocationId]]:
        """Remove and yield each deadline at ``now`` or before with its key, earliest first.

        The caller may set deadlines meanwhile; due deadlines among them are yielded too.
        """
        while self._heap and self._heap[0][0] <= now:
            at, _, key = self._heap[0]
            self.discard(key)
            yield at, key

    def _tidy(self) -> None:
        """Keep the top of the heap live and the heap small, and `earliest` true."""
        is_large, popped = len(self._heap) > 2 * len(self._at) + _SLACK, 0
        while self._heap and self._at.get(self._heap[0][2]) is not self._heap[0] and popped < STALE_DEADLINES:
            heapq.heappop(self._heap)
            popped += 1
        if is_large or popped == STALE_DEADLINES:
            self._heap = list(self._at.values())
            heapq.heapify(self._heap)
        self.earliest = self._heap[0][0] if self._heap else math.inf
