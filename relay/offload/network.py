"""The kernel's network state: links, addresses, neighbours and routes, and the content of their messages. No IO.

Addresses have the format of `relay.offload.layout.packed_address`: 16 bytes, IPv4 addresses mapped.

A library for the messages (pyroute2) takes 300 ms of CPU and 25 MB for its import, and 130 µs for a route. After a change of
a gateway, up to 16,000 routes are looked up again.
"""

import socket
import struct
from functools import lru_cache
from typing import Final, NamedTuple

from relay.net.netlink import ADDRESS, ATTRIBUTE, IFA_ADDRESS, IFA_LOCAL, Kind, parse_attributes, request
from relay.offload.layout import V4_MAPPED


class Link(NamedTuple):
    """An interface."""

    ifindex: int
    name: str
    mac: bytes
    """6 bytes if `ethernet`, else any length."""
    mtu: int
    """Bytes of the longest IPv4 packet."""
    ipv6_mtu: int
    """Bytes of the longest IPv6 packet: the MTU of a router advertisement, or the same MTU."""
    up: bool
    """Enabled, with a carrier."""
    ethernet: bool
    parent: int = 0
    """The parent interface of an 802.1Q VLAN; 0 for other interfaces, or a parent in another network namespace."""
    vlan: int = 0
    """The tag of the VLAN."""
    master: int = 0
    """The bond, bridge or upper interface to which this interface belongs; 0 for none, or for an inactive port of a bond.

    A switch may send a packet to all ports. The kernel drops the copies of inactive ports, but drivers run the program.
    """


class Address(NamedTuple):
    """An address of this machine."""

    ifindex: int
    address: bytes
    tentative: bool = False
    """Duplicate address detection is not complete: the kernel does not accept packets for the address."""


class Neighbour(NamedTuple):
    """Another machine on a link."""

    ifindex: int
    address: bytes
    mac: bytes
    """Empty if the kernel does not know it, or has given it up."""
    stale: bool = False
    """The kernel will probe the neighbour when it sends a packet.

    The neighbour has most likely not moved, so its MAC address is used, but the kernel does not see offloaded packets.
    Therefore one packet per second is left to the kernel. The neighbour then becomes DELAY without a notification, PROBE
    while the kernel probes, and finally REACHABLE or FAILED.
    """


class Route(NamedTuple):
    """The route of unicast packets that leave this machine."""

    ifindex: int
    """The outgoing interface."""
    gateway: bytes | None
    """The next hop, or None for the destination itself. It may be an IPv6 address for an IPv4 destination."""
    source: bytes | None
    """The source address for a socket without an own address."""
    mtu: int | None
    """Bytes of the longest packet, if set by the route or by path MTU discovery."""


class LookUp(NamedTuple):
    """A route lookup."""

    destination: bytes
    source: bytes | None = None
    """The bind address of the sending socket."""


_WORD: Final = struct.Struct("=I")

_LINK: Final = struct.Struct("=BxHiI4x")  # family, type, index, flags
_ETHERNET: Final = 1
_RUNNING: Final = 0x1 | 0x40
_LINK_ADDRESS, _NAME, _MTU, _PARENT, _MASTER, _INFO, _AF_SPEC, _PARENT_NAMESPACE = 1, 3, 4, 5, 10, 18, 26, 37
_INFO_KIND, _INFO_DATA, _INFO_PORT_KIND, _INFO_PORT_DATA, _VLAN_ID, _VLAN_PROTOCOL = 1, 2, 4, 5, 1, 5
_BOND_PORT_STATE: Final = 1
_BACKUP: Final = b"\1"
_INET6_CONF: Final = 2
_INET6_MTU: Final = slice(8, 12)
_8021Q: Final = b"\x81\0"

_IFA_FLAGS: Final = 8
_TENTATIVE: Final = 0x40 | 0x08
"""Duplicate address detection is not complete, or has failed."""

_NEIGHBOUR: Final = struct.Struct("=BxxxiHBx")  # family, interface, state, flags
_NDA_DST, _NDA_LLADDR = 1, 2
_STALE: Final = 0x04
_USABLE: Final = 0x02 | _STALE | 0x08 | 0x10 | 0x40 | 0x80
"""States (linux/neighbour.h): reachable, stale, delay, probe, noarp, permanent; neither incomplete nor failed."""
_MAC_LENGTH: Final = 6
_PROXY: Final = 0x08
"""A neighbour for which this machine responds."""

_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # family, bits of both addresses, class, table, protocol, scope, type, flags
_DST, _SRC, _OIF, _GATEWAY, _PREFSRC, _METRICS, _VIA, _ENCAP_TYPE, _IP_PROTO = 1, 2, 4, 5, 7, 8, 18, 21, 27
_METRIC_MTU: Final = 2
_UNICAST: Final = 1
_UDP: Final = b"\x11"
"""A rule may select the protocol."""


def route_request(look_up: LookUp, sequence: int) -> bytes:
    """Return a request for the route of a UDP packet."""
    destination, source = look_up
    family = socket.AF_INET6
    if destination.startswith(V4_MAPPED):
        family, destination, source = socket.AF_INET, destination[12:], source and source[12:]
    bits = 8 * len(destination)
    body = _ROUTE.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, 0) + _attribute(_DST, destination)
    body += _attribute(_IP_PROTO, _UDP + bytes(3), 1)
    return request(Kind.GET_ROUTE, sequence, body + _attribute(_SRC, source) if source else body)


def _attribute(kind: int, value: bytes, size: int | None = None) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + (len(value) if size is None else size), kind) + value


def parse_link(body: bytes) -> Link | None:
    """Parse a link. Return None for an invalid message, or for a view of a bridge or an address family."""
    if len(body) < _LINK.size:
        return None
    family, type_, ifindex, flags = _LINK.unpack_from(body)
    attributes = parse_attributes(body, _LINK.size)
    name, mtu = attributes.get(_NAME), _word(attributes.get(_MTU))
    if family != socket.AF_UNSPEC or name is None or mtu is None:
        return None
    info = parse_attributes(attributes.get(_INFO, b""))
    data = parse_attributes(info.get(_INFO_DATA, b""))
    ipv6 = parse_attributes(parse_attributes(attributes.get(_AF_SPEC, b"")).get(socket.AF_INET6, b""))
    parent = vlan = 0
    # IFLA_LINK is also the peer of a veth, and an index in another namespace with IFLA_LINK_NETNSID.
    is_vlan = _text(info.get(_INFO_KIND, b"")) == "vlan" and data.get(_VLAN_PROTOCOL, _8021Q) == _8021Q
    if is_vlan and _PARENT_NAMESPACE not in attributes:
        parent, vlan = _word(attributes.get(_PARENT)) or 0, int.from_bytes(data.get(_VLAN_ID, b""), "little")
    port = parse_attributes(info.get(_INFO_PORT_DATA, b""))
    is_inactive = _text(info.get(_INFO_PORT_KIND, b"")) == "bond" and port.get(_BOND_PORT_STATE) == _BACKUP
    return Link(
        ifindex=ifindex,
        name=_text(name),
        mac=attributes.get(_LINK_ADDRESS, b"") if type_ == _ETHERNET else b"",
        mtu=mtu,
        ipv6_mtu=min(_word(ipv6.get(_INET6_CONF, b"")[_INET6_MTU]) or mtu, mtu),
        up=flags & _RUNNING == _RUNNING,
        ethernet=type_ == _ETHERNET,
        parent=parent,
        vlan=vlan,
        master=0 if is_inactive else _word(attributes.get(_MASTER)) or 0,
    )


def parse_address(body: bytes) -> Address | None:
    """Parse an address of this machine. Return None for an invalid message."""
    if len(body) < ADDRESS.size:
        return None
    _, flags, ifindex = ADDRESS.unpack_from(body)
    attributes = parse_attributes(body, ADDRESS.size)
    address = _mapped(attributes.get(IFA_LOCAL, attributes.get(IFA_ADDRESS)))
    flags |= _word(attributes.get(_IFA_FLAGS)) or 0
    return None if address is None else Address(ifindex, address, bool(flags & _TENTATIVE))


def parse_neighbour(body: bytes) -> Neighbour | None:
    """Parse a neighbour. Return None for an invalid message, or for an address for which this machine responds."""
    if len(body) < _NEIGHBOUR.size:
        return None
    family, ifindex, state, flags = _NEIGHBOUR.unpack_from(body)
    attributes = parse_attributes(body, _NEIGHBOUR.size)
    address = _mapped(attributes.get(_NDA_DST))
    if family not in (socket.AF_INET, socket.AF_INET6) or address is None or flags & _PROXY:
        return None
    mac = attributes.get(_NDA_LLADDR, b"")
    if not state & _USABLE or len(mac) != _MAC_LENGTH or not any(mac):
        return Neighbour(ifindex, address, b"")
    return Neighbour(ifindex, address, mac, bool(state & _STALE))


def parse_route(body: bytes) -> Route | None:
    """Parse a route. Return None for an invalid message, a local destination, and a route that is no unicast or a tunnel."""
    if len(body) < _ROUTE.size or body[7] != _UNICAST:
        return None
    found = parse_attributes(body, _ROUTE.size).get
    return _route(tuple(map(found, (_OIF, _GATEWAY, _VIA, _PREFSRC, _METRICS, _ENCAP_TYPE))))


# Cached, because most destinations share a few routes.
@lru_cache(maxsize=256)
def _route(values: tuple[bytes | None, ...]) -> Route | None:
    """Convert the values of attributes, None for missing attributes."""
    interface, gateway, via, source, metrics, tunnel = values
    ifindex = _word(interface)
    # RTA_VIA starts with the address family, which the length implies.
    next_hop = via[2:] if gateway is None and via is not None else gateway
    if tunnel is not None or ifindex is None or (next_hop is not None and _mapped(next_hop) is None):
        return None
    mtu = _word(parse_attributes(metrics or b"").get(_METRIC_MTU)) or None
    return Route(ifindex, _mapped(next_hop), _mapped(source), mtu)


def _word(value: bytes | None) -> int | None:
    return int.from_bytes(value, "little") if value is not None and len(value) == _WORD.size else None


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _mapped(address: bytes | None) -> bytes | None:
    """Return an address of 16 bytes, or None for a missing or invalid address."""
    if address is not None and len(address) == 4:  # noqa: PLR2004 - IPv4
        return V4_MAPPED + address
    return address if address is not None and len(address) == len(V4_MAPPED) + 4 else None
