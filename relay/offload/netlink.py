"""Rtnetlink sockets: queries of links, addresses, neighbours and routes, and notifications of changes."""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from relay.net.netlink import BUFFER, LARGEST, Kind, Message, NetlinkSocket, split
from relay.offload import network

_BATCH: Final = 64
"""Route requests per system call. More would save no time, and responses to 64 requests fit every socket's buffer (4.3 KB
each at worst, of 212 KB)."""

_PIECES: Final = 1024
"""Maximum of datagrams with notifications in a batch."""

_GROUPS: Final = sum(1 << number - 1 for number in (1, 3, 5, 7, 8, 9, 11, 19, 24, 32))
"""Links, neighbours; addresses, routes, rules of IPv4; addresses, routes, rules of IPv6; IPv4 settings; nexthop objects."""

_WITHOUT_STATISTICS: Final = struct.pack("=16xHHI", 8, 29, 1 << 3)

T = TypeVar("T")

# The responses are already in the socket, so the call keeps the GIL: to get it back from busy threads takes longer.
_receive = ctypes.PyDLL(None, use_errno=True).recv
_receive.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_receive.restype = ctypes.c_ssize_t


class Changes(NamedTuple):
    """Changes of the kernel's network state."""

    neighbours: list[network.Neighbour]
    """In order of their occurrence."""
    others: bool
    """Whether links, addresses, routes or rules may have changed, or notifications were lost."""


class Network(NetlinkSocket):
    """Queries to the kernel, by one thread at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._answer = ctypes.create_string_buffer(LARGEST)

    def look_up(self, look_ups: Sequence[network.LookUp]) -> list[network.Route | None]:
        """Return the routes of unmarked UDP packets of this process, None if the program can't send to a destination.

        Rules by port are ignored. A lookup takes about 12 µs, and the GIL is released once per 64 lookups.
        """
        routes: list[network.Route | None] = []
        for start in range(0, len(look_ups), _BATCH):
            routes += self._look_up(look_ups[start : start + _BATCH])
        return routes

    def _look_up(self, look_ups: Sequence[network.LookUp]) -> list[network.Route | None]:
        first = self._next_sequence(len(look_ups))
        # The kernel responds during the call: a response missing afterwards will not arrive.
        self.send(b"".join(network.route_request(each, first + place) for place, each in enumerate(look_ups)))
        routes: list[network.Route | None] = [None] * len(look_ups)
        for message in self._answers():
            if message.kind == Kind.NEW_ROUTE and 0 <= message.sequence - first < len(look_ups):
                routes[message.sequence - first] = network.parse_route(message.body)
        return routes

    def _answers(self) -> Iterator[Message]:
        """Return all available responses, including late responses to earlier requests."""
        descriptor, buffer, view = self.fileno(), ctypes.addressof(self._answer), memoryview(self._answer)
        while True:
            size = _receive(descriptor, buffer, LARGEST, socket.MSG_DONTWAIT)
            if size >= 0:
                yield from split(bytes(view[:size]))
            elif ctypes.get_errno() not in (errno.EINTR, errno.ENOBUFS):
                return

    def links(self) -> list[network.Link]:
        """Return all interfaces.

        Raises:
            OSError: the query failed; InterruptedError if interfaces change constantly.
        """
        return self._parsed(Kind.GET_LINK, Kind.NEW_LINK, _WITHOUT_STATISTICS, network.parse_link)

    def addresses(self) -> list[network.Address]:
        """Return all addresses of this machine. Errors are as for `links`."""
        return self._parsed(Kind.GET_ADDRESS, Kind.NEW_ADDRESS, bytes(8), network.parse_address)

    def neighbours(self) -> list[network.Neighbour]:
        """Return all neighbours that the kernel knows or is resolving. Errors are as for `links`."""
        return self._parsed(Kind.GET_NEIGHBOUR, Kind.NEW_NEIGHBOUR, bytes(12), network.parse_neighbour)

    def _parsed(self, asked: Kind, kind: Kind, body: bytes, parse: Callable[[bytes], T | None]) -> list[T]:
        return [parsed for parsed in map(parse, self.dump(asked, kind, body)) if parsed is not None]


class Monitor(NetlinkSocket):
    """Notifications from the kernel. Open it before the first query of `Network`, so that no change is missed in between."""

    def __init__(self, buffer: int = BUFFER) -> None:
        super().__init__(_GROUPS, buffer)
        # Closing a netlink socket does not wake up a waiting thread.
        self._stopping = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        for each in (self.fileno(), self._stopping):
            self._poll.register(each, select.POLLIN)

    def stop(self) -> None:
        """End the current and all later calls of `receive`. Any thread may call this before `close`."""
        os.eventfd_write(self._stopping, 1)

    def close(self) -> None:
        """Close the descriptors when no thread is in `receive`. A second call does nothing."""
        super().close()
        stopping, self._stopping = self._stopping, -1
        if stopping >= 0:
            os.close(stopping)

    def receive(self) -> Changes | None:
        """Wait for notifications. Return None after `stop`."""
        if any(descriptor == self._stopping for descriptor, _ in self._poll.poll()):
            return None
        neighbours: list[network.Neighbour] = []
        others = False
        try:
            for kind, _, _, body in self._pieces():
                is_gone = kind == Kind.GONE_NEIGHBOUR
                neighbour = network.parse_neighbour(body) if is_gone or kind == Kind.NEW_NEIGHBOUR else None
                if neighbour is not None:
                    neighbours.append(neighbour._replace(mac=b"", stale=False) if is_gone else neighbour)
                others = others or kind not in (Kind.NEW_NEIGHBOUR, Kind.GONE_NEIGHBOUR)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._discard()
            return Changes([], others=True)
        return Changes(neighbours, others)

    def _pieces(self) -> Iterator[Message]:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_PIECES):
                yield from split(self.recv(LARGEST, socket.MSG_DONTWAIT))

    def _discard(self) -> None:
        """Discard notifications before an overrun, which would otherwise look newer than the next dump.

        The kernel adds nothing until the socket is empty, so this ends.
        """
        while True:
            try:
                self.recv(LARGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
