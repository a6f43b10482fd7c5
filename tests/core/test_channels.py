"""ChannelBind and the lifetime of a channel (RFC 8656 §12, docs/protocol.md)."""

from collections.abc import Callable

import pytest

from relay.core.addresses import AllocationId, PeerAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS
from relay.core.peers import PeerPolicy
from relay.core.stun import Method
from tests.support.core import (
    CHANNEL,
    CLIENT,
    FORBIDDEN_PEER,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    PEER6,
    AttributeValue,
    Client,
    Relay,
    opaque,
    peer_at,
    relay_with,
)


@pytest.fixture
def allocation(client: Client) -> AllocationId:
    return client.allocate((LIFETIME, 3600)).id


def relays(client: Client, allocation: AllocationId, number: int = CHANNEL, peer: PeerAddress = PEER) -> bool:
    """Return whether a channel relays; check both directions."""
    to_peer = client.send_on_channel(b"data", number)
    to_client = client.relay.receive_from_peer(allocation, b"data", peer)
    assert bool(to_peer) is bool(to_client)
    return bool(to_peer)


@pytest.mark.parametrize("number", [0x4000, 0x4FFF, 0x5000, 0x7FFF])
def test_a_channel_number_from_0x4000_to_0x7fff_can_be_bound(client: Client, allocation: AllocationId, number: int) -> None:
    answer = client.bind_channel(number)
    assert answer.code is None
    assert not answer.message.has(CHANNEL_NUMBER)
    assert relays(client, allocation, number)


@pytest.mark.parametrize("number", [0, 0x3FFF, 0x8000, 0xFFFF])
def test_a_channel_number_outside_0x4000_to_0x7fff_gets_400(client: Client, allocation: AllocationId, number: int) -> None:
    assert client.bind_channel(number).code == 400
    assert not relays(client, allocation, number)


def test_a_bind_without_number_gets_400(client: Client, allocation: AllocationId) -> None:
    assert client.ask(Method.CHANNEL_BIND, (XOR_PEER_ADDRESS, PEER)).code == 400
    assert not relays(client, allocation)


def test_a_bind_without_peer_gets_400(client: Client, allocation: AllocationId) -> None:
    assert client.ask(Method.CHANNEL_BIND, (CHANNEL_NUMBER, CHANNEL)).code == 400
    assert not relays(client, allocation)


def test_a_bind_to_port_zero_gets_400(client: Client, allocation: AllocationId) -> None:
    peer = PeerAddress((PEER[0], 0))
    assert client.bind_channel(CHANNEL, peer).code == 400
    assert not relays(client, allocation, peer=peer)


@pytest.mark.parametrize("type_", [CHANNEL_NUMBER.type, XOR_PEER_ADDRESS.type])
def test_a_malformed_value_gets_400(client: Client, allocation: AllocationId, type_: int) -> None:
    attributes: list[AttributeValue] = [(opaque(type_), b"\x40"), (CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, PEER)]
    assert client.ask(Method.CHANNEL_BIND, *attributes).code == 400
    assert not relays(client, allocation)


def test_a_bind_without_allocation_gets_437(client: Client) -> None:
    assert client.bind_channel().code == 437


def test_a_bind_from_another_address_gets_437(relay: Relay, allocation: AllocationId) -> None:
    assert allocation in relay.server.allocations.by_id
    assert Client(relay, OTHER_CLIENT).bind_channel().code == 437


def test_a_bind_for_another_username_gets_441(relay: Relay, client: Client, allocation: AllocationId) -> None:
    assert Client(relay, salt="other").bind_channel().code == 441
    assert not relays(client, allocation)


def test_a_peer_of_a_family_without_a_relayed_address_gets_443(client: Client, allocation: AllocationId) -> None:
    assert client.bind_channel(CHANNEL, PEER6).code == 443
    assert not relays(client, allocation, peer=PEER6)


def test_a_dual_allocation_binds_channels_to_both_families(client: Client) -> None:
    allocation = client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2)).id
    assert client.bind_channel(CHANNEL, PEER).code is None
    assert client.bind_channel(OTHER_CHANNEL, PEER6).code is None
    assert relays(client, allocation, CHANNEL, PEER)
    assert relays(client, allocation, OTHER_CHANNEL, PEER6)


def test_a_forbidden_peer_gets_403(client: Client, allocation: AllocationId) -> None:
    assert client.bind_channel(CHANNEL, FORBIDDEN_PEER).code == 403
    assert not relays(client, allocation, peer=FORBIDDEN_PEER)


def test_a_bind_compares_the_port_of_the_peer() -> None:
    own = "192.0.2.1"
    peers = PeerPolicy(
        relay_addresses=frozenset({own}),
        service_ports=frozenset({3478}),
        relayed_ports=range(50000, 50100),
        public_addresses=frozenset({own}),
    )
    client = Client(relay_with(peers=peers))
    client.allocate()
    assert client.bind_channel(CHANNEL, peer_at(own, 3478)).code == 403
    assert client.bind_channel(CHANNEL, peer_at(own, 49999)).code == 403
    assert client.bind_channel(CHANNEL, peer_at(own, 50000)).code is None
    assert client.create_permission(peer_at(own, 3478)).code is None


def test_a_channel_bound_to_another_peer_gets_400(client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    assert client.bind_channel(CHANNEL, OTHER_PEER).code == 400
    assert relays(client, allocation)
    assert client.relay.receive_from_peer(allocation, b"data", OTHER_PEER) == []


def test_a_peer_bound_to_another_channel_gets_400(client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    assert client.bind_channel(OTHER_CHANNEL, PEER).code == 400
    assert relays(client, allocation)
    assert client.send_on_channel(b"data", OTHER_CHANNEL) == []


def test_two_channels_cannot_swap_peers(client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    assert client.bind_channel(CHANNEL, OTHER_PEER).code == 400
    assert relays(client, allocation)
    assert relays(client, allocation, OTHER_CHANNEL, OTHER_PEER)


def test_two_ports_of_a_host_are_two_peers(client: Client, allocation: AllocationId) -> None:
    neighbour = PeerAddress((PEER[0], PEER[1] + 1))
    client.bind_channel()
    assert client.bind_channel(OTHER_CHANNEL, neighbour).code is None
    assert relays(client, allocation, OTHER_CHANNEL, neighbour)


def test_two_clients_may_use_the_same_number_and_peer(relay: Relay, client: Client, allocation: AllocationId) -> None:
    other = Client(relay, OTHER_CLIENT, salt="other")
    others = other.allocate().id
    assert client.bind_channel().code is None
    assert other.bind_channel().code is None
    assert relays(client, allocation)
    assert relays(other, others)
    client.refresh(0)
    assert relays(other, others)


def test_a_channel_relays_for_600_seconds(relay: Relay, client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    relay.pass_time(599.75)
    assert relays(client, allocation)
    relay.pass_time(0.25)
    assert not relays(client, allocation)


@pytest.mark.parametrize(
    "first",
    [
        lambda client, _: client.send_on_channel(b"data"),
        lambda client, allocation: client.relay.receive_from_peer(allocation, b"data", PEER),
    ],
    ids=["client", "peer"],
)
def test_an_expired_channel_does_not_relay_before_a_late_wake_up(
    relay: Relay,
    client: Client,
    allocation: AllocationId,
    first: Callable[[Client, AllocationId], list[object]],
) -> None:
    client.bind_channel()
    relay.pass_time(600)
    assert first(client, allocation) == []


def test_binding_the_same_pair_again_refreshes_the_channel(relay: Relay, client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    relay.pass_time(599)
    assert client.bind_channel().code is None
    relay.pass_time(599.75)
    assert relays(client, allocation)
    relay.pass_time(0.25)
    assert not relays(client, allocation)


@pytest.mark.parametrize("woken", [True, False])
def test_an_expired_number_and_peer_are_reserved_for_300_seconds(
    relay: Relay,
    client: Client,
    allocation: AllocationId,
    woken: bool,  # noqa: FBT001
) -> None:
    client.bind_channel()
    relay.pass_time(600)
    if woken:
        relay.wake()
    assert client.bind_channel(CHANNEL, OTHER_PEER).code == 400
    assert client.bind_channel(OTHER_CHANNEL, PEER).code == 400
    relay.pass_time(299.75)
    assert client.bind_channel(CHANNEL, OTHER_PEER).code == 400
    assert client.bind_channel(OTHER_CHANNEL, PEER).code == 400
    assert not relays(client, allocation)
    relay.pass_time(0.25)
    assert client.bind_channel(CHANNEL, OTHER_PEER).code is None
    assert client.bind_channel(OTHER_CHANNEL, PEER).code is None
    assert relays(client, allocation, CHANNEL, OTHER_PEER)
    assert relays(client, allocation, OTHER_CHANNEL, PEER)


def test_the_300_seconds_count_from_the_expiry_not_from_a_late_wake_up(
    relay: Relay, client: Client, allocation: AllocationId
) -> None:
    client.bind_channel()
    relay.pass_time(899)
    relay.wake()
    assert relay.server.poll_timeout() == relay.now.monotonic + 1
    relay.pass_time(1)
    assert client.bind_channel(CHANNEL, OTHER_PEER).code is None
    assert relays(client, allocation, CHANNEL, OTHER_PEER)


@pytest.mark.parametrize("after", [600, 750, 899.75])
def test_a_channel_bound_in_its_grace_period_relays_again(
    relay: Relay, client: Client, allocation: AllocationId, after: float
) -> None:
    client.bind_channel()
    relay.pass_time(after)
    assert not relays(client, allocation)
    assert client.bind_channel().code is None
    assert relays(client, allocation)
    relay.pass_time(599.75)
    assert relays(client, allocation)
    relay.pass_time(0.25)
    assert not relays(client, allocation)
    relay.pass_time(299.75)
    assert client.bind_channel(CHANNEL, OTHER_PEER).code == 400


def test_the_end_of_an_allocation_frees_numbers_and_peers_at_once(client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    client.refresh(0)
    new = client.allocate().id
    assert new != allocation
    assert client.bind_channel(CHANNEL, OTHER_PEER).code is None
    assert client.bind_channel(OTHER_CHANNEL, PEER).code is None


@pytest.mark.parametrize("number", [CHANNEL, 0x3FFF])
def test_a_missing_allocation_is_checked_before_the_channel(client: Client, number: int) -> None:
    assert client.bind_channel(number, FORBIDDEN_PEER).code == 437


def test_a_channel_ends_with_its_allocation(relay: Relay, client: Client) -> None:
    allocation = client.allocate().id
    relay.pass_time(500)
    client.bind_channel()
    relay.pass_time(99.75)
    assert relays(client, allocation)
    relay.pass_time(0.25)
    client.send(b"")
    assert not relays(client, allocation)
    assert not relay.server.allocations.live_channels
    assert not relay.server.allocations.live_peers
    assert relay.server.poll_timeout() is None


def test_channels_of_a_roaming_client_end_at_the_old_address(relay: Relay, client: Client, allocation: AllocationId) -> None:
    client.bind_channel()
    Client(relay, OTHER_CLIENT).allocate()
    assert not relays(client, allocation)
    assert CLIENT not in relay.server.allocations.live_channels


def test_the_wake_up_is_the_earliest_deadline_of_channels_and_allocation(
    relay: Relay, client: Client, allocation: AllocationId
) -> None:
    assert relay.server.allocations.by_id[allocation].lifetime == 3600
    start = relay.now.monotonic
    client.bind_channel()
    relay.pass_time(100)
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    wake_ups = []
    while (at := relay.server.poll_timeout()) is not None:
        wake_ups.append(at - start)
        relay.pass_time(at - relay.now.monotonic)
        relay.wake()
    assert wake_ups == [600, 700, 900, 1000, 3600]
