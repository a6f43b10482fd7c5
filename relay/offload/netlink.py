"""Rtnetlink sockets: queries of links, addresses, neighbours and routes, and notifications of changes.

Queries need no privilege. They refer to the process's network namespace when the socket is opened.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Self, TypeVar

from relay.offload import network
from relay.offload.network import Kind, Message

_BATCH: Final = 64
"""Route requests per system call. More would save no time, and responses to 64 requests fit every socket's buffer (4.3 KB
each at worst, of 212 KB)."""

_LARGEST: Final = 1 << 16
"""Upper bound of a part of a dump, or of a notification: the kernel sends 32 KB."""

BUFFER: Final = 4 << 20
"""Receive buffer for notifications: about 5,000. After an overrun, all state is dumped again."""

_PATIENCE: Final = struct.pack("@ll", 5, 0)
"""Timeout in seconds for the next part of a dump, which the kernel sends immediately."""

_ATTEMPTS: Final = 5
"""Attempts of a dump during changes."""

_PIECES: Final = 1024
"""Maximum of datagrams with notifications in a batch."""

_GROUPS: Final = sum(1 << number - 1 for number in (1, 3, 5, 7, 8, 9, 11, 19, 24, 32))
"""Links, neighbours; addresses, routes, rules of IPv4; addresses, routes, rules of IPv6; IPv4 settings; nexthop objects."""

_WITHOUT_STATISTICS: Final = struct.pack("=16xHHI", 8, 29, 1 << 3)
_SO_RCVBUFFORCE: Final = 33

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


class _Socket:
    """An open rtnetlink socket, for notifications of some groups."""

    def __init__(self, groups: int = 0, buffer: int = BUFFER) -> None:
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
            self._socket.bind((0, groups))
            # A connected socket receives nothing from other processes, which could be privileged.
            self._socket.connect((0, 0))
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            stack.pop_all()

    def close(self) -> None:
        """Close the socket. A second call does nothing."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Network(_Socket):
    """Queries to the kernel, by one thread at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
        self._sequence = 0
        self._answer = ctypes.create_string_buffer(_LARGEST)

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
        self._socket.send(b"".join(network.route_request(each, first + place) for place, each in enumerate(look_ups)))
        routes: list[network.Route | None] = [None] * len(look_ups)
        for message in self._answers():
            if message.kind == Kind.NEW_ROUTE and 0 <= message.sequence - first < len(look_ups):
                routes[message.sequence - first] = network.parse_route(message.body)
        return routes

    def _answers(self) -> Iterator[Message]:
        """Return all available responses, including late responses to earlier requests."""
        descriptor, buffer, view = self._socket.fileno(), ctypes.addressof(self._answer), memoryview(self._answer)
        while True:
            size = _receive(descriptor, buffer, _LARGEST, socket.MSG_DONTWAIT)
            if size >= 0:
                yield from network.split(bytes(view[:size]))
            elif ctypes.get_errno() not in (errno.EINTR, errno.ENOBUFS):
                return

    def _next_sequence(self, count: int = 1) -> int:
        """Return the first of some consecutive sequence numbers, which wrap around within 31 bits."""
        first = self._sequence % (1 << 30) + 1
        self._sequence = first + count - 1
        return first

    def links(self) -> list[network.Link]:
        """Return all interfaces.

        Raises:
            OSError: the query failed; InterruptedError if interfaces change constantly.
        """
        return self._dump(Kind.GET_LINK, Kind.NEW_LINK, _WITHOUT_STATISTICS, network.parse_link)

    def addresses(self) -> list[network.Address]:
        """Return all addresses of this machine. Errors are as for `links`."""
        return self._dump(Kind.GET_ADDRESS, Kind.NEW_ADDRESS, bytes(8), network.parse_address)

    def neighbours(self) -> list[network.Neighbour]:
        """Return all neighbours that the kernel knows or is resolving. Errors are as for `links`."""
        return self._dump(Kind.GET_NEIGHBOUR, Kind.NEW_NEIGHBOUR, bytes(12), network.parse_neighbour)

    def _dump(self, asked: Kind, kind: Kind, body: bytes, parse: Callable[[bytes], T | None]) -> list[T]:
        for _ in range(_ATTEMPTS):
            found = self._dump_once(asked, kind, body)
            if found is not None:
                return [parsed for parsed in map(parse, found) if parsed is not None]
        raise InterruptedError(errno.EINTR, f"{kind.name}: the kernel's state changes faster than it can be read")

    def _dump_once(self, asked: Kind, kind: Kind, body: bytes) -> list[bytes] | None:
        """Return the messages of a dump, or None if the kernel's state changed meanwhile."""
        ours = self._next_sequence()
        self._socket.send(network.request(asked, network.DUMP, ours, body))
        found: list[bytes] = []
        whole = True
        while True:
            for number, flags, sequence, content in network.split(self._socket.recv(_LARGEST)):
                if sequence != ours:
                    continue
                whole = whole and not flags & network.INTERRUPTED
                if number == kind:
                    found.append(content)
                elif number == Kind.DONE:
                    return found if whole else None
                elif number == Kind.ERROR:
                    raise OSError(errno.EIO, f"{kind.name}: the kernel rejects the query")


class Monitor(_Socket):
    """Notifications from the kernel. Open it before the first query of `Network`, so that no change is missed in between."""

    def __init__(self, buffer: int = BUFFER) -> None:
        super().__init__(_GROUPS, buffer)
        # Closing a netlink socket does not wake up a waiting thread.
        self._stopping = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        for each in (self._socket.fileno(), self._stopping):
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
                yield from network.split(self._socket.recv(_LARGEST, socket.MSG_DONTWAIT))

    def _discard(self) -> None:
        """Discard notifications before an overrun, which would otherwise look newer than the next dump.

        The kernel adds nothing until the socket is empty, so this ends.
        """
        while True:
            try:
                self._socket.recv(_LARGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
