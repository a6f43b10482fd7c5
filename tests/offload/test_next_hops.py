"""Which way packets go: what the kernel says of its network turned into entries, one piece of news after the other."""

from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.offload.layout import NextHop, Own, packed_address
from relay.offload.network import (
    Address,
    Link,
    LinkNews,
    LookUp,
    Neighbour,
    NeighbourNews,
    NeighbourState,
    NoRoute,
    Outcome,
    Route,
)
from relay.offload.next_hops import UNKNOWN, Mode, NextHops, own_addresses

DEVICE, VLAN, SECOND, TUNNEL = 3, 4, 5, 6
PEER, OTHER_PEER, PEER6 = "198.51.100.9", "198.51.100.10", "2001:db8:9::9"
OWN, OWN6 = packed_address("192.0.2.1"), packed_address("2001:db8::1")
GATEWAY, OTHER_GATEWAY, GATEWAY6 = (packed_address(each) for each in ("192.0.2.254", "192.0.2.253", "fe80::1"))
MACS = {index: bytes((2, 0, 0, 0, 0, index)) for index in (DEVICE, VLAN, SECOND)}
ITS_MAC, NEW_MAC = b"\x02\0\0\0\1\1", b"\x02\0\0\0\1\2"
LINKS = (
    Link(DEVICE, "eth0", MACS[DEVICE], 1500, 1480, up=True, ethernet=True),
    Link(VLAN, "eth0.7", MACS[VLAN], 1496, 1496, up=True, ethernet=True, kind="vlan", parent=DEVICE, vlan=7),
    Link(SECOND, "eth1", MACS[SECOND], 9000, 9000, up=True, ethernet=True),
    Link(TUNNEL, "wg0", b"", 1420, 1420, up=True, ethernet=False, kind="wireguard"),
)
USUAL = Route(DEVICE, GATEWAY, OWN, None)
S = NeighbourState


def neighbour(
    state: NeighbourState = S.REACHABLE, mac: bytes = ITS_MAC, address: bytes = GATEWAY, ifindex: int = DEVICE
) -> Neighbour:
    return Neighbour(ifindex, address, mac, state)


def known(*neighbours: Neighbour, attached: Mapping[int, Mode] | None = None) -> NextHops:
    """What is known of the network above, with the program on its first interface."""
    hops = NextHops()
    hops.attach({DEVICE: Mode.NATIVE} if attached is None else attached)
    hops.replace(LINKS, neighbours or (neighbour(),))
    return hops


def settle(hops: NextHops, routes: Outcome | Mapping[bytes, Outcome] = USUAL) -> dict[int, NextHop]:
    """Answer whatever is asked; give what is written."""
    written: dict[int, NextHop] = {}
    while hops.pending:
        for each in hops.look_ups(3):
            hops.found(each, routes[each.destination] if isinstance(routes, Mapping) else routes)
        written.update(hops.entries(3))
    return written


def entry_for(hops: NextHops, route: Outcome = USUAL, host: str = PEER, source: str | None = None) -> NextHop:
    """What the entry of a destination becomes."""
    hops.follow(0, host, source)
    return settle(hops, route).get(0, UNKNOWN)


def test_an_entry_says_where_frames_go_and_what_is_in_them() -> None:
    assert entry_for(known()) == NextHop(DEVICE, packed_address(PEER), OWN, ITS_MAC, MACS[DEVICE], 0, 1500, stale=False)


def test_packets_on_the_link_go_to_the_destination_itself() -> None:
    hops = known(neighbour(), neighbour(mac=NEW_MAC, address=packed_address(PEER)))
    assert entry_for(hops, Route(DEVICE, None, OWN, None)).to_mac == NEW_MAC


def test_an_ipv4_destination_may_be_behind_an_ipv6_gateway() -> None:
    hops = known(neighbour(mac=NEW_MAC, address=GATEWAY6))
    assert entry_for(hops, Route(DEVICE, GATEWAY6, OWN, None)).to_mac == NEW_MAC


def test_the_source_is_what_the_relay_is_bound_to() -> None:
    hops = known()
    hops.follow(0, PEER, "192.0.2.77")
    (asked,) = hops.look_ups(10)
    assert asked == LookUp(0, packed_address(PEER), packed_address("192.0.2.77"))
    hops.found(asked, Route(DEVICE, GATEWAY, None, None))
    assert dict(hops.entries(10))[0].source == packed_address("192.0.2.77")


@pytest.mark.parametrize(
    ("host", "mtu", "expected"), [(PEER, None, 1500), (PEER, 1400, 1400), (PEER, 9000, 1500), (PEER6, None, 1480)]
)
def test_a_packet_must_fit_the_link_and_the_route(host: str, mtu: int | None, expected: int) -> None:
    assert entry_for(known(), USUAL._replace(mtu=mtu), host).mtu == expected


@pytest.mark.parametrize("outcome", [*NoRoute, Route(DEVICE, GATEWAY, None, None), Route(99, GATEWAY, OWN, None)])
def test_without_a_way_or_a_source_packets_are_userspaces(outcome: Outcome) -> None:
    assert entry_for(known(), outcome) == UNKNOWN


@pytest.mark.parametrize("host", ["fe80::1", "169.254.1.1"])
def test_a_link_local_destination_is_not_even_asked_for(host: str) -> None:
    hops = known()
    hops.follow(0, host)
    hops.routes_changed()
    assert not hops.pending


@pytest.mark.parametrize("state", [S.REACHABLE, S.STALE, S.DELAY, S.PROBE, S.PERMANENT, S.NOARP])
def test_only_a_neighbour_that_the_kernel_does_not_ask_for_by_itself_is_stale(state: NeighbourState) -> None:
    entry = entry_for(known(neighbour(state)))
    assert entry.to_mac == ITS_MAC
    assert entry.stale == (state is S.STALE)


@pytest.mark.parametrize(
    "useless",
    [neighbour(S.INCOMPLETE, b""), neighbour(S.FAILED), neighbour(S.NONE), neighbour(mac=b""), neighbour(S.NOARP, bytes(6))],
    ids=str,
)
def test_without_a_neighbours_address_packets_are_userspaces(useless: Neighbour) -> None:
    assert entry_for(known(useless)) == UNKNOWN


def test_the_news_of_a_neighbour_fills_the_entry_and_empties_it() -> None:
    hops = known(neighbour(S.INCOMPLETE, b""))
    assert entry_for(hops) == UNKNOWN
    hops.neighbour(NeighbourNews(neighbour()))
    assert settle(hops)[0].to_mac == ITS_MAC
    hops.neighbour(NeighbourNews(neighbour(mac=NEW_MAC)))
    assert settle(hops)[0].to_mac == NEW_MAC
    hops.neighbour(NeighbourNews(neighbour(S.NONE, b"")))
    assert settle(hops) == {0: UNKNOWN}


def test_what_changes_nothing_is_not_written() -> None:
    hops = known()
    entry_for(hops)
    hops.neighbour(NeighbourNews(neighbour(S.PROBE)))
    assert not hops.link(LinkNews(DEVICE, LINKS[0]))
    hops.routes_changed()
    assert settle(hops) == {}


def test_news_of_a_neighbour_touches_only_what_is_behind_it() -> None:
    hops = known(neighbour(), neighbour(address=OTHER_GATEWAY))
    for index in range(10):
        hops.follow(index, f"198.51.100.{index}")
    settle(
        hops,
        {packed_address(f"198.51.100.{index}"): USUAL for index in range(9)}
        | {packed_address("198.51.100.9"): USUAL._replace(gateway=OTHER_GATEWAY)},
    )
    hops.neighbour(NeighbourNews(neighbour(mac=NEW_MAC, address=OTHER_GATEWAY)))
    assert hops.look_ups(100) == []
    assert [index for index, _ in hops.entries(1)] == [9]
    assert not hops.pending


def test_a_new_gateway_asks_once_for_each_destination_and_the_old_way_stays_meanwhile() -> None:
    hops = known(neighbour(), neighbour(mac=NEW_MAC, address=OTHER_GATEWAY))
    for index in range(100):
        hops.follow(index, f"198.51.100.{index}")
    assert len(settle(hops)) == 100
    hops.routes_changed()
    hops.routes_changed()
    asked = hops.look_ups(1000)
    assert len(asked) == 100
    assert hops.entries(1000) == []
    for each in asked:
        hops.found(each, USUAL._replace(gateway=OTHER_GATEWAY))
    assert {entry.to_mac for _, entry in hops.entries(1000)} == {NEW_MAC}


@pytest.mark.parametrize("attached", [{}, {DEVICE: Mode.NATIVE}, {SECOND: Mode.GENERIC}])
def test_packets_leave_only_through_an_interface_that_has_the_program(attached: dict[int, Mode]) -> None:
    hops = known(neighbour(ifindex=SECOND), attached=attached)
    assert (entry_for(hops, USUAL._replace(ifindex=SECOND)).ifindex == SECOND) == (SECOND in attached)


def test_attaching_and_detaching_changes_entries() -> None:
    hops = known(attached={})
    assert entry_for(hops) == UNKNOWN
    hops.attach({DEVICE: Mode.GENERIC})
    assert settle(hops)[0].ifindex == DEVICE
    hops.attach({})
    assert settle(hops) == {0: UNKNOWN}


def test_a_vlan_is_a_tag_on_an_interface_that_has_the_program_in_its_driver() -> None:
    hops = known(neighbour(ifindex=VLAN))
    route = USUAL._replace(ifindex=VLAN)
    assert entry_for(hops, route) == NextHop(DEVICE, packed_address(PEER), OWN, ITS_MAC, MACS[VLAN], 7, 1496, stale=False)
    hops.attach({DEVICE: Mode.GENERIC})
    assert settle(hops) == {0: UNKNOWN}


def test_a_vlan_with_the_program_itself_needs_no_tag() -> None:
    hops = known(neighbour(ifindex=VLAN), attached={VLAN: Mode.GENERIC})
    entry = entry_for(hops, USUAL._replace(ifindex=VLAN))
    assert (entry.ifindex, entry.vlan) == (VLAN, 0)


def test_what_is_no_ethernet_is_userspaces() -> None:
    hops = known(neighbour(ifindex=TUNNEL), attached={TUNNEL: Mode.GENERIC})
    assert entry_for(hops, USUAL._replace(ifindex=TUNNEL)) == UNKNOWN


@pytest.mark.parametrize("through", [DEVICE, VLAN])
def test_an_interface_goes_down_and_up(through: int) -> None:
    hops = known(neighbour(ifindex=through))
    entry = entry_for(hops, USUAL._replace(ifindex=through))
    assert entry != UNKNOWN
    assert hops.link(LinkNews(DEVICE, LINKS[0]._replace(up=False))), "routes may have gone with it"
    assert dict(hops.entries(10)) == {0: UNKNOWN}
    assert hops.link(LinkNews(DEVICE, LINKS[0]))
    assert dict(hops.entries(10)) == {0: entry}


def test_a_new_mtu_or_address_of_an_interface_needs_no_routes() -> None:
    hops = known()
    entry_for(hops)
    assert not hops.link(LinkNews(DEVICE, LINKS[0]._replace(mtu=1400, mac=NEW_MAC)))
    entry = settle(hops)[0]
    assert (entry.mtu, entry.from_mac) == (1400, NEW_MAC)


def test_an_interface_that_is_gone_takes_its_neighbours_along() -> None:
    hops = known()
    entry = entry_for(hops)
    assert hops.link(LinkNews(DEVICE, None))
    assert not hops.link(LinkNews(DEVICE, None))
    assert settle(hops) == {0: UNKNOWN}
    hops.link(LinkNews(DEVICE, LINKS[0]))
    assert settle(hops) == {}
    hops.neighbour(NeighbourNews(neighbour()))
    assert settle(hops) == {0: entry}


def test_an_unfollowed_entry_is_unknown() -> None:
    hops = known()
    entry_for(hops)
    hops.unfollow(0)
    hops.unfollow(0)
    assert settle(hops) == {0: UNKNOWN}


def test_what_was_never_written_needs_no_wiping() -> None:
    hops = known()
    hops.follow(0, PEER)
    hops.unfollow(0)
    assert not hops.pending


def test_an_answer_about_an_earlier_destination_is_no_answer() -> None:
    hops = known()
    hops.follow(0, PEER)
    (asked,) = hops.look_ups(10)
    hops.follow(0, OTHER_PEER)
    hops.found(asked, USUAL)
    assert hops.entries(10) == []
    assert settle(hops)[0].destination == packed_address(OTHER_PEER)


def test_an_entry_that_is_used_again_is_wiped_or_written_anew() -> None:
    hops = known()
    entry_for(hops)
    hops.follow(0, OTHER_PEER)
    assert hops.entries(10) == [(0, UNKNOWN)]
    assert settle(hops)[0].destination == packed_address(OTHER_PEER)
    hops.unfollow(0)
    hops.follow(0, PEER)
    assert settle(hops)[0].destination == packed_address(PEER)


def test_what_is_no_address_changes_nothing() -> None:
    hops = known()
    entry_for(hops)
    with pytest.raises(OSError, match="illegal"):
        hops.follow(0, "example.org")
    assert not hops.pending


def test_all_that_the_kernel_has_replaces_what_it_said() -> None:
    hops = known(neighbour(), neighbour(address=OTHER_GATEWAY))
    entry_for(hops)
    hops.replace(LINKS, [neighbour(mac=NEW_MAC)])
    assert settle(hops)[0].to_mac == NEW_MAC
    hops.replace(LINKS[1:], [neighbour(mac=NEW_MAC)])
    assert settle(hops) == {0: UNKNOWN}


def test_own_addresses_are_what_packets_on_a_wire_can_have() -> None:
    hosts = [
        (SECOND, "192.0.2.9"),
        (1, "127.0.0.1"),
        (1, "::1"),
        (DEVICE, "fe80::1"),
        (DEVICE, "192.0.2.1"),
        (1, "192.0.2.5"),
    ]
    addresses = [Address(ifindex, packed_address(host), 0) for ifindex, host in hosts]
    addresses.append(Address(DEVICE, OWN6, 0, tentative=True))
    found = own_addresses(addresses, LINKS, {DEVICE: Mode.NATIVE})
    assert found == [Own(packed_address(host)) for host in ("192.0.2.1", "192.0.2.5", "192.0.2.9")]


def test_addresses_of_a_vlan_are_own_ones_only_where_its_tag_is_seen() -> None:
    addresses = [Address(VLAN, OWN, 0)]
    assert own_addresses(addresses, LINKS, {DEVICE: Mode.NATIVE}) == [Own(OWN, vlan=7)]
    assert own_addresses(addresses, LINKS, {DEVICE: Mode.GENERIC}) == []


@pytest.mark.parametrize("mode", [Mode.NATIVE, Mode.GENERIC])
def test_packets_for_addresses_of_a_vlan_come_untagged_where_it_has_the_program_itself(mode: Mode) -> None:
    addresses = [Address(VLAN, OWN, 0)]
    assert own_addresses(addresses, LINKS, {DEVICE: mode, VLAN: Mode.GENERIC}) == [Own(OWN)]
    assert own_addresses(addresses, LINKS, {VLAN: Mode.GENERIC}) == [Own(OWN)]


def test_packets_for_addresses_of_other_interfaces_come_untagged() -> None:
    addresses = [Address(VLAN, OWN, 0), Address(SECOND, OWN6, 0), Address(DEVICE, GATEWAY, 0)]
    own = own_addresses(addresses, LINKS, {DEVICE: Mode.NATIVE})
    assert own == [Own(GATEWAY), Own(OWN, vlan=7), Own(OWN6)]
    assert own_addresses(addresses, LINKS, {SECOND: Mode.NATIVE}) == [Own(OWN6), Own(GATEWAY), Own(OWN)]


@pytest.mark.parametrize("first", [DEVICE, VLAN])
def test_an_address_of_an_interface_and_its_vlan_is_the_interfaces(first: int) -> None:
    addresses = [Address(first, OWN, 0), Address(DEVICE + VLAN - first, OWN, 0)]
    assert own_addresses(addresses, LINKS, {DEVICE: Mode.NATIVE}) == [Own(OWN)]


def test_of_many_own_addresses_those_of_the_programs_interfaces_go_first() -> None:
    addresses = [Address(SECOND, packed_address(f"192.0.2.{each}"), 0) for each in range(20)] + [Address(DEVICE, OWN6, 0)]
    found = own_addresses(addresses, LINKS, {DEVICE: Mode.NATIVE})
    assert len(found) == 16
    assert found[0] == Own(OWN6)


HOSTS = (PEER, OTHER_PEER, PEER6)
PLACES = st.sampled_from([(DEVICE, GATEWAY), (DEVICE, packed_address(PEER)), (VLAN, GATEWAY6)])
NEIGHBOURS = st.builds(
    lambda place, mac, state: Neighbour(place[0], place[1], mac, state),
    PLACES,
    st.sampled_from([ITS_MAC, ITS_MAC, NEW_MAC, b""]),
    st.sampled_from([S.REACHABLE, S.NONE, *S]),
)
OUTCOMES: st.SearchStrategy[Outcome] = st.builds(
    lambda place, direct, source, mtu: Route(place[0], None if direct else place[1], source, mtu),
    PLACES,
    st.booleans(),
    st.sampled_from([OWN, OWN, None]),
    st.sampled_from([None, 1300]),
) | st.sampled_from(NoRoute)
INDICES = st.integers(0, 2)
LINK = st.builds(
    lambda link, up, mtu: link._replace(up=up, mtu=mtu), st.sampled_from(LINKS), st.booleans(), st.sampled_from([1500, 1400])
)
ATTACHED = st.dictionaries(st.sampled_from([DEVICE, VLAN]), st.sampled_from(Mode))


class NewsInAnyOrder(RuleBasedStateMachine):
    """Whatever is said in whatever order, the entries are what one would make of all that is true in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.hops = NextHops()
        self.written: dict[int, NextHop] = {}
        self.asked: list[LookUp] = []
        self.followed: dict[int, LookUp] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.links: dict[int, Link] = {}
        self.neighbours: dict[tuple[int, bytes], Neighbour] = {}
        self.attached: dict[int, Mode] = {}
        self.attach({DEVICE: Mode.NATIVE})
        self.dump(
            list(LINKS), [neighbour(), neighbour(address=packed_address(PEER)), neighbour(address=GATEWAY6, ifindex=VLAN)]
        )

    @rule(index=INDICES, host=st.sampled_from(HOSTS), source=st.sampled_from([None, "192.0.2.1"]))
    def follow(self, index: int, host: str, source: str | None) -> None:
        self.hops.follow(index, host, source)
        self.followed[index] = LookUp(index, packed_address(host), None if source is None else packed_address(source))
        self.outcomes[index] = NoRoute.UNKNOWN

    @rule(index=INDICES)
    def unfollow(self, index: int) -> None:
        self.hops.unfollow(index)
        self.followed.pop(index, None)

    @rule(limit=st.integers(1, 3))
    def ask(self, limit: int) -> None:
        self.asked += self.hops.look_ups(limit)

    @precondition(lambda self: self.asked)
    @rule(outcomes=st.lists(OUTCOMES, min_size=1, max_size=4))
    def answer(self, outcomes: list[Outcome]) -> None:
        for asked, outcome in zip(self.asked, outcomes, strict=False):
            self.hops.found(asked, outcome)
            if self.followed.get(asked.entry) == asked:
                self.outcomes[asked.entry] = outcome
        del self.asked[: len(outcomes)]

    @rule(news=NEIGHBOURS)
    def hear_of_a_neighbour(self, news: Neighbour) -> None:
        self.hops.neighbour(NeighbourNews(news))
        self.neighbours[news.ifindex, news.address] = news

    @rule(link=LINK, gone=st.booleans())
    def hear_of_a_link(self, link: Link, gone: bool) -> None:  # noqa: FBT001 - drawn
        self.hops.link(LinkNews(link.ifindex, None if gone else link))
        if not gone:
            self.links[link.ifindex] = link
        elif self.links.pop(link.ifindex, None) is not None:
            self.neighbours = {place: each for place, each in self.neighbours.items() if place[0] != link.ifindex}

    @rule(attached=ATTACHED)
    def attach(self, attached: dict[int, Mode]) -> None:
        self.hops.attach(attached)
        self.attached = attached

    @rule()
    def hear_of_routes(self) -> None:
        self.hops.routes_changed()

    @rule(links=st.lists(LINK, unique_by=lambda each: each.ifindex), neighbours=st.lists(NEIGHBOURS))
    def dump(self, links: list[Link], neighbours: list[Neighbour]) -> None:
        self.hops.replace(links, neighbours)
        self.links = {each.ifindex: each for each in links}
        self.neighbours = {(each.ifindex, each.address): each for each in neighbours}

    @rule(limit=st.integers(1, 3))
    def write_some(self, limit: int) -> None:
        self.written.update(self.hops.entries(limit))

    @rule()
    def write_all(self) -> None:
        while self.hops.pending:
            self.asked += self.hops.look_ups(2)
            self.written.update(self.hops.entries(2))
        for index in range(3):
            assert self.written.get(index, UNKNOWN) == self.expected(index)

    @invariant()
    def nothing_piles_up(self) -> None:
        assert len(self.hops._neighbours) <= len(self.neighbours)
        assert sum(map(len, self.hops._behind.values())) <= len(self.followed)
        assert len(self.hops._left) <= 3

    def expected(self, index: int) -> NextHop:
        outcome = self.outcomes.get(index)
        if index not in self.followed or not isinstance(outcome, Route):
            return UNKNOWN
        _, destination, source = self.followed[index]
        source = source or outcome.source
        link = self.links.get(outcome.ifindex)
        found = self.neighbours.get((outcome.ifindex, outcome.gateway or destination))
        if source is None or link is None or not link.up or found is None or not found.mac:
            return UNKNOWN
        if found.state in (S.NONE, S.INCOMPLETE, S.FAILED):
            return UNKNOWN
        mtus = [link.mtu if destination[:12] == OWN[:12] else link.ipv6_mtu, outcome.mtu or 65535]
        device = link if link.ifindex in self.attached else self.links.get(link.parent)
        if device is None or not device.up:
            return UNKNOWN
        if device is not link:
            if self.attached.get(device.ifindex) is not Mode.NATIVE:
                return UNKNOWN
            mtus.append(device.mtu)
        tag = link.vlan if device is not link else 0
        stale = found.state is S.STALE
        return NextHop(device.ifindex, destination, source, found.mac, link.mac, tag, min(mtus), stale)


TestNewsInAnyOrder = NewsInAnyOrder.TestCase
TestNewsInAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
