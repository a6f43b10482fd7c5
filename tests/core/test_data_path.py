"""Relayed and dropped datagrams (RFC 8656 §12.4–12.7, docs/protocol.md)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import AllocationId, PeerAddress
from relay.core.attributes import DATA, XOR_PEER_ADDRESS
from relay.core.commands import SendToClient, SendToPeer
from relay.core.counters import DropReason
from relay.core.overload import EARLY_AGE
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import (
    CHANNEL,
    CLIENT,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    PEER6,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    channel_data,
    opaque,
)


@pytest.fixture
def allocation(client: Client) -> AllocationId:
    """An allocation with one channel, bound to `PEER`."""
    allocation = client.allocate().id
    client.bind_channel()
    return allocation


def drops(relay: Relay) -> dict[DropReason, int]:
    return {reason: count for reason, count in relay.counters.drops.items() if count}


def bare(method: int, message_class: MessageClass = MessageClass.INDICATION) -> bytes:
    return encode(message_class, method, bytes(12), [])


@given(st.binary(max_size=1500), st.binary(max_size=8))
def test_any_payload_is_relayed_unaltered_both_ways(payload: bytes, padding: bytes) -> None:
    relay = Relay()
    client = Client(relay)
    allocation = client.allocate().id
    client.bind_channel()
    frame = channel_data(CHANNEL, payload)
    # All bytes after the stated length are padding.
    assert client.send(frame + padding) == [SendToPeer(allocation, payload, PEER)]
    assert relay.receive_from_peer(allocation, payload, PEER) == [SendToClient(frame, client.address)]
    assert drops(relay) == {}


def test_a_payload_of_length_zero_is_relayed(relay: Relay, client: Client, allocation: AllocationId) -> None:
    assert client.send(b"\x40\0\0\0") == [SendToPeer(allocation, b"", PEER)]
    assert relay.receive_from_peer(allocation, b"", PEER) == [SendToClient(b"\x40\0\0\0", client.address)]
    assert relay.counters.to_peer_packets == 1
    assert relay.counters.to_client_packets == 1


def test_the_largest_datagrams_are_relayed(relay: Relay, client: Client, allocation: AllocationId) -> None:
    payload = bytes(65507 - 4)
    assert client.send(channel_data(CHANNEL, payload)) == [SendToPeer(allocation, payload, PEER)]
    from_peer = bytes(65527)
    (sent,) = relay.receive_from_peer(allocation, from_peer, PEER)
    assert sent == SendToClient(channel_data(CHANNEL, from_peer), client.address)


@pytest.mark.parametrize("data", [b"\x40", b"\x40\0", b"\x40\0\0", b"\x40\0\0\1", b"\x40\0\0\5data", b"\x40\0\xff\xffdata"])
def test_a_length_beyond_the_datagram_is_dropped(
    relay: Relay, client: Client, allocation: AllocationId, data: bytes
) -> None:
    assert allocation in relay.server.allocations.by_id
    assert client.send(data) == []
    assert drops(relay) == {DropReason.SHORT_CHANNEL_DATA: 1}


def test_data_on_an_unbound_channel_is_dropped(relay: Relay, client: Client, allocation: AllocationId) -> None:
    assert allocation in relay.server.allocations.by_id
    assert client.send_on_channel(b"data", OTHER_CHANNEL) == []
    assert client.send_on_channel(b"data", 0x7FFF) == []
    assert relay.receive(channel_data(CHANNEL, b"data"), OTHER_CLIENT) == []
    assert relay.receive(channel_data(CHANNEL, b"data"), (CLIENT[0], CLIENT[1] + 1)) == []
    assert drops(relay) == {DropReason.UNBOUND_CHANNEL: 2}
    # Data of a client with an allocation waits for a ChannelBind: test_early.py.
    relay.pass_time(EARLY_AGE)
    assert relay.wake() == []
    assert drops(relay) == {DropReason.UNBOUND_CHANNEL: 4}


def test_data_from_a_peer_without_channel_is_dropped(relay: Relay, client: Client, allocation: AllocationId) -> None:
    client.create_permission(OTHER_PEER)
    for peer in (OTHER_PEER, PeerAddress((PEER[0], PEER[1] + 1)), PEER6, PeerAddress(CLIENT)):
        assert relay.receive_from_peer(allocation, b"data", peer) == []
    assert relay.receive_from_peer(AllocationId(allocation + 1), b"data", PEER) == []
    assert drops(relay) == {DropReason.UNBOUND_PEER: 5}


def test_late_data_from_a_freed_allocation_is_dropped(relay: Relay, client: Client, allocation: AllocationId) -> None:
    client.refresh(0)
    new = client.allocate().id
    client.bind_channel()
    assert relay.receive_from_peer(allocation, b"data", PEER) == []
    assert len(relay.receive_from_peer(new, b"data", PEER)) == 1
    assert drops(relay) == {DropReason.UNBOUND_PEER: 1}


def test_each_client_and_peer_gets_its_own_data(relay: Relay, client: Client, allocation: AllocationId) -> None:
    other = Client(relay, OTHER_CLIENT, salt="other")
    others = other.allocate().id
    other.bind_channel(CHANNEL, OTHER_PEER)
    other.bind_channel(OTHER_CHANNEL, PEER)
    assert client.send_on_channel(b"1") == [SendToPeer(allocation, b"1", PEER)]
    assert other.send_on_channel(b"2") == [SendToPeer(others, b"2", OTHER_PEER)]
    assert other.send_on_channel(b"3", OTHER_CHANNEL) == [SendToPeer(others, b"3", PEER)]
    assert relay.receive_from_peer(allocation, b"4", PEER) == [SendToClient(channel_data(CHANNEL, b"4"), client.address)]
    assert relay.receive_from_peer(others, b"5", PEER) == [SendToClient(channel_data(OTHER_CHANNEL, b"5"), other.address)]


@pytest.mark.parametrize("first", [*range(4, 64), *range(128, 256)])
def test_a_first_byte_of_another_protocol_is_dropped(relay: Relay, client: Client, first: int) -> None:
    client.allocate()
    assert client.send(bytes((first,)) + bytes(30)) == []
    assert drops(relay) == {DropReason.UNKNOWN_PROTOCOL: 1}


@pytest.mark.parametrize("first", range(64, 128))
def test_a_first_byte_of_64_to_127_is_channel_data(relay: Relay, first: int) -> None:
    assert relay.receive(bytes((first, 0, 0, 0)), CLIENT) == []
    assert drops(relay) == {DropReason.UNBOUND_CHANNEL: 1}


@pytest.mark.parametrize("first", range(4))
def test_a_first_byte_of_0_to_3_is_stun(relay: Relay, first: int) -> None:
    assert relay.receive(bytes((first,)) + bytes(3), CLIENT) == []
    assert drops(relay) == {DropReason.MALFORMED_HEADER: 1}


def test_an_empty_datagram_is_dropped(relay: Relay) -> None:
    assert relay.receive(b"", CLIENT) == []
    assert drops(relay) == {DropReason.EMPTY: 1}


@pytest.mark.parametrize(
    ("method", "reason"), [(Method.SEND, DropReason.SEND_INDICATION), (Method.DATA, DropReason.DATA_INDICATION)]
)
def test_send_and_data_indications_are_dropped(
    relay: Relay, client: Client, allocation: AllocationId, method: Method, reason: DropReason
) -> None:
    assert allocation in relay.server.allocations.by_id
    client.create_permission(PEER)
    body: list[AttributeValue] = [(XOR_PEER_ADDRESS, PEER), (DATA, b"data")]
    assert client.send(encode(MessageClass.INDICATION, method, bytes(12), body)) == []
    assert drops(relay) == {reason: 1}


@pytest.mark.parametrize("method", [Method.ALLOCATE, Method.REFRESH, Method.CHANNEL_BIND, 0x002, 0x0FF])
def test_an_indication_of_a_request_method_is_dropped(relay: Relay, method: int) -> None:
    assert relay.receive(bare(method), CLIENT) == []
    assert drops(relay) == {DropReason.INDICATION: 1}


def test_a_binding_indication_is_a_keep_alive(relay: Relay) -> None:
    assert relay.receive(bare(Method.BINDING), CLIENT) == []
    assert drops(relay) == {}
    assert relay.counters.binding_indications == 1


@pytest.mark.parametrize("message_class", [MessageClass.SUCCESS, MessageClass.ERROR])
@pytest.mark.parametrize("method", [Method.BINDING, Method.ALLOCATE, Method.DATA])
def test_a_response_is_dropped(relay: Relay, method: Method, message_class: MessageClass) -> None:
    assert relay.receive(bare(method, message_class), CLIENT) == []
    assert drops(relay) == {DropReason.RESPONSE: 1}


@pytest.mark.parametrize("method", [0x000, 0x002, 0x005, Method.SEND, Method.DATA, 0x00A, 0x0FF])
def test_a_request_of_an_unknown_method_is_dropped(relay: Relay, client: Client, method: int) -> None:
    assert relay.receive(bare(method, MessageClass.REQUEST), CLIENT) == []
    assert client.send(client.write(method)) == []
    assert drops(relay) == {DropReason.UNKNOWN_METHOD: 2}


@pytest.mark.parametrize("method", [Method.BINDING, Method.ALLOCATE])
def test_a_request_from_port_zero_is_dropped(relay: Relay, method: Method) -> None:
    assert relay.receive(bare(method, MessageClass.REQUEST), (CLIENT[0], 0)) == []
    assert drops(relay) == {DropReason.SOURCE_PORT_ZERO: 1}


@pytest.mark.parametrize("first", [b"\0", b"\x40", b"\x10", b"\xff"])
def test_no_datagram_from_port_zero_gets_a_response(relay: Relay, first: bytes) -> None:
    assert relay.receive(first + bytes(20), (CLIENT[0], 0)) == []
    assert sum(drops(relay).values()) == 1


def test_commands_are_drained_once(relay: Relay, client: Client) -> None:
    binding = bare(Method.BINDING, MessageClass.REQUEST)
    for _ in range(2):
        assert relay.server.handle_client_datagram((binding, client.address, 0, 0), relay.now) is None
    assert len(relay.server.drain()) == 2
    assert relay.server.drain() == []


def test_past_deadlines_are_handled_before_a_datagram(relay: Relay, client: Client, allocation: AllocationId) -> None:
    relay.pass_time(600)
    freed, sent = client.send(bare(Method.BINDING, MessageClass.REQUEST))
    assert not isinstance(freed, SendToClient)
    assert answer_in([sent]).code is None
    assert allocation not in relay.server.allocations.by_id


@pytest.mark.parametrize(("length", "drops"), [(1500, 0), (1504, 1)])
def test_an_oversized_stun_message_is_dropped_unread(relay: Relay, length: int, drops: int) -> None:
    """RFC 8489 §6.1. A datagram of 64 KiB could contain thousands of peer addresses to check."""
    padding = (opaque(0x8FFF), bytes(length - 24))
    data = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [padding])
    assert len(data) == length
    assert len(relay.receive(data, CLIENT)) == 1 - drops
    assert relay.counters.drops[DropReason.STUN_TOO_LONG] == drops
