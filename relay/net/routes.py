"""The addresses and routes of this machine, as the kernel has them now. Needs no privilege."""

import errno
import socket

from relay.core.addresses import IPV4_LENGTH, Family
from relay.net.netlink import ADDRESS, IFA_ADDRESS, IFA_LOCAL, Kind, NetlinkSocket, parse_attributes
from relay.net.udp import ADDRESS_FAMILIES

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
    addresses: set[str] = set()
    with NetlinkSocket() as kernel:
        for body in kernel.dump(Kind.GET_ADDRESS, Kind.NEW_ADDRESS, bytes(ADDRESS.size)):
            found = parse_attributes(body, ADDRESS.size)
            packed = found.get(IFA_LOCAL) or found[IFA_ADDRESS]
            addresses.add(socket.inet_ntop(socket.AF_INET if len(packed) == IPV4_LENGTH else socket.AF_INET6, packed))
    return frozenset(addresses)


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
