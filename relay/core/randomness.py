"""Where the core's random numbers come from: a source that is handed in, so that a seed repeats a run."""

from typing import Protocol


class RandomSource(Protocol):
    """What the core asks of a source; both generators of the standard library's ``random`` fit."""

    def randrange(self, stop: int, /) -> int:
        """Give an integer in ``0 <= n < stop``."""

    def randbytes(self, n: int, /) -> bytes:
        """Give ``n`` random bytes."""
