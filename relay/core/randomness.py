"""The source of random numbers, an argument of the core, so that a seed reproduces a run."""

from typing import Protocol


class RandomSource(Protocol):
    """A source of random numbers, such as the generators of ``random``."""

    def randrange(self, stop: int, /) -> int:
        """Return an integer in ``0 <= n < stop``."""

    def randbytes(self, n: int, /) -> bytes:
        """Return ``n`` random bytes."""
