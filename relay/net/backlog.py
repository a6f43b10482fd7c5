"""Keeps what waits in a socket young while more arrives than can be read.

A large receive buffer takes up bursts. When more arrives than is read for longer than that, the same buffer only adds delay
to all that comes through: 4 MiB are 80 ms of small packets. To read and throw away what is old would cost as much as
relaying half of it. So the buffer is made small for as long as there is an overload: what finds no room in it is dropped by
the kernel before it has cost anything here.
"""

import time

from relay.net.udp import RECEIVE_BUFFER, UdpSocket

DELAY = 0.011
"""Seconds of reading that a small buffer holds, about: what a packet then waits for."""

PATIENCE = 0.010
"""Seconds for which a socket is never seen empty before its buffer is made small. A burst is over by then, or is not one."""

REVIEW = 0.1
"""Seconds between two looks at a small buffer: whether it still drops, and how much is read from it."""

CALM = 1.0
"""Seconds without a drop after which it is made large again."""

LEAST = 48
"""Datagrams for which there is room in any case, or a thread that has to wait for its turn would find too little."""

_BOOKKEEPING = 256
_ROOM = 380
"""Bytes that the kernel counts for a datagram beside the power of two that holds it and so many more (its own headers)."""

_SMALL = 196
_COUNTED_FOR_SMALL = 832
"""A datagram of up to so many bytes has a size of its own. All as measured on loopback with Linux 6.18; memory of network
cards is counted in other ways, by up to twice as much, which then makes the wait shorter."""


def counted_size(size: int, datagrams: int) -> int:
    """Give the bytes that the kernel counts against the buffer for datagrams of ``size`` bytes in all, roughly."""
    mean = size // datagrams
    return datagrams * (_COUNTED_FOR_SMALL if mean <= _SMALL else _BOOKKEEPING + (1 << (mean + _ROOM - 1).bit_length()))


class Backlog:
    """What waits in one socket, as its reader sees it."""

    __slots__ = ("_calm_since", "_count", "_drops", "_least", "_read", "_since", "_socket", "is_small")

    def __init__(self, sock: UdpSocket, least: int = LEAST) -> None:
        self._socket = sock
        self._least = least
        self._since = 0.0
        self._read = 0
        self._count = 0
        self._drops = 0
        self._calm_since = 0.0
        self.is_small = False

    def note(self, size: int, datagrams: int, *, is_behind: bool, now: float | None = None) -> None:
        """Take note of a batch that was read; to be called for each while it is behind, or small.

        Args:
            size: of all of it, in bytes.
            datagrams: how many.
            is_behind: the batch was full, so more may be waiting.
            now: monotonic time.
        """
        now = time.monotonic() if now is None else now
        if self.is_small:
            self._read += counted_size(size, datagrams)
            self._count += datagrams
            if now - self._since >= REVIEW:
                self._review(now)
        elif not is_behind:
            self._since = 0.0
        elif self._since == 0.0:
            self._since, self._read, self._count = now, 0, 0
        else:
            self._read += counted_size(size, datagrams)
            self._count += datagrams
            if now - self._since >= PATIENCE:
                self.is_small = True
                self._socket.counters.buffers_cut += 1
                self._drops, self._calm_since = self._socket.drops(), now
                self._fit(now)

    def _review(self, now: float) -> None:
        drops = self._socket.drops()
        if drops != self._drops:
            self._drops, self._calm_since = drops, now
        if now - self._calm_since >= CALM:
            self.is_small, self._since = False, 0.0
            self._socket.set_receive_buffer(RECEIVE_BUFFER)
        else:
            self._fit(now)

    def _fit(self, now: float) -> None:
        """Make the buffer as large as what is read in `DELAY`, at the pace of late."""
        room = max(self._least / max(self._count, 1), DELAY / (now - self._since))
        wanted = int(self._read * room)
        # The kernel doubles what it is asked for (socket(7)).
        if self._read:
            self._socket.set_receive_buffer(min(RECEIVE_BUFFER, wanted // 2))
        self._since, self._read, self._count = now, 0, 0
