"""Reads many sockets in one thread."""

import contextlib
import itertools
import select
import socket
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

from relay.core.data import Datagram
from relay.core.overload import BATCH_BYTES, BATCH_DATAGRAMS
from relay.net.udp import RECEIVE_BUFFER, UdpSocket

K = TypeVar("K", bound=Hashable)


class ManyReceiver(Generic[K]):
    """Reads sockets which threads of a second process may read too.

    Waits in epoll, because the kernel wakes a single thread of all blocked readers. As long as threads of the second process
    are blocked in a read, a blocking read here would miss packets.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sockets: dict[int, tuple[UdpSocket, K]] = {}
        self._descriptors: dict[K, list[int]] = {}

    def __len__(self) -> int:
        return len(self._descriptors)

    def add(self, key: K, sockets: Collection[UdpSocket]) -> None:
        """Read some sockets, under a name."""
        self._descriptors[key] = [each.fileno() for each in sockets]
        for each in sockets:
            self._sockets[each.fileno()] = each, key
            self._epoll.register(each, select.EPOLLIN)

    def remove(self, key: K) -> None:
        """Read the sockets of this name no more. They are open.

        Their buffers are large again: the second process may have shrunk them, and the next reader knows nothing of this.
        """
        for descriptor in self._descriptors.pop(key):
            sock, _ = self._sockets.pop(descriptor)
            sock.set_receive_buffer(RECEIVE_BUFFER)
            self._epoll.unregister(descriptor)

    def some(self, most: int) -> list[K]:
        """Return the first names, at most ``most``."""
        return list(itertools.islice(self._descriptors, most))

    def receive(self, timeout: float) -> Iterator[tuple[K, list[Datagram]]]:
        """Wait for datagrams, for some seconds, and yield a batch of each readable socket."""
        for descriptor, _ in self._epoll.poll(timeout):
            sock, key = self._sockets[descriptor]
            batch = _batch_of(sock)
            if batch:
                yield key, batch

    def close(self) -> None:
        """Close epoll, and no socket."""
        self._epoll.close()


def _batch_of(sock: UdpSocket) -> list[Datagram]:
    batch: list[Datagram] = []
    size = 0
    # An error is reported by the next reader, if it lasts.
    with contextlib.suppress(OSError):
        while len(batch) < BATCH_DATAGRAMS and size < BATCH_BYTES:
            datagram = sock.receive(socket.MSG_DONTWAIT)
            if datagram is None:
                break
            batch.append(datagram)
            size += len(datagram[0])
    return batch
