"""ChannelData that arrives before its ChannelBind: held for a moment, and relayed when the bind succeeds."""

from collections import defaultdict
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import AllocationId, PeerAddress, SocketAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS
from relay.core.commands import Command, InstallChannel, SendToClient, SendToPeer
from relay.core.counters import Counters, DropReason
from relay.core.nonces import NONCE_LIFETIME
from relay.core.overload import EARLY_BYTES, EARLY_CLIENT_BYTES, EARLY_OVERHEAD
from relay.core.stun import Method
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CLIENT6,
    FORBIDDEN_PEER,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    PEER6,
    UDP,
    Client,
    Relay,
    answer_in,
    channel_data,
    of_kind,
    relay_with,
)

CHANNEL_LIFETIME = 600
EARLY_AGE = 1.0
ALLOCATION_LIFETIME = (LIFETIME, 3600)


def bind_request(client: Client, number: int = CHANNEL, peer: PeerAddress = PEER) -> bytes:
    return client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer))


def bind(client: Client, number: int = CHANNEL, peer: PeerAddress = PEER) -> list[Command]:
    return client.send(bind_request(client, number, peer))


def relayed(commands: Iterable[Command]) -> list[SendToPeer]:
    return of_kind(SendToPeer, commands)


def early_counts(counters: Counters) -> tuple[int, int, int, int]:
    """Return the numbers of held, relayed, expired and excess datagrams."""
    drops = counters.drops
    expired, excess = drops[DropReason.UNBOUND_CHANNEL], drops[DropReason.EARLY_LIMIT]
    return counters.early_held, counters.early_relayed, expired, excess


def test_data_before_its_bind_is_relayed_in_order_with_the_bind(relay: Relay, client: Client) -> None:
    allocation = client.allocate().id
    for payload in (b"1", b"", b"333"):
        assert client.send_on_channel(payload) == []
    *sent, response = bind(client)
    assert sent == [SendToPeer(allocation, payload, PEER) for payload in (b"1", b"", b"333")]
    assert answer_in([response]).code is None
    assert client.send_on_channel(b"4") == [SendToPeer(allocation, b"4", PEER)]
    assert early_counts(relay.counters) == (3, 3, 0, 0)
    assert (relay.counters.to_peer_packets, relay.counters.to_peer_bytes) == (4, 5)


def test_padding_and_traffic_class_are_treated_as_usual(relay: Relay, client: Client) -> None:
    allocation = client.allocate().id
    relay.receive_batch([(channel_data(CHANNEL, b"data") + bytes(3), client.address, 0, 0xB8)])
    assert relayed(bind(client)) == [SendToPeer(allocation, b"data", PEER, 0, 0xB8)]


def test_held_data_is_relayed_once(client: Client) -> None:
    client.allocate()
    client.send_on_channel(b"early")
    assert len(relayed(bind(client))) == 1
    assert relayed(bind(client)) == []


def test_data_is_relayed_until_its_age_is_reached(relay: Relay, client: Client) -> None:
    client.allocate()
    client.send_on_channel(b"early")
    assert relay.server.poll_timeout() == relay.now.monotonic + EARLY_AGE
    relay.pass_time(EARLY_AGE - 0.001)
    assert len(relayed(bind(client))) == 1
    client.send_on_channel(b"early", OTHER_CHANNEL)
    relay.pass_time(EARLY_AGE)
    assert relayed(bind(client, OTHER_CHANNEL, OTHER_PEER)) == []
    assert early_counts(relay.counters) == (2, 1, 1, 0)


def test_data_without_a_bind_is_dropped_at_its_deadline(relay: Relay, client: Client) -> None:
    client.allocate()
    client.send_on_channel(b"early")
    relay.pass_time(0.25)
    client.send_on_channel(b"later", OTHER_CHANNEL)
    relay.pass_time(EARLY_AGE - 0.25)
    assert relay.wake() == []
    assert early_counts(relay.counters) == (2, 0, 1, 0)
    assert relay.server.poll_timeout() == relay.now.monotonic + 0.25
    relay.pass_time(0.25)
    assert relay.wake() == []
    assert early_counts(relay.counters) == (2, 0, 2, 0)


def test_data_of_a_client_without_an_allocation_is_not_held(relay: Relay, client: Client) -> None:
    client.send_on_channel(b"before the Allocate")
    begun = client.begin_allocate()
    # Without the response, a client can't have sent a ChannelBind.
    client.send_on_channel(b"before the response")
    assert early_counts(relay.counters) == (0, 0, 2, 0)
    relay.report_bound(begun.allocation)
    assert relayed(bind(client)) == []


@pytest.mark.parametrize("code", [400, 403, 437, 441])
def test_a_rejected_bind_relays_nothing(relay: Relay, client: Client, code: int) -> None:
    client.allocate()
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    client.send_on_channel(b"early")
    binder, peer = {
        400: (client, OTHER_PEER),
        403: (client, FORBIDDEN_PEER),
        437: (Client(relay, OTHER_CLIENT), PEER),
        441: (Client(relay, salt="other"), PEER),
    }[code]
    (rejected,) = bind(binder, CHANNEL, peer)
    assert answer_in([rejected]).code == code
    # A client corrects its request.
    assert [each.data for each in relayed(bind(client))] == [b"early"]


def test_a_bind_with_an_outdated_nonce_keeps_the_data_for_the_next_bind(relay: Relay, client: Client) -> None:
    client.allocate()
    relay.pass_time(NONCE_LIFETIME / 6 - 1)
    client.refresh(3600)
    relay.pass_time(NONCE_LIFETIME - NONCE_LIFETIME / 6 + 1)
    client.send_on_channel(b"early")
    (rejected,) = bind(client)
    assert answer_in([rejected]).code == 438
    client.take_nonce()
    assert [each.data for each in relayed(bind(client))] == [b"early"]


def test_data_stays_with_its_client_and_channel(relay: Relay, client: Client) -> None:
    other = Client(relay, OTHER_CLIENT, salt="other")
    allocation, others = client.allocate().id, other.allocate().id
    for number in (CHANNEL, OTHER_CHANNEL):
        client.send_on_channel(b"%x" % number, number)
    other.send_on_channel(b"of other")
    assert relayed(bind(other, CHANNEL, PEER)) == [SendToPeer(others, b"of other", PEER)]
    assert relayed(bind(client, OTHER_CHANNEL, OTHER_PEER)) == [SendToPeer(allocation, b"4001", OTHER_PEER)]
    assert relayed(bind(client, CHANNEL, PEER)) == [SendToPeer(allocation, b"4000", PEER)]


def test_a_new_allocation_relays_no_data_of_the_old_allocation(relay: Relay, client: Client) -> None:
    client.allocate()
    client.send_on_channel(b"for the old allocation")
    # New credentials at the same address, as with Firezone clients.
    renewed = Client(relay, salt="renewed")
    assert renewed.ask(Method.ALLOCATE, UDP).code == 437
    assert renewed.refresh(0).code is None
    allocation = renewed.allocate().id
    renewed.send_on_channel(b"for the new allocation")
    assert relayed(bind(renewed)) == [SendToPeer(allocation, b"for the new allocation", PEER)]


def test_a_roaming_client_leaves_its_data_behind(relay: Relay, client: Client) -> None:
    client.allocate()
    client.send_on_channel(b"from the old address")
    moved = Client(relay, OTHER_CLIENT)
    allocation = moved.allocate().id
    moved.send_on_channel(b"from the new address")
    assert relayed(bind(moved)) == [SendToPeer(allocation, b"from the new address", PEER)]


def test_data_of_an_expired_channel_waits_for_the_refresh(relay: Relay, client: Client) -> None:
    allocation = client.allocate(ALLOCATION_LIFETIME).id
    client.bind_channel()
    relay.pass_time(CHANNEL_LIFETIME)
    assert client.send_on_channel(b"late") == []
    assert relayed(bind(client)) == [SendToPeer(allocation, b"late", PEER)]


def test_the_kernel_gets_a_channel_with_the_packets_of_the_same_bind() -> None:
    """The server actor sends the packets first (tests/actors/test_early.py)."""
    client = Client(relay_with(offloads=True))
    client.allocate(ALLOCATION_LIFETIME)
    client.send_on_channel(b"early")
    assert sorted(type(each).__name__ for each in bind(client)) == [
        InstallChannel.__name__,
        SendToClient.__name__,
        SendToPeer.__name__,
    ]


def test_a_packet_of_a_peer_does_not_wait(relay: Relay, client: Client) -> None:
    """RFC 8656 §12: a peer without a permission is not relayed."""
    allocation = client.allocate().id
    assert relay.receive_from_peer(allocation, b"early", PEER) == []
    assert of_kind(SendToClient, bind(client))[:-1] == []
    assert relay.counters.drops[DropReason.UNBOUND_PEER] == 1


def test_200_packets_of_1200_bytes_fit(relay: Relay, client: Client) -> None:
    client.allocate()
    for _ in range(200):
        client.send_on_channel(bytes(1200))
    assert len(relayed(bind(client))) == 200
    assert early_counts(relay.counters) == (200, 200, 0, 0)


@pytest.mark.parametrize("size", [0, 1000, 60_000])
def test_a_client_at_its_limit_keeps_its_first_data(relay: Relay, client: Client, size: int) -> None:
    client.allocate()
    cost = size + len(channel_data(CHANNEL, b"")) + EARLY_OVERHEAD
    fitting = -(-EARLY_CLIENT_BYTES // cost)
    packets = [b"%5d" % n + bytes(size - 5) if size else b"" for n in range(fitting + 3)]
    for each in packets:
        client.send_on_channel(each)
    # All channels of the client count.
    client.send_on_channel(b"", OTHER_CHANNEL)
    assert early_counts(relay.counters) == (fitting, 0, 0, 4)
    assert [each.data for each in relayed(bind(client))] == packets[:fitting]
    client.send_on_channel(b"room again", OTHER_CHANNEL)
    assert early_counts(relay.counters) == (fitting + 1, fitting, 0, 4)


def some_clients(relay: Relay, count: int) -> list[Client]:
    clients = [Client(relay, (f"203.0.113.{n}", 40000), salt=str(n)) for n in range(count)]
    for each in clients:
        each.allocate()
    return clients


def flood(*clients: Client, size: int) -> list[int]:
    """Send more data than clients may have held, in turn; return how many datagrams of each are held."""
    held = [0] * len(clients)
    for _ in range(EARLY_CLIENT_BYTES // size + 1):
        for n, each in enumerate(clients):
            before = each.relay.counters.early_held
            each.send_on_channel(bytes(size))
            held[n] += each.relay.counters.early_held - before
    return held


def test_all_clients_together_have_a_limit(relay: Relay) -> None:
    clients = some_clients(relay, 48)
    held = [flood(each, size=60_000)[0] for each in clients]
    assert EARLY_BYTES * 0.9 < sum(held) * (60_004 + EARLY_OVERHEAD) < EARLY_BYTES + 61_028
    relay.pass_time(EARLY_AGE)
    relay.wake()
    clients[-1].send_on_channel(b"room again")
    assert len(relayed(bind(clients[-1]))) == 1


def test_clients_that_flood_have_equal_shares_and_leave_one_to_the_next_client(relay: Relay) -> None:
    *greedy, other = some_clients(relay, 40)
    held = flood(*greedy, size=1000)
    assert max(held) - min(held) <= 1
    (left,) = flood(other, size=1000)
    assert left >= min(held) * 0.8
    assert len(relayed(bind(other))) == left


def test_a_flood_of_unbound_data_sets_one_deadline(relay: Relay, client: Client) -> None:
    client.allocate()
    deadlines = relay.server.allocations.deadlines
    for n in range(3000):
        client.send_on_channel(b"", 0x4000 + n)
        relay.receive(channel_data(CHANNEL, b""), ("203.0.113.99", 1024 + n))
    assert len(deadlines) == 2
    assert deadlines.entries == 2


ADDRESSES: list[SocketAddress] = [CLIENT, OTHER_CLIENT, CLIENT6]
PEERS = {CHANNEL: PEER, OTHER_CHANNEL: PEER6}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(range(len(ADDRESSES))),
            st.sampled_from([CHANNEL, OTHER_CHANNEL]),
            st.sampled_from(["data", "data", "data", "bind"]),
            st.sampled_from([0, 0, 0.0625, 0.25]),
        ),
        max_size=40,
    )
)
def test_a_bind_relays_exactly_the_data_of_its_channel_of_the_last_moment(steps: list[tuple[int, int, str, float]]) -> None:
    """Data reaches only the peer that its own client bound its channel to, in order, and never late."""
    relay = relay_with()
    clients = [Client(relay, address, salt=str(n)) for n, address in enumerate(ADDRESSES)]

    ids = [client.allocate(ALLOCATION_LIFETIME, (ADDITIONAL_ADDRESS_FAMILY, 2)).id for client in clients]
    sent: dict[tuple[AllocationId, PeerAddress], list[tuple[float, bytes]]] = defaultdict(list)
    arrived: dict[tuple[AllocationId, PeerAddress], list[bytes]] = defaultdict(list)
    bound: dict[tuple[AllocationId, PeerAddress], float] = {}
    for n, (index, number, kind, pause) in enumerate(steps):
        relay.pass_time(pause)
        flow = ids[index], PEERS[number]
        if kind == "bind":
            bound.setdefault(flow, relay.now.monotonic)
            commands = bind(clients[index], number, PEERS[number])
        else:
            sent[flow].append((relay.now.monotonic, b"%d" % n))
            commands = clients[index].send_on_channel(b"%d" % n, number)
        for each in relayed(commands):
            arrived[each.allocation, each.peer].append(each.data)
    for flow, packets in sent.items():
        # All data after the bind, and a complete end of the data of the second before.
        must = [data for at, data in packets if flow in bound and at >= bound[flow]]
        may = [data for at, data in packets if flow in bound and at > bound[flow] - EARLY_AGE]
        assert arrived[flow] == may[len(may) - len(arrived[flow]) :]
        assert len(arrived[flow]) >= len(must)
    assert set(arrived) <= set(sent)
    assert relay.counters.drops[DropReason.EARLY_LIMIT] == 0
