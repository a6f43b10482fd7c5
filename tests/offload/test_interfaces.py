"""Interfaces and addresses that come and go while the relay runs."""

from collections.abc import Iterator
from typing import Final

import pytest

from relay.core.addresses import Family
from tests.support.machine import wait_until_up
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, WITHIN, Lab, Talk, running, talk
from tests.support.offload.stream import Stream
from tests.support.offload.topology import BEHIND, CLIENT, PEER, RELAY, configure, connect, row
from tests.support.requirements import needs_ipv6
from tests.support.waiting import wait_until

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

FAMILIES: Final = [pytest.param((each, each), id=each.name) for each in Family]


def is_attached(lab: Lab) -> bool:
    found: dict[str, str | None] = lab.relay.state()["xdp_attached"]
    return found == {"r0": lab.mode, "r1": lab.mode}


@pytest.fixture(scope="module", params=MODES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with row() as network, running(network.relay, tmp_path_factory.mktemp("relay"), request.param) as relay:
        yield Lab(network, relay, request.param)


@pytest.fixture
def elsewhere(lab: Lab) -> Iterator[Stream]:
    """Packets between a client and a peer behind r0, without losses during changes of r1."""
    with (
        lab.relay.client(lab.network.client) as client,
        lab.network.client.udp(CLIENT[Family.IPV6]) as peer,
    ):
        way = Talk(lab.relay, client, peer)
        way.wait_for_kernel()
        with Stream(way) as stream:
            yield stream
        assert (stream.lost(), stream.doubled()) == (0, 0)


def goes_on(lab: Lab, stream: Stream) -> None:
    """Check that the kernel relays packets."""
    before = lab.relay.counts()
    stream.wait_for(100)
    assert min(lab.relay.counts().since(before)[:2]) >= 10


@pytest.mark.parametrize("families", FAMILIES)
def test_relaying_resumes_after_an_interface_is_recreated(
    lab: Lab, elsewhere: Stream, families: tuple[Family, Family]
) -> None:
    network = lab.network
    with talk(lab.relay, network, families) as way:
        network.relay.ip("link del r1")
        wait_until(lambda: lab.relay.state()["xdp_attached"] == {"r0": lab.mode, "r1": None}, WITHIN)
        way.client.send(way.number, bytes(100))
        goes_on(lab, elsewhere)
        connect(network.relay, "r1", network.peer, "p0")
        configure(network.relay, "r1", BEHIND)
        configure(network.peer, "p0", PEER)
        network.peer.ip(*(f"route add default via {each}" for each in BEHIND.values()))
        wait_until_up(*network)
        wait_until(lambda: is_attached(lab), WITHIN)
        way.wait_for_kernel(WITHIN)
        goes_on(lab, elsewhere)


@pytest.mark.parametrize("families", FAMILIES)
def test_relaying_resumes_after_the_only_client_interface_is_recreated(lab: Lab, families: tuple[Family, Family]) -> None:
    network = lab.network
    with talk(lab.relay, network, families) as way:
        network.relay.ip("link del r0")
        wait_until(lambda: lab.relay.state()["xdp_attached"] == {"r0": None, "r1": lab.mode}, WITHIN)
        way.peer.sendto(bytes(100), way.relayed[:2])
        connect(network.relay, "r0", network.client, "c0")
        configure(network.relay, "r0", RELAY)
        configure(network.client, "c0", CLIENT)
        network.client.ip(*(f"route add default via {each}" for each in RELAY.values()))
        wait_until_up(*network)
        wait_until(lambda: is_attached(lab), WITHIN)
        way.wait_for_kernel(WITHIN)


@pytest.mark.parametrize("families", FAMILIES)
def test_relaying_resumes_after_a_link_was_down(lab: Lab, elsewhere: Stream, families: tuple[Family, Family]) -> None:
    network = lab.network
    for host, link in ((network.relay, "r1"), (network.peer, "p0")):
        host.set_knob(f"ipv6/conf/{link}/keep_addr_on_down", 1)
    with talk(lab.relay, network, families) as way:
        network.relay.ip("link set r1 down")

        def is_left_to_the_sockets() -> bool:
            before = lab.relay.counts()
            way.client.send(way.number, bytes(100))
            elsewhere.wait_for(10)
            return lab.relay.counts().since(before).passed["no_next_hop"] > 0

        wait_until(is_left_to_the_sockets, WITHIN)
        goes_on(lab, elsewhere)
        network.relay.ip("link set r1 up")
        # The other end needs up to a second, and an earlier neighbour solicitation is repeated a second later.
        wait_until(lambda: "state UP" in network.peer.links() and "state DOWN" not in network.relay.links())
        way.wait_for_kernel(WITHIN)


@pytest.mark.parametrize("families", FAMILIES)
def test_relaying_resumes_after_an_address_is_restored(lab: Lab, families: tuple[Family, Family]) -> None:
    network, address = lab.network, RELAY[families[0]]
    with talk(lab.relay, network, families) as way:
        # The client does not notice the removal.
        network.client.ip(f"neigh replace {address} dev c0 lladdr {network.relay.mac('r0')}")
        network.relay.ip(f"addr del {address}/{64 if ':' in address else 24} dev r0")

        def is_relayed() -> bool:
            before = lab.relay.counts()
            way.client.send(way.number, bytes(100))
            return sum(lab.relay.counts().since(before)[:2]) > 0

        wait_until(lambda: not is_relayed(), WITHIN)
        for _ in range(10):
            assert not is_relayed(), "it is nobody's, or another machine's"
        network.relay.ip(f"addr add {address}/{64 if ':' in address else 24} dev r0{' nodad' * (':' in address)}")
        wait_until(is_relayed, WITHIN)


@pytest.mark.parametrize("families", FAMILIES)
def test_relaying_follows_changes_of_the_mtu(lab: Lab, families: tuple[Family, Family]) -> None:
    network = lab.network
    with talk(lab.relay, network, families) as way:
        headers = 28 if families[0] is Family.IPV4 else 48
        for mtu in (1300, 1500):
            network.peer.set_mtu("p0", mtu)
            network.relay.set_mtu("r1", mtu)
            # The MTU of the client's own link includes a ChannelData header of 4 bytes.
            longest = min(mtu, 1496) - headers

            def is_followed(longest: int = longest, limit: bool = mtu < 1496) -> bool:  # noqa: FBT001
                before = lab.relay.counts()
                way.to_peer(bytes(longest))
                if limit:
                    way.to_peer(bytes(longest + 1))
                counts = lab.relay.counts().since(before)
                return (counts.to_peer, counts.passed["too_long"]) == (1, limit)

            wait_until(is_followed, WITHIN)
