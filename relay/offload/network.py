"""What the kernel says of the network: links, their addresses, neighbours, routes. Nothing but data.

Addresses are as `relay.offload.layout.packed_address` gives them: 16 bytes, IPv4 ones mapped.
"""

from dataclasses import dataclass
from enum import Enum, IntFlag, auto
from typing import NamedTuple, TypeAlias


class Link(NamedTuple):
    """An interface."""

    ifindex: int
    name: str
    mac: bytes
    """6 bytes if `ethernet`, else any number."""
    mtu: int
    """Bytes of the longest IPv4 packet."""
    ipv6_mtu: int
    """Bytes of the longest IPv6 packet: what a router has announced, or the same."""
    up: bool
    """Switched on, and with a carrier."""
    ethernet: bool
    kind: str = ""
    """Such as `veth` or `vlan`; empty for hardware."""
    parent: int = 0
    """The interface that a VLAN of 802.1Q is on; 0 for anything else, and if that one is in another network namespace."""
    vlan: int = 0
    """The tag of that VLAN."""


class Address(NamedTuple):
    """An address of this machine."""

    ifindex: int
    address: bytes
    scope: int
    """As the kernel numbers them: 0 global, 253 link, 254 host."""
    tentative: bool = False
    """It may turn out to be another machine's: nothing is received for it yet."""


class NeighbourState(IntFlag):
    """What the kernel knows of a neighbour (linux/neighbour.h)."""

    NONE = 0
    INCOMPLETE = 0x01
    REACHABLE = 0x02
    STALE = 0x04
    DELAY = 0x08
    PROBE = 0x10
    FAILED = 0x20
    NOARP = 0x40
    PERMANENT = 0x80


class Neighbour(NamedTuple):
    """Another machine on a link."""

    ifindex: int
    address: bytes
    mac: bytes
    """Empty if it isn't known."""
    state: NeighbourState
    """NONE if the kernel has forgotten it."""


class Route(NamedTuple):
    """How packets get to a destination."""

    ifindex: int
    """The interface that they leave through."""
    gateway: bytes | None
    """Whom to hand them to: None for the destination itself. It may be an IPv6 address for an IPv4 destination."""
    source: bytes | None
    """The address that they come from, if they are sent from a socket that has none of its own."""
    mtu: int | None
    """Bytes of the longest packet, if the route says so or the path has been found to be narrow."""


class NoRoute(Enum):
    """Why there is no such way."""

    LOCAL = auto()
    """It is an address of this machine."""
    UNREACHABLE = auto()
    """The kernel refuses: no route, one that says so, or the source is no address of this machine."""
    NOT_UNICAST = auto()
    """Several machines have it: multicast, broadcast, anycast."""
    TUNNEL = auto()
    """Something is put in front of the packets on their way out."""
    UNKNOWN = auto()
    """There was no answer, or none that is understood."""


Outcome: TypeAlias = Route | NoRoute


class LookUp(NamedTuple):
    """A question: how does a packet get there?"""

    entry: int
    """Of the map: what the answer is for."""
    destination: bytes
    source: bytes | None = None
    """The address that the sending socket is bound to."""


class LinkNews(NamedTuple):
    """An interface is new, has changed, or is gone."""

    ifindex: int
    link: Link | None
    """None if it is gone."""


class NeighbourNews(NamedTuple):
    """A neighbour is new, has changed, or is forgotten."""

    neighbour: Neighbour


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """An address of this machine came or went."""


@dataclass(frozen=True, slots=True)
class RoutesChanged:
    """A route or a rule came or went: any destination may have another way now."""


@dataclass(frozen=True, slots=True)
class Overrun:
    """The kernel had more news than there was room for: nothing that it said before is to be relied on."""


News: TypeAlias = LinkNews | NeighbourNews | AddressesChanged | RoutesChanged | Overrun
