"""A clock that advances from event to event, and the exception of a failed run."""

import heapq
from collections.abc import Callable
from typing import Any, TypeAlias

Deed: TypeAlias = Callable[..., None]


class BrokenError(Exception):
    """A check of the simulation failed."""


class Scheduler:
    """Future events by time; simultaneous events run in insertion order."""

    def __init__(self, start: float) -> None:
        self.now = start
        """Seconds; exact, to hit deadlines exactly."""
        self.events = 0
        self._sequence = 0
        self._heap: list[tuple[float, int, Deed, tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, moment: float, deed: Deed, *arguments: Any) -> None:  # noqa: ANN401 - arguments of the action
        """Schedule an action; past times mean immediately."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(moment, self.now), self._sequence, deed, arguments))

    def after(self, seconds: float, deed: Deed, *arguments: Any) -> None:  # noqa: ANN401 - as above
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + seconds, self._sequence, deed, arguments))

    def run(self, until: float) -> None:
        """Run all events until a time."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, deed, arguments = pop(heap)
            self.events += 1
            deed(*arguments)
        self.now = until
