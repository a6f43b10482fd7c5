"""What a real kernel says of networks made for it here, and what next hops come of that."""

import contextlib
import ctypes
import errno
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from relay.offload.layout import NextHop, Own, packed_address
from relay.offload.netlink import Monitor, Network
from relay.offload.network import (
    AddressesChanged,
    Link,
    LinkNews,
    LookUp,
    NeighbourNews,
    NeighbourState,
    News,
    NoRoute,
    Outcome,
    Overrun,
    Route,
    RoutesChanged,
)
from relay.offload.next_hops import UNKNOWN, Mode, NextHops, own_addresses
from tests.conftest import needs_ipv6
from tests.machine import CLONE_NEWNET, Machine

T = TypeVar("T")

OWN, OWN6 = "192.0.2.1", "2001:db8::1"
ON_LINK, GATEWAY, OTHER_GATEWAY = "192.0.2.9", "192.0.2.254", "192.0.2.253"
ON_LINK6, GATEWAY6 = "2001:db8::9", "2001:db8::fe"
FAR, FAR6 = "198.51.100.9", "2001:db8:9::9"
MAC, OTHER_MAC = "02:00:00:00:01:01", "02:00:00:00:01:02"
CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def ip(machine: Machine, *lines: str) -> None:
    """Run commands of ip(8) there, of which each is one line."""
    machine.run("ip", "-batch", "-", text="\n".join(lines))


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with two links, each to itself."""
    if shutil.which("ip") is None:
        pytest.skip("what the kernel says of networks is not tested: ip is not installed (iproute2)")
    try:
        made = Machine()
    except OSError as error:
        pytest.skip(f"what the kernel says of networks is not tested: namespaces take root ({error.strerror})")
    with contextlib.closing(made):
        ip(
            made,
            "link set lo up",
            *(f"link add {link} type veth peer name far-{link}" for link in ("one", "two")),
            *(f"link set {link} up" for link in ("one", "far-one", "two", "far-two")),
            f"addr add {OWN}/24 dev one",
            "addr add 203.0.113.1/24 dev two",
        )
        yield made


@pytest.fixture
def ipv6(machine: Machine) -> Machine:
    ip(machine, f"addr add {OWN6}/64 dev one nodad", "addr add 2001:db8:2::1/64 dev two nodad")
    return machine


@pytest.fixture
def monitor(machine: Machine) -> Iterator[Monitor]:
    with machine.entered(), Monitor() as opened:
        # What is waited for in vain fails, and does not hang.
        giving_up = threading.Timer(60, opened.stop)
        giving_up.start()
        yield opened
        giving_up.cancel()
        giving_up.join()


@pytest.fixture
def news(monitor: Monitor) -> Iterator[News]:
    return heard(monitor)


@pytest.fixture
def network(machine: Machine) -> Iterator[Network]:
    with machine.entered(), Network() as opened:
        yield opened


def way_to(network: Network, host: str, source: str | None = None) -> Outcome:
    (outcome,) = network.look_up([LookUp(0, packed_address(host), None if source is None else packed_address(source))])
    return outcome


def link(network: Network, name: str) -> Link:
    return {each.name: each for each in network.links()}[name]


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def heard(monitor: Monitor) -> Iterator[News]:
    """Give the news one by one, for as long as it takes."""
    for batch in iter(monitor.receive, None):
        yield from batch
    pytest.fail("no such news came")


def wait_for(news: Iterator[News], wanted: Callable[[News], T | None]) -> T:
    """Give what is made of the first news that is wanted."""
    return next(found for found in map(wanted, news) if found is not None)


def of_kind(kind: type[T]) -> Callable[[object], T | None]:
    return lambda news: news if isinstance(news, kind) else None


def neighbour_news(host: str) -> Callable[[News], NeighbourNews | None]:
    return lambda news: news if isinstance(news, NeighbourNews) and news.neighbour.address == packed_address(host) else None


def test_a_peer_on_the_link_has_no_gateway(network: Network) -> None:
    assert way_to(network, ON_LINK) == Route(link(network, "one").ifindex, None, packed_address(OWN), None)


def test_a_peer_behind_a_gateway(machine: Machine, network: Network) -> None:
    ip(machine, f"route add default via {GATEWAY}")
    one = link(network, "one").ifindex
    assert way_to(network, FAR) == Route(one, packed_address(GATEWAY), packed_address(OWN), None)


@needs_ipv6
@pytest.mark.usefixtures("ipv6")
def test_peers_of_ipv6(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR6}/128 via {GATEWAY6} mtu 1400")
    one = link(network, "one").ifindex
    assert way_to(network, ON_LINK6) == Route(one, None, packed_address(OWN6), None)
    assert way_to(network, FAR6) == Route(one, packed_address(GATEWAY6), packed_address(OWN6), 1400)
    assert way_to(network, OWN6) is NoRoute.LOCAL
    assert way_to(network, "2001:db8:ffff::1") is NoRoute.UNREACHABLE
    assert way_to(network, "ff0e::1") is not NoRoute.UNREACHABLE


@needs_ipv6
@pytest.mark.usefixtures("ipv6")
def test_an_ipv4_peer_behind_an_ipv6_gateway(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR}/32 via inet6 {GATEWAY6}")
    one = link(network, "one").ifindex
    assert way_to(network, FAR) == Route(one, packed_address(GATEWAY6), packed_address(OWN), None)


def test_each_peer_has_the_way_through_its_own_interface(network: Network) -> None:
    hosts = [ON_LINK, "203.0.113.9", "192.0.2.10", "203.0.113.10"] * 50
    found = network.look_up([LookUp(number, packed_address(host)) for number, host in enumerate(hosts)])
    one, two = link(network, "one").ifindex, link(network, "two").ifindex
    assert [each.ifindex for each in found if isinstance(each, Route)] == [one, two] * 100


def test_a_rule_by_source_is_for_what_is_sent_from_there(machine: Machine, network: Network) -> None:
    ip(
        machine,
        f"route add default via {GATEWAY}",
        "route add default via 203.0.113.254 table 7",
        "rule add from 203.0.113.1 lookup 7",
    )
    two = link(network, "two").ifindex
    assert way_to(network, FAR, "203.0.113.1") == Route(two, packed_address("203.0.113.254"), None, None)
    assert isinstance(route := way_to(network, FAR, OWN), Route)
    assert route.gateway == packed_address(GATEWAY)


def test_a_rule_for_udp_is_for_the_relay(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR} via {GATEWAY}", f"route add {FAR} via {OTHER_GATEWAY} table 7")
    ip(machine, "rule add ipproto udp lookup 7")
    assert isinstance(route := way_to(network, FAR), Route)
    assert route.gateway == packed_address(OTHER_GATEWAY)


def test_why_there_is_no_way(machine: Machine, network: Network) -> None:
    ip(
        machine,
        "route add blackhole 198.18.1.0/24",
        "route add unreachable 198.18.2.0/24",
        "route add prohibit 198.18.3.0/24",
    )
    hosts = (FAR, "198.18.1.1", "198.18.2.1", "198.18.3.1")
    assert {way_to(network, host) for host in hosts} == {NoRoute.UNREACHABLE}
    assert way_to(network, ON_LINK, "192.0.2.77") is NoRoute.UNREACHABLE
    assert {way_to(network, host) for host in (OWN, "127.0.0.1", "203.0.113.1")} == {NoRoute.LOCAL}
    assert way_to(network, "192.0.2.255") is NoRoute.NOT_UNICAST


def test_a_route_may_be_narrower_than_its_link(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR} via {GATEWAY} mtu 1400")
    assert isinstance(route := way_to(network, FAR), Route)
    assert route.mtu == 1400


def test_links_are_told_as_they_are(machine: Machine, network: Network) -> None:
    ip(machine, "link set two down", f"link set one address {MAC} mtu 1400")
    assert link(network, "lo").ethernet is False
    one = link(network, "one")
    assert (one.mac, one.mtu, one.ipv6_mtu, one.up, one.ethernet) == (mac(MAC), 1400, 1400, True, True)
    assert (one.kind, one.parent, one.vlan) == ("veth", 0, 0)
    assert not link(network, "two").up
    assert not link(network, "far-two").up, "it has no carrier"


@needs_ipv6
def test_addresses_are_told_as_they_are(ipv6: Machine, network: Network) -> None:
    ip(ipv6, "addr add 192.0.2.5 peer 192.0.2.6 dev one", "addr add 2001:db8::77/64 dev one")
    found = {each.address: each for each in network.addresses()}
    assert found[packed_address("127.0.0.1")].scope == 254
    assert packed_address("192.0.2.5") in found
    assert packed_address("192.0.2.6") not in found
    assert not found[packed_address(OWN6)].tentative
    assert found[packed_address("2001:db8::77")].tentative
    links = network.links()
    first = {link(network, "one").ifindex: Mode.NATIVE}
    own = own_addresses(network.addresses(), links, first)
    assert own[:3] == [Own(packed_address(host)) for host in (OWN, "192.0.2.5", OWN6)]
    assert set(own[3:]) == {Own(packed_address("203.0.113.1")), Own(packed_address("2001:db8:2::1"))}


def test_neighbours_are_told_as_they_are(machine: Machine, network: Network) -> None:
    ip(
        machine,
        f"neigh add {GATEWAY} lladdr {MAC} nud stale dev one",
        f"neigh add {OTHER_GATEWAY} nud failed dev one",
        f"neigh add proxy {ON_LINK} dev one",
    )
    found = {each.address: each for each in network.neighbours()}
    assert found[packed_address(GATEWAY)][2:] == (mac(MAC), NeighbourState.STALE)
    assert found[packed_address(OTHER_GATEWAY)][2:] == (b"", NeighbourState.FAILED)
    assert packed_address(ON_LINK) not in found


def test_a_neighbour_with_another_address_is_news(machine: Machine, network: Network, news: Iterator[News]) -> None:
    one = link(network, "one").ifindex
    ip(machine, f"neigh add {GATEWAY} lladdr {MAC} dev one")
    assert wait_for(news, neighbour_news(GATEWAY)).neighbour.mac == mac(MAC)
    ip(machine, f"neigh replace {GATEWAY} lladdr {OTHER_MAC} dev one")
    changed = wait_for(news, neighbour_news(GATEWAY)).neighbour
    assert changed == (one, packed_address(GATEWAY), mac(OTHER_MAC), NeighbourState.PERMANENT)
    ip(machine, f"neigh del {GATEWAY} dev one")
    forgotten = [wait_for(news, neighbour_news(GATEWAY)).neighbour for _ in range(2)]
    assert forgotten[0].state is NeighbourState.FAILED
    assert forgotten[1] == (one, packed_address(GATEWAY), b"", NeighbourState.NONE)


CHANGES_OF_ROUTES = [
    f"route add default via {GATEWAY}",
    "route del 192.0.2.0/24 dev one",
    "rule add from 192.0.2.0/24 lookup 7",
    "nexthop add id 7 dev one",
    "-6 route add unreachable 2001:db8:1::/64",
    "-6 rule add from 2001:db8::/64 lookup 7",
]


@pytest.mark.parametrize(
    "change", [pytest.param(each, marks=needs_ipv6) if "-6" in each else each for each in CHANGES_OF_ROUTES]
)
def test_a_change_of_routes_is_news(machine: Machine, news: Iterator[News], change: str) -> None:
    machine.run("ip", *change.split())
    wait_for(news, of_kind(RoutesChanged))


@pytest.mark.parametrize("host", ["192.0.2.5/24", pytest.param("2001:db8::5/64", marks=needs_ipv6)])
def test_an_address_is_news(machine: Machine, news: Iterator[News], host: str) -> None:
    ip(machine, f"addr add {host} dev one")
    wait_for(news, of_kind(AddressesChanged))
    ip(machine, f"addr del {host} dev one")
    wait_for(news, of_kind(AddressesChanged))


def test_an_interface_is_deleted_and_made_again(machine: Machine, network: Network, news: Iterator[News]) -> None:
    before = link(network, "one").ifindex
    ip(machine, "link del one")
    assert wait_for(news, lambda news: news if news == LinkNews(before, None) else None)
    ip(machine, "link add one type veth peer name far-one", "link set one up", "link set far-one up")

    def ready(each: News) -> Link | None:
        new = each.link if isinstance(each, LinkNews) else None
        return new if new is not None and new.name == "one" and new.up else None

    assert wait_for(news, ready) == link(network, "one")


def test_a_bridge_that_lets_go_of_an_interface_has_not_removed_it(
    machine: Machine, network: Network, news: Iterator[News]
) -> None:
    one = link(network, "one").ifindex
    ip(
        machine,
        "link add bridge type bridge",
        "link set one master bridge",
        "link set one nomaster",
        "link set one mtu 1400",
    )

    def about_one(each: News) -> Link | None:
        if not isinstance(each, LinkNews) or each.ifindex != one:
            return None
        assert each.link is not None
        return each.link if each.link.mtu == 1400 else None

    assert wait_for(news, about_one)


def test_what_the_kernel_had_no_room_for_is_said_and_what_comes_after_it_is_not_lost(
    machine: Machine, network: Network, monitor: Monitor
) -> None:
    monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    hosts = [f"192.0.2.{number}" for number in range(10, 200)]
    ip(machine, *(f"neigh add {host} lladdr {MAC} dev one" for host in hosts))
    assert monitor.receive() == [Overrun()]
    assert {packed_address(host) for host in hosts} <= {each.address for each in network.neighbours()}
    ip(machine, f"neigh add {GATEWAY} lladdr {OTHER_MAC} dev one")
    batch = monitor.receive()
    assert batch is not None
    # Nothing of what was before the dump comes after it.
    assert [each.neighbour.address for each in batch if isinstance(each, NeighbourNews)] == [packed_address(GATEWAY)]


def test_who_waits_for_news_can_be_stopped(monitor: Monitor) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(iter(monitor.receive, None)))
        monitor.stop()
        waiting.result(timeout=30)
    assert monitor.receive() is None


def test_it_takes_no_privilege(machine: Machine) -> None:
    ready, changed = threading.Event(), threading.Event()

    def unprivileged() -> tuple[Outcome, list[News] | None]:
        # Of this thread alone, which ends afterwards.
        assert _libc.setns(machine.descriptor, CLONE_NEWNET) == 0
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        assert _libc.capset(header, (ctypes.c_uint32 * 6)()) == 0
        with pytest.raises(PermissionError):
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        with Monitor() as monitor, Network() as network:
            ready.set()
            assert changed.wait(30)
            return way_to(network, ON_LINK), monitor.receive()

    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(unprivileged)
        assert ready.wait(30)
        ip(machine, f"neigh add {GATEWAY} lladdr {MAC} dev one")
        changed.set()
        outcome, news = doing.result(timeout=30)
    assert isinstance(outcome, Route)
    assert news


def test_nobody_but_the_kernel_is_listened_to(monitor: Monitor, network: Network) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as other:
        for each in (monitor._socket, network._socket):
            with pytest.raises(ConnectionRefusedError):
                other.sendto(bytes(16), (each.getsockname()[0], 0))


class Following:
    """What the relay does: asks and listens, and keeps the entries."""

    def __init__(self, network: Network, monitor: Monitor) -> None:
        self.network, self.monitor = network, monitor
        self.hops = NextHops()
        self.written: dict[int, NextHop] = {}
        self.asked = 0
        self.hops.attach({each.ifindex: Mode.NATIVE for each in network.links()})
        self.hops.replace(network.links(), network.neighbours())

    def settle(self) -> None:
        while self.hops.pending:
            asked = self.hops.look_ups(512)
            self.asked += len(asked)
            for look_up, outcome in zip(asked, self.network.look_up(asked), strict=True):
                self.hops.found(look_up, outcome)
            self.written.update(self.hops.entries(512))

    def until(self, condition: Callable[[], bool]) -> None:
        self.settle()
        while not condition():
            batch = self.monitor.receive()
            assert batch is not None, "it did not come true"
            changed = False
            for news in batch:
                if isinstance(news, NeighbourNews):
                    self.hops.neighbour(news)
                elif isinstance(news, LinkNews):
                    changed = self.hops.link(news) or changed
                else:
                    changed = True
            if changed:
                self.hops.routes_changed()
            self.settle()

    def becomes(self, index: int, to_mac: str) -> None:
        self.until(lambda: self.written.get(index, UNKNOWN).to_mac == mac(to_mac))


@pytest.fixture
def following(network: Network, monitor: Monitor) -> Following:
    return Following(network, monitor)


def test_an_entry_follows_its_neighbour_its_gateway_and_its_interface(machine: Machine, following: Following) -> None:
    ip(machine, f"route add default via {GATEWAY}", f"neigh add {OTHER_GATEWAY} lladdr {OTHER_MAC} dev one")
    following.hops.follow(0, FAR)
    following.settle()
    assert 0 not in following.written
    ip(machine, f"neigh add {GATEWAY} lladdr {MAC} dev one")
    following.becomes(0, MAC)
    one = link(following.network, "one")
    assert following.written[0] == NextHop(
        one.ifindex, packed_address(FAR), packed_address(OWN), mac(MAC), one.mac, 0, 1500, stale=False
    )
    ip(machine, f"route replace default via {OTHER_GATEWAY}")
    following.becomes(0, OTHER_MAC)
    ip(machine, f"neigh replace {OTHER_GATEWAY} lladdr {MAC} dev one")
    following.becomes(0, MAC)
    ip(machine, "link set one mtu 1400")
    following.until(lambda: following.written[0].mtu == 1400)
    ip(machine, "link set far-one down")
    following.until(lambda: following.written[0] == UNKNOWN)


@pytest.mark.parametrize("change", ["addr del 192.0.2.1/24 dev one", "link set one down", "link del one"])
def test_an_entry_goes_with_what_its_way_depends_on(machine: Machine, following: Following, change: str) -> None:
    ip(machine, f"neigh add {ON_LINK} lladdr {MAC} dev one")
    following.hops.follow(0, ON_LINK)
    following.becomes(0, MAC)
    ip(machine, change)
    following.until(lambda: following.written[0] == UNKNOWN)


def test_a_neighbour_answers_because_userspace_sends(machine: Machine, following: Following) -> None:
    """Two machines: what is unknown is found out by the kernel as soon as a socket sends."""
    with contextlib.closing(Machine()) as far:
        machine.run("ip", "link", "set", "far-one", "netns", far.path)
        ip(far, f"addr add {ON_LINK}/24 dev far-one", f"link set far-one address {MAC}", "link set far-one up")
        following.hops.follow(0, ON_LINK)
        following.until(lambda: link(following.network, "one").up)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", (ON_LINK, 9))
            following.becomes(0, MAC)


def test_a_moved_gateway_moves_all_destinations_and_asks_once_for_each(machine: Machine, following: Following) -> None:
    number = 16_000
    ip(
        machine,
        f"route add default via {GATEWAY}",
        f"neigh add {GATEWAY} lladdr {MAC} dev one",
        f"neigh add {OTHER_GATEWAY} lladdr {OTHER_MAC} dev one",
    )
    for index in range(number):
        following.hops.follow(index, f"198.51.{index >> 8}.{index & 255}")
    following.becomes(number - 1, MAC)
    # What came of the commands above was heard while waiting, or is now.
    ip(machine, "link set two mtu 1400")
    two = link(following.network, "two").ifindex
    following.until(lambda: following.hops._links[two].mtu == 1400)
    before = following.asked
    ip(machine, f"route replace default via {OTHER_GATEWAY}")
    following.becomes(number - 1, OTHER_MAC)
    assert {entry.to_mac for entry in following.written.values()} == {mac(OTHER_MAC)}
    assert len(following.written) == number
    assert following.asked - before == number


def test_where_the_kernel_has_no_such_sockets_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_NETLINK", 250)
    for kind in (Network, Monitor):
        with pytest.raises(OSError, match="supported") as raised:
            kind()
        assert raised.value.errno == errno.EAFNOSUPPORT
