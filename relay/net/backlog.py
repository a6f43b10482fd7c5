"""Keeps the queue of a socket short during an overload.

A large receive buffer absorbs bursts. During a longer overload the same buffer only adds delay to all packets: 4 MiB are 80
ms of small packets. Reading and dropping old packets would cost as much as relaying half of them. So the buffer is shrunk
during an overload: the kernel drops excess packets before they consume CPU. `relay.core.overload` has the thresholds.
"""

import time

from relay.core.overload import BUFFER_CALM, BUFFER_DELAY, BUFFER_REVIEW, BURST, LEAST_WAITING
from relay.net.udp import RECEIVE_BUFFER, UdpSocket

_BOOKKEEPING = 256
_ROOM = 380
"""Bytes that the kernel counts for a datagram: `_BOOKKEEPING`, and the power of two that holds the datagram and `_ROOM`."""

_SMALL = 196
_COUNTED_FOR_SMALL = 832
"""Bytes counted for a datagram of up to `_SMALL` bytes. All figures are measured on loopback with Linux 6.18. For network
cards the kernel counts up to twice as much, which makes the queue shorter."""


def counted_size(size: int, datagrams: int) -> int:
    """Return roughly the bytes that the kernel counts against the buffer for datagrams of ``size`` bytes in total."""
    mean = size // datagrams
    return datagrams * (_COUNTED_FOR_SMALL if mean <= _SMALL else _BOOKKEEPING + (1 << (mean + _ROOM - 1).bit_length()))


class Backlog:
    """The queue of one socket, as its reader sees it."""

    __slots__ = ("_calm_since", "_count", "_drops", "_least", "_read", "_since", "_socket", "is_small")

    def __init__(self, sock: UdpSocket, least: int = LEAST_WAITING) -> None:
        self._socket = sock
        self._least = least
        self._since = 0.0
        self._read = 0
        self._count = 0
        self._drops = 0
        self._calm_since = 0.0
        self.is_small = False

    def note(self, size: int, datagrams: int, *, is_behind: bool, now: float | None = None) -> None:
        """Note a batch of ``size`` bytes that was read, while the reader is behind or the buffer is small.

        The reader is behind after a full batch, because more datagrams may be waiting.
        """
        now = time.monotonic() if now is None else now
        if self.is_small:
            self._read += counted_size(size, datagrams)
            self._count += datagrams
            if now - self._since >= BUFFER_REVIEW:
                self._review(now)
        elif not is_behind:
            self._since = 0.0
        elif self._since == 0.0:
            self._since, self._read, self._count = now, 0, 0
        else:
            self._read += counted_size(size, datagrams)
            self._count += datagrams
            if now - self._since >= BURST:
                self.is_small = True
                self._socket.counters.buffers_cut += 1
                self._drops, self._calm_since = self._socket.drops(), now
                self._fit(now)

    def _review(self, now: float) -> None:
        drops = self._socket.drops()
        if drops != self._drops:
            self._drops, self._calm_since = drops, now
        if now - self._calm_since >= BUFFER_CALM:
            self.is_small, self._since = False, 0.0
            self._socket.set_receive_buffer(RECEIVE_BUFFER)
        else:
            self._fit(now)

    def _fit(self, now: float) -> None:
        """Set the buffer to the size of all reads of `BUFFER_DELAY`, at the present pace."""
        room = max(self._least / max(self._count, 1), BUFFER_DELAY / (now - self._since))
        wanted = int(self._read * room)
        # The kernel doubles the value (socket(7)).
        if self._read:
            self._socket.set_receive_buffer(min(RECEIVE_BUFFER, wanted // 2))
        self._since, self._read, self._count = now, 0, 0
