"""Rtnetlink: what the kernel has of links, addresses and neighbours, which way it sends packets, and news of all that.

It takes no privilege, and is about the network namespace that the process is in when the sockets are opened.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self, TypeVar

from relay.offload import route_messages
from relay.offload.network import (
    Address,
    AddressesChanged,
    Link,
    LinkNews,
    LookUp,
    Neighbour,
    NeighbourNews,
    NeighbourState,
    News,
    NoRoute,
    Outcome,
    Overrun,
    RoutesChanged,
)
from relay.offload.network_messages import Decoder, Kind, link_index

_BATCH: Final = 64
"""Questions in one system call, and answers in the next. What it costs to call is spread thin by then, and the answers to so
many fit the buffer that any socket has (4.3 KB each at worst, of 212 KB)."""

_ANSWER_SIZE: Final = 1024
"""Bytes of an answer: some 200, as long as nothing is put around packets."""

_LARGEST: Final = 1 << 16
"""Bytes that the kernel puts into one piece of a dump or of news, at most: 32 KB."""

_BUFFER: Final = 4 << 20
"""Bytes of news that may wait: some 5,000. When the kernel has dropped some, everything is to be dumped again."""

_PATIENCE: Final = struct.pack("@ll", 5, 0)
"""Seconds for the kernel to go on with a dump, which it does at once."""

_ATTEMPTS: Final = 5
"""At a dump during which things change."""

_PIECES: Final = 1024
"""Of news in one batch, at most."""

_GROUPS: Final = sum(1 << number - 1 for number in (1, 3, 5, 7, 8, 9, 11, 19, 32))
"""Links, neighbours; addresses, routes, rules of IPv4; addresses, routes, rules of IPv6; next hops that routes share."""

_ABOUT_LINKS: Final = {Kind.NEW_LINK, Kind.GONE_LINK}
_ABOUT_ADDRESSES: Final = {Kind.NEW_ADDRESS, Kind.GONE_ADDRESS}
_ABOUT_NEIGHBOURS: Final = {Kind.NEW_NEIGHBOUR, Kind.GONE_NEIGHBOUR}
_ABOUT_ROUTES: Final = {
    *(Kind.NEW_ROUTE, Kind.GONE_ROUTE),
    *(Kind.NEW_RULE, Kind.GONE_RULE),
    *(Kind.NEW_SHARED_HOP, Kind.GONE_SHARED_HOP),
}

_DONE: Final = 3
_REQUEST, _DUMP, _INTERRUPTED = 0x1, 0x300, 0x10
_GET_LINK, _GET_ADDRESS, _GET_NEIGHBOUR = 18, 22, 30
_WITHOUT_STATISTICS: Final = struct.pack("=16xHHI", 8, 29, 1 << 3)
_SO_RCVBUFFORCE: Final = 33

T = TypeVar("T")


class _Piece(ctypes.Structure):
    """Struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """Struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Envelope(ctypes.Structure):
    """Struct mmsghdr."""

    _fields_ = (("message", _Message), ("length", ctypes.c_uint32))


# What it reads is there already, so it keeps the interpreter: whoever lets others have it waits for it. To ask for 16,000
# destinations again, and write them, takes 0.3 s; beside four busy threads 0.55 s, and 0.85 s if each answer is a `recv`.
_receive_many = ctypes.PyDLL(None, use_errno=True).recvmmsg
_receive_many.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)


def _open(groups: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        opened.bind((0, groups))
        # From now on it takes nothing from other processes, which a privileged one could send.
        opened.connect((0, 0))
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    except OSError:
        opened.close()
        raise
    return opened


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Take apart what was read: type, flags, and the message with its header; up to what is cut off or makes no sense."""
    offset = 0
    while offset + route_messages.HEADER.size <= len(data):
        length, kind, flags, _, _ = route_messages.HEADER.unpack_from(data, offset)
        if length < route_messages.HEADER.size or offset + length > len(data):
            return
        yield kind, flags, data[offset : offset + length]
        offset += length + 3 & ~3


class Network:
    """Questions to the kernel, by one thread at a time."""

    def __init__(self) -> None:
        """Get ready to ask.

        Raises:
            OSError: there are no such sockets here.
        """
        self._decoder = Decoder()
        self._socket = _open(0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
        self._sequence = 0
        self._answers = ctypes.create_string_buffer(_BATCH * _ANSWER_SIZE)
        self._pieces = (_Piece * _BATCH)()
        self._envelopes = (_Envelope * _BATCH)()
        start = ctypes.addressof(self._answers)
        for number, (piece, envelope) in enumerate(zip(self._pieces, self._envelopes, strict=True)):
            piece.base, piece.length = start + number * _ANSWER_SIZE, _ANSWER_SIZE
            envelope.message.pieces, envelope.message.count = ctypes.addressof(piece), 1

    def close(self) -> None:
        """Ask nothing any more; again does nothing."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look_up(self, look_ups: Sequence[LookUp]) -> list[Outcome]:
        """Ask which way an unmarked UDP packet of this process would take.

        What is not asked: source and destination port, which a rule may look at.

        Args:
            look_ups: as many as one likes. Each takes some 12 µs, and every 64 of them others get the interpreter once.

        Returns:
            The answers in the same order.

        Raises:
            OSError: the kernel can't be asked.
        """
        outcomes: list[Outcome] = []
        for start in range(0, len(look_ups), _BATCH):
            outcomes += self._look_up(look_ups[start : start + _BATCH])
        return outcomes

    def _look_up(self, look_ups: Sequence[LookUp]) -> list[Outcome]:
        first = self._sequence + 1
        self._sequence = (self._sequence + len(look_ups)) % (1 << 31)
        if self._sequence < first:
            first, self._sequence = 1, len(look_ups)
        # The kernel answers within the call: what is not there afterwards won't come.
        self._socket.send(b"".join(route_messages.request(each, first + place) for place, each in enumerate(look_ups)))
        outcomes: list[Outcome] = [NoRoute.UNKNOWN] * len(look_ups)
        for message in self._read_answers():
            found = route_messages.answer(message)
            if found is not None and 0 <= found[0] - first < len(look_ups):
                outcomes[found[0] - first] = found[1]
        return outcomes

    def _read_answers(self) -> Iterator[bytes]:
        """Give all that has been answered; what was left over from an earlier question, too."""
        view = memoryview(self._answers)
        got = _BATCH
        while got == _BATCH:
            got = _receive_many(self._socket.fileno(), ctypes.addressof(self._envelopes), _BATCH, socket.MSG_DONTWAIT, None)
            for number, envelope in zip(range(got), self._envelopes, strict=False):
                start = number * _ANSWER_SIZE
                yield bytes(view[start : start + envelope.length])
            if got < 0 and ctypes.get_errno() in (errno.EINTR, errno.ENOBUFS):
                got = _BATCH

    def links(self) -> list[Link]:
        """Give all interfaces.

        Raises:
            OSError: the kernel can't be asked, or they change all the time.
        """
        return self._dump(_GET_LINK, Kind.NEW_LINK, _WITHOUT_STATISTICS, self._decoder.link)

    def addresses(self) -> list[Address]:
        """Give all addresses of this machine.

        Raises:
            OSError: as with `links`.
        """
        return self._dump(_GET_ADDRESS, Kind.NEW_ADDRESS, bytes(8), self._decoder.address)

    def neighbours(self) -> list[Neighbour]:
        """Give all neighbours that the kernel knows or asks for.

        Raises:
            OSError: as with `links`.
        """
        return self._dump(_GET_NEIGHBOUR, Kind.NEW_NEIGHBOUR, bytes(12), self._decoder.neighbour)

    def _dump(self, request: int, kind: Kind, body: bytes, decode: Callable[[bytes], T | None]) -> list[T]:
        for _ in range(_ATTEMPTS):
            found = self._dump_once(request, kind, body)
            if found is not None:
                return [decoded for decoded in map(decode, found) if decoded is not None]
        raise OSError(errno.EINTR, f"{kind.name}: it changes faster than it can be read")

    def _dump_once(self, request: int, kind: Kind, body: bytes) -> list[bytes] | None:
        """Give the messages; None if there were changes meanwhile."""
        self._sequence = self._sequence % (1 << 31) + 1
        header = route_messages.HEADER.pack(
            route_messages.HEADER.size + len(body), request, _REQUEST | _DUMP, self._sequence, 0
        )
        self._socket.send(header + body)
        found: list[bytes] = []
        whole = True
        while True:
            for number, flags, message in messages(self._socket.recv(_LARGEST)):
                _, _, _, sequence, _ = route_messages.HEADER.unpack_from(message)
                if sequence != self._sequence:
                    continue
                whole = whole and not flags & _INTERRUPTED
                if number == kind:
                    found.append(message)
                elif number == _DONE:
                    return found if whole else None
                elif number == route_messages.ERROR:
                    raise OSError(errno.EIO, f"{kind.name}: the kernel doesn't say")


class Monitor:
    """News from the kernel. To be opened before `Network` is asked for anything, so that no change falls between the two."""

    def __init__(self) -> None:
        """Begin to collect news.

        Raises:
            OSError: there are no such sockets here.
        """
        self._decoder = Decoder()
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(_open(_GROUPS))
            # Whoever waits for this kind of socket isn't woken up by its end.
            self._stopping = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.pop_all()
        self._poll = select.poll()
        for each in (self._socket.fileno(), self._stopping):
            self._poll.register(each, select.POLLIN)

    def stop(self) -> None:
        """End `receive`, now and ever after. Any thread may call it until `close`."""
        os.eventfd_write(self._stopping, 1)

    def close(self) -> None:
        """Give back what was opened, once no thread is in `receive` any more; again does nothing."""
        self._socket.close()
        stopping, self._stopping = self._stopping, -1
        if stopping >= 0:
            os.close(stopping)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self) -> list[News] | None:
        """Wait for news.

        Returns:
            What is new, each kind in the order in which it happened; empty if nothing of it matters. None after `stop`.

        Raises:
            OSError: there can be no news any more.
        """
        if any(descriptor == self._stopping for descriptor, _ in self._poll.poll()):
            return None
        batch: list[News] = []
        about_all: dict[News, None] = {}
        try:
            for data in self._pieces(_PIECES):
                for kind, _, message in messages(data):
                    news = self._news(kind, message)
                    if isinstance(news, AddressesChanged | RoutesChanged):
                        about_all[news] = None
                    elif news is not None:
                        batch.append(news)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._discard()
            return [Overrun()]
        return [*batch, *about_all]

    def _pieces(self, limit: int) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            for _ in range(limit):
                yield self._socket.recv(_LARGEST, socket.MSG_DONTWAIT)

    def _discard(self) -> None:
        """Forget what happened before some of it was lost: later it would be taken for newer than what is dumped now.

        The kernel adds nothing until all is read, so this comes to an end.
        """
        while True:
            try:
                self._socket.recv(_LARGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def _news(self, kind: int, message: bytes) -> News | None:
        if kind in _ABOUT_ROUTES:
            return RoutesChanged()
        if kind in _ABOUT_ADDRESSES:
            return AddressesChanged()
        if kind in _ABOUT_NEIGHBOURS:
            neighbour = self._decoder.neighbour(message)
            return neighbour and NeighbourNews(neighbour if kind == Kind.NEW_NEIGHBOUR else _forgotten(neighbour))
        ifindex = link_index(message) if kind in _ABOUT_LINKS else None
        if ifindex is None:
            return None
        link = self._decoder.link(message) if kind == Kind.NEW_LINK else None
        return None if kind == Kind.NEW_LINK and link is None else LinkNews(ifindex, link)


def _forgotten(neighbour: Neighbour) -> Neighbour:
    return neighbour._replace(mac=b"", state=NeighbourState.NONE)
