"""Several sockets on one port (SO_REUSEPORT), and the distribution of datagrams over these sockets.

A full receive buffer drops datagrams of every kind. Requests therefore get their own socket, receive buffer and reader.
Data is spread over several sockets by sender, so a flood from one sender affects only senders on the same socket. The kernel
runs a classic BPF program for each datagram, which selects the socket.
"""

import array
import contextlib
import secrets
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from relay.core.addresses import Family
from relay.net.asked import AskedAddresses
from relay.net.udp import UdpCounters, UdpSocket

_SO_ATTACH_REUSEPORT_CBPF = 51

# Instructions (linux/filter.h): load a byte, a half word or a word; copy to the index register; arithmetic; jump; return.
_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD, _TO_INDEX = 0x30, 0x28, 0x20, 0x07
_ADD_INDEX, _ADD, _MULTIPLY, _SHIFT_RIGHT = 0x0C, 0x04, 0x24, 0x74
_JUMP_IF_AT_LEAST, _RETURN, _RETURN_RESULT = 0x35, 0x06, 0x16

_NETWORK_HEADER = 0xFFF00000
"""Loads from this offset on are relative to the IP header (SKF_NET_OFF), not to the payload."""

_SOURCE_HOST = {Family.IPV4: 12, Family.IPV6: 20}
"""Offset of the last four bytes of the source address in the IP header."""

_SOURCE_PORT = {Family.IPV4: 20, Family.IPV6: 40}
"""Offset of the source port in an IP header without options. With options, these bytes are constant per flow."""

_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("@HP")


class ReuseportGroup(NamedTuple):
    """The sockets of one port."""

    data: tuple[UdpSocket, ...]
    """Sockets for datagrams with a first byte of at least the threshold, selected by sender. At least one socket."""
    rest: UdpSocket | None
    """The socket for all other datagrams. None: the only data socket gets every datagram."""

    @property
    def all(self) -> tuple[UdpSocket, ...]:
        """Return all sockets."""
        return self.data if self.rest is None else (*self.data, self.rest)

    def answer_from(self, asked: AskedAddresses) -> None:
        """Send to the senders of requests from the addresses asked."""
        for each in self.all:
            each.asked = asked
        (self.rest or self.data[0]).note_asked()


def open_group(
    family: Family, host: str, port: int, threshold: int, counters: UdpCounters, *, spread: int = 4
) -> ReuseportGroup:
    """Open sockets for datagrams with a first byte of ``threshold`` or more, and a socket for all other datagrams.

    All sockets are bound to the same port, which must be free. Without kernel support, a single socket is opened.

    Args:
        family: address family of all sockets.
        host: address of this machine, or the unspecified address.
        port: 1–65535, or 0 for any free port.
        threshold: 1–255.
        counters: counters of all sockets.
        spread: number of data sockets: a power of two, 2 or more.

    Raises:
        OSError: a socket can't be opened or bound. No socket is left open.
    """
    # SO_REUSEPORT sockets would silently share the port with another relay. A bind without SO_REUSEPORT detects this.
    with UdpSocket(family, host, port) as alone:
        port = alone.getsockname()[1]
    with contextlib.ExitStack() as stack:
        # The program returns the index of a socket in the group. The index is the order of bind().
        opened = [stack.enter_context(UdpSocket(family, host, port, counters, shares_port=True)) for _ in range(1 + spread)]
        try:
            _attach(opened[0], _program(family, threshold, spread))
        except OSError:
            for each in opened[:-1]:
                each.close()
            group = ReuseportGroup((opened[-1],), None)
        else:
            group = ReuseportGroup(tuple(opened[1:]), opened[0])
        stack.pop_all()
        return group


def _program(family: Family, threshold: int, spread: int) -> Iterator[tuple[int, int, int, int]]:
    """Build a program that returns 0, or for data a hash of the sender from 1 to ``spread``.

    The hash is seeded, so an attacker can't choose a source address that shares a socket with a victim.
    """
    yield _LOAD_BYTE, 0, 0, 0  # fails for an empty datagram: the program then returns 0
    yield _JUMP_IF_AT_LEAST, 1, 0, threshold
    yield _RETURN, 0, 0, 0
    yield _LOAD_WORD, 0, 0, _NETWORK_HEADER + _SOURCE_HOST[family]
    yield _MULTIPLY, 0, 0, secrets.randbits(32) | 1
    yield _TO_INDEX, 0, 0, 0
    yield _LOAD_HALF, 0, 0, _NETWORK_HEADER + _SOURCE_PORT[family]
    yield _ADD_INDEX, 0, 0, 0
    # The highest bits of a product depend on all bits of its factors.
    yield _MULTIPLY, 0, 0, secrets.randbits(32) | 1
    yield _SHIFT_RIGHT, 0, 0, 32 - (spread - 1).bit_length()
    yield _ADD, 0, 0, 1
    yield _RETURN_RESULT, 0, 0, 0


def _attach(sock: socket.socket, program: Iterator[tuple[int, int, int, int]]) -> None:
    """Attach the program that selects a socket of the group.

    Raises:
        OSError: the kernel does not support such programs.
    """
    code = array.array("B", b"".join(_INSTRUCTION.pack(*instruction) for instruction in program))
    address, length = code.buffer_info()
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, _PROGRAM.pack(length // _INSTRUCTION.size, address))
