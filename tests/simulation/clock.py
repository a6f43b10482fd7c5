"""Time that passes from one event to the next, and the exception by which a run ends early."""

import heapq
from collections.abc import Callable
from typing import Any, TypeAlias

Deed: TypeAlias = Callable[..., None]


class BrokenError(Exception):
    """Something came out otherwise than it must."""


class Scheduler:
    """What is to happen, and when; events of one moment happen in the order in which they were asked for."""

    def __init__(self, start: float) -> None:
        self.now = start
        """Seconds; exact, so that the moment at which something ends can be hit."""
        self.events = 0
        self._sequence = 0
        self._heap: list[tuple[float, int, Deed, tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, moment: float, deed: Deed, *arguments: Any) -> None:  # noqa: ANN401 - what the deed takes
        """Let something happen; at once, if its moment is over."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(moment, self.now), self._sequence, deed, arguments))

    def after(self, seconds: float, deed: Deed, *arguments: Any) -> None:  # noqa: ANN401 - as above
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + seconds, self._sequence, deed, arguments))

    def run(self, until: float) -> None:
        """Let everything happen that is to happen until then."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, deed, arguments = pop(heap)
            self.events += 1
            deed(*arguments)
        self.now = until
