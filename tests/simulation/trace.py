"""The trace of a run: the latest entries, and a hash of all entries."""

import hashlib
import struct
from collections import deque

_MOMENT = struct.Struct("d")
_LENGTH = 80


class Trace:
    """Records entries. Equal hashes mean equal runs."""

    def __init__(self) -> None:
        self.tail: deque[tuple[float, str, object, bytes]] = deque(maxlen=_LENGTH)
        self.is_printed = False
        self._hash = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def note(self, now: float, what: str, about: object, data: bytes = b"") -> None:
        """Record an entry; the hash covers times and data."""
        self.tail.append((now, what, about, data))
        self._hash.update(_MOMENT.pack(now) + data)
        if self.is_printed:
            print(_line(*self.tail[-1]))  # noqa: T201 - requested output

    def __str__(self) -> str:
        return "\n".join(_line(*each) for each in self.tail)


def _line(at: float, what: str, about: object, data: bytes) -> str:
    return f"{at:14.6f}  {what:9} {about!r:.240} {data.hex() if what == 'in' else ''}".rstrip()
