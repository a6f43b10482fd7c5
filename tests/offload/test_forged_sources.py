"""Packets with forged sources: the machine drops the same packets with offload as without."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from relay.core.addresses import Family, socket_address
from relay.offload.layout import packed_address
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.packets import IPV4, IPV6, channel_data, ethernet, ipv4, ipv6, udp
from tests.support.offload.relays import MODES, SERVICE, WITHIN, Lab, Talk, running
from tests.support.offload.topology import PEER, RELAY, Host, row
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

COUNT: Final = 3
SIZE: Final = 100
NUMBER: Final = 0x4123
LOOPBACK: Final = "127.0.0.1"
BROADCAST: Final = "10.77.2.255"
"""Of the network of the peer."""


@pytest.fixture(scope="module", params=MODES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with row() as network:
        network.know_all()
        options = ("--allow-peer", f"{LOOPBACK}/32,{BROADCAST}/32")
        with running(network.relay, tmp_path_factory.mktemp("relay"), request.param, *options) as relay:
            yield Lab(network, relay, request.param)


@pytest.fixture
def strictness(place: Lab, request: pytest.FixtureRequest) -> Iterator[int]:
    """The setting rp_filter of all interfaces of the relay."""
    (value,) = request.param
    for link in ("all", "r0", "r1"):
        place.network.relay.set_knob(f"ipv4/conf/{link}/rp_filter", value)
    yield value
    for link in ("all", "r0", "r1"):
        place.network.relay.set_knob(f"ipv4/conf/{link}/rp_filter", 0)


def forge(
    sender: Host, link: str, to_mac: str, source: tuple[str, int], destination: tuple[str, int], payload: bytes
) -> None:
    """Send packets with any source."""
    ends = (packed_address(source[0]), source[1]), (packed_address(destination[0]), destination[1])
    inner, is_ipv6 = udp(*ends, payload), ":" in source[0]
    packet = (ipv6 if is_ipv6 else ipv4)(ends[0][0], ends[1][0], inner)
    mac = bytes.fromhex(sender.mac(link).replace(":", ""))
    frame = ethernet(bytes.fromhex(to_mac.replace(":", "")), mac, IPV6 if is_ipv6 else IPV4, packet)
    with sender.open_socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((link, 0))
        for _ in range(COUNT):
            raw.send(frame)


def arrivals(receiver: socket.socket) -> int:
    """Return the number of forged packets before the honest packet behind them."""
    for number in range(COUNT + 1):
        if receiver.recv(2000).endswith(b"honest"):
            return number
    raise AssertionError("no honest packet arrived")


class Forgery:
    """A client with a channel to a peer, and packets on the wire of another peer that look as if the first had sent them."""

    def __init__(self, place: Lab, client: TurnClient, peer: tuple[str, int], honest: socket.socket) -> None:
        self._place = place
        self._client = client
        family = Family.IPV6 if ":" in peer[0] else Family.IPV4
        self._relayed = client.allocate(family=family)[0][:2]
        assert client.bind_channel(NUMBER, socket_address(*peer)) is None
        assert client.bind_channel(NUMBER + 1, socket_address(*honest.getsockname()[:2])) is None
        self._peer = peer
        self._honest = honest

    def arrivals(self) -> int:
        """Forge packets, and return the number of packets that reach the client."""
        network = self._place.network
        payload = b"forged".ljust(SIZE)
        forge(network.peer, "p0", network.relay.mac("r1"), self._peer, self._relayed, payload)
        self._honest.sendto(b"honest", self._relayed)
        return arrivals(self._client.socket)


def both(place: Lab, count: "Forgery | ForgedClient") -> tuple[int, int]:
    """Return the arrivals with sockets and with offload."""
    place.relay.detach()
    by_sockets = count.arrivals()
    place.relay.attach()
    return by_sockets, count.arrivals()


@pytest.mark.parametrize("strictness", [[0], [1], [2]], ids=["any-way", "strict", "loose"], indirect=True)
@pytest.mark.parametrize("kind", ["this relay", "loopback", "broadcast"])
def test_martian_packets_are_not_relayed(place: Lab, strictness: int, kind: str) -> None:
    network, relay, _ = place
    with (
        relay.client(network.client) as client,
        relay.client(network.client) as other,
        network.peer.udp(PEER[Family.IPV4]) as honest,
    ):
        peer = {
            "this relay": (RELAY[Family.IPV4], other.allocate()[0][1]),
            "loopback": (LOOPBACK, 5000),
            "broadcast": (BROADCAST, 5000),
        }[kind]
        is_accepted = kind == "broadcast" and not strictness
        assert both(place, Forgery(place, client, peer, honest)) == ((COUNT, COUNT) if is_accepted else (0, 0))


def test_the_stack_decides_about_own_ipv6_addresses_as_sources(place: Lab) -> None:
    network, relay, _ = place
    with (
        relay.client(network.client) as client,
        relay.client(network.client) as other,
        network.peer.udp(PEER[Family.IPV6]) as honest,
    ):
        peer = (RELAY[Family.IPV6], other.allocate(family=Family.IPV6)[0][1])
        by_sockets, by_kernel = both(place, Forgery(place, client, peer, honest))
        assert by_sockets == by_kernel


class ForgedClient:
    """A client with a channel to a peer, and ChannelData on the wire of the peer that looks as if the client had sent it."""

    def __init__(self, place: Lab, client: TurnClient, peer: socket.socket) -> None:
        self._place = place
        self._talk = Talk(place.relay, client, peer, number=NUMBER)
        self._peer = peer
        self._client = client

    def wait_for_kernel(self) -> None:
        self._talk.wait_for_kernel()

    def arrivals(self) -> int:
        """Forge packets, and return the number of packets that reach the peer."""
        network, source = self._place.network, self._client.socket.getsockname()[:2]
        message = channel_data(NUMBER, b"forged".ljust(SIZE))
        family = Family.IPV6 if ":" in source[0] else Family.IPV4
        forge(network.peer, "p0", network.relay.mac("r1"), source, (RELAY[family], SERVICE), message)
        self._client.send(NUMBER, b"honest")
        return arrivals(self._peer)


@pytest.mark.parametrize(("strictness", "expected"), [([0], COUNT), ([1], 0), ([2], COUNT)], indirect=["strictness"])
@pytest.mark.parametrize("to", Family)
def test_rp_filter_applies_to_packets_by_another_interface_than_the_senders(
    place: Lab, strictness: int, expected: int, to: Family
) -> None:
    network, relay, _ = place
    with relay.client(network.client) as client, network.peer.udp(PEER[to]) as peer:
        forged = ForgedClient(place, client, peer)
        assert both(place, forged) == (expected, expected), f"rp_filter={strictness}"
        forged.wait_for_kernel()


@pytest.mark.parametrize("strictness", [[1]], ids=["strict"], indirect=True)
def test_honest_packets_stay_in_the_kernel_with_a_strict_rp_filter(place: Lab, strictness: int) -> None:
    assert strictness
    network, relay, _ = place
    with relay.client(network.client) as client, network.peer.udp(PEER[Family.IPV4]) as peer:
        way = Talk(relay, client, peer)
        way.wait_for_kernel()
        before = relay.counts()
        for _ in range(10):
            way.to_peer(bytes(SIZE))
            way.to_client(bytes(SIZE))
        counts = relay.counts().since(before)
        assert counts[:2] == (10, 10)
        assert not counts.passed["wrong_way"]


def test_an_address_that_arrives_is_no_source_of_relayed_packets(tmp_path: Path) -> None:
    """A client's address may become an address of this machine."""
    late = "10.77.1.9"
    with row() as network:
        network.know_all()
        network.client.ip(f"addr add {late}/24 dev c0")
        with (
            running(network.relay, tmp_path, "generic") as relay,
            relay.client(network.client, host=late) as client,
            network.peer.udp(PEER[Family.IPV4]) as peer,
        ):
            way = Talk(relay, client, peer)
            way.wait_for_kernel()
            network.relay.ip(f"addr add {late}/32 dev lo")

            def is_left_to_the_stack() -> bool:
                before = relay.counts()
                client.send(way.number, bytes(SIZE))
                return relay.counts().since(before).passed["wrong_way"] == 1

            wait_until(is_left_to_the_stack, WITHIN)
