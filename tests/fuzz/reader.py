"""A fuzzer's bytes as choices: random changes of the bytes change the actions, and all inputs stay well-formed."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Reader:
    """Returns numbers, choices and bytes from the input, and zeros after its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        if not self:
            return 0
        self._at += 1
        return self._data[self._at - 1]

    def short(self) -> int:
        return self.byte() << 8 | self.byte()

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def choose(self, things: Sequence[T]) -> T:
        return things[self.byte() % len(things)]

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def blob(self) -> bytes:
        """Read some bytes, mostly few."""
        length = self.byte()
        return self.take(length if length < 0xF0 else (length & 0xF) << 7)

    def text(self) -> str:
        return self.blob().decode("utf-8", "replace")

    def rest(self) -> bytes:
        return self.take(len(self._data))
