"""Networks of various shapes: the relay finds the next hops, and follows changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from relay.core.addresses import Family
from tests.support.machine import wait_until_up
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, WITHIN, Lab, Offloading, Talk, running
from tests.support.offload.stream import Stream
from tests.support.offload.topology import CLIENT, PEER, RELAY, Capture, Host, Row, configure, connect, hosts, row
from tests.support.requirements import needs_ipv6
from tests.support.waiting import wait_until

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

FAR_PEER: Final = {Family.IPV4: "10.77.9.9", Family.IPV6: "fd77:9::9"}
ON_LINK: Final = {Family.IPV4: "10.77.1.3", Family.IPV6: "fd77:1::3"}
FAMILIES: Final = [pytest.param((one, other), id=f"{one.name}-{other.name}") for one in Family for other in Family]


@pytest.fixture(params=FAMILIES)
def families(request: pytest.FixtureRequest) -> tuple[Family, Family]:
    """Families of the client and the peer."""
    found: tuple[Family, Family] = request.param
    return found


class Roads(NamedTuple):
    """A peer behind two gateways. The relay reaches the gateways through r1 and r2, and the peer through p1 and p2."""

    relay: Host
    client: Host
    peer: Host
    gateways: tuple[Host, Host]
    offloading: Offloading

    def go_by(self, way: int) -> None:
        """Route the relay's packets through one of the two gateways."""
        self.relay.ip(
            f"route replace {FAR_PEER[Family.IPV4]} via 10.77.1{way}.254",
            f"route replace {FAR_PEER[Family.IPV6]} via fd77:1{way}::254",
        )


@pytest.fixture(scope="module", params=MODES)
def roads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roads]:
    with hosts("relay", "client", "peer", "one", "two") as (relay, client, peer, *both):
        connect(relay, "r0", client, "c0")
        configure(relay, "r0", RELAY)
        configure(client, "c0", CLIENT)
        configure(peer, "lo", FAR_PEER)
        for way, gateway in enumerate(both, 1):
            gateway.set_knob("ipv4/ip_forward", 1)
            gateway.set_knob("ipv6/conf/all/forwarding", 1)
            connect(relay, f"r{way}", gateway, "near")
            connect(peer, f"p{way}", gateway, "far")
            configure(relay, f"r{way}", f"10.77.1{way}.1", f"fd77:1{way}::1")
            configure(gateway, "near", f"10.77.1{way}.254", f"fd77:1{way}::254")
            configure(gateway, "far", f"10.77.2{way}.254", f"fd77:2{way}::254")
            configure(peer, f"p{way}", f"10.77.2{way}.2", f"fd77:2{way}::2")
            gateway.ip(
                f"route add default via 10.77.1{way}.1",
                f"route add default via fd77:1{way}::1",
                f"route add {FAR_PEER[Family.IPV4]} via 10.77.2{way}.2",
                f"route add {FAR_PEER[Family.IPV6]} via fd77:2{way}::2",
            )
        peer.ip("route add default via 10.77.21.254", "route add default via fd77:21::254")
        wait_until_up(relay, client, peer, *both)
        with running(relay, tmp_path_factory.mktemp("relay"), request.param, links="r0,r1,r2") as offloading:
            yield Roads(relay, client, peer, (both[0], both[1]), offloading)


def test_relaying_follows_a_changed_gateway(roads: Roads, families: tuple[Family, Family]) -> None:
    roads.go_by(1)
    with (
        roads.offloading.client(roads.client, families[0]) as client,
        roads.peer.udp(FAR_PEER[families[1]]) as peer,
        Capture(roads.peer, "p1") as by_one,
        Capture(roads.peer, "p2") as by_two,
    ):
        way = Talk(roads.offloading, client, peer)
        way.wait_for_kernel()
        with Stream(way) as stream:
            for new, old in ((by_two, by_one), (by_one, by_two)):
                stream.wait_for(100)
                roads.go_by(1 if new is by_one else 2)

                def is_followed(new: Capture = new, old: Capture = old) -> bool:
                    for each in (new, old):
                        each.take()
                    before = roads.offloading.counts()
                    stream.wait_for(100)
                    by_kernel = roads.offloading.counts().since(before).to_peer
                    return len(new.take()) > 10 and by_kernel > 10 and not old.take()

                wait_until(is_followed, WITHIN)
    assert (stream.lost(), stream.doubled()) == (0, 0), "the old way was as good, until the new one was known"


@pytest.fixture(scope="module", params=MODES)
def one_armed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Client, peer and relay on one switch; the relay has a single link."""
    with hosts("client", "relay", "peer", "switch") as (client, relay, peer, switch):
        switch.ip("link add b0 type bridge", "link set b0 up")
        for host, link, addresses in ((client, "c0", CLIENT), (relay, "r0", RELAY), (peer, "p0", ON_LINK)):
            connect(host, link, switch, f"to-{link}")
            switch.ip(f"link set to-{link} master b0 up")
            configure(host, link, addresses)
        wait_until_up(client, relay, peer, switch)
        with running(relay, tmp_path_factory.mktemp("relay"), request.param, links="r0") as offloading:
            yield Lab(Row(client, relay, peer), offloading, request.param)


def test_client_peer_and_relay_can_share_a_switch(one_armed: Lab, families: tuple[Family, Family]) -> None:
    network, relay, _ = one_armed
    with relay.client(network.client, families[0]) as client, network.peer.udp(ON_LINK[families[1]]) as peer:
        way = Talk(relay, client, peer)
        way.wait_for_kernel()
        with Stream(way) as stream, Capture(network.client, "c0") as at_client, Capture(network.peer, "p0") as at_peer:
            before = relay.counts()
            stream.wait_for(200)
            assert min(relay.counts().since(before)[:2]) > 50
            for capture, far in ((at_client, network.client.mac("c0")), (at_peer, network.peer.mac("p0"))):
                assert {(seen.to, seen.source) for seen in capture.take()} == {(far, network.relay.mac("r0"))}
        assert (stream.lost(), stream.doubled()) == (0, 0)


def test_two_clients_on_the_same_switch_reach_each_other(one_armed: Lab) -> None:
    network, relay, _ = one_armed
    with (
        relay.client(network.client, Family.IPV4) as one,
        relay.client(network.peer, Family.IPV6, ON_LINK[Family.IPV6]) as other,
    ):
        (here,), (there,) = one.allocate(), other.allocate()
        assert one.bind_channel(0x4001, there) is None
        assert other.bind_channel(0x4002, here) is None

        def is_relayed() -> bool:
            before = relay.counts()
            one.send(0x4001, bytes(100))
            assert other.receive() == (0x4002, bytes(100))
            other.send(0x4002, bytes(50))
            assert one.receive() == (0x4001, bytes(50))
            return relay.counts().since(before)[:2] == (2, 2)

        wait_until(is_relayed)


def test_the_sockets_send_through_interfaces_without_the_program(tmp_path: Path) -> None:
    with row() as network:
        network.know_all()
        with (
            running(network.relay, tmp_path, "generic", links="r0") as relay,
            relay.client(network.client) as client,
            network.peer.udp(PEER[Family.IPV4]) as peer,
        ):
            way = Talk(relay, client, peer)
            before = relay.counts()
            for _ in range(10):
                way.both()
            assert relay.counts().since(before) == (0, 0, {"no_next_hop": 10})


@pytest.fixture
def behind_nat(tmp_path: Path) -> Iterator[Lab]:
    """A relay whose public address belongs to no interface: its sockets receive packets for any address."""
    with row() as network:
        network.know_all()
        with running(network.relay, tmp_path, "generic", public=["203.0.113.77"]) as relay:
            yield Lab(network, relay, "generic")


def test_behind_nat_packets_for_any_address_are_relayed(behind_nat: Lab) -> None:
    network, relay, _ = behind_nat
    with relay.client(network.client) as client, network.peer.udp(PEER[Family.IPV4]) as peer:
        way = Talk(relay, client, peer)
        assert way.relayed[0] == "203.0.113.77"
        # The source address of packets to the internet; NAT would replace it with the public address.
        way.relayed = ("10.77.2.1", way.relayed[1])
        way.wait_for_kernel()
        network.relay.ip("addr add 10.77.1.77/24 dev r0")
        client.server = ("10.77.1.77", 3478)

        def is_relayed() -> bool:
            before = relay.counts()
            way.to_peer(bytes(100))
            return relay.counts().since(before).to_peer == 1

        wait_until(is_relayed, WITHIN)
