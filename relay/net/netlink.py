"""Rtnetlink: its messages, and dumps of the kernel's network state.

Queries need no privilege. They refer to the process's network namespace when the socket is opened.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

LARGEST: Final = 1 << 16
"""Upper bound of a part of a dump, or of a notification: the kernel sends 32 KB."""

BUFFER: Final = 4 << 20
"""Receive buffer for notifications: about 5,000. After an overrun, all state is dumped again."""

_PATIENCE: Final = struct.pack("@ll", 5, 0)
"""Timeout in seconds for the next part of a dump, which the kernel sends immediately."""

_ATTEMPTS: Final = 5
"""Attempts of a dump during changes."""

_SO_RCVBUFFORCE: Final = 33


class Kind(IntEnum):
    """Types of messages."""

    ERROR = 2
    DONE = 3
    NEW_LINK = 16
    GET_LINK = 18
    NEW_ADDRESS = 20
    GET_ADDRESS = 22
    NEW_ROUTE = 24
    GET_ROUTE = 26
    NEW_NEIGHBOUR = 28
    GONE_NEIGHBOUR = 29
    GET_NEIGHBOUR = 30


_REQUEST, _DUMP, _INTERRUPTED = 0x1, 0x300, 0x10
"""Flags of messages."""

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF
"""Removes the flags for nested attributes and byte order."""

ADDRESS: Final = struct.Struct("=BxBxI")  # family, flags, interface
IFA_ADDRESS, IFA_LOCAL = 1, 2
"""An address. On a point-to-point link, IFA_ADDRESS is the other end."""


class Message(NamedTuple):
    """A message without its header, possibly invalid."""

    kind: int
    flags: int
    sequence: int
    body: bytes


def split(data: bytes) -> Iterator[Message]:
    """Split received data into messages, up to an invalid length."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield Message(kind, flags, sequence, data[offset + _HEADER.size : offset + length])
        offset += length + 3 & ~3


def request(kind: Kind, sequence: int, body: bytes, flags: int = 0) -> bytes:
    """Return a request."""
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, sequence, 0) + body


def parse_attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Return the attributes before the first invalid attribute."""
    found = {}
    unpack, end = ATTRIBUTE.unpack_from, len(data)
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:  # noqa: PLR2004 - the size of the header
            break
        found[kind & _TYPE_MASK] = data[offset + 4 : offset + length]
        offset += length + 3 & ~3
    return found


class NetlinkSocket(socket.socket):
    """An open rtnetlink socket, for queries by one thread at a time and for notifications of some groups."""

    def __init__(self, groups: int = 0, buffer: int = BUFFER) -> None:
        super().__init__(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sequence = 0
        try:
            self.bind((0, groups))
            # A connected socket receives nothing from other processes, which could be privileged.
            self.connect((0, 0))
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
            try:
                self.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
            except PermissionError:
                self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        except BaseException:
            super().close()
            raise

    def dump(self, asked: Kind, kind: Kind, body: bytes) -> list[bytes]:
        """Return the bodies of all messages of a kind.

        Raises:
            OSError: the query failed; InterruptedError if the kernel's state changes constantly.
        """
        for _ in range(_ATTEMPTS):
            found = self._dump_once(asked, kind, body)
            if found is not None:
                return found
        raise InterruptedError(errno.EINTR, f"{kind.name}: the kernel's state changes faster than it can be read")

    def _dump_once(self, asked: Kind, kind: Kind, body: bytes) -> list[bytes] | None:
        """Return the bodies, or None if the kernel's state changed meanwhile."""
        ours = self._next_sequence()
        self.send(request(asked, ours, body, _DUMP))
        found: list[bytes] = []
        whole = True
        while True:
            for number, flags, sequence, content in split(self.recv(LARGEST)):
                if sequence != ours:
                    continue
                whole = whole and not flags & _INTERRUPTED
                if number == kind:
                    found.append(content)
                elif number == Kind.DONE:
                    return found if whole else None
                elif number == Kind.ERROR:
                    raise OSError(errno.EIO, f"{kind.name}: the kernel rejects the query")

    def _next_sequence(self, count: int = 1) -> int:
        """Return the first of some consecutive sequence numbers, which wrap around within 31 bits."""
        first = self._sequence % (1 << 30) + 1
        self._sequence = first + count - 1
        return first
