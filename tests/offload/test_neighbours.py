"""Neighbours change while the kernel relays: the relay follows, and only packets in flight are lost."""

import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from relay.core.addresses import Family
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, WITHIN, Lab, running, talk
from tests.support.offload.stream import Stream
from tests.support.offload.topology import PEER, Capture, asks_for, row
from tests.support.requirements import needs_ipv6
from tests.support.waiting import wait_until

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

FAMILIES: Final = [pytest.param((each, each), id=each.name) for each in Family]
REACHABLE: Final = 400
"""Milliseconds until a neighbour is stale, about."""


@pytest.fixture(scope="module", params=MODES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with row() as network:
        for host, link in ((network.relay, "r0"), (network.relay, "r1"), (network.client, "c0"), (network.peer, "p0")):
            host.set_knob(f"ipv4/conf/{link}/arp_notify", 1)
            host.set_knob(f"ipv6/conf/{link}/ndisc_notify", 1)
        for link in ("r0", "r1"):
            for family in ("ipv4", "ipv6"):
                network.relay.set_knob(f"{family}/neigh/{link}/base_reachable_time_ms", REACHABLE)
                network.relay.set_knob(f"{family}/neigh/{link}/delay_first_probe_time", 0)
                network.relay.set_knob(f"{family}/neigh/{link}/retrans_time_ms", 100)
        with running(network.relay, tmp_path_factory.mktemp("relay"), request.param) as relay:
            yield Lab(network, relay, request.param)


@pytest.fixture(params=FAMILIES)
def families(request: pytest.FixtureRequest) -> tuple[Family, Family]:
    found: tuple[Family, Family] = request.param
    return found


@pytest.fixture(autouse=True)
def _nobody_knows_anybody(lab: Lab) -> None:
    """Flush the neighbours of the previous test."""
    lab.network.relay.ip("neigh flush dev r0", "neigh flush dev r1")
    lab.network.client.ip("neigh flush dev c0")
    lab.network.peer.ip("neigh flush dev p0")


_macs = (f"02:00:00:77:{number >> 8:02x}:{number & 0xFF:02x}" for number in range(1, 1 << 16))


def arrives_by_kernel(lab: Lab, stream: Stream) -> Callable[[], bool]:
    """Return a check whether the kernel relays a stream from now on: ten packets in each direction."""

    def does() -> bool:
        peer, client, counts = len(stream.at_peer), len(stream.at_client), lab.relay.counts()
        # Arriving packets are the only sign of the end.
        time.sleep(0.02)
        later = lab.relay.counts().since(counts)
        arrived = [(len(stream.at_peer) - peer, later.to_peer)]
        if stream.to_client:
            arrived.append((len(stream.at_client) - client, later.to_client))
        return min(min(each) for each in arrived) >= 10

    return does


def test_stale_neighbours_are_probed_while_the_kernel_relays_all_packets(lab: Lab, families: tuple[Family, Family]) -> None:
    with talk(lab.relay, lab.network, families) as way, Capture(lab.network.peer, "p0") as at_peer:
        with Stream(way) as stream:
            before = lab.relay.counts()
            questions: list[bytes] = []

            def is_asked_often() -> bool:
                questions.extend(each for each in at_peer.frames() if asks_for(each, PEER[families[1]]))
                return len(questions) >= 2 and lab.relay.counts().since(before).passed["stale_neighbour"] >= 2

            wait_until(is_asked_often)
            counts = lab.relay.counts().since(before)
        assert stream.lost() == 0
        assert counts.passed.total() < 20 < counts.to_peer, counts


def test_a_new_mac_address_announced_by_a_neighbour_is_used(lab: Lab, families: tuple[Family, Family]) -> None:
    with talk(lab.relay, lab.network, families) as way, Stream(way, loses=True) as stream:
        stream.wait_for(50)
        with Capture(lab.network.peer, "p0") as at_peer:
            mac = next(_macs)
            lab.network.peer.ip(f"link set p0 address {mac}")
            wait_until(arrives_by_kernel(lab, stream), WITHIN)
            assert at_peer.take(lambda seen: seen.to == mac)


def test_a_new_mac_address_announced_by_a_client_is_used(lab: Lab, families: tuple[Family, Family]) -> None:
    with talk(lab.relay, lab.network, families) as way, Stream(way, loses=True) as stream:
        stream.wait_for(50)
        lab.network.client.ip(f"link set c0 address {next(_macs)}")
        wait_until(arrives_by_kernel(lab, stream), WITHIN)


def test_an_unannounced_mac_address_is_found_by_probes(lab: Lab, families: tuple[Family, Family]) -> None:
    """A neighbour changes its MAC address without an announcement: packets are lost until probes by the kernel fail."""
    network = lab.network
    knobs = ("ipv4/conf/p0/arp_notify", "ipv6/conf/p0/ndisc_notify")
    with (
        talk(lab.relay, network, families) as way,
        Stream(way, loses=True, to_client=False) as stream,
        Capture(network.peer, "p0") as at_peer,
    ):
        stream.wait_for(50)
        for knob in knobs:
            network.peer.set_knob(knob, 0)
        mac = next(_macs)
        try:
            network.peer.ip(f"link set p0 address {mac}")
        finally:
            for knob in knobs:
                network.peer.set_knob(knob, 1)
        # Once stale: a packet by the sockets, some unicast probes, some broadcast probes.
        wait_until(lambda: any(each.to == mac for each in at_peer.take()))
        wait_until(arrives_by_kernel(lab, stream), WITHIN)
    assert stream.lost() > 0, "it had to be lost first"


def test_a_deleted_neighbour_is_resolved_by_the_sockets(lab: Lab, families: tuple[Family, Family]) -> None:
    with talk(lab.relay, lab.network, families) as way, Stream(way) as stream:
        before = lab.relay.counts()
        lab.network.relay.ip("neigh flush dev r1", "neigh flush dev r0")
        wait_until(arrives_by_kernel(lab, stream), WITHIN)
        assert lab.relay.counts().since(before).passed["no_next_hop"] > 0
    assert stream.lost() == 0


@pytest.mark.parametrize("link", ["r0", "r1"])
def test_a_new_mac_address_of_the_relay_is_used(lab: Lab, families: tuple[Family, Family], link: str) -> None:
    network = lab.network
    with talk(lab.relay, network, families) as way, Stream(way, loses=True) as stream:
        stream.wait_for(50)
        mac = next(_macs)
        network.relay.ip(f"link set {link} address {mac}")
        wait_until(arrives_by_kernel(lab, stream), WITHIN)
        far = (network.client, "c0") if link == "r0" else (network.peer, "p0")
        with Capture(*far) as at_far:
            stream.wait_for(50)
            assert {each.source for each in at_far.take()} == {mac}
