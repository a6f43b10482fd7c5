"""The connections of one HTTP address: how many there may be, and which give way to new ones."""

import contextlib
import socket
import struct
import threading
import time
from enum import IntEnum

_RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: what was not sent yet is forgotten, and takes no memory of the kernel any more."""


_SPARED = 1.0
"""Seconds for an answer to be taken, before it may give way: most are taken at once."""

_PATIENCE = 0.1
"""Seconds until it is looked again who might give way."""


class Stage(IntEnum):
    """How far a connection is. Those of the first stages give way first."""

    LEAVING = 0
    """It has its answer."""
    READING = 1
    """Its request is not complete."""
    ANSWERING = 2
    """It has not taken all of its answer."""
    WORKING = 3
    """Its answer is being made; it does not give way."""


class Visitor:
    """One connection."""

    __slots__ = ("holds", "is_cut", "socket", "spared_until", "stage", "until")

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.socket = connection
        self.stage = Stage.READING
        self.holds = 0
        """Bytes of its answer."""
        self.is_cut = False
        self.spared_until = 0.0
        """The monotonic time from which its answer may be cut off for others."""
        self.until = time.monotonic() + seconds
        """The monotonic time at which it has to be done with its stage."""

    def wait_no_longer(self) -> None:
        """Have the next read or write of the socket fail when time is up.

        Raises:
            TimeoutError: it is.
        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)

    def cut(self) -> None:
        """Have whoever reads or writes find it closed."""
        self.is_cut = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def turn_away(self) -> None:
        """Forget it at once; it is told that this was no mistake of the network."""
        self.is_cut = True
        self.close()

    def close(self) -> None:
        """Be done with it."""
        if self.is_cut or self.stage is Stage.ANSWERING:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()


class Crowd:
    """All that are connected.

    Args:
        most: of them at once.
        most_bytes: of all answers that are not taken yet, together.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._changed = threading.Condition(threading.Lock())
        # In the order of their arrival.
        self._present: dict[Visitor, None] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._present)

    def admit(self, visitor: Visitor) -> bool:
        """Take one in, as soon as another has given way to it if there are too many; false if it is too late for that."""
        with self._changed:
            while len(self._present) >= self._most and not self._is_closed:
                self._make_room()
                self._changed.wait(_PATIENCE)
            if not self._is_closed:
                self._present[visitor] = None
            return not self._is_closed

    def make_room(self) -> None:
        """Have one give way, since there is no descriptor or no thread left."""
        with self._changed:
            self._make_room()

    def hold(self, visitor: Visitor, size: int) -> None:
        """Note that one has an answer of some bytes to take; others that take too long over theirs give way."""
        with self._changed:
            visitor.holds = size
            waiting = [each for each in self._present if each.stage is Stage.ANSWERING and not each.is_cut]
            held = size + sum(each.holds for each in waiting)
            for each in waiting:
                if held <= self._most_bytes:
                    break
                held -= each.holds
                each.cut()
            visitor.spared_until = time.monotonic() + _SPARED
            visitor.stage = Stage.ANSWERING

    def see_off(self, visitor: Visitor) -> None:
        """Note that one has its answer: it may go any time."""
        with self._changed:
            visitor.stage = Stage.LEAVING
            self._changed.notify_all()

    def leave(self, visitor: Visitor) -> None:
        """Close one's connection."""
        with self._changed:
            visitor.close()
            self._present.pop(visitor, None)
            self._changed.notify_all()

    def disperse(self, timeout: float) -> None:
        """Close all connections and take no more in; wait some seconds until they are gone."""
        with self._changed:
            self._is_closed = True
            for each in self._present:
                each.cut()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._present, timeout)

    def _make_room(self) -> None:
        if not any(each.is_cut for each in self._present):
            now = time.monotonic()
            able = (
                each
                for each in self._present
                if each.stage < Stage.ANSWERING or (each.stage is Stage.ANSWERING and each.spared_until <= now)
            )
            # The first in the order of arrival, of those whose stage is the first.
            first = min(able, key=lambda each: each.stage, default=None)
            if first is not None:
                first.cut()
