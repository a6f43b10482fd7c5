"""Notifications and dumps of a real kernel in test networks, and the resulting next hops."""

import contextlib
import errno
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay.net.netlink import BUFFER
from relay.offload.bpf import XdpMode
from relay.offload.layout import NextHop, Own, packed_address
from relay.offload.netlink import Changes, Monitor, Network
from relay.offload.network import (
    Link,
    LookUp,
    Neighbour,
    Route,
)
from relay.offload.next_hops import NextHops, own_addresses
from tests.support.machine import Machine
from tests.support.privileges import EVERY_CAPABILITY, give_up
from tests.support.requirements import needs_ipv6
from tests.support.waiting import wait_until

OWN, OWN6 = "192.0.2.1", "2001:db8::1"
ON_LINK, GATEWAY, OTHER_GATEWAY = "192.0.2.9", "192.0.2.254", "192.0.2.253"
ON_LINK6, GATEWAY6 = "2001:db8::9", "2001:db8::fe"
FAR, FAR6 = "198.51.100.9", "2001:db8:9::9"
LINKS = ("one", "far-one", "two", "far-two")
MAC, OTHER_MAC = "02:00:00:00:01:01", "02:00:00:00:01:02"
ROOM_FOR_SOME = 32 << 10
"""Bytes of notifications, each of which takes 4 KB in the kernel. The kernel doubles this number."""


def ip(machine: Machine, *lines: str) -> None:
    """Run commands of ip(8) on a machine, one per line."""
    machine.run("ip", "-batch", "-", text="\n".join(lines))


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with two separate links."""
    if shutil.which("ip") is None:
        pytest.skip("rtnetlink is not tested: ip is not installed (iproute2)")
    try:
        made = Machine()
    except OSError as error:
        pytest.skip(f"rtnetlink is not tested: namespaces take root ({error.strerror})")
    with contextlib.closing(made):
        ip(
            made,
            "link set lo up",
            *(f"link add {link} type veth peer name far-{link}" for link in ("one", "two")),
            # No packets and notifications by the kernel itself, such as for a new link-local address.
            *(f"link set {link} addrgenmode none" for link in LINKS),
            *(f"link set {link} up" for link in LINKS),
            f"addr add {OWN}/24 dev one",
            "addr add 203.0.113.1/24 dev two",
        )
        with made.entered(), Network() as network:
            # A link comes up a moment later, with another notification.
            wait_until(lambda: all(each.up for each in network.links() if each.name in LINKS))
        yield made


@pytest.fixture
def ipv6(machine: Machine) -> Machine:
    ip(machine, f"addr add {OWN6}/64 dev one nodad", "addr add 2001:db8:2::1/64 dev two nodad")
    return machine


@contextlib.contextmanager
def opened_monitor(buffer: int = BUFFER) -> Iterator[Monitor]:
    """Open a monitor that stops after a minute, so that a failing test does not hang."""
    with Monitor(buffer) as opened:
        giving_up = threading.Timer(60, opened.stop)
        giving_up.start()
        yield opened
        giving_up.cancel()
        giving_up.join()


@pytest.fixture
def monitor(machine: Machine) -> Iterator[Monitor]:
    with machine.entered(), opened_monitor() as opened:
        yield opened


@pytest.fixture
def network(machine: Machine) -> Iterator[Network]:
    with machine.entered(), Network() as opened:
        yield opened


def way_to(network: Network, host: str, source: str | None = None) -> Route | None:
    (outcome,) = network.look_up([LookUp(packed_address(host), None if source is None else packed_address(source))])
    return outcome


def link(network: Network, name: str) -> Link:
    return {each.name: each for each in network.links()}[name]


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def heard(monitor: Monitor) -> Iterator[Neighbour]:
    """Return the changed neighbours one by one."""
    for changes in iter(monitor.receive, None):
        yield from changes.neighbours
    pytest.fail("no such news came")


def wait_for_neighbour(news: Iterator[Neighbour], host: str) -> Neighbour:
    return next(each for each in news if each.address == packed_address(host))


def wait_for_others(monitor: Monitor) -> Changes:
    """Wait for a change that is not about neighbours."""
    return next(each for each in iter(monitor.receive, None) if each.others)


def test_a_peer_on_the_link_has_no_gateway(network: Network) -> None:
    assert way_to(network, ON_LINK) == Route(link(network, "one").ifindex, None, packed_address(OWN), None)


def test_a_peer_behind_a_gateway_has_the_gateway_as_next_hop(machine: Machine, network: Network) -> None:
    ip(machine, f"route add default via {GATEWAY}")
    one = link(network, "one").ifindex
    assert way_to(network, FAR) == Route(one, packed_address(GATEWAY), packed_address(OWN), None)


@needs_ipv6
@pytest.mark.usefixtures("ipv6")
def test_ipv6_peers_have_routes(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR6}/128 via {GATEWAY6} mtu 1400")
    one = link(network, "one").ifindex
    assert way_to(network, ON_LINK6) == Route(one, None, packed_address(OWN6), None)
    assert way_to(network, FAR6) == Route(one, packed_address(GATEWAY6), packed_address(OWN6), 1400)
    assert way_to(network, OWN6) is None
    assert way_to(network, "2001:db8:ffff::1") is None


@needs_ipv6
@pytest.mark.usefixtures("ipv6")
def test_an_ipv4_peer_can_have_an_ipv6_gateway(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR}/32 via inet6 {GATEWAY6}")
    one = link(network, "one").ifindex
    assert way_to(network, FAR) == Route(one, packed_address(GATEWAY6), packed_address(OWN), None)


def test_each_peer_has_a_route_through_its_own_interface(network: Network) -> None:
    hosts = [ON_LINK, "203.0.113.9", "192.0.2.10", "203.0.113.10"] * 50
    found = network.look_up([LookUp(packed_address(host)) for host in hosts])
    one, two = link(network, "one").ifindex, link(network, "two").ifindex
    assert [each.ifindex for each in found if isinstance(each, Route)] == [one, two] * 100


def test_a_source_rule_applies_to_lookups_with_its_source(machine: Machine, network: Network) -> None:
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


def test_a_udp_rule_applies_to_lookups(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR} via {GATEWAY}", f"route add {FAR} via {OTHER_GATEWAY} table 7")
    ip(machine, "rule add ipproto udp lookup 7")
    assert isinstance(route := way_to(network, FAR), Route)
    assert route.gateway == packed_address(OTHER_GATEWAY)


def test_packets_that_cannot_leave_have_no_route(machine: Machine, network: Network) -> None:
    ip(
        machine,
        "route add blackhole 198.18.1.0/24",
        "route add unreachable 198.18.2.0/24",
        "route add prohibit 198.18.3.0/24",
    )
    hosts = (FAR, "198.18.1.1", "198.18.2.1", "198.18.3.1")
    assert {way_to(network, host) for host in hosts} == {None}
    assert way_to(network, ON_LINK, "192.0.2.77") is None
    assert {way_to(network, host) for host in (OWN, "127.0.0.1", "203.0.113.1", "192.0.2.255")} == {None}


def test_a_route_may_have_a_smaller_mtu_than_its_link(machine: Machine, network: Network) -> None:
    ip(machine, f"route add {FAR} via {GATEWAY} mtu 1400")
    assert isinstance(route := way_to(network, FAR), Route)
    assert route.mtu == 1400


def test_links_are_returned(machine: Machine, network: Network) -> None:
    ip(machine, "link set two down", f"link set one address {MAC} mtu 1400")
    assert link(network, "lo").ethernet is False
    one = link(network, "one")
    assert (one.mac, one.mtu, one.ipv6_mtu, one.up, one.ethernet) == (mac(MAC), 1400, 1400, True, True)
    assert (one.parent, one.vlan, one.master) == (0, 0, 0)
    assert not link(network, "two").up
    wait_until(lambda: not link(network, "far-two").up)  # The kernel notices the lost carrier a moment later.


@needs_ipv6
def test_addresses_are_returned(ipv6: Machine, network: Network) -> None:
    with ipv6.entered():
        # Number of seconds for which an address stays tentative.
        Path("/proc/sys/net/ipv6/conf/one/dad_transmits").write_text("60")
    ip(ipv6, "addr add 192.0.2.5 peer 192.0.2.6 dev one", "addr add 2001:db8::77/64 dev one")
    found = {each.address: each for each in network.addresses()}
    assert packed_address("127.0.0.1") in found
    assert packed_address("192.0.2.5") in found
    assert packed_address("192.0.2.6") not in found
    assert not found[packed_address(OWN6)].tentative
    assert found[packed_address("2001:db8::77")].tentative
    links = network.links()
    first = {link(network, "one").ifindex: XdpMode.DRIVER}
    own = own_addresses(network.addresses(), links, first)
    assert own[:3] == [Own(packed_address(host)) for host in (OWN, "192.0.2.5", OWN6)]
    assert set(own[3:]) == {Own(packed_address("203.0.113.1")), Own(packed_address("2001:db8:2::1"))}


def test_neighbours_are_returned(machine: Machine, network: Network) -> None:
    ip(
        machine,
        f"neigh add {GATEWAY} lladdr {MAC} nud stale dev one",
        f"neigh add {OTHER_GATEWAY} nud failed dev one",
        f"neigh add proxy {ON_LINK} dev one",
    )
    found = {each.address: each for each in network.neighbours()}
    assert found[packed_address(GATEWAY)][2:] == (mac(MAC), True)
    assert found[packed_address(OTHER_GATEWAY)][2:] == (b"", False)
    assert packed_address(ON_LINK) not in found


def test_a_changed_neighbour_is_notified(machine: Machine, network: Network, monitor: Monitor) -> None:
    one, news = link(network, "one").ifindex, heard(monitor)
    ip(machine, f"neigh add {GATEWAY} lladdr {MAC} dev one")
    assert wait_for_neighbour(news, GATEWAY).mac == mac(MAC)
    ip(machine, f"neigh replace {GATEWAY} lladdr {OTHER_MAC} dev one")
    changed = wait_for_neighbour(news, GATEWAY)
    assert changed == (one, packed_address(GATEWAY), mac(OTHER_MAC), False)
    ip(machine, f"neigh del {GATEWAY} dev one")
    forgotten = [wait_for_neighbour(news, GATEWAY) for _ in range(2)]
    assert forgotten == [(one, packed_address(GATEWAY), b"", False)] * 2


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
def test_a_change_of_routes_is_notified(machine: Machine, monitor: Monitor, change: str) -> None:
    machine.run("ip", *change.split())
    wait_for_others(monitor)


@pytest.mark.parametrize("host", ["192.0.2.5/24", pytest.param("2001:db8::5/64", marks=needs_ipv6)])
def test_a_new_address_is_notified(machine: Machine, monitor: Monitor, host: str) -> None:
    ip(machine, f"addr add {host} dev one")
    wait_for_others(monitor)
    ip(machine, f"addr del {host} dev one")
    wait_for_others(monitor)


def test_a_change_of_a_neighbour_is_no_other_change(machine: Machine, monitor: Monitor) -> None:
    """Any other change makes the relay query all routes."""
    ip(machine, f"neigh add {GATEWAY} lladdr {MAC} dev one")
    assert [changes.others for changes in iter(monitor.receive, None) if changes.neighbours][:1] == [False]


def test_deleting_and_recreating_an_interface_is_notified(machine: Machine, network: Network, monitor: Monitor) -> None:
    before = link(network, "one").ifindex
    ip(machine, "link del one")
    wait_for_others(monitor)
    ip(machine, "link add one type veth peer name far-one", "link set one up", "link set far-one up")
    while not (one := {each.name: each for each in network.links()}.get("one")) or not one.up:
        wait_for_others(monitor)
    assert one.ifindex != before


def test_a_port_of_a_bridge_has_a_master(machine: Machine, network: Network, monitor: Monitor) -> None:
    ip(machine, "link add bridge type bridge", "link set one master bridge")
    wait_for_others(monitor)
    assert link(network, "one").master == link(network, "bridge").ifindex
    ip(machine, "link set one nomaster")
    assert link(network, "one").master == 0


def test_an_overrun_is_reported_and_later_notifications_are_not_lost(machine: Machine, network: Network) -> None:
    with machine.entered(), opened_monitor(buffer=ROOM_FOR_SOME) as monitor:
        hosts = [f"192.0.2.{number}" for number in range(10, 200)]
        ip(machine, *(f"neigh add {host} lladdr {MAC} dev one" for host in hosts))
        wait_for_others(monitor)
        assert {packed_address(host) for host in hosts} <= {each.address for each in network.neighbours()}
        ip(machine, f"neigh add {GATEWAY} lladdr {OTHER_MAC} dev one")
        # No notification from before the dump comes after the dump. Other notifications are not about neighbours.
        assert next(heard(monitor)).address == packed_address(GATEWAY)


def test_a_waiting_monitor_can_be_stopped(monitor: Monitor) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(iter(monitor.receive, None)))
        monitor.stop()
        waiting.result(timeout=30)
    assert monitor.receive() is None


def test_a_monitor_needs_no_privileges(machine: Machine) -> None:
    ready, changed = threading.Event(), threading.Event()

    def unprivileged() -> tuple[Route | None, Neighbour]:
        # Only this thread's capabilities, because the thread ends afterwards. The thread inherited the network.
        give_up(EVERY_CAPABILITY)
        with pytest.raises(PermissionError):
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        with opened_monitor() as monitor, Network() as network:
            ready.set()
            assert changed.wait(30)
            return way_to(network, ON_LINK), next(heard(monitor))

    with machine.entered(), ThreadPoolExecutor(1) as pool:
        doing = pool.submit(unprivileged)
        assert ready.wait(30)
        ip(machine, f"neigh add {GATEWAY} lladdr {MAC} dev one")
        changed.set()
        outcome, news = doing.result(timeout=30)
    assert isinstance(outcome, Route)
    assert news.address == packed_address(GATEWAY)


@pytest.mark.usefixtures("monitor", "network")
def test_messages_from_other_processes_are_ignored() -> None:
    lines = [line.split() for line in Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]]
    # The second column is the protocol, the third the socket's address: 0 is the kernel.
    open_here = [int(port) for _, protocol, port, *_ in lines if int(protocol) == socket.NETLINK_ROUTE and port != "0"]
    assert len(open_here) == 2
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as other:
        for port in open_here:
            with pytest.raises(ConnectionRefusedError):
                other.sendto(bytes(16), (port, 0))


class Following:
    """A simple offload actor: queries, receives notifications and updates entries."""

    def __init__(self, network: Network, monitor: Monitor) -> None:
        self.network, self.monitor = network, monitor
        self.hops = NextHops()
        self.written: dict[bytes, NextHop | None] = {}
        self.asked = 0
        self.links: list[Link] = []
        """The links after the last notification."""
        self.hops.attach({each.ifindex: XdpMode.DRIVER for each in network.links()})
        self.hops.replace(network.links(), network.neighbours())

    def settle(self) -> None:
        while self.hops.pending:
            asked = self.hops.look_ups(512)
            self.asked += len(asked)
            for look_up, route in zip(asked, self.network.look_up(asked), strict=True):
                self.hops.found(look_up, route)
            self.written.update(self.hops.entries(512))

    def until(self, condition: Callable[[], bool]) -> None:
        self.settle()
        while not condition():
            changes = self.monitor.receive()
            assert changes is not None, "it did not come true"
            for neighbour in changes.neighbours:
                self.hops.neighbour(neighbour)
            if changes.others:
                self.links = self.network.links()
                self.hops.replace(self.links, self.network.neighbours())
            self.settle()

    def hop(self, host: str) -> NextHop | None:
        return self.written.get(packed_address(host))

    def becomes(self, host: str, to_mac: str) -> None:
        def has_become() -> bool:
            hop = self.hop(host)
            return hop is not None and hop.to_mac == mac(to_mac)

        self.until(has_become)


@pytest.fixture
def following(network: Network, monitor: Monitor) -> Following:
    return Following(network, monitor)


def test_an_entry_follows_its_neighbour_its_gateway_and_its_interface(machine: Machine, following: Following) -> None:
    ip(machine, f"route add default via {GATEWAY}", f"neigh add {OTHER_GATEWAY} lladdr {OTHER_MAC} dev one")
    following.hops.follow(FAR)
    following.settle()
    assert not following.written
    ip(machine, f"neigh add {GATEWAY} lladdr {MAC} dev one")
    following.becomes(FAR, MAC)
    one = link(following.network, "one")
    assert following.hop(FAR) == NextHop(one.ifindex, packed_address(OWN), mac(MAC), one.mac, 0, 1500, stale=False)
    ip(machine, f"route replace default via {OTHER_GATEWAY}")
    following.becomes(FAR, OTHER_MAC)
    ip(machine, f"neigh replace {OTHER_GATEWAY} lladdr {MAC} dev one")
    following.becomes(FAR, MAC)
    ip(machine, "link set one mtu 1400")
    following.until(lambda: (hop := following.hop(FAR)) is not None and hop.mtu == 1400)
    ip(machine, "link set far-one down")
    following.until(lambda: following.hop(FAR) is None)


@pytest.mark.parametrize("change", ["addr del 192.0.2.1/24 dev one", "link set one down", "link del one"])
def test_an_entry_is_deleted_without_its_address_or_link(machine: Machine, following: Following, change: str) -> None:
    ip(machine, f"neigh add {ON_LINK} lladdr {MAC} dev one")
    following.hops.follow(ON_LINK)
    following.becomes(ON_LINK, MAC)
    ip(machine, change)
    following.until(lambda: following.hop(ON_LINK) is None)


def test_a_neighbour_answers_because_userspace_sends(machine: Machine, following: Following) -> None:
    """The kernel resolves an unknown neighbour when a socket sends."""
    with contextlib.closing(Machine()) as far:
        machine.run("ip", "link", "set", "far-one", "netns", far.path)
        ip(far, f"addr add {ON_LINK}/24 dev far-one", f"link set far-one address {MAC}", "link set far-one up")
        following.hops.follow(ON_LINK)
        following.until(lambda: link(following.network, "one").up)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", (ON_LINK, 9))
            following.becomes(ON_LINK, MAC)


def test_a_moved_gateway_moves_all_destinations_and_asks_once_for_each(machine: Machine, following: Following) -> None:
    number = 4_000
    ip(
        machine,
        f"route add default via {GATEWAY}",
        f"neigh add {GATEWAY} lladdr {MAC} dev one",
        f"neigh add {OTHER_GATEWAY} lladdr {OTHER_MAC} dev one",
    )
    hosts = [f"198.51.{index >> 8}.{index & 255}" for index in range(number)]
    for host in hosts:
        following.hops.follow(host)
    following.becomes(hosts[-1], MAC)
    # The notifications about the commands above have arrived, or arrive now.
    ip(machine, "link set two mtu 1400")
    following.until(lambda: ("two", 1400) in [(each.name, each.mtu) for each in following.links])
    before = following.asked
    ip(machine, f"route replace default via {OTHER_GATEWAY}")
    following.becomes(hosts[-1], OTHER_MAC)
    assert {entry and entry.to_mac for entry in following.written.values()} == {mac(OTHER_MAC)}
    assert len(following.written) == number
    assert following.asked - before in (number, 2 * number)


def test_a_kernel_without_netlink_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_NETLINK", 250)
    for kind in (Network, Monitor):
        with pytest.raises(OSError, match="supported") as raised:
            kind()
        assert raised.value.errno == errno.EAFNOSUPPORT
