"""Next hops of hosts, derived from the kernel's network state for the maps `next_hops` and `ways`. No IO.

The owner of a `NextHops` passes destinations and changes in, and takes the resulting work out:

    follow, unfollow, neighbour, attach, replace                         →  look_ups: routes to query
    found (the results), and all of the above                            →  entries, ways: changes of both maps

Inputs only mark the affected entries. The work is done in portions when taken out: a change of a gateway with 16,000
destinations must not block other work, and repeated changes cause the work only once.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

from relay.offload.bpf import XdpMode
from relay.offload.layout import NO_WAY, V4_MAPPED, WAY, NextHop, Own, packed_address
from relay.offload.network import Address, Link, LookUp, Neighbour, Route

_MAC_LENGTH: Final = 6

_Place: TypeAlias = tuple[int, bytes]
"""A neighbour's interface and address."""


class _WayOut(NamedTuple):
    """The real outgoing interface and the frame header for an interface."""

    ifindex: int
    mac: bytes
    vlan: int
    mtu: int
    ipv6_mtu: int


class NextHops:
    """The followed destinations and their next hops."""

    def __init__(self) -> None:
        self._attached: dict[int, XdpMode] = {}
        self._links: dict[int, Link] = {}
        self._ways_out: dict[int, _WayOut] = {}
        # The kernel limits the number of neighbours, and notifies of each deletion.
        self._neighbours: dict[_Place, Neighbour] = {}
        self._followed: dict[bytes, LookUp] = {}
        """By destination, as all of the following."""
        self._routes: dict[bytes, Route] = {}
        self._behind: dict[_Place, set[bytes]] = {}
        # Ordered, so that frequently changing entries do not starve others.
        self._to_ask: dict[bytes, None] = {}
        self._to_write: dict[bytes, None] = {}
        self._written: dict[bytes, NextHop] = {}
        self._ways: dict[bytes, bytes] = {}
        self._changed_ways: dict[bytes, bytes] = {}

    @property
    def pending(self) -> bool:
        """Whether there is work to take out."""
        return bool(self._to_ask or self._to_write)

    def follow(self, host: str, source: str | None = None) -> None:
        """Start to update the entry of a destination. Without a source address, the kernel chooses it."""
        look_up = LookUp(packed_address(host), None if source is None else packed_address(source))
        destination = look_up.destination
        # The host may have another place in `ways` than before.
        self._ways.pop(destination, None)
        if self._followed.get(destination) == look_up:
            self._to_write[destination] = None
            return
        self.unfollow(host)
        self._followed[destination] = look_up
        # Link-local destinations are ambiguous, because peer addresses do not include the link.
        if not _is_link_local(destination):
            self._to_ask[destination] = None

    def unfollow(self, host: str) -> None:
        """Drop a destination, and delete its entry."""
        destination = packed_address(host)
        self._set_route(destination, None)
        for each in (self._followed, self._to_ask, self._to_write, self._ways, self._changed_ways):
            each.pop(destination, None)
        if destination in self._written:
            self._to_write[destination] = None

    def found(self, look_up: LookUp, route: Route | None) -> None:
        """Process the result of a lookup, and ignore results of outdated lookups."""
        destination = look_up.destination
        if self._followed.get(destination) != look_up:
            return
        if self._routes.get(destination) != route or destination not in self._ways:
            self._set_route(destination, route)
            self._to_write[destination] = None

    def _set_route(self, destination: bytes, route: Route | None) -> None:
        before = self._routes.pop(destination, None)
        if before is not None:
            place = _place(destination, before)
            self._behind[place].remove(destination)
            if not self._behind[place]:
                del self._behind[place]
        if route is not None:
            self._routes[destination] = route
            self._behind.setdefault(_place(destination, route), set()).add(destination)

    def neighbour(self, neighbour: Neighbour) -> None:
        """Process a change of a neighbour."""
        place = (neighbour.ifindex, neighbour.address)
        if neighbour == self._neighbours.get(place):
            return
        if neighbour.mac:
            self._neighbours[place] = neighbour
        elif self._neighbours.pop(place, None) is None:
            return
        self._to_write.update(dict.fromkeys(self._behind.get(place, ())))

    def attach(self, devices: Mapping[int, XdpMode]) -> None:
        """Set the interfaces with the program, and their modes."""
        self._attached = dict(devices)
        self._find_ways_out()

    def replace(self, links: Iterable[Link], neighbours: Iterable[Neighbour]) -> None:
        """Replace all links and neighbours, and request all routes again.

        Packets use the previous routes until the results arrive.
        """
        self._links = {each.ifindex: each for each in links}
        self._neighbours = {(each.ifindex, each.address): each for each in neighbours if each.mac}
        self._to_ask = dict.fromkeys(each for each in self._followed if not _is_link_local(each))
        self._find_ways_out()

    def _find_ways_out(self) -> None:
        ways_out = {index: self._way_out(link) for index, link in self._links.items()}
        self._ways_out = {index: way_out for index, way_out in ways_out.items() if way_out is not None}
        self._to_write.update(dict.fromkeys(self._followed))

    def _way_out(self, link: Link) -> _WayOut | None:
        """Return the interface and frame header for sending through an interface, if possible."""
        if not link.up or not link.ethernet or len(link.mac) != _MAC_LENGTH:
            return None
        if link.ifindex in self._attached:
            return _WayOut(link.ifindex, link.mac, 0, link.mtu, link.ipv6_mtu)
        parent = self._links.get(link.parent)
        if parent is None or not parent.up or not link.vlan or self._attached.get(parent.ifindex) is not XdpMode.DRIVER:
            return None
        return _WayOut(parent.ifindex, link.mac, link.vlan, min(link.mtu, parent.mtu), min(link.ipv6_mtu, parent.mtu))

    def look_ups(self, limit: int) -> list[LookUp]:
        """Remove and return the next lookups, up to a limit. `found` processes their results."""
        taken = list(islice(self._to_ask, limit))
        for destination in taken:
            del self._to_ask[destination]
        return [self._followed[destination] for destination in taken]

    def entries(self, limit: int) -> dict[bytes, NextHop | None]:
        """Remove and return the next changed entries of the map by destination, up to a limit; None: to delete.

        Without an entry packets go to the sockets, so that the kernel resolves the next hop. A result below the limit does
        not mean that all work is done: see `pending`.
        """
        changed: dict[bytes, NextHop | None] = {}
        for destination in list(islice(self._to_write, limit)):
            del self._to_write[destination]
            if destination in self._followed:
                self._find_way(destination)
            entry = self._entry(destination)
            if entry == self._written.get(destination):
                continue
            changed[destination] = entry
            if entry is None:
                del self._written[destination]
            else:
                self._written[destination] = entry
        return changed

    def ways(self) -> dict[bytes, bytes]:
        """Remove and return the changed entries of `ways` by host, as of the last call of `entries`."""
        changed, self._changed_ways = self._changed_ways, {}
        return changed

    def _find_way(self, host: bytes) -> None:
        route, way = self._routes.get(host), NO_WAY
        if route is not None:
            way_out = self._ways_out.get(route.ifindex)
            ifindex, vlan = (route.ifindex, 0) if way_out is None else (way_out.ifindex, way_out.vlan)
            way = WAY.pack(vlan.to_bytes(2, "big"), ifindex)
        if self._ways.get(host) != way:
            self._ways[host] = self._changed_ways[host] = way

    def _entry(self, destination: bytes) -> NextHop | None:
        route = self._routes.get(destination)
        if route is None:
            return None
        way_out = self._ways_out.get(route.ifindex)
        neighbour = self._neighbours.get(_place(destination, route))
        source = self._followed[destination].source or route.source
        if way_out is None or neighbour is None or source is None:
            return None
        mtu = way_out.mtu if destination.startswith(V4_MAPPED) else way_out.ipv6_mtu
        return NextHop(
            way_out.ifindex,
            source,
            neighbour.mac,
            way_out.mac,
            way_out.vlan,
            mtu if route.mtu is None else min(mtu, route.mtu),
            neighbour.stale,
        )


def _place(destination: bytes, route: Route) -> _Place:
    return route.ifindex, route.gateway or destination


def own_addresses(addresses: Iterable[Address], links: Iterable[Link], attached: Mapping[int, XdpMode]) -> Sequence[Own]:
    """Return the destination addresses of packets for this machine, beginning with addresses of attached interfaces.

    Excluded are loopback and link-local addresses, and addresses of VLANs on interfaces whose tags the program can't see.
    """
    # With another tag on the same wire, another machine may have the same address.
    hidden = {
        each.ifindex for each in links if attached.get(each.parent) is XdpMode.GENERIC and each.ifindex not in attached
    }
    tags = {
        each.ifindex: each.vlan
        for each in links
        if attached.get(each.parent) is XdpMode.DRIVER and each.ifindex not in attached
    }
    fit = [
        each
        for each in addresses
        if not (each.tentative or each.ifindex in hidden or _is_link_local(each.address) or _is_loopback(each.address))
    ]
    fit.sort(key=lambda each: (each.ifindex not in attached, each.ifindex, each.address))
    found = {each.address: Own(each.address, tags.get(each.ifindex, 0)) for each in reversed(fit)}
    return [found[address] for address in dict.fromkeys(each.address for each in fit)]


def _is_link_local(address: bytes) -> bool:
    if address.startswith(V4_MAPPED):
        return address[12:14] == b"\xa9\xfe"  # 169.254.0.0/16
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80  # noqa: PLR2004 - fe80::/10


def _is_loopback(address: bytes) -> bool:
    return address == b"\1".rjust(16, b"\0") or (address.startswith(V4_MAPPED) and address[12] == 127)  # noqa: PLR2004 - 127.0.0.0/8
