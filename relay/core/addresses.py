"""Transport addresses as the operating system spells them, and the types that keep them apart.

An address is the tuple that a socket gives and takes: ``(host, port)`` for IPv4, ``(host, port, 0, scope)`` for IPv6. The
core never rewrites one, so that the address of a packet is a table key as it arrives (no conversion per packet).
"""

import ipaddress
from enum import IntEnum
from typing import NewType, TypeAlias

SocketAddress: TypeAlias = tuple[str, int, *tuple[int, ...]]

# A client's address and a peer's address look alike and mean opposite ends: the types make a swap an error.
ClientAddress = NewType("ClientAddress", SocketAddress)
PeerAddress = NewType("PeerAddress", SocketAddress)
RelayedPort = NewType("RelayedPort", int)
ChannelNumber = NewType("ChannelNumber", int)
# Never reused, unlike a port: data still on its way from a freed allocation can't be taken for its successor's.
AllocationId = NewType("AllocationId", int)

IPV4_LENGTH = 4
IPV6_LENGTH = 16

_GROUPS = 8
_NETWORK_GROUPS = 4


class Family(IntEnum):
    """An address family, numbered as in STUN's address attributes (RFC 8489 §14.1)."""

    IPV4 = 1
    IPV6 = 2

    # As its number has, in C: an enumeration's own is a function in Python, which look-ups would call.
    __hash__ = int.__hash__

    def __str__(self) -> str:
        return "IPv4" if self is Family.IPV4 else "IPv6"


def family_of(address: SocketAddress) -> Family:
    """Tell the family of an address from its shape."""
    return Family.IPV4 if len(address) == 2 else Family.IPV6  # noqa: PLR2004 - (host, port) is all IPv4 has


def network_of(address: SocketAddress) -> str:
    """Give what one sender can be told by, as text: an IPv4 host, or the first 64 bits of an IPv6 one.

    It relies on hosts being spelled as operating systems do (RFC 5952), and costs a fifth of what ipaddress takes.
    """
    host = address[0]
    if len(address) == 2:  # noqa: PLR2004 - (host, port) is all IPv4 has
        return host
    head, gap, tail = host.partition("::")
    groups = head.split(":") if head else []
    if gap and len(groups) < _NETWORK_GROUPS:
        rest = tail.split(":") if tail else []
        # A dotted end is two groups.
        groups += ["0"] * (_GROUPS - len(groups) - len(rest) - ("." in tail)) + rest
    return ":".join(groups[:_NETWORK_GROUPS])


def pack_host(address: SocketAddress) -> bytes:
    """Give the host of an address as 4 or 16 bytes in network order."""
    if family_of(address) is Family.IPV4:
        # A tenth of what ipaddress takes, which also checks what an operating system, or this module, has written.
        return bytes(map(int, address[0].split(".")))
    return ipaddress.IPv6Address(address[0]).packed


def unpack_address(host: bytes, port: int) -> SocketAddress:
    """Spell an address as a socket would.

    Args:
        host: 4 or 16 bytes in network order.
        port: 0–65535.

    Raises:
        ValueError: ``host`` has another length.
    """
    if len(host) == IPV4_LENGTH:
        return ("%d.%d.%d.%d" % tuple(host), port)  # noqa: UP031 - a third of the cost of the other ways
    if len(host) == IPV6_LENGTH:
        return (str(ipaddress.IPv6Address(host)), port, 0, 0)
    raise ValueError(f"an address has 4 or 16 bytes, not {len(host)}")


def socket_address(host: str, port: int) -> SocketAddress:
    """Spell the address of a host that is given as text.

    Raises:
        ValueError: ``host`` is no IP address.
    """
    return unpack_address(ipaddress.ip_address(host).packed, port)


def show(address: SocketAddress) -> str:
    """Write an address as people do: ``192.0.2.1:3478`` or ``[2001:db8::1]:3478``."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
