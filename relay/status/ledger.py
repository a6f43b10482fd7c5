"""Many counts, kept for a moment."""

from array import array
from collections.abc import Sequence

from relay.status.pace import Pace

_AT_ONCE = 256


class Ledger:
    """Rows of counts by number, all of one width.

    It is made of a few large objects. A table of tuples would have the garbage collector run through thousands of them every
    so often, and would take milliseconds to be thrown away.

    Args:
        width: counts in each row.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._places: dict[int, int] = {}
        self._counts = array("Q")

    def __len__(self) -> int:
        return len(self._places)

    def put(self, key: int, row: Sequence[int]) -> None:
        """Enter a row whose number has none."""
        self._places[key] = len(self._counts)
        self._counts.extend(row)

    def get(self, key: int) -> Sequence[int] | None:
        """Give a row; None if there is none of that number."""
        at = self._places.get(key)
        return None if at is None else self._counts[at : at + self._width]

    def clear(self, pace: Pace) -> None:
        """Forget all rows, in portions."""
        places = self._places
        while places:
            for _ in range(min(_AT_ONCE, len(places))):
                places.popitem()
            pace()
        self._counts = array("Q")
