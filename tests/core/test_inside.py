"""Data for a client of the same relay stays on the machine (docs/datapath.md)."""

from typing import NamedTuple

import pytest

from relay.core.addresses import AllocationId, Family, PeerAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, CHANNEL_NUMBER, XOR_PEER_ADDRESS
from relay.core.commands import InstallChannel, SendToClient, SendToPeer
from relay.core.counters import DropReason
from relay.core.stun import Method
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CLIENT6,
    CONFIG,
    HOSTS,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    Client,
    Relay,
    channel_data,
    peer_at,
    relay_with,
    the,
)

UNBOUND_PEER = DropReason.UNBOUND_PEER


def bind_request(client: Client, number: int, peer: PeerAddress) -> bytes:
    return client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer))


class End(NamedTuple):
    """A client and its allocation."""

    client: Client
    id: AllocationId
    port: int

    def relayed(self, family: Family = Family.IPV4) -> PeerAddress:
        return peer_at(HOSTS[family], self.port)


class Pair(NamedTuple):
    """Two clients of one relay. The second one's channel has another number."""

    relay: Relay
    one: End
    other: End

    def bind(self, family: Family = Family.IPV4) -> None:
        assert self.one.client.bind_channel(CHANNEL, self.other.relayed(family)).code is None
        assert self.other.client.bind_channel(OTHER_CHANNEL, self.one.relayed(family)).code is None

    def counts(self) -> tuple[int, int, int]:
        """Packets to peers and to clients, and drops."""
        counters = self.relay.counters
        return counters.to_peer_packets, counters.to_client_packets, counters.drops[UNBOUND_PEER]


def pair_of(relay: Relay, address: tuple[str, int] | tuple[str, int, int, int] = CLIENT) -> Pair:
    ends = []
    for salt, where in (("one", address), ("other", OTHER_CLIENT)):
        client = Client(relay, where, salt=salt)
        allocated = client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
        ends.append(End(client, allocated.id, allocated.port))
    return Pair(relay, *ends)


@pytest.fixture
def pair(relay: Relay) -> Pair:
    return pair_of(relay)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("address", [CLIENT, CLIENT6], ids=["from-IPv4", "from-IPv6"])
def test_two_clients_reach_each_other(
    relay: Relay, address: tuple[str, int] | tuple[str, int, int, int], family: Family
) -> None:
    pair = pair_of(relay, address)
    pair.bind(family)
    assert pair.one.client.send_on_channel(b"there", CHANNEL) == [
        SendToClient(channel_data(OTHER_CHANNEL, b"there"), pair.other.client.address)
    ]
    assert pair.other.client.send_on_channel(b"and back", OTHER_CHANNEL) == [
        SendToClient(channel_data(CHANNEL, b"and back"), pair.one.client.address)
    ]
    assert pair.counts() == (2, 2, 0)


def test_the_traffic_class_stays(pair: Pair) -> None:
    pair.bind()
    commands = pair.relay.receive_batch([(channel_data(CHANNEL, b"data"), pair.one.client.address, 0, 0xB9)])
    assert commands == [SendToClient(channel_data(OTHER_CHANNEL, b"data"), pair.other.client.address, 0, 0xB9)]


def test_a_batch_stays_a_batch(pair: Pair) -> None:
    pair.bind()
    data = channel_data(CHANNEL, b"1234") * 2 + channel_data(CHANNEL, b"56")
    (sent,) = pair.relay.receive_batch([(data, pair.one.client.address, 8, 0)])
    frames = channel_data(OTHER_CHANNEL, b"1234") * 2 + channel_data(OTHER_CHANNEL, b"56")
    assert sent == SendToClient(frames, pair.other.client.address, 8)
    assert pair.counts() == (3, 3, 0)


def test_a_batch_of_inside_and_outside_channels_is_split(pair: Pair) -> None:
    pair.bind()
    pair.one.client.bind_channel(0x4002)
    data = (channel_data(CHANNEL, b"in") + channel_data(0x4002, b"ex")) * 2
    inside, outside = pair.relay.receive_batch([(data, pair.one.client.address, 6, 0)])
    assert inside == SendToClient(channel_data(OTHER_CHANNEL, b"in") * 2, pair.other.client.address, 6)
    assert outside == SendToPeer(pair.one.id, b"exex", peer_at("198.51.100.9", 5000), 2)


def test_data_for_a_client_without_a_channel_to_the_sender_is_dropped_and_counted(pair: Pair) -> None:
    assert pair.one.client.bind_channel(CHANNEL, pair.other.relayed()).code is None
    # A channel to another port, and one to the sender's address of the other family.
    pair.other.client.bind_channel(OTHER_CHANNEL, peer_at(HOSTS[Family.IPV4], pair.one.port ^ 1))
    pair.other.client.bind_channel(OTHER_CHANNEL + 1, pair.one.relayed(Family.IPV6))
    batch = channel_data(CHANNEL, b"1234") * 3
    assert pair.relay.receive_batch([(batch, pair.one.client.address, 8, 0)]) == []
    assert pair.counts() == (3, 0, 3)


def test_an_allocation_may_come_and_go_behind_a_channel(pair: Pair) -> None:
    pair.bind()
    pair.other.client.refresh(0)
    # Another program of this machine may have the port now.
    assert pair.one.client.send_on_channel(b"data", CHANNEL) == [SendToPeer(pair.one.id, b"data", pair.other.relayed())]
    assert pair.counts() == (1, 0, 0)
    # The next owner of the port has to bind a channel too.
    relay = pair.relay
    owner = next(
        owner
        for owner in (Client(relay, ("203.0.113.7", 2000 + n), salt=f"{n}") for n in range(len(CONFIG.ports)))
        if owner.allocate().port == pair.other.port or owner.refresh(0).code
    )
    assert pair.one.client.send_on_channel(b"data", CHANNEL) == []
    assert owner.bind_channel(CHANNEL, pair.one.relayed()).code is None
    assert pair.one.client.send_on_channel(b"data", CHANNEL) == [SendToClient(channel_data(CHANNEL, b"data"), owner.address)]


def test_an_expired_channel_ends_the_way_inside(pair: Pair) -> None:
    pair.bind()
    pair.relay.pass_time(300)
    pair.one.client.bind_channel(CHANNEL, pair.other.relayed())
    pair.one.client.refresh(3600)
    pair.other.client.refresh(3600)
    pair.relay.pass_time(300)
    assert pair.one.client.send_on_channel(b"data", CHANNEL) == []
    assert pair.counts() == (1, 0, 1)


def test_a_client_reaches_itself_once(pair: Pair) -> None:
    """A packet ends at a client, so no channels make a loop."""
    pair.one.client.bind_channel(CHANNEL, pair.one.relayed())
    assert pair.one.client.send_on_channel(b"data", CHANNEL) == [
        SendToClient(channel_data(CHANNEL, b"data"), pair.one.client.address)
    ]


def test_a_pending_allocation_receives_nothing(pair: Pair) -> None:
    third = Client(pair.relay, ("203.0.113.7", 2000), salt="third")
    pending = third.begin_allocate()
    peer = peer_at(HOSTS[Family.IPV4], pending.port)
    pair.one.client.bind_channel(CHANNEL, peer)
    assert pair.one.client.send_on_channel(b"data", CHANNEL) == [SendToPeer(pair.one.id, b"data", peer)]
    pair.relay.report_bound(pending.allocation)
    assert pair.one.client.send_on_channel(b"data", CHANNEL) == []
    assert pair.counts() == (2, 0, 1)


def test_a_program_of_this_machine_reaches_a_client(pair: Pair) -> None:
    """Ephemeral ports may overlap the relay's range."""
    pair.one.client.bind_channel(CHANNEL, peer_at(HOSTS[Family.IPV4], CONFIG.ports[-1]))
    sent = pair.relay.receive_from_peer(pair.one.id, b"data", peer_at(HOSTS[Family.IPV4], CONFIG.ports[-1]))
    assert sent == [SendToClient(channel_data(CHANNEL, b"data"), pair.one.client.address)]


def test_early_data_is_delivered_inside(pair: Pair) -> None:
    pair.other.client.bind_channel(OTHER_CHANNEL, pair.one.relayed())
    assert pair.one.client.send_on_channel(b"early", CHANNEL) == []
    early, answer = pair.one.client.send(bind_request(pair.one.client, CHANNEL, pair.other.relayed()))
    assert early == SendToClient(channel_data(OTHER_CHANNEL, b"early"), pair.other.client.address)
    assert isinstance(answer, SendToClient)


@pytest.mark.parametrize(("port", "inside"), [(CONFIG.ports[0], True), (CONFIG.ports[-1] + 1, False)])
def test_the_kernel_learns_which_channels_are_inside(port: int, *, inside: bool) -> None:
    client = Client(relay_with(offloads=True))
    client.allocate()
    commands = client.send(bind_request(client, CHANNEL, peer_at(HOSTS[Family.IPV4], port)))
    assert the(InstallChannel, commands).inside is inside


@pytest.mark.parametrize("peer", [("192.0.2.1", 49999), ("192.0.2.1", 50100), ("192.0.2.2", 50000)])
def test_other_ports_and_hosts_are_outside(relay: Relay, peer: tuple[str, int]) -> None:
    client = Client(relay)
    allocation = client.allocate().id
    client.bind_channel(CHANNEL, PeerAddress(peer))
    assert client.send_on_channel(b"data") == [SendToPeer(allocation, b"data", PeerAddress(peer))]
