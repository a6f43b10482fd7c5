"""Exact values of the counters."""

from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, REQUESTED_ADDRESS_FAMILY
from relay.core.counters import Counters, DropReason, FreeReason, NonceOutcome
from relay.core.lifecycle import BindRefusal
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import (
    CHANNEL,
    CLIENT,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    UDP,
    Client,
    Relay,
    channel_data,
)


def freed(relay: Relay) -> dict[FreeReason, int]:
    return {reason: count for reason, count in relay.counters.allocations_freed.items() if count}


def test_all_counters_of_a_new_relay_are_zero(relay: Relay) -> None:
    assert relay.counters == Counters()
    assert set(relay.counters.drops) == set(DropReason)
    assert set(relay.counters.allocations_freed) == set(FreeReason)
    assert not any((*relay.counters.drops.values(), *relay.counters.allocations_freed.values()))


def test_payload_is_counted_without_headers_and_padding(relay: Relay, client: Client) -> None:
    allocation = client.allocate().id
    client.bind_channel()
    client.send(channel_data(CHANNEL, b"12345") + bytes(3))
    client.send(channel_data(CHANNEL, b""))
    client.send(channel_data(OTHER_CHANNEL, b"dropped"))
    relay.receive_from_peer(allocation, b"1234567", PEER)
    relay.receive_from_peer(allocation, b"12", PEER)
    relay.receive_from_peer(allocation, b"", PEER)
    relay.receive_from_peer(allocation, b"dropped", OTHER_PEER)
    assert (relay.counters.to_peer_packets, relay.counters.to_peer_bytes) == (2, 5)
    assert (relay.counters.to_client_packets, relay.counters.to_client_bytes) == (3, 9)


def test_each_response_is_counted_by_method_and_code(relay: Relay, client: Client) -> None:
    client.take_nonce()
    relay.receive(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []), CLIENT)
    relay.receive(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []), CLIENT)
    client.refresh(600)
    client.allocate()
    client.ask(Method.ALLOCATE, UDP)
    client.ask(Method.ALLOCATE, UDP)
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, PEER)
    client.create_permission()
    client.create_permission(PEER)
    client.refresh(600)
    client.refresh(0)
    assert relay.counters.successes == {
        Method.BINDING: 2,
        Method.ALLOCATE: 1,
        Method.CHANNEL_BIND: 1,
        Method.CREATE_PERMISSION: 1,
        Method.REFRESH: 2,
    }
    assert relay.counters.errors == {
        (Method.ALLOCATE, 401): 1,
        (Method.REFRESH, 437): 1,
        (Method.ALLOCATE, 437): 2,
        (Method.CHANNEL_BIND, 400): 1,
        (Method.CREATE_PERMISSION, 400): 1,
    }


def test_an_allocation_is_counted_at_the_response(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    assert relay.counters.allocations_made == 0
    assert Method.ALLOCATE not in relay.counters.successes
    relay.report_bound(bind.allocation)
    assert relay.counters.allocations_made == 1
    assert relay.counters.successes[Method.ALLOCATE] == 1


def test_a_repeated_response_counts_as_a_response_not_as_an_allocation(relay: Relay, client: Client) -> None:
    data = client.write(Method.ALLOCATE, UDP)
    client.send(data)
    client.send(data)
    relay.report_bound(next(iter(relay.server.allocations.by_id)))
    client.send(data)
    assert relay.counters.drops[DropReason.ALLOCATE_UNDER_WAY] == 1
    assert relay.counters.successes[Method.ALLOCATE] == 2
    assert relay.counters.allocations_made == 1


def test_a_failed_allocation_is_counted_as_freed_but_not_as_created(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    relay.report_refused(bind.allocation)
    relay.report_refused(bind.allocation)
    assert relay.counters.ports_refused == 2
    relay.report_refused(bind.allocation, BindRefusal.MACHINE)
    assert relay.counters.ports_refused == 2
    assert relay.counters.allocations_made == 0
    assert freed(relay) == {FreeReason.REFUSED: 1}
    assert relay.counters.errors[Method.ALLOCATE, 508] == 1


def test_ended_allocations_are_counted_by_reason(relay: Relay, client: Client) -> None:
    client.allocate()
    client.refresh(0)
    assert freed(relay) == {FreeReason.DELETED: 1}
    client.allocate()
    roamed = Client(relay, OTHER_CLIENT)
    failing = roamed.allocate()
    assert freed(relay) == {FreeReason.DELETED: 1, FreeReason.REPLACED: 1}
    relay.report_failed(failing.id)
    relay.kick(roamed.allocate().id)
    roamed.allocate()
    relay.pass_time(600)
    relay.wake()
    roamed.begin_allocate()
    relay.pass_time(5)
    relay.wake()
    assert freed(relay) == {
        FreeReason.DELETED: 1,
        FreeReason.REPLACED: 1,
        FreeReason.FAILED: 1,
        FreeReason.KICKED: 1,
        FreeReason.EXPIRED: 1,
        FreeReason.REFUSED: 1,
    }
    assert relay.counters.allocations_made == 5


def test_deleting_a_family_counts_no_ended_allocation(relay: Relay, client: Client) -> None:
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    assert client.refresh(0, (REQUESTED_ADDRESS_FAMILY, 2)).code is None
    assert freed(relay) == {}
    assert client.refresh(0, (REQUESTED_ADDRESS_FAMILY, 1)).code is None
    assert freed(relay) == {FreeReason.DELETED: 1}


def test_successful_channel_binds_are_counted(relay: Relay, client: Client) -> None:
    client.bind_channel()
    client.allocate()
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, PEER)
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    assert relay.counters.channels_bound == 2


def test_keepalives_are_counted_and_are_no_drops(relay: Relay) -> None:
    for _ in range(3):
        relay.receive(encode(MessageClass.INDICATION, Method.BINDING, bytes(12), []), CLIENT)
    assert relay.counters.binding_indications == 3
    assert not any(relay.counters.drops.values())


def test_a_drop_is_counted_once_and_a_response_is_no_drop(relay: Relay, client: Client) -> None:
    client.allocate()
    client.bind_channel()
    client.send_on_channel(b"data")
    client.bind_channel(1)
    client.refresh(0)
    assert not any(relay.counters.drops.values())
    client.send_on_channel(b"data")
    assert sum(relay.counters.drops.values()) == 1


def test_nonces_are_counted_by_result(relay: Relay, client: Client) -> None:
    client.allocate()
    relay.pass_time(3600)
    client.refresh(600)
    stranger = Client(relay, OTHER_CLIENT)
    stranger.send(client.write(Method.REFRESH))
    assert relay.counters.nonces == {NonceOutcome.OURS: 1, NonceOutcome.EXPIRED: 1, NonceOutcome.FOREIGN: 1}
