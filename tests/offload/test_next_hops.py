"""Next hops from the kernel's notifications, one at a time."""

import pickle
from collections.abc import Mapping

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from relay.offload.bpf import XdpMode
from relay.offload.layout import NO_WAY, WAY, NextHop, Own, packed_address
from relay.offload.network import (
    Address,
    Link,
    LookUp,
    Neighbour,
    Route,
)
from relay.offload.next_hops import NextHops, own_addresses
from tests.support.examples import examples

DEVICE, VLAN, SECOND, TUNNEL = 3, 4, 5, 6
PEER, OTHER_PEER, PEER6 = "198.51.100.9", "198.51.100.10", "2001:db8:9::9"
OWN, OWN6 = packed_address("192.0.2.1"), packed_address("2001:db8::1")
GATEWAY, OTHER_GATEWAY, GATEWAY6 = (packed_address(each) for each in ("192.0.2.254", "192.0.2.253", "fe80::1"))
MACS = {index: bytes((2, 0, 0, 0, 0, index)) for index in (DEVICE, VLAN, SECOND)}
ITS_MAC, NEW_MAC = b"\x02\0\0\0\1\1", b"\x02\0\0\0\1\2"
LINKS = (
    Link(DEVICE, "eth0", MACS[DEVICE], 1500, 1480, up=True, ethernet=True),
    Link(VLAN, "eth0.7", MACS[VLAN], 1496, 1496, up=True, ethernet=True, parent=DEVICE, vlan=7),
    Link(SECOND, "eth1", MACS[SECOND], 9000, 9000, up=True, ethernet=True),
    Link(TUNNEL, "wg0", b"", 1420, 1420, up=True, ethernet=False),
)
USUAL = Route(DEVICE, GATEWAY, OWN, None)


def neighbour(mac: bytes = ITS_MAC, address: bytes = GATEWAY, ifindex: int = DEVICE, *, stale: bool = False) -> Neighbour:
    return Neighbour(ifindex, address, mac, stale)


def known(*neighbours: Neighbour, attached: Mapping[int, XdpMode] | None = None) -> NextHops:
    """The network above, with the program on its first interface."""
    hops = NextHops()
    hops.attach({DEVICE: XdpMode.DRIVER} if attached is None else attached)
    hops.replace(LINKS, neighbours or (neighbour(),))
    return hops


Entries = dict[bytes, NextHop | None]
HERE = packed_address(PEER)


def settle(hops: NextHops, routes: Route | Mapping[bytes, Route] | None = USUAL) -> Entries:
    """Answer all lookups, and return the written and deleted entries."""
    written: Entries = {}
    while hops.pending:
        for each in hops.look_ups(3):
            hops.found(each, routes[each.destination] if isinstance(routes, Mapping) else routes)
        written.update(hops.entries(3))
    return written


def found(hops: NextHops, route: Route | None = USUAL, host: str = PEER, source: str | None = None) -> NextHop | None:
    """Return the entry of a destination, if any."""
    hops.follow(host, source)
    return settle(hops, route).get(packed_address(host))


def entry_for(hops: NextHops, route: Route = USUAL, host: str = PEER) -> NextHop:
    """Return the entry of a destination."""
    entry = found(hops, route, host)
    assert entry is not None
    return entry


def settled(hops: NextHops) -> NextHop:
    """Return the changed entry of the usual peer."""
    entry = settle(hops)[HERE]
    assert entry is not None
    return entry


def test_an_entry_has_an_interface_addresses_and_an_mtu() -> None:
    assert entry_for(known()) == NextHop(DEVICE, OWN, ITS_MAC, MACS[DEVICE], 0, 1500, stale=False)


def test_packets_to_the_link_go_to_the_destination_itself() -> None:
    hops = known(neighbour(), neighbour(mac=NEW_MAC, address=packed_address(PEER)))
    assert entry_for(hops, Route(DEVICE, None, OWN, None)).to_mac == NEW_MAC


def test_an_ipv4_destination_may_have_an_ipv6_gateway() -> None:
    hops = known(neighbour(mac=NEW_MAC, address=GATEWAY6))
    assert entry_for(hops, Route(DEVICE, GATEWAY6, OWN, None)).to_mac == NEW_MAC


def test_the_source_is_the_bind_address() -> None:
    hops = known()
    hops.follow(PEER, "192.0.2.77")
    (asked,) = hops.look_ups(10)
    assert asked == LookUp(packed_address(PEER), packed_address("192.0.2.77"))
    hops.found(asked, Route(DEVICE, GATEWAY, None, None))
    assert [each and each.source for each in hops.entries(10).values()] == [packed_address("192.0.2.77")]


@pytest.mark.parametrize(
    ("host", "mtu", "expected"), [(PEER, None, 1500), (PEER, 1400, 1400), (PEER, 9000, 1500), (PEER6, None, 1480)]
)
def test_the_mtu_is_the_minimum_of_the_link_and_the_route(host: str, mtu: int | None, expected: int) -> None:
    assert entry_for(known(), USUAL._replace(mtu=mtu), host).mtu == expected


@pytest.mark.parametrize("outcome", [None, Route(DEVICE, GATEWAY, None, None), Route(99, GATEWAY, OWN, None)])
def test_packets_without_a_route_or_source_are_left_to_userspace(outcome: Route | None) -> None:
    assert found(known(), outcome) is None


@pytest.mark.parametrize("host", ["fe80::1", "169.254.1.1"])
def test_a_link_local_destination_is_not_looked_up(host: str) -> None:
    hops = known()
    hops.follow(host)
    hops.replace(LINKS, [neighbour()])
    assert hops.look_ups(10) == []
    assert settle(hops) == {}


@pytest.mark.parametrize("stale", [False, True])
def test_a_stale_neighbour_is_used_and_marked(*, stale: bool) -> None:
    entry = entry_for(known(neighbour(stale=stale)))
    assert (entry.to_mac, entry.stale) == (ITS_MAC, stale)


def test_packets_to_an_unresolved_neighbour_are_left_to_userspace() -> None:
    assert found(known(neighbour(b""))) is None


def test_notifications_of_a_neighbour_fill_and_clear_the_entry() -> None:
    hops = known(neighbour(b""))
    assert found(hops) is None
    hops.neighbour(neighbour())
    assert settled(hops).to_mac == ITS_MAC
    hops.neighbour(neighbour(mac=NEW_MAC))
    assert settled(hops).to_mac == NEW_MAC
    hops.neighbour(neighbour(b""))
    assert settle(hops) == {HERE: None}


def test_unchanged_entries_are_not_written() -> None:
    hops = known()
    entry_for(hops)
    hops.neighbour(neighbour())
    hops.replace(LINKS, [neighbour()])
    assert settle(hops) == {}


def test_a_changed_neighbour_writes_only_destinations_behind_it() -> None:
    hops = known(neighbour(), neighbour(address=OTHER_GATEWAY))
    for index in range(10):
        hops.follow(f"198.51.100.{index}")
    settle(
        hops,
        {packed_address(f"198.51.100.{index}"): USUAL for index in range(9)}
        | {packed_address("198.51.100.9"): USUAL._replace(gateway=OTHER_GATEWAY)},
    )
    hops.neighbour(neighbour(mac=NEW_MAC, address=OTHER_GATEWAY))
    assert hops.look_ups(100) == []
    assert list(hops.entries(1)) == [packed_address("198.51.100.9")]
    assert not hops.pending


NEAR = neighbour(), neighbour(mac=NEW_MAC, address=OTHER_GATEWAY)


def test_a_new_gateway_causes_a_lookup_per_destination() -> None:
    hops = known(*NEAR)
    for index in range(100):
        hops.follow(f"198.51.100.{index}")
    assert len(settle(hops)) == 100
    for _ in range(2):
        hops.replace(LINKS, NEAR)
    asked = hops.look_ups(1000)
    assert len(asked) == 100
    assert hops.entries(1000) == {}
    for each in asked:
        hops.found(each, USUAL._replace(gateway=OTHER_GATEWAY))
    assert {entry and entry.to_mac for entry in hops.entries(1000).values()} == {NEW_MAC}


@pytest.mark.parametrize("attached", [{}, {DEVICE: XdpMode.DRIVER}, {SECOND: XdpMode.GENERIC}])
def test_packets_leave_only_through_interfaces_with_the_program(attached: dict[int, XdpMode]) -> None:
    hops = known(neighbour(ifindex=SECOND), attached=attached)
    entry = found(hops, USUAL._replace(ifindex=SECOND))
    assert entry is None if SECOND not in attached else entry is not None and entry.ifindex == SECOND


def test_attaching_and_detaching_changes_entries() -> None:
    hops = known(attached={})
    assert found(hops) is None
    hops.attach({DEVICE: XdpMode.GENERIC})
    assert settled(hops).ifindex == DEVICE
    hops.attach({})
    assert settle(hops) == {HERE: None}


def test_a_vlan_is_a_tag_on_an_interface_in_native_mode() -> None:
    hops = known(neighbour(ifindex=VLAN))
    route = USUAL._replace(ifindex=VLAN)
    assert entry_for(hops, route) == NextHop(DEVICE, OWN, ITS_MAC, MACS[VLAN], 7, 1496, stale=False)
    hops.attach({DEVICE: XdpMode.GENERIC})
    assert settle(hops) == {HERE: None}


def test_a_vlan_with_the_program_itself_needs_no_tag() -> None:
    hops = known(neighbour(ifindex=VLAN), attached={VLAN: XdpMode.GENERIC})
    entry = entry_for(hops, USUAL._replace(ifindex=VLAN))
    assert (entry.ifindex, entry.vlan) == (VLAN, 0)


def test_interfaces_without_ethernet_are_left_to_the_sockets() -> None:
    hops = known(neighbour(ifindex=TUNNEL), attached={TUNNEL: XdpMode.GENERIC})
    assert found(hops, USUAL._replace(ifindex=TUNNEL)) is None


@pytest.mark.parametrize("through", [DEVICE, VLAN])
def test_an_entry_is_restored_after_its_interface_was_down(through: int) -> None:
    hops = known(neighbour(ifindex=through))
    entry = entry_for(hops, USUAL._replace(ifindex=through))
    near = [neighbour(ifindex=through)]
    hops.replace([LINKS[0]._replace(up=False), *LINKS[1:]], near)
    assert hops.entries(10) == {HERE: None}
    hops.replace(LINKS, near)
    assert hops.entries(10) == {HERE: entry}


def test_an_entry_follows_the_mtu_and_the_address_of_its_interface() -> None:
    hops = known()
    entry_for(hops)
    hops.replace([LINKS[0]._replace(mtu=1400, mac=NEW_MAC)], [neighbour()])
    entry = settled(hops)
    assert (entry.mtu, entry.from_mac) == (1400, NEW_MAC)


def test_an_entry_is_deleted_with_its_interface() -> None:
    hops = known()
    entry = entry_for(hops)
    hops.replace(LINKS[1:], [])
    assert settle(hops) == {HERE: None}
    hops.replace(LINKS, [])
    assert settle(hops) == {}
    hops.neighbour(neighbour())
    assert settle(hops) == {HERE: entry}


def test_an_unfollowed_entry_is_deleted() -> None:
    hops = known()
    entry_for(hops)
    hops.unfollow(PEER)
    hops.unfollow(PEER)
    assert settle(hops) == {HERE: None}


def test_an_unwritten_entry_is_not_cleared() -> None:
    hops = known()
    hops.follow(PEER)
    hops.unfollow(PEER)
    assert not hops.pending


def test_a_response_for_a_dropped_destination_is_ignored() -> None:
    hops = known()
    hops.follow(PEER)
    (asked,) = hops.look_ups(10)
    hops.unfollow(PEER)
    hops.found(asked, USUAL)
    hops.follow(PEER, "192.0.2.77")
    hops.found(asked, USUAL)
    assert hops.entries(10) == {}
    assert settled(hops).source == packed_address("192.0.2.77")


def test_a_destination_followed_again_keeps_its_entry() -> None:
    hops = known()
    entry_for(hops)
    hops.follow(PEER)
    assert hops.entries(10) == {}
    hops.unfollow(PEER)
    hops.follow(PEER)
    assert hops.look_ups(10) == [LookUp(HERE)]
    hops.found(LookUp(HERE), USUAL)
    assert hops.entries(10) == {}


def test_the_way_to_a_host_is_the_interface_of_its_route_without_any_neighbour() -> None:
    hops = known(neighbour(b""))
    assert found(hops) is None
    assert hops.ways() == {HERE: WAY.pack(bytes(2), DEVICE)}
    hops.replace(LINKS, ())
    settle(hops, Route(VLAN, GATEWAY6, OWN, None))
    assert hops.ways() == {HERE: WAY.pack(b"\0\7", DEVICE)}
    hops.replace(LINKS, ())
    settle(hops, Route(TUNNEL, None, OWN, None))
    assert hops.ways() == {HERE: WAY.pack(bytes(2), TUNNEL)}


def test_no_way_leads_to_an_address_of_this_machine() -> None:
    hops = known()
    entry_for(hops)
    hops.ways()
    hops.replace(LINKS, [neighbour()])
    settle(hops, None)
    assert hops.ways() == {HERE: NO_WAY}


def test_the_way_is_written_again_for_a_host_followed_again() -> None:
    """The host may have another place in the map."""
    hops = known()
    entry_for(hops)
    assert len(hops.ways()) == 1
    hops.follow(PEER)
    settle(hops)
    assert len(hops.ways()) == 1
    hops.unfollow(PEER)
    assert hops.ways() == {}


def test_an_invalid_address_has_no_effect() -> None:
    hops = known()
    entry_for(hops)
    with pytest.raises(OSError, match="illegal"):
        hops.follow("example.org")
    assert not hops.pending


def test_a_dump_replaces_earlier_notifications() -> None:
    hops = known(neighbour(), neighbour(address=OTHER_GATEWAY))
    entry_for(hops)
    hops.replace(LINKS, [neighbour(mac=NEW_MAC)])
    assert settled(hops).to_mac == NEW_MAC
    hops.replace(LINKS[1:], [neighbour(mac=NEW_MAC)])
    assert settle(hops) == {HERE: None}


def test_own_addresses_exclude_loopback_link_local_and_tentative_addresses() -> None:
    hosts = [
        (SECOND, "192.0.2.9"),
        (1, "127.0.0.1"),
        (1, "::1"),
        (DEVICE, "fe80::1"),
        (DEVICE, "192.0.2.1"),
        (1, "192.0.2.5"),
    ]
    addresses = [Address(ifindex, packed_address(host)) for ifindex, host in hosts]
    addresses.append(Address(DEVICE, OWN6, tentative=True))
    found = own_addresses(addresses, LINKS, {DEVICE: XdpMode.DRIVER})
    assert found == [Own(packed_address(host)) for host in ("192.0.2.1", "192.0.2.5", "192.0.2.9")]


def test_addresses_of_a_vlan_are_own_addresses_only_with_a_visible_tag() -> None:
    addresses = [Address(VLAN, OWN)]
    assert own_addresses(addresses, LINKS, {DEVICE: XdpMode.DRIVER}) == [Own(OWN, vlan=7)]
    assert own_addresses(addresses, LINKS, {DEVICE: XdpMode.GENERIC}) == []


@pytest.mark.parametrize("mode", [XdpMode.DRIVER, XdpMode.GENERIC])
def test_addresses_of_a_vlan_with_the_program_itself_are_untagged(mode: XdpMode) -> None:
    addresses = [Address(VLAN, OWN)]
    assert own_addresses(addresses, LINKS, {DEVICE: mode, VLAN: XdpMode.GENERIC}) == [Own(OWN)]
    assert own_addresses(addresses, LINKS, {VLAN: XdpMode.GENERIC}) == [Own(OWN)]


def test_addresses_of_other_interfaces_are_untagged() -> None:
    addresses = [Address(VLAN, OWN), Address(SECOND, OWN6), Address(DEVICE, GATEWAY)]
    own = own_addresses(addresses, LINKS, {DEVICE: XdpMode.DRIVER})
    assert own == [Own(GATEWAY), Own(OWN, vlan=7), Own(OWN6)]
    assert own_addresses(addresses, LINKS, {SECOND: XdpMode.DRIVER}) == [Own(OWN6), Own(GATEWAY), Own(OWN)]


@pytest.mark.parametrize("first", [DEVICE, VLAN])
def test_an_address_of_an_interface_and_its_vlan_is_untagged(first: int) -> None:
    addresses = [Address(first, OWN), Address(DEVICE + VLAN - first, OWN)]
    assert own_addresses(addresses, LINKS, {DEVICE: XdpMode.DRIVER}) == [Own(OWN)]


def test_own_addresses_of_interfaces_with_the_program_come_first() -> None:
    addresses = [Address(SECOND, packed_address(f"192.0.2.{each}")) for each in range(20)] + [Address(DEVICE, OWN6)]
    found = own_addresses(addresses, LINKS, {DEVICE: XdpMode.DRIVER})
    assert len(found) == 21
    assert found[0] == Own(OWN6)


def forget_all(hops: NextHops) -> None:
    """Delete all links and neighbours."""
    hops.replace([], [])
    hops.attach({})


def is_as_new(hops: NextHops) -> bool:
    return pickle.dumps(hops) == pickle.dumps(NextHops())


@pytest.mark.parametrize("again", [False, True], ids=["", "followed-again"])
def test_dropped_destinations_leave_no_state(*, again: bool) -> None:
    hops = known()
    assert found(hops) is not None
    hops.unfollow(PEER)
    if again:
        # The entry is kept for now, and then removed.
        hops.follow(PEER)
        hops.neighbour(neighbour(b""))
    assert settle(hops) == {HERE: None}
    hops.unfollow(PEER)
    assert settle(hops) == {}
    forget_all(hops)
    assert is_as_new(hops)


HOSTS = (PEER, OTHER_PEER, PEER6)
PLACES = st.sampled_from([(DEVICE, GATEWAY), (DEVICE, packed_address(PEER)), (VLAN, GATEWAY6)])
NEIGHBOURS = st.builds(
    lambda place, mac, stale: Neighbour(place[0], place[1], mac, stale),
    PLACES,
    st.sampled_from([ITS_MAC, ITS_MAC, NEW_MAC, b""]),
    st.booleans(),
)
OUTCOMES: st.SearchStrategy[Route | None] = (
    st.builds(
        lambda place, direct, source, mtu: Route(place[0], None if direct else place[1], source, mtu),
        PLACES,
        st.booleans(),
        st.sampled_from([OWN, OWN, None]),
        st.sampled_from([None, 1300]),
    )
    | st.none()
)
LINK = st.builds(
    lambda link, up, mtu: link._replace(up=up, mtu=mtu), st.sampled_from(LINKS), st.booleans(), st.sampled_from([1500, 1400])
)
ATTACHED = st.dictionaries(st.sampled_from([DEVICE, VLAN]), st.sampled_from(XdpMode))


class NewsInAnyOrder(RuleBasedStateMachine):
    """After any notifications in any order, the entries match the final state."""

    def __init__(self) -> None:
        super().__init__()
        self.hops = NextHops()
        self.written: dict[bytes, NextHop] = {}
        """The map."""
        self.ways: dict[bytes, bytes] = {}
        self.asked: list[LookUp] = []
        self.followed: dict[bytes, LookUp] = {}
        self.outcomes: dict[bytes, Route | None] = {}
        self.links: dict[int, Link] = {}
        self.neighbours: dict[tuple[int, bytes], Neighbour] = {}
        self.attached: dict[int, XdpMode] = {}
        self.attach({DEVICE: XdpMode.DRIVER})
        self.dump(
            list(LINKS), [neighbour(), neighbour(address=packed_address(PEER)), neighbour(address=GATEWAY6, ifindex=VLAN)]
        )

    @rule(host=st.sampled_from(HOSTS), source=st.sampled_from([None, "192.0.2.1"]))
    def follow(self, host: str, source: str | None) -> None:
        self.hops.follow(host, source)
        look_up = LookUp(packed_address(host), None if source is None else packed_address(source))
        if self.followed.get(look_up.destination) != look_up:
            self.followed[look_up.destination] = look_up
            self.outcomes[look_up.destination] = None

    @rule(host=st.sampled_from(HOSTS))
    def unfollow(self, host: str) -> None:
        self.hops.unfollow(host)
        self.followed.pop(packed_address(host), None)

    @rule(limit=st.integers(1, 3))
    def ask(self, limit: int) -> None:
        self.asked += self.hops.look_ups(limit)

    @precondition(lambda self: self.asked)
    @rule(outcomes=st.lists(OUTCOMES, min_size=1, max_size=4))
    def answer(self, outcomes: list[Route | None]) -> None:
        for asked, outcome in zip(self.asked, outcomes, strict=False):
            self.hops.found(asked, outcome)
            if self.followed.get(asked.destination) == asked:
                self.outcomes[asked.destination] = outcome
        del self.asked[: len(outcomes)]

    @rule(news=NEIGHBOURS)
    def hear_of_a_neighbour(self, news: Neighbour) -> None:
        self.hops.neighbour(news)
        self.neighbours[news.ifindex, news.address] = news

    @rule(attached=ATTACHED)
    def attach(self, attached: dict[int, XdpMode]) -> None:
        self.hops.attach(attached)
        self.attached = attached

    @rule(links=st.lists(LINK, unique_by=lambda each: each.ifindex), neighbours=st.lists(NEIGHBOURS))
    def dump(self, links: list[Link], neighbours: list[Neighbour]) -> None:
        self.hops.replace(links, neighbours)
        self.links = {each.ifindex: each for each in links}
        self.neighbours = {(each.ifindex, each.address): each for each in neighbours}

    @rule(limit=st.integers(1, 3))
    def write_some(self, limit: int) -> None:
        self.write(limit)

    def write(self, limit: int) -> None:
        for destination, entry in self.hops.entries(limit).items():
            if entry is None:
                del self.written[destination]
            else:
                self.written[destination] = entry
        ways = self.hops.ways()
        assert not ways.keys() - self.followed.keys()
        self.ways |= ways

    @rule()
    def write_all(self) -> None:
        while self.hops.pending:
            self.asked += self.hops.look_ups(2)
            self.write(2)
        for destination in map(packed_address, HOSTS):
            assert self.written.get(destination) == self.expected(destination)
        if not self.asked:
            for destination in self.followed:
                assert self.ways[destination] == self.expected_way(destination)

    def teardown(self) -> None:
        """Remove everything step by step: no state must be left."""
        for host in HOSTS:
            self.unfollow(host)
        self.write_all()
        forget_all(self.hops)
        assert is_as_new(self.hops)

    def expected(self, destination: bytes) -> NextHop | None:
        outcome = self.outcomes.get(destination)
        if destination not in self.followed or outcome is None:
            return None
        _, source = self.followed[destination]
        source = source or outcome.source
        link = self.links.get(outcome.ifindex)
        found = self.neighbours.get((outcome.ifindex, outcome.gateway or destination))
        if source is None or link is None or not link.up or found is None or not found.mac:
            return None
        mtus = [link.mtu if destination[:12] == OWN[:12] else link.ipv6_mtu, outcome.mtu or 65535]
        device = link if link.ifindex in self.attached else self.links.get(link.parent)
        if device is None or not device.up:
            return None
        if device is not link:
            if self.attached.get(device.ifindex) is not XdpMode.DRIVER:
                return None
            mtus.append(device.mtu)
        tag = link.vlan if device is not link else 0
        return NextHop(device.ifindex, source, found.mac, link.mac, tag, min(mtus), found.stale)

    def expected_way(self, destination: bytes) -> bytes:
        outcome = self.outcomes[destination]
        if outcome is None:
            return NO_WAY
        link = self.links.get(outcome.ifindex)
        parent = self.links.get(link.parent) if link is not None and link.ifindex not in self.attached else None
        if link is None or parent is None or self.attached.get(parent.ifindex) is not XdpMode.DRIVER:
            return WAY.pack(bytes(2), outcome.ifindex)
        is_up = link.up and parent.up
        return WAY.pack(link.vlan.to_bytes(2, "big"), parent.ifindex) if is_up else WAY.pack(bytes(2), outcome.ifindex)


TestNewsInAnyOrder = NewsInAnyOrder.TestCase
TestNewsInAnyOrder.settings = examples(50, stateful_step_count=40)
