"""Several sockets on one port, and what goes to which.

A socket that is full of one thing drops another thing as well. So what begins with some bytes can be given a socket, and
with it a buffer and a reader, of its own; the rest be spread over several by who sends it, so that a sender who sends too
much takes only from those that share a socket with it. A classic BPF program, which the kernel runs for each datagram, says
where it goes.
"""

import array
import contextlib
import secrets
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from relay.core.addresses import Family
from relay.net.udp import UdpCounters, UdpSocket

_SO_ATTACH_REUSEPORT_CBPF = 51

# Instructions (linux/filter.h): load a byte, a half word or a word; copy to the index register; arithmetic; jump; return.
_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD, _TO_INDEX = 0x30, 0x28, 0x20, 0x07
_ADD_INDEX, _ADD, _MULTIPLY, _SHIFT_RIGHT = 0x0C, 0x04, 0x24, 0x74
_JUMP_IF_AT_LEAST, _RETURN, _RETURN_RESULT = 0x35, 0x06, 0x16

_NETWORK_HEADER = 0xFFF00000
"""From where on a load is relative to the IP header (SKF_NET_OFF), not to the payload."""

_SOURCE_HOST = {Family.IPV4: 12, Family.IPV6: 20}
"""Where the source address has its last four bytes, from the begin of the IP header."""

_SOURCE_PORT = {Family.IPV4: 20, Family.IPV6: 40}
"""Where the source port is, if the IP header has no options. Else this is part of those: the same for all of a flow, too."""

_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("@HP")


class Steered(NamedTuple):
    """The sockets of a port."""

    data: tuple[UdpSocket, ...]
    """For what begins with the threshold or more, by sender; the first one is there always."""
    rest: UdpSocket | None
    """For all else; None if the first one of the others gets everything."""

    @property
    def all(self) -> tuple[UdpSocket, ...]:
        """Give all of them."""
        return self.data if self.rest is None else (*self.data, self.rest)


def open_steered(family: Family, host: str, port: int, threshold: int, counters: UdpCounters, *, spread: int = 4) -> Steered:
    """Open sockets for datagrams whose first byte is ``threshold`` or more, and another one for the rest.

    All are bound to the same port, which nobody else's socket may have. Where the kernel can't steer there is one for all.

    Args:
        family: of all of them.
        host: address of this machine, or the unspecified one.
        port: 1–65535, or 0 for any.
        threshold: 1–255.
        counters: what they count in.
        spread: over how many senders are spread: a power of two, 2 or more.

    Raises:
        OSError: they can't be opened or bound; nothing is left open.
    """
    # Sockets that share a port would also share it with another relay's, unseen. One that does not share finds it taken.
    with UdpSocket(family, host, port) as alone:
        port = alone.getsockname()[1]
    with contextlib.ExitStack() as stack:
        # The program gives the place of a socket among those of the port, in the order in which they were bound.
        opened = [stack.enter_context(UdpSocket(family, host, port, counters, shares_port=True)) for _ in range(1 + spread)]
        try:
            _attach(opened[0], _program(family, threshold, spread))
        except OSError:
            for each in opened[:-1]:
                each.close()
            steered = Steered((opened[-1],), None)
        else:
            steered = Steered(tuple(opened[1:]), opened[0])
        stack.pop_all()
        return steered


def _program(family: Family, threshold: int, spread: int) -> Iterator[tuple[int, int, int, int]]:
    """Write what gives 0 for the rest, and 1 to ``spread`` for data, always the same for the same sender.

    Which one can't be foretold, or whoever wants to could share a socket with whom they like.
    """
    yield _LOAD_BYTE, 0, 0, 0  # of an empty datagram: ends with 0
    yield _JUMP_IF_AT_LEAST, 1, 0, threshold
    yield _RETURN, 0, 0, 0
    yield _LOAD_WORD, 0, 0, _NETWORK_HEADER + _SOURCE_HOST[family]
    yield _MULTIPLY, 0, 0, secrets.randbits(32) | 1
    yield _TO_INDEX, 0, 0, 0
    yield _LOAD_HALF, 0, 0, _NETWORK_HEADER + _SOURCE_PORT[family]
    yield _ADD_INDEX, 0, 0, 0
    # The highest bits of a product depend on all bits of what was multiplied.
    yield _MULTIPLY, 0, 0, secrets.randbits(32) | 1
    yield _SHIFT_RIGHT, 0, 0, 32 - (spread - 1).bit_length()
    yield _ADD, 0, 0, 1
    yield _RETURN_RESULT, 0, 0, 0


def _attach(sock: socket.socket, program: Iterator[tuple[int, int, int, int]]) -> None:
    """Have the kernel choose among the sockets of a port.

    Raises:
        OSError: it takes no such program.
    """
    code = array.array("B", b"".join(_INSTRUCTION.pack(*instruction) for instruction in program))
    address, length = code.buffer_info()
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, _PROGRAM.pack(length // _INSTRUCTION.size, address))
