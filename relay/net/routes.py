"""The addresses and routes of this machine, as the kernel has them now. Needs no privilege."""

import errno
import socket
import struct
from collections.abc import Iterator

from relay.core.addresses import IPV4_LENGTH, Family
from relay.net.udp import ADDRESS_FAMILIES

TIMEOUT = 5.0
"""Seconds for each part of the kernel's response, which comes at once."""

ATTEMPTS = 5
"""Queries, while the addresses keep changing."""

_HEADER = struct.Struct("=IHHII")
_ADDRESS_HEADER_LENGTH = 8
_ATTRIBUTE = struct.Struct("=HH")
_GET_ADDRESS, _NEW_ADDRESS, _ERROR, _DONE = 22, 20, 2, 3
_REQUEST_DUMP, _INTERRUPTED = 0x301, 0x10
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_LARGEST = 1 << 16
"""Numbers of linux/netlink.h, linux/rtnetlink.h and linux/if_addr.h. The kernel's messages have at most 32 KB."""

_NO_PATH = frozenset(
    (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EACCES, errno.EINVAL)
)
"""Errors of a missing address, and of missing, unreachable, prohibited and blackhole routes (ip-route(8))."""

_ANY_PORT = 9


def own_addresses() -> frozenset[str]:
    """Return the addresses of all interfaces of this machine.

    A query takes 0.03 ms, and 1 ms for 200 addresses. getifaddrs(3) takes 5 ms for them, because it reads the links too.

    Raises:
        OSError: the kernel does not respond, or the addresses change faster than they can be read.
    """
    for _ in range(ATTEMPTS):
        addresses: set[str] = set()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asking:
            asking.settimeout(TIMEOUT)
            # A connected socket receives nothing from other processes.
            asking.connect((0, 0))
            asking.send(_HEADER.pack(_HEADER.size + _ADDRESS_HEADER_LENGTH, _GET_ADDRESS, _REQUEST_DUMP, 1, 0) + bytes(8))
            is_whole = _read_dump(asking, addresses)
        if is_whole:
            return frozenset(addresses)
    raise OSError(errno.EINTR, "the addresses change faster than they can be read")


def _read_dump(asking: socket.socket, addresses: set[str]) -> bool:
    """Add the addresses of a dump. Return False if they changed meanwhile."""
    is_whole = True
    while True:
        data = asking.recv(_LARGEST)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
            is_whole = is_whole and not flags & _INTERRUPTED
            if kind == _DONE:
                return is_whole
            if kind == _ERROR or length < _HEADER.size:
                raise OSError(errno.EIO, "the kernel rejects the query of addresses")
            if kind == _NEW_ADDRESS:
                attributes = dict(_attributes(data[offset + _HEADER.size + _ADDRESS_HEADER_LENGTH : offset + length]))
                # On a point-to-point link, IFA_ADDRESS is the other end.
                packed = attributes.get(_IFA_LOCAL) or attributes[_IFA_ADDRESS]
                addresses.add(socket.inet_ntop(socket.AF_INET if len(packed) == IPV4_LENGTH else socket.AF_INET6, packed))
            offset += length + 3 & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        yield kind, data[offset + _ATTRIBUTE.size : offset + length]
        offset += max(_ATTRIBUTE.size, length + 3 & ~3)


def has_address(family: Family, host: str) -> bool:
    """Check whether sockets of this machine can receive packets for a host, with the exceptions of `source_toward`.

    A bind proves nothing: with the sysctl ip_nonlocal_bind it succeeds for any host. `own_addresses` includes addresses
    whose duplicate detection is not complete, and lacks local routes to whole networks.
    """
    # The kernel rejects routes from an IPv4 address that is not local. For IPv6 it prefers the destination as the source.
    return source_toward(family, host, host if family is Family.IPV4 else "::") == host


def source_toward(family: Family, destination: str, bound: str) -> str | None:
    """Return the source address of packets from a bound socket to a host; None without the address or a route.

    The call sends nothing. The kernel's routing decides, so that rules and local routes count, whatever an address list has.

    Args:
        family: the family of both addresses.
        destination: the host.
        bound: the address of the socket, or the unspecified address.

    Raises:
        OSError: no socket can be opened, or a sandbox forbids the call.
    """
    with socket.socket(ADDRESS_FAMILIES[family], socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        try:
            asking.bind((bound, 0))
            asking.connect((destination, _ANY_PORT))
        except OSError as error:
            if error.errno in _NO_PATH:
                return None
            raise
        source: str = asking.getsockname()[0]
        return source
