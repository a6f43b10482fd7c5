"""This machine's addresses come and go while the relay runs: none of them is a peer, and every other address may be."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import AllocationId, ChannelNumber, PeerAddress
from relay.core.allocation import CHANNEL_LIFETIME
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY
from relay.core.commands import RemoveChannel, SendToPeer
from relay.core.events import ChannelExpired
from relay.core.overload import EXPIRIES
from relay.core.peers import MAY_EMBED, PeerPolicy, embedded_addresses
from tests.support.core import CHANNEL, OTHER_CHANNEL, OTHER_PEER, PEER, PEER6, Client, Relay, peer_at, relay_with

PUBLIC = "192.0.2.1"
PUBLIC6 = "2001:db8::1"
POLICY = PeerPolicy(
    relay_addresses=frozenset((PUBLIC, PUBLIC6)),
    service_ports=frozenset((3478,)),
    relayed_ports=range(50000, 50100),
    public_addresses=frozenset((PUBLIC, PUBLIC6)),
)

HOST = "198.51.100.200"
CHANNELS = 3 * EXPIRIES


def has(relay: Relay, *addresses: str) -> None:
    """Let the machine have addresses besides the public addresses."""
    relay.server.handle_own_addresses(frozenset((PUBLIC, PUBLIC6, *addresses)), relay.now)


def relays_both_ways(client: Client, allocation: AllocationId, peer: PeerAddress, number: int = CHANNEL) -> bool:
    there = client.send_on_channel(b"data", number) == [SendToPeer(allocation, b"data", peer)]
    back = client.relay.receive_from_peer(allocation, b"data", peer) != []
    assert there is back
    return there


@pytest.fixture
def client() -> Client:
    return Client(relay_with(peers=POLICY, offloads=True))


@pytest.fixture
def allocation(client: Client) -> AllocationId:

    return client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2)).id


@pytest.mark.parametrize("peer", [PEER, PEER6, peer_at(PEER[0], 3478)], ids=str)
def test_an_address_that_arrives_is_no_peer_any_more(client: Client, allocation: AllocationId, peer: PeerAddress) -> None:
    assert client.bind_channel(CHANNEL, peer).code is None
    assert relays_both_ways(client, allocation, peer)
    has(client.relay, peer[0])
    (removed,) = client.relay.drain()
    assert isinstance(removed, RemoveChannel)
    assert (removed.client, removed.number, removed.peer) == (client.address, CHANNEL, peer)
    assert not relays_both_ways(client, allocation, peer)
    assert client.bind_channel(CHANNEL, peer).code == 403
    assert client.create_permission(peer).code == 403


def test_an_address_that_goes_is_a_peer_again(client: Client, allocation: AllocationId) -> None:
    has(client.relay, PEER[0])
    assert client.bind_channel().code == 403
    has(client.relay)
    assert client.create_permission(PEER).code is None
    assert client.bind_channel().code is None
    assert relays_both_ways(client, allocation, PEER)


def test_other_channels_go_on(client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    has(client.relay, PEER[0])
    client.relay.drain()
    assert relays_both_ways(client, allocation, OTHER_PEER, OTHER_CHANNEL)


def test_a_channel_that_ended_keeps_its_number_and_peer(client: Client, allocation: AllocationId) -> None:
    """Datagrams of the former peer may still be on their way: the number stays reserved, as after an expiry."""
    client.relay.watch(ChannelExpired)
    client.bind_channel()
    has(client.relay, PEER[0])
    client.relay.drain()
    assert client.relay.take_events() == [ChannelExpired(allocation, client.address, ChannelNumber(CHANNEL), PEER)]
    assert client.bind_channel(CHANNEL, OTHER_PEER).code == 400
    has(client.relay)
    assert client.bind_channel(CHANNEL, PEER).code is None
    client.relay.pass_time(599)
    assert relays_both_ways(client, allocation, PEER)


@pytest.mark.parametrize(
    "host", ["::ffff:198.51.100.9", "64:ff9b::198.51.100.9", "2002:c633:6409::1", "2001:0:c633:6409:8000:0:f7f7:f7f7"]
)
def test_an_embedded_address_that_arrives_ends_the_channel(client: Client, allocation: AllocationId, host: str) -> None:
    peer = peer_at(host, 5000)
    assert client.bind_channel(CHANNEL, peer).code is None
    has(client.relay, "198.51.100.9")
    client.relay.drain()
    assert not relays_both_ways(client, allocation, peer)


def test_clients_of_one_relay_still_meet_at_its_public_address(client: Client, allocation: AllocationId) -> None:
    peer = peer_at(PUBLIC, 50001)
    client.bind_channel(CHANNEL, peer)
    has(client.relay, PEER[0])
    assert relays_both_ways(client, allocation, peer)


def test_allowed_peers_go_on_except_at_the_relays_own_ports() -> None:
    client = Client(relay_with(peers=replace(POLICY, allow=(ip_network("198.51.100.0/24"),))))
    allocation = client.allocate().id
    own_port = peer_at(PEER[0], 3478)
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, own_port)
    has(client.relay, PEER[0])
    assert relays_both_ways(client, allocation, PEER)
    assert not relays_both_ways(client, allocation, own_port, OTHER_CHANNEL)


# Thousands of channels.


def fleet(relay: Relay, *hosts: str) -> list[Client]:
    """Return clients with `CHANNELS` channels each, to ports of a host for each client."""
    clients = [Client(relay, (f"203.0.113.{n}", 40000), salt=str(n)) for n in range(1, len(hosts) + 1)]
    for client, host in zip(clients, hosts, strict=True):
        client.allocate()
        for n in range(CHANNELS):
            assert client.bind_channel(CHANNEL + n, peer_at(host, 5000 + n)).code is None
    return clients


def live(client: Client) -> int:
    allocation = client.relay.server.allocations.by_client.get(client.address)
    return 0 if allocation is None else len(allocation.live)


def finish(relay: Relay) -> list[int]:
    """Wake the relay up until nothing is due; return the number of channels that ended in each turn."""
    ended = [len(relay.drain())]
    while relay.server.poll_timeout() == -inf:
        ended.append(len(relay.wake()))
    return ended


@pytest.fixture
def relay() -> Relay:
    return relay_with(peers=POLICY, offloads=True)


def test_thousands_of_channels_end_in_portions_and_none_is_granted_meanwhile(relay: Relay) -> None:
    client, other = fleet(relay, HOST, PEER[0])
    has(relay, HOST)
    assert live(client) == CHANNELS - EXPIRIES
    for n in range(CHANNELS):
        assert client.bind_channel(CHANNEL + n, peer_at(HOST, 5000 + n)).code == 403
    assert max(finish(relay)) <= EXPIRIES
    assert (live(client), live(other)) == (0, CHANNELS)
    # The grace period of each begins with its end.
    assert client.bind_channel(CHANNEL, OTHER_PEER).code == 400


def test_channels_that_stay_cost_little(relay: Relay) -> None:
    fleet(relay, PEER[0], OTHER_PEER[0])
    has(relay, HOST)
    assert relay.server.poll_timeout() != -inf


def test_a_change_during_a_review_leaves_nothing_out(relay: Relay) -> None:
    clients = fleet(relay, HOST, "203.0.113.200", HOST)
    has(relay, HOST)
    has(relay, HOST, "203.0.113.200")
    finish(relay)
    assert [live(each) for each in clients] == [0, 0, 0]


def test_an_address_that_goes_during_a_review_is_a_peer_again(relay: Relay) -> None:
    (client,) = fleet(relay, HOST)
    has(relay, HOST)
    has(relay)
    finish(relay)
    assert live(client) == CHANNELS - EXPIRIES


def test_channels_and_allocations_that_end_during_a_review_are_left_alone(relay: Relay) -> None:
    clients = fleet(relay, HOST, HOST, HOST)
    has(relay, HOST)
    clients[0].refresh(0)
    moved = Client(relay, ("203.0.113.99", 1), salt="2")
    moved.allocate()
    relay.pass_time(CHANNEL_LIFETIME)
    while (at := relay.server.poll_timeout()) is not None and at <= relay.now.monotonic:
        relay.wake()
    assert [live(each) for each in (*clients, moved)] == [0, 0, 0, 0]


def _with_prefix(prefix: str, bits: int, rest: int) -> IPv6Address:
    return IPv6Address(int(IPv6Address(prefix)) | rest & (1 << 128 - bits) - 1)


@given(
    st.builds(
        _with_prefix,
        st.sampled_from(["::", "::ffff:0:0", "::ffff:0:0:0", "64:ff9b::", "2002::", "2001::"]),
        st.sampled_from([16, 32, 96]),
        st.one_of(st.integers(0, (1 << 128) - 1), st.integers(0, 0xFFFF)),
    )
    | st.ip_addresses(v=6)
)
def test_every_embedding_address_is_recognised_by_its_text(address: IPv6Address) -> None:
    if embedded_addresses(int(address)):
        assert str(address).startswith(MAY_EMBED)
    assert not str(IPv4Address(int(address) & 0xFFFFFFFF)).startswith(MAY_EMBED)
