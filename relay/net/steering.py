"""Several sockets on one port, and what goes to which.

A socket that is full of data drops what asks for something as well. So what begins with some bytes can be given a socket,
and with it a buffer and a reader, of its own: a classic BPF program that the kernel runs for each datagram says which.
"""

import array
import contextlib
import socket
import struct

from relay.core.addresses import Family
from relay.net.udp import UdpCounters, UdpSocket

_SO_ATTACH_REUSEPORT_CBPF = 51

_LOAD_BYTE = 0x30
_JUMP_IF_AT_LEAST = 0x35
_RETURN = 0x06
_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("@HP")


def open_steered(
    family: Family, host: str, port: int, threshold: int, counters: UdpCounters
) -> tuple[UdpSocket, UdpSocket | None]:
    """Open a socket for datagrams whose first byte is ``threshold`` or more, and another one for the rest.

    Both are bound to the same port, which no other socket may have. Where the kernel can't steer, the first one gets all,
    and there is no other.

    Raises:
        OSError: they can't be opened or bound; nothing is left open.
    """
    # Sockets that share a port would also share it with another relay's, unseen. One that does not share finds it taken.
    with UdpSocket(family, host, port) as alone:
        port = alone.getsockname()[1]
    with contextlib.ExitStack() as stack:
        # The program gives the place of a socket among those of the port, in the order in which they were bound.
        rest = stack.enter_context(UdpSocket(family, host, port, counters, shares_port=True))
        first = stack.enter_context(UdpSocket(family, host, port, counters, shares_port=True))
        try:
            _steer(first, threshold)
        except OSError:
            rest.close()
            stack.pop_all()
            return first, None
        stack.pop_all()
        return first, rest


def _steer(sock: socket.socket, threshold: int) -> None:
    """Send what begins with ``threshold`` or more to the second socket of a port, all else, and nothing, to the first.

    Raises:
        OSError: the kernel takes no such program.
    """
    program = b"".join(
        _INSTRUCTION.pack(*instruction)
        for instruction in (
            (_LOAD_BYTE, 0, 0, 0),  # of an empty datagram: ends with 0
            (_JUMP_IF_AT_LEAST, 0, 1, threshold),
            (_RETURN, 0, 0, 1),
            (_RETURN, 0, 0, 0),
        )
    )
    code = array.array("B", program)
    address, _ = code.buffer_info()
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, _PROGRAM.pack(len(program) // _INSTRUCTION.size, address))
