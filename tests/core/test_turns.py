"""A turn of the core is bounded in its work, whatever a client has sent or bound: counted here, not timed."""

import itertools
from collections.abc import Iterator

import pytest

from relay.core.addresses import ClientAddress, PeerAddress
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    XOR_PEER_ADDRESS,
)
from relay.core.commands import BindPort, Command, FreeAllocation, HandIn, RemoveChannel, SendToClient, SendToPeer
from relay.core.counters import DropReason
from relay.core.data import Datagram
from relay.core.events import ChannelExpired
from relay.core.overload import (
    EXPIRIES,
    KERNEL_PORTION,
    MIXED_DATAGRAMS,
    MIXED_INTERVAL,
    MIXED_SENDS,
    REQUESTS_IN_A_BATCH,
)
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import (
    CHANNEL,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    UDP,
    Client,
    Relay,
    channel_data,
    of_kind,
    peer_at,
    relay_with,
    the,
)

MANY = 2000
"""Channels of a greedy client, several turns' worth."""


def peer(number: int) -> PeerAddress:
    return PeerAddress((f"203.0.{number >> 8}.{number & 255}", 9))


def greedy(relay: Relay, number: int = 1, channels: int = MANY) -> Client:
    """Return a client with an allocation and many channels."""
    client = Client(relay, (f"203.0.113.{100 + number}", 40000), salt=f"greedy {number}")
    client.allocate((LIFETIME, 3600))
    for channel in range(channels):
        assert client.bind_channel(CHANNEL + channel, peer(channel)).code is None
    return client


def turns(relay: Relay) -> Iterator[list[Command]]:
    """Wake the relay up until nothing is due; yield the commands of each turn."""
    while (at := relay.server.poll_timeout()) is not None and at <= relay.now.monotonic:
        yield relay.wake()


def mixed(client: Client, pieces: list[bytes]) -> Datagram:
    return b"".join(pieces), client.address, len(pieces[0]), 0


@pytest.fixture
def two_channels(client: Client) -> Client:
    client.allocate()
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    return client


# Batches of several channels.


def test_the_sends_of_a_clients_mixed_batches_are_limited_and_the_excess_is_counted(
    relay: Relay, two_channels: Client
) -> None:
    pieces = [channel_data(CHANNEL, b""), channel_data(OTHER_CHANNEL, b"")] * 400
    assert len(of_kind(SendToPeer, relay.receive_batch([mixed(two_channels, pieces)] * 2))) == MIXED_SENDS
    assert relay.counters.drops[DropReason.MIXED] == 2 * len(pieces) - MIXED_SENDS
    relay.pass_time(2 * MIXED_INTERVAL)
    assert len(of_kind(SendToPeer, relay.receive_batch([mixed(two_channels, pieces)]))) == MIXED_SENDS


def test_the_excess_of_one_client_takes_nothing_from_another(relay: Relay, two_channels: Client) -> None:
    other = Client(relay, OTHER_CLIENT, salt="other")
    allocation = other.allocate().id
    other.bind_channel()
    other.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    pieces = [channel_data(CHANNEL, b""), channel_data(OTHER_CHANNEL, b"")] * (MIXED_SENDS // 2)
    commands = relay.receive_batch([mixed(two_channels, pieces * 10), mixed(other, pieces)])
    assert sum(each.allocation == allocation for each in of_kind(SendToPeer, commands)) == len(pieces)


def test_data_that_can_be_joined_is_not_limited_by_its_number(relay: Relay, two_channels: Client) -> None:
    pieces = [channel_data(CHANNEL, b"a"), channel_data(OTHER_CHANNEL, b"b")] * 700
    commands = of_kind(SendToPeer, relay.receive_batch([mixed(two_channels, pieces)]))
    assert [each.data for each in commands] == [b"a" * 700, b"b" * 700]
    assert relay.counters.drops[DropReason.MIXED] == 0


def test_a_batch_of_countless_datagrams_is_cut(relay: Relay, two_channels: Client) -> None:
    pieces = [channel_data(CHANNEL, b"a"), channel_data(OTHER_CHANNEL, b"b")] * MIXED_DATAGRAMS
    commands = of_kind(SendToPeer, relay.receive_batch([mixed(two_channels, pieces)]))
    assert sum(len(each.data) for each in commands) == MIXED_DATAGRAMS
    assert relay.counters.drops[DropReason.MIXED] == len(pieces) - MIXED_DATAGRAMS


def test_requests_of_a_batch_are_handled_a_few_at_a_time_and_in_order_with_the_data(relay: Relay, client: Client) -> None:
    binding = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
    pieces = [binding] * (2 * REQUESTS_IN_A_BATCH) + [channel_data(CHANNEL, bytes(16))]
    relay.server.handle_client_datagram(mixed(client, pieces), relay.now)
    commands = relay.drain()
    assert len(of_kind(SendToClient, commands)) == REQUESTS_IN_A_BATCH
    assert [each[0] for each in the(HandIn, commands).datagrams] == pieces[REQUESTS_IN_A_BATCH:]


def test_data_behind_many_requests_of_a_batch_counts_as_well(relay: Relay, two_channels: Client) -> None:
    binding = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
    data = [channel_data(number, b"%016d" % n) for n in range(400) for number in (CHANNEL, OTHER_CHANNEL)]
    # Each request keeps the data before it from being joined with the data behind it.
    pieces = [binding] * REQUESTS_IN_A_BATCH
    for each in data:
        pieces += [binding, each]
    commands = relay.receive_batch([mixed(two_channels, pieces)])
    assert len(of_kind(SendToPeer, commands)) == MIXED_SENDS


# Ends.


def test_thousands_of_channels_expire_in_portions(relay: Relay) -> None:
    relay.watch(ChannelExpired)
    greedy(relay)
    relay.pass_time(700)
    of_a_turn = [len(relay.take_events()) for _ in turns(relay)]
    assert sum(of_a_turn) == MANY
    assert max(of_a_turn) <= EXPIRIES


def test_grace_periods_end_in_portions(relay: Relay) -> None:
    client = greedy(relay)
    relay.pass_time(600)
    list(turns(relay))
    relay.pass_time(300)
    allocation = relay.server.allocations.by_client[client.address]
    left = [allocation.channel_count for _ in turns(relay)]
    assert left[-1] == 0
    assert all(before - after <= 2 * EXPIRIES for before, after in zip([MANY, *left], left, strict=False))


def test_expired_channels_relay_nothing_while_others_wait_for_their_end(relay: Relay) -> None:
    client = greedy(relay)
    allocation = relay.server.allocations.by_client[client.address].id
    relay.pass_time(600)
    # One portion is handled; the others are late.
    relay.wake()
    for number in range(MANY):
        assert of_kind(SendToPeer, client.send_on_channel(b"data", CHANNEL + number)) == []
        assert of_kind(SendToClient, relay.receive_from_peer(allocation, b"data", peer(number))) == []


def test_an_input_ends_only_what_it_concerns_while_others_wait(relay: Relay) -> None:
    relay.watch(ChannelExpired)
    client = greedy(relay)
    relay.pass_time(600)
    relay.wake()
    relay.take_events()
    client.send_on_channel(b"data", CHANNEL + MANY - 1)
    (event,) = relay.take_events()
    assert isinstance(event, ChannelExpired)
    assert event.number == CHANNEL + MANY - 1


def test_a_late_channel_can_be_bound_again_and_a_late_grace_period_is_over(relay: Relay) -> None:
    client = greedy(relay)
    relay.pass_time(600)
    relay.wake()
    # In its grace period, although its end is late.
    assert client.bind_channel(CHANNEL + MANY - 1, peer(MANY)).code == 400
    assert client.bind_channel(CHANNEL + MANY - 1, peer(MANY - 1)).code is None
    relay.pass_time(299)
    list(turns(relay))
    relay.pass_time(1)
    relay.wake()
    assert client.bind_channel(CHANNEL + MANY - 2, peer(MANY)).code is None


def test_allocations_that_end_together_end_in_turns_and_are_over_at_once(relay: Relay) -> None:
    clients = [Client(relay, (f"203.0.113.{number}", 1), salt=str(number)) for number in range(1, 51)]
    for client in clients:
        client.allocate()
    relay.pass_time(600)
    first = of_kind(FreeAllocation, relay.wake())
    assert 0 < len(first) < len(clients)
    # The allocation of the last client has not ended yet, but it is over: a new allocation is a new one.
    last = clients[-1].send(clients[-1].write(Method.ALLOCATE, UDP))
    assert len(of_kind(FreeAllocation, last)) == 1
    assert len(of_kind(BindPort, last)) == 1
    freed = len(first) + 1 + sum(len(of_kind(FreeAllocation, turn)) for turn in turns(relay))
    assert freed == len(clients)


def test_a_late_allocation_can_not_be_refreshed(relay: Relay) -> None:
    clients = [Client(relay, (f"203.0.113.{number}", 1), salt=str(number)) for number in range(1, 51)]
    for client in clients:
        client.allocate()
    relay.pass_time(600)
    relay.wake()
    commands = clients[-1].send(clients[-1].write(Method.REFRESH, (LIFETIME, 600)))
    assert [type(each) for each in commands] == [FreeAllocation, SendToClient]


# The kernel.


def test_the_kernel_removes_a_large_allocation_in_portions_and_its_port_stays_taken() -> None:
    relay = relay_with(offloads=True, ports=range(50000, 50001))
    client = greedy(relay)
    commands = client.send(client.write(Method.REFRESH, (LIFETIME, 0)))
    assert len(of_kind(RemoveChannel, commands)) == KERNEL_PORTION
    assert not relay.server.free_ports
    of_a_turn = [len(of_kind(RemoveChannel, turn)) for turn in turns(relay)]
    assert sum(of_a_turn) == MANY - KERNEL_PORTION
    assert max(of_a_turn) <= KERNEL_PORTION
    assert list(relay.server.free_ports) == [50000]


def test_the_kernel_removes_the_channels_of_a_deleted_family_in_portions() -> None:
    relay = relay_with(offloads=True)
    client = Client(relay)
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    client.bind_channel(CHANNEL + MANY, PEER)
    for number in range(MANY):
        assert client.bind_channel(CHANNEL + number, peer_at(f"2001:db8:9::{number + 1:x}", 9)).code is None
    commands = client.send(client.write(Method.REFRESH, (LIFETIME, 0), (REQUESTED_ADDRESS_FAMILY, 2)))
    of_a_turn = [len(of_kind(RemoveChannel, turn)) for turn in (commands, *turns(relay))]
    assert sum(of_a_turn) == MANY
    assert max(of_a_turn) <= KERNEL_PORTION
    assert of_kind(SendToPeer, client.send_on_channel(b"data", CHANNEL + MANY))


def test_a_port_is_free_again_although_a_refresh_did_the_rest_of_the_kernels_work() -> None:
    relay = relay_with(offloads=True)
    client, other = greedy(relay, channels=KERNEL_PORTION + 1), Client(relay)
    free = len(relay.server.free_ports)
    other.allocate()
    relay.pass_time(1)
    other.bind_channel()
    client.refresh(0)
    # Extends a channel in the kernel.
    other.refresh(3600)
    list(turns(relay))
    assert len(relay.server.free_ports) == free


def test_a_number_is_removed_from_the_kernel_before_it_is_bound_again() -> None:
    relay = relay_with(offloads=True)
    client = greedy(relay)
    client.refresh(0)
    client.allocate()
    commands = client.send(client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, CHANNEL + MANY - 1), (XOR_PEER_ADDRESS, PEER)))
    kinds = [type(each).__name__ for each in commands]
    assert kinds == ["RemoveChannel", "InstallChannel", "SendToClient"]
    later = [each.number for turn in turns(relay) for each in of_kind(RemoveChannel, turn)]
    assert CHANNEL + MANY - 1 not in later


def test_the_kernel_extends_the_channels_of_a_refreshed_allocation_in_portions() -> None:
    relay = relay_with(offloads=True)
    client = Client(relay, ClientAddress(OTHER_CLIENT))
    client.allocate()
    relay.pass_time(1)
    for number in range(MANY):
        client.bind_channel(CHANNEL + number, peer(number))
    commands = client.send(client.write(Method.REFRESH, (LIFETIME, 3600)))
    assert len(commands) == KERNEL_PORTION + 1
    of_a_turn = [len(turn) for turn in turns(relay)]
    assert sum(of_a_turn) == MANY - KERNEL_PORTION
    assert max(of_a_turn) <= KERNEL_PORTION


def test_channels_that_outlive_their_allocation_again_do_not_keep_the_relay_busy() -> None:
    relay = relay_with(offloads=True)
    client = greedy(relay)
    client.refresh(600)
    relay.pass_time(1)
    for number in range(MANY):
        client.bind_channel(CHANNEL + number, peer(number))
    client.refresh(600)
    relay.pass_time(0.001)
    # Before the kernel has extended the first.
    for number in range(MANY):
        client.bind_channel(CHANNEL + number, peer(number))
    most = MANY // KERNEL_PORTION + 2
    assert len(list(itertools.islice(turns(relay), most))) < most
