"""Which way to each destination: from what the kernel says of its network to entries of the map `next_hops`. No IO.

Whoever holds a `NextHops` tells it whom to follow and what the kernel says, and takes out of it what is to be done:

    follow, unfollow, link, neighbour, attach, replace, routes_changed   →  look_ups: routes to ask the kernel for
    found: the answers, and all of the above                             →  entries: to be written to the map

What is put in only marks what it touches. The work is done as it is taken out, in portions: news about a gateway with 16,000
destinations behind it must keep nobody waiting for as long as all of them take, and twice the same news is worked on once.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

from relay.offload.layout import OWN_ADDRESSES, NextHop, Own, packed_address
from relay.offload.network import Address, Link, LinkNews, LookUp, Neighbour, NeighbourNews, NeighbourState, NoRoute, Outcome

UNKNOWN: Final = NextHop(0, bytes(16))
"""The entry that leaves packets to userspace, whose sending has the kernel find out what is missing."""

_USABLE: Final = (
    NeighbourState.REACHABLE
    | NeighbourState.STALE
    | NeighbourState.DELAY
    | NeighbourState.PROBE
    | NeighbourState.NOARP
    | NeighbourState.PERMANENT
)
_MAC_LENGTH: Final = 6
_IPV4: Final = packed_address("0.0.0.0")[:12]  # noqa: S104 - what mapped addresses begin with

_Place: TypeAlias = tuple[int, bytes]
"""Where a neighbour is: interface and address."""


class Mode(Enum):
    """How the program is attached to an interface."""

    NATIVE = auto()
    """In the driver: VLAN tags are still part of the packet."""
    GENERIC = auto()
    """Behind it: they are gone from received packets, and can't be put into sent ones."""


class _WayOut(NamedTuple):
    """What frames through an interface look like, and where they really leave."""

    ifindex: int
    mac: bytes
    vlan: int
    mtu: int
    ipv6_mtu: int


class _Reach(NamedTuple):
    """All that matters of a neighbour."""

    mac: bytes
    stale: bool


class _Followed:
    """A destination."""

    __slots__ = ("look_up", "outcome", "place", "written")

    def __init__(self, look_up: LookUp) -> None:
        self.look_up = look_up
        self.outcome: Outcome = NoRoute.UNKNOWN
        self.place: _Place | None = None
        self.written = UNKNOWN


class NextHops:
    """The destinations followed, and what is known about the ways to them."""

    def __init__(self) -> None:
        self._attached: dict[int, Mode] = {}
        self._links: dict[int, Link] = {}
        self._ways_out: dict[int, _WayOut] = {}
        # As many as the kernel has, which limits them: each leaves as the kernel says that it has forgotten it.
        self._neighbours: dict[_Place, _Reach] = {}
        self._followed: dict[int, _Followed] = {}
        self._behind: dict[_Place, set[int]] = {}
        # In order, so that none is left behind by others that come up again and again.
        self._to_ask: dict[int, None] = {}
        self._to_write: dict[int, None] = {}
        self._left: dict[int, NextHop] = {}

    @property
    def pending(self) -> bool:
        """Whether there is something to take out."""
        return bool(self._to_ask or self._to_write)

    def follow(self, index: int, host: str, source: str | None = None) -> None:
        """Keep an entry up to date from now on. Whatever it was for before is forgotten.

        Args:
            index: of the entry.
            host: the destination, an address.
            source: the address that the relay sends from; None to have the kernel choose.

        Raises:
            OSError: one of them is no address.
        """
        look_up = LookUp(index, packed_address(host), None if source is None else packed_address(source))
        written = self._forget(index)
        followed = self._followed[index] = _Followed(look_up)
        followed.written = written
        if written is not UNKNOWN:
            self._to_write[index] = None
        # Where a link-local address is depends on the link, which is no part of a peer's address.
        if not _is_link_local(look_up.destination):
            self._to_ask[index] = None

    def unfollow(self, index: int) -> None:
        """Forget a destination: its entry becomes unknown."""
        written = self._forget(index)
        if written is not UNKNOWN:
            self._left[index] = written
            self._to_write[index] = None

    def _forget(self, index: int) -> NextHop:
        """Give what the entry has now."""
        self._to_ask.pop(index, None)
        self._to_write.pop(index, None)
        followed = self._followed.pop(index, None)
        if followed is None:
            return self._left.pop(index, UNKNOWN)
        self._move(index, followed, None)
        return followed.written

    def found(self, look_up: LookUp, outcome: Outcome) -> None:
        """Take the answer to a question, also one that nobody has any more."""
        followed = self._followed.get(look_up.entry)
        if followed is None or followed.look_up != look_up or followed.outcome == outcome:
            return
        followed.outcome = outcome
        place = None if isinstance(outcome, NoRoute) else (outcome.ifindex, outcome.gateway or look_up.destination)
        self._move(look_up.entry, followed, place)
        self._to_write[look_up.entry] = None

    def _move(self, index: int, followed: _Followed, place: _Place | None) -> None:
        if followed.place == place:
            return
        if followed.place is not None:
            behind = self._behind[followed.place]
            behind.remove(index)
            if not behind:
                del self._behind[followed.place]
        followed.place = place
        if place is not None:
            self._behind.setdefault(place, set()).add(index)

    def neighbour(self, news: NeighbourNews) -> None:
        """Take what the kernel says of a neighbour."""
        self._learn(news.neighbour)

    def _learn(self, neighbour: Neighbour) -> None:
        place = (neighbour.ifindex, neighbour.address)
        reach = _reach(neighbour)
        if reach == self._neighbours.get(place):
            return
        if reach is None:
            del self._neighbours[place]
        else:
            self._neighbours[place] = reach
        self._to_write.update(dict.fromkeys(self._behind.get(place, ())))

    def link(self, news: LinkNews) -> bool:
        """Take what the kernel says of an interface.

        Returns:
            Whether routes may have changed as well: those through an interface come and go with it, which the kernel does
            not always say.
        """
        before = self._links.get(news.ifindex)
        if news.link == before:
            return False
        if news.link is not None:
            self._links[news.ifindex] = news.link
        else:
            del self._links[news.ifindex]
            for place in [each for each in self._neighbours if each[0] == news.ifindex]:
                del self._neighbours[place]
        self._find_ways_out()
        return before is None or news.link is None or before.up != news.link.up

    def attach(self, devices: Mapping[int, Mode]) -> None:
        """Take which interfaces have the program now, and how."""
        self._attached = dict(devices)
        self._find_ways_out()

    def replace(self, links: Iterable[Link], neighbours: Iterable[Neighbour]) -> None:
        """Take all that the kernel has, instead of whatever it said before. Routes are to be asked for again, too."""
        self._links = {each.ifindex: each for each in links}
        self._find_ways_out()
        known = list(neighbours)
        for ifindex, address in self._neighbours.keys() - {(each.ifindex, each.address) for each in known}:
            self._learn(Neighbour(ifindex, address, b"", NeighbourState.NONE))
        for each in known:
            self._learn(each)
        self.routes_changed()

    def routes_changed(self) -> None:
        """Ask for all routes again. Until the answers come, packets take the ways that were known."""
        self._to_ask = dict.fromkeys(
            index for index, each in self._followed.items() if not _is_link_local(each.look_up.destination)
        )

    def _find_ways_out(self) -> None:
        before, self._ways_out = self._ways_out, {}
        for index, link in self._links.items():
            way_out = self._way_out(link)
            if way_out is not None:
                self._ways_out[index] = way_out
        changed = {index for index, _ in before.items() ^ self._ways_out.items()}
        for place, behind in self._behind.items():
            if place[0] in changed:
                self._to_write.update(dict.fromkeys(behind))

    def _way_out(self, link: Link) -> _WayOut | None:
        """Tell how the program can send through an interface, if it can."""
        if not link.up or not link.ethernet or len(link.mac) != _MAC_LENGTH:
            return None
        if link.ifindex in self._attached:
            return _WayOut(link.ifindex, link.mac, 0, link.mtu, link.ipv6_mtu)
        parent = self._links.get(link.parent)
        if parent is None or not parent.up or not link.vlan or self._attached.get(parent.ifindex) is not Mode.NATIVE:
            return None
        return _WayOut(parent.ifindex, link.mac, link.vlan, min(link.mtu, parent.mtu), min(link.ipv6_mtu, parent.mtu))

    def look_ups(self, limit: int) -> list[LookUp]:
        """Take out what the kernel is to be asked next, at most so many; `found` takes the answers."""
        taken = list(islice(self._to_ask, limit))
        for index in taken:
            del self._to_ask[index]
        return [self._followed[index].look_up for index in taken]

    def entries(self, limit: int) -> list[tuple[int, NextHop]]:
        """Take out what is to be written next to the map, at most so many: index and entry, `UNKNOWN` for no way.

        Fewer than the limit, or none, does not mean that there are no more: see `pending`.
        """
        taken = list(islice(self._to_write, limit))
        changed = []
        for index in taken:
            del self._to_write[index]
            followed = self._followed.get(index)
            if followed is None:
                del self._left[index]
                changed.append((index, UNKNOWN))
                continue
            entry = self._entry(followed)
            if entry != followed.written:
                followed.written = entry
                changed.append((index, entry))
        return changed

    def _entry(self, followed: _Followed) -> NextHop:
        route = followed.outcome
        if isinstance(route, NoRoute) or followed.place is None:
            return UNKNOWN
        way_out = self._ways_out.get(route.ifindex)
        reach = self._neighbours.get(followed.place)
        source = followed.look_up.source or route.source
        if way_out is None or reach is None or source is None:
            return UNKNOWN
        destination = followed.look_up.destination
        mtu = way_out.mtu if destination.startswith(_IPV4) else way_out.ipv6_mtu
        return NextHop(
            way_out.ifindex,
            destination,
            source,
            reach.mac,
            way_out.mac,
            way_out.vlan,
            mtu if route.mtu is None else min(mtu, route.mtu),
            reach.stale,
        )


def _reach(neighbour: Neighbour) -> _Reach | None:
    """Tell what there is to be known about a neighbour; None if packets can't be sent to it now.

    A stale one is still where it was, most likely. But nobody asks for it again unless a packet is sent to it, and none is
    that the program relays: the flag has one a second take the kernel's way. That makes it DELAY, without a word, and then
    PROBE: there the kernel asks by itself, until it is REACHABLE again or FAILED.
    """
    if not neighbour.state & _USABLE or len(neighbour.mac) != _MAC_LENGTH or not any(neighbour.mac):
        return None
    return _Reach(neighbour.mac, bool(neighbour.state & NeighbourState.STALE))


def own_addresses(
    addresses: Iterable[Address], links: Iterable[Link], attached: Mapping[int, Mode], limit: int = OWN_ADDRESSES
) -> Sequence[Own]:
    """Give the addresses of this machine that packets to the program can have, those of its own interfaces first.

    Left out are those of VLANs on interfaces where it sees no tags, which it can't tell from others; and what is never on a
    wire, or only on one.

    Args:
        addresses: all.
        links: all.
        attached: the interfaces that have the program.
        limit: how many at most.
    """
    # On the same wire with another tag there may be another machine with the same address.
    hidden = {each.ifindex for each in links if attached.get(each.parent) is Mode.GENERIC and each.ifindex not in attached}
    tags = {
        each.ifindex: each.vlan
        for each in links
        if attached.get(each.parent) is Mode.NATIVE and each.ifindex not in attached
    }
    fit = [
        each
        for each in addresses
        if not (each.tentative or each.ifindex in hidden or _is_link_local(each.address) or _is_loopback(each.address))
    ]
    fit.sort(key=lambda each: (each.ifindex not in attached, each.ifindex, each.address))
    found = {each.address: Own(each.address, tags.get(each.ifindex, 0)) for each in reversed(fit)}
    return [found[address] for address in dict.fromkeys(each.address for each in fit)][:limit]


def _is_link_local(address: bytes) -> bool:
    if address.startswith(_IPV4):
        return address[12:14] == b"\xa9\xfe"  # 169.254.0.0/16
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80  # noqa: PLR2004 - fe80::/10


def _is_loopback(address: bytes) -> bool:
    return address == b"\1".rjust(16, b"\0") or (address.startswith(_IPV4) and address[12] == 127)  # noqa: PLR2004 - 127.0.0.0/8
