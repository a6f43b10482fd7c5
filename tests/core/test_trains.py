"""Batches: GRO batches leave as GSO batches, with the same datagrams, order and counters as separate datagrams."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from relay.core.addresses import AllocationId, PeerAddress, SocketAddress
from relay.core.attributes import CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS
from relay.core.commands import Command, FreeAllocation, SendToClient, SendToPeer, cut
from relay.core.counters import Counters, DropReason
from relay.core.data import Datagram
from relay.core.overload import EARLY_AGE
from relay.core.stun import MessageClass, Method, encode
from relay.net.grouping import grouped
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CLIENT6,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    Client,
    Relay,
    answer_in,
    channel_data,
    of_kind,
    opaque,
    the,
)
from tests.support.examples import examples

FREE_CHANNEL = 0x4002
THIRD_PEER = PeerAddress(("198.51.100.11", 5000))
PEERS = (PEER, OTHER_PEER, THIRD_PEER)
STRANGER: SocketAddress = ("203.0.113.7", 40000)
EXPEDITED = 0xB8 | 1
"""DSCP EF, ECN ECT(1)."""

CHANNEL_LIFETIME = 600

Flows: TypeAlias = dict[Hashable, list[Hashable]]


class World:
    """A relay with three clients that have channels. All worlds are identical to the byte."""

    def __init__(self) -> None:
        self.relay = Relay()
        self.server = self.relay.server
        self.clients = [Client(self.relay, each, salt=each[0].replace(":", "-")) for each in (CLIENT, OTHER_CLIENT, CLIENT6)]
        self.allocations = [client.allocate((LIFETIME, 3600)).id for client in self.clients]
        self.clients[0].bind_channel(CHANNEL, PEER)
        self.clients[0].bind_channel(OTHER_CHANNEL, OTHER_PEER)
        self.clients[1].bind_channel(CHANNEL, PEER)
        self.clients[2].bind_channel(CHANNEL, OTHER_PEER)

    @property
    def counters(self) -> Counters:
        return self.relay.counters

    def take(self, batch: Sequence[Datagram]) -> list[Command]:
        return self.relay.receive_batch(grouped(batch))

    def take_from_peers(self, batch: Sequence[Datagram]) -> list[Command]:
        return self.relay.receive_batch_from_peers(self.allocations[0], grouped(batch))

    def expire_early(self) -> None:
        """Let the time pass for which ChannelData waits for a ChannelBind."""
        self.relay.pass_time(EARLY_AGE)
        assert self.relay.wake() == []

    def take_one_by_one(self, batch: Iterable[Datagram]) -> list[Command]:
        return self.relay.receive_batch(one_by_one(batch))

    def take_from_peers_one_by_one(self, batch: Iterable[Datagram]) -> list[Command]:
        return self.relay.receive_batch_from_peers(self.allocations[0], one_by_one(batch))


@pytest.fixture
def world() -> World:
    return World()


def one_by_one(datagrams: Iterable[Datagram]) -> Iterable[Datagram]:
    for data, source, segment, traffic_class in datagrams:
        for datagram in cut(data, segment):
            yield datagram, source, 0, traffic_class


def flows_of(commands: Iterable[Command]) -> Flows:
    """Group commands by flow: the data of a channel in one direction, and the end of its allocation."""
    flows: Flows = defaultdict(list)
    for command in commands:
        match command:
            case SendToPeer(allocation, data, peer, segment, traffic_class):
                flows[allocation, peer] += [(datagram, traffic_class) for datagram in cut(data, segment)]
            case SendToClient(data, client, segment, traffic_class):
                for frame in cut(data, segment):
                    flows[client, frame[:2]].append((frame, traffic_class))
            case FreeAllocation(allocation):
                for peer in PEERS:
                    flows[allocation, peer].append(command)
            case _:
                flows["others"].append(command)
    return flows


def frames(*payloads: bytes, number: int = CHANNEL) -> list[bytes]:
    return [channel_data(number, payload) for payload in payloads]


def lone(*datagrams: bytes, source: SocketAddress = CLIENT, traffic_class: int = 0) -> list[Datagram]:
    """Return separate datagrams."""
    return [(datagram, source, 0, traffic_class) for datagram in datagrams]


def train(*datagrams: bytes, source: SocketAddress = CLIENT, traffic_class: int = 0) -> Datagram:
    """Return a GRO batch: datagrams of equal length, the last of which may be shorter."""
    assert {len(each) for each in datagrams[:-1]} == {len(datagrams[0])}
    assert 0 < len(datagrams[-1]) <= len(datagrams[0])
    return b"".join(datagrams), source, len(datagrams[0]), traffic_class


def binding_request(*, padding: int = 0) -> bytes:
    attributes = [(opaque(0x8FFF), bytes(padding))] if padding else []
    return encode(MessageClass.REQUEST, Method.BINDING, bytes(12), attributes)


# Few lengths, sources and channels, so that batches contain several datagrams of a flow.
LENGTHS = st.sampled_from([0, 1, 4, 4, 4, 9, 100])
CHANNELS = st.sampled_from([CHANNEL, CHANNEL, CHANNEL, OTHER_CHANNEL, FREE_CHANNEL])
CLIENTS: st.SearchStrategy[SocketAddress] = st.sampled_from([CLIENT, CLIENT, CLIENT, OTHER_CLIENT, CLIENT6, STRANGER])
PEER_SOURCES: st.SearchStrategy[SocketAddress] = st.sampled_from([PEER, PEER, PEER, OTHER_PEER, THIRD_PEER])
TRAFFIC_CLASSES = st.sampled_from([0, 0, 0, EXPEDITED])
NOT_DATA = st.sampled_from([b"", b"\x10garbage", b"\xff", b"\x40", b"\x40\0\0", b"\0\1\0\0", binding_request()])

OTHER_HEADERS = [binding_request(padding=4), b"\0\0\0\4", b"\x10\0\0\4", b"\xff\0\0\1"]

# Requests of a client between two of its datagrams. Each is encoded once, because all worlds get the same bytes.
_OF_ANY_WORLD = World().clients
CHANGES = st.sampled_from(
    [
        (client.write(method, *attributes), client.address)
        for client in _OF_ANY_WORLD
        for method, attributes in (
            (Method.CHANNEL_BIND, ((CHANNEL_NUMBER, FREE_CHANNEL), (XOR_PEER_ADDRESS, THIRD_PEER))),
            (Method.CHANNEL_BIND, ((CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, PEER))),
            (Method.REFRESH, ((LIFETIME, 0),)),
            (Method.REFRESH, ((LIFETIME, 600),)),
        )
    ]
)


def payloads_of(length: int) -> st.SearchStrategy[bytes]:
    # Few bytes, for fast shrinking. Distinct payloads, so that a swap is detected.
    return st.binary(min_size=length, max_size=length)


@st.composite
def client_datagrams(draw: st.DrawFn) -> bytes:
    payload = draw(LENGTHS.flatmap(payloads_of))
    padding = bytes(draw(st.sampled_from([0, 0, 0, 0, 1, 3])))
    beyond = draw(st.sampled_from([0, 0, 0, 0, 0, 0, 4]))
    return channel_data(draw(CHANNELS), payload + padding, length=len(payload) + beyond)


@st.composite
def client_trains(draw: st.DrawFn) -> bytes:
    """Draw a GRO batch, in most cases of frames with equal headers, with its segment size."""
    header = draw(st.one_of(client_datagrams(), client_datagrams(), st.sampled_from(OTHER_HEADERS)))[:4]
    segment = draw(st.sampled_from([1, 4, 5, 8, 8, 8, 9, 13, 24]))
    count = draw(st.integers(1, 4))
    datagrams = [(header + draw(payloads_of(max(0, segment - 4))))[:segment] for _ in range(count)]
    if draw(st.integers(0, 3)) == 0:
        other = draw(st.one_of(client_datagrams(), NOT_DATA))
        datagrams[draw(st.integers(0, count - 1))] = other[:segment].ljust(segment, b"\0")
    # Never empty, because the kernel does not report an empty last segment.
    if segment > 1 and draw(st.booleans()):
        last = draw(st.one_of(client_datagrams(), NOT_DATA, payloads_of(segment).map(lambda data: header + data)))
        shorter = draw(st.integers(1, segment - 1))
        datagrams.append(last[:shorter].ljust(min(shorter, max(1, len(last))), b"\0"))
    return segment.to_bytes(2, "big") + b"".join(datagrams)


@st.composite
def client_datagrams_and_trains(draw: st.DrawFn, *, changes: bool) -> Datagram:
    kind = draw(st.sampled_from(["datagram"] * 6 + ["train"] * 3 + ["other"] + ["change"] * changes))
    if kind == "change":
        data, source = draw(CHANGES)
        return data, source, 0, 0
    source, traffic_class = draw(CLIENTS), draw(TRAFFIC_CLASSES)
    if kind == "other":
        return draw(NOT_DATA), source, 0, traffic_class
    if kind == "datagram":
        return draw(client_datagrams()), source, 0, traffic_class
    drawn = draw(client_trains())
    segment, data = int.from_bytes(drawn[:2], "big"), drawn[2:]
    assume(len(data) > segment)
    return data, source, segment, traffic_class


@st.composite
def peer_datagrams_and_trains(draw: st.DrawFn) -> Datagram:
    data = draw(LENGTHS.flatmap(payloads_of))
    segment = draw(st.sampled_from([0, 0, 1, 3, 4]))
    return data, draw(PEER_SOURCES), segment if segment < len(data) else 0, draw(TRAFFIC_CLASSES)


@st.composite
def batches(draw: st.DrawFn, datagrams: st.SearchStrategy[Datagram]) -> list[Datagram]:
    """Draw bursts of one or two datagrams, each repeated several times in turn."""
    batch: list[Datagram] = []
    for _ in range(draw(st.integers(1, 5))):
        burst = [draw(datagrams) for _ in range(draw(st.integers(1, 2)))]
        for number in range(draw(st.integers(1, 4))):
            # Each datagram has a distinct last byte, so that a swap is detected.
            batch += [
                datagram
                if number == 0 or datagram[2] or len(datagram[0]) <= 4
                else (_renumbered(datagram[0], number), *datagram[1:])
                for datagram in burst
            ]
    return batch


def _renumbered(data: bytes, number: int) -> bytes:
    return data if data[0] < 64 else data[:-1] + bytes((number,))


@examples(100)
@given(batches(client_datagrams_and_trains(changes=True)))
def test_a_batch_from_clients_equals_its_datagrams_one_by_one(batch: list[Datagram]) -> None:
    together, alone = World(), World()
    # The second batch detects state left by the first batch.
    for _ in range(2):
        assert flows_of(together.take(batch)) == flows_of(alone.take_one_by_one(batch))
        assert together.counters == alone.counters
        assert together.server.poll_timeout() == alone.server.poll_timeout()
    for each in (together, alone):
        each.expire_early()
    assert together.counters == alone.counters


@given(batches(peer_datagrams_and_trains()))
def test_a_batch_from_peers_equals_its_datagrams_one_by_one(batch: list[Datagram]) -> None:
    together, alone = World(), World()
    for _ in range(2):
        assert flows_of(together.take_from_peers(batch)) == flows_of(alone.take_from_peers_one_by_one(batch))
        assert together.counters == alone.counters


@given(st.one_of(batches(client_datagrams_and_trains(changes=True)), batches(peer_datagrams_and_trains())))
def test_grouping_keeps_the_order_of_each_source(batch: list[Datagram]) -> None:
    made = grouped(batch)
    assert by_source(made) == by_source(batch)
    for data, _, segment_size, _ in made:
        assert segment_size == 0 or 0 < segment_size < len(data)


@given(payloads_of(4), st.integers(1, 6), st.integers(0, 8), TRAFFIC_CLASSES)
def test_a_shorter_datagram_ends_the_gro_batch_of_its_flow(
    payload: bytes, count: int, last: int, traffic_class: int
) -> None:
    batch = lone(*[payload] * count, bytes(last), traffic_class=traffic_class)
    if 0 < last <= 4:
        assert grouped(batch) == [(payload * count + bytes(last), CLIENT, 4, traffic_class)]
    else:
        assert len(grouped(batch)) == 2


def by_source(batch: Iterable[Datagram]) -> dict[SocketAddress, list[tuple[bytes, int]]]:
    made: dict[SocketAddress, list[tuple[bytes, int]]] = defaultdict(list)
    for datagram, source, _, traffic_class in one_by_one(batch):
        made[source].append((datagram, traffic_class))
    return made


@given(st.binary(max_size=50), st.integers(1, 60))
def test_a_batch_is_cut_into_segments_and_a_remainder(data: bytes, segment: int) -> None:
    datagrams = list(cut(data, segment))
    assert b"".join(datagrams) == data
    assert all(len(each) == segment for each in datagrams[:-1])
    assert all(0 < len(each) <= segment for each in datagrams)


@given(st.binary(max_size=50))
def test_a_single_datagram_is_not_cut_even_if_empty(data: bytes) -> None:
    assert list(cut(data, 0)) == [data]


def test_a_gro_batch_of_a_channel_leaves_as_a_gso_batch(world: World) -> None:
    assert world.take([train(*frames(b"1111", b"2222", b"33"), traffic_class=EXPEDITED)]) == [
        SendToPeer(world.allocations[0], b"1111222233", PEER, 4, EXPEDITED)
    ]
    assert (world.counters.to_peer_packets, world.counters.to_peer_bytes) == (3, 10)


def test_a_lone_gro_batch_leaves_as_a_batch(world: World) -> None:
    to_peer = world.server.handle_client_datagram(train(*frames(b"1111", b"22")), world.relay.now)
    to_client = world.server.handle_peer_datagram(
        train(b"1111", b"22", source=PEER), world.relay.now.monotonic, world.allocations[0]
    )
    assert to_peer == SendToPeer(world.allocations[0], b"111122", PEER, 4)
    assert to_client == SendToClient(b"".join(frames(b"1111", b"22")), world.clients[0].address, 8)


def test_a_gro_batch_of_a_peer_gets_a_header_per_datagram(world: World) -> None:
    assert world.take_from_peers([train(b"1111", b"2222", b"33", source=PEER, traffic_class=EXPEDITED)]) == [
        SendToClient(b"".join(frames(b"1111", b"2222", b"33")), world.clients[0].address, 8, EXPEDITED)
    ]
    assert (world.counters.to_client_packets, world.counters.to_client_bytes) == (3, 10)


def test_padding_in_a_batch_is_removed(world: World) -> None:
    padded = [frame + b"\0\0" for frame in frames(b"11", b"22")]
    assert world.take([train(*padded, frames(b"3")[0] + b"\0")]) == [SendToPeer(world.allocations[0], b"11223", PEER, 2)]


@pytest.mark.parametrize(
    "last",
    [
        b"\x40",
        b"\x40\0\0\0",
        channel_data(CHANNEL, b"", length=9),
        channel_data(CHANNEL, b"3", length=2),
        channel_data(OTHER_CHANNEL, b"33"),
        channel_data(FREE_CHANNEL, b"33"),
        b"\xff",
    ],
    ids=bytes.hex,
)
def test_a_batch_with_a_different_last_datagram_is_split(world: World, last: bytes) -> None:
    alone = World()
    arrived = [train(*frames(b"1111", b"2222"), last)]
    assert flows_of(world.take(arrived)) == flows_of(alone.take_one_by_one(arrived))
    assert world.counters == alone.counters
    assert world.counters.to_peer_packets >= 2


@pytest.mark.parametrize("last", [channel_data(CHANNEL, b"333"), channel_data(CHANNEL, b"\0\0", length=0)], ids=bytes.hex)
def test_a_padded_batch_with_a_longer_or_empty_end_is_split(world: World, last: bytes) -> None:
    payload = last[4 : 4 + last[3]]
    padded = [frame + bytes(4) for frame in frames(b"11", b"22")]
    assert flows_of(world.take([train(*padded, last)])) == {
        (world.allocations[0], PEER): [(b"11", 0), (b"22", 0), (payload, 0)]
    }


def test_a_gro_batch_equal_to_a_datagram_is_not_appended(world: World) -> None:
    whole = channel_data(CHANNEL, b"x" * 12)
    # Each segment states a length beyond its end.
    commands = world.take([*lone(whole), (whole, CLIENT, 8, 0)])
    assert flows_of(commands) == {(world.allocations[0], PEER): [(b"x" * 12, 0)]}
    assert world.counters.drops[DropReason.SHORT_CHANNEL_DATA] == 2


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_a_batch_of_empty_payloads_is_split(world: World, padding: int) -> None:
    (empty,) = frames(b"")
    assert world.take([train(*[empty + bytes(padding)] * 3)]) == [SendToPeer(world.allocations[0], b"", PEER)] * 3


def test_a_batch_of_two_channels_is_split(world: World) -> None:
    (one, three), (two,) = frames(b"11", b"33"), frames(b"22", number=OTHER_CHANNEL)
    assert flows_of(world.take([train(one, two, three)])) == {
        (world.allocations[0], PEER): [(b"11", 0), (b"33", 0)],
        (world.allocations[0], OTHER_PEER): [(b"22", 0)],
    }


def test_each_datagram_of_a_batch_without_channel_is_counted(world: World) -> None:
    assert world.take([train(*frames(b"11", b"22", b"3", number=FREE_CHANNEL))]) == []
    assert world.take_from_peers([train(b"11", b"22", b"3", source=THIRD_PEER)]) == []
    world.expire_early()
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 3
    assert world.counters.drops[DropReason.UNBOUND_PEER] == 3


def test_requests_in_a_batch_get_a_response(world: World) -> None:
    """A client that binds many channels sends requests of equal length, which the kernel may coalesce."""
    request = binding_request(padding=8)
    commands = world.take([train(request, request)])
    assert [answer_in([command]).code for command in commands] == [None, None]


@given(
    st.integers(0, 255).filter(lambda first: not 64 <= first < 128),
    st.integers(5, 30),
    st.integers(2, 4),
    st.binary(max_size=4),
)
def test_a_batch_without_channel_data_is_split(first: int, segment: int, count: int, rest: bytes) -> None:
    together, alone = World(), World()
    datagram = bytes((first, 1, 0, 1)).ljust(segment, b"x")
    batch: list[Datagram] = [(datagram * count + rest, CLIENT, segment, 0)]
    assert flows_of(together.take(batch)) == flows_of(alone.take_one_by_one(batch))
    assert together.counters == alone.counters


def test_datagrams_of_one_flow_and_length_leave_as_a_batch(world: World) -> None:
    assert world.take(lone(*frames(b"11", b"22", b"33"), traffic_class=EXPEDITED)) == [
        SendToPeer(world.allocations[0], b"112233", PEER, 2, EXPEDITED)
    ]
    assert world.take_from_peers(lone(b"11", b"22", b"33", source=PEER, traffic_class=EXPEDITED)) == [
        SendToClient(b"".join(frames(b"11", b"22", b"33")), world.clients[0].address, 6, EXPEDITED)
    ]


def test_a_shorter_datagram_ends_its_batch(world: World) -> None:
    assert world.take(lone(*frames(b"11", b"22", b"3", b"4", b"55"))) == [
        SendToPeer(world.allocations[0], b"11223", PEER, 2),
        SendToPeer(world.allocations[0], b"4", PEER, 0),
        SendToPeer(world.allocations[0], b"55", PEER, 0),
    ]
    assert world.take_from_peers(lone(b"11", b"22", b"3", b"4", b"55", source=PEER)) == [
        SendToClient(b"".join(frames(b"11", b"22", b"3")), world.clients[0].address, 6),
        SendToClient(frames(b"4")[0], world.clients[0].address),
        SendToClient(frames(b"55")[0], world.clients[0].address),
    ]


def test_a_padded_datagram_can_end_a_batch(world: World) -> None:
    (padded,) = frames(b"2")
    assert world.take(lone(*frames(b"111"), padded + b"\0")) == [SendToPeer(world.allocations[0], b"1112", PEER, 3)]


def test_a_longer_datagram_starts_a_new_batch(world: World) -> None:
    assert world.take(lone(*frames(b"1", b"22", b"33"))) == [
        SendToPeer(world.allocations[0], b"1", PEER),
        SendToPeer(world.allocations[0], b"2233", PEER, 2),
    ]
    assert world.take_from_peers(lone(b"1", b"22", b"33", source=PEER)) == [
        SendToClient(frames(b"1")[0], world.clients[0].address),
        SendToClient(b"".join(frames(b"22", b"33")), world.clients[0].address, 6),
    ]


def test_empty_payloads_go_alone_to_a_peer(world: World) -> None:
    commands = world.take(lone(*frames(b"11", b"22", b"", b"", b"33")))
    assert flows_of(commands) == {(world.allocations[0], PEER): [(each, 0) for each in (b"11", b"22", b"", b"", b"33")]}
    assert world.counters.to_peer_packets == 5


def test_empty_payloads_go_alone_to_a_client(world: World) -> None:
    assert world.take_from_peers(lone(b"", b"", source=PEER)) == [
        SendToClient(frame, world.clients[0].address) for frame in frames(b"", b"")
    ]


def test_a_batch_has_a_single_traffic_class(world: World) -> None:
    one, two, three, four = frames(b"11", b"22", b"33", b"44")
    marked = lone(two, three, traffic_class=EXPEDITED)
    assert world.take([*lone(one), *marked, *lone(four)]) == [
        SendToPeer(world.allocations[0], b"11", PEER),
        SendToPeer(world.allocations[0], b"2233", PEER, 2, EXPEDITED),
        SendToPeer(world.allocations[0], b"44", PEER),
    ]
    marked = lone(b"22", b"33", source=PEER, traffic_class=EXPEDITED)
    assert world.take_from_peers([*lone(b"11", source=PEER), *marked, *lone(b"44", source=PEER)]) == [
        SendToClient(frames(b"11")[0], world.clients[0].address),
        SendToClient(b"".join(frames(b"22", b"33")), world.clients[0].address, 6, EXPEDITED),
        SendToClient(frames(b"44")[0], world.clients[0].address),
    ]


def test_interleaved_flows_leave_as_a_batch_each(world: World) -> None:
    batch = [
        datagram
        for number in b"1234"
        for datagram in (
            *lone(*frames(bytes((number,)) * 2)),
            *lone(*frames(bytes((number,)) * 2, number=OTHER_CHANNEL)),
            *lone(*frames(bytes((number,)) * 3), source=OTHER_CLIENT),
        )
    ]
    assert world.take(batch) == [
        SendToPeer(world.allocations[0], b"11223344", PEER, 2),
        SendToPeer(world.allocations[0], b"11223344", OTHER_PEER, 2),
        SendToPeer(world.allocations[1], b"111222333444", PEER, 3),
    ]
    from_peers = [
        datagram for number in b"12" for peer in (PEER, OTHER_PEER) for datagram in lone(bytes((number,)), source=peer)
    ]
    assert world.take_from_peers(from_peers) == [
        SendToClient(b"".join(frames(b"1", b"2")), world.clients[0].address, 5),
        SendToClient(b"".join(frames(b"1", b"2", number=OTHER_CHANNEL)), world.clients[0].address, 5),
    ]


def test_later_datagrams_do_not_overtake_a_batch(world: World) -> None:
    batch = [*lone(*frames(b"11")), train(*frames(b"22", b"33")), *lone(*frames(b"44"))]
    assert flows_of(world.take(batch)) == {(world.allocations[0], PEER): [(b"%d%d" % (n, n), 0) for n in range(1, 5)]}
    from_peer = [*lone(b"11", source=PEER), train(b"22", b"33", source=PEER), *lone(b"44", source=PEER)]
    assert flows_of(world.take_from_peers(from_peer)) == {
        (CLIENT, b"\x40\0"): [(frame, 0) for frame in frames(b"11", b"22", b"33", b"44")]
    }


def test_equal_datagrams_of_different_clients_share_no_batch(world: World) -> None:
    (frame,) = frames(b"data")
    assert flows_of(world.take([*lone(frame), *lone(frame, source=OTHER_CLIENT), *lone(frame, source=CLIENT6)])) == {
        (world.allocations[0], PEER): [(b"data", 0)],
        (world.allocations[1], PEER): [(b"data", 0)],
        (world.allocations[2], OTHER_PEER): [(b"data", 0)],
    }


def test_data_before_a_bind_goes_to_the_new_channel_first(world: World) -> None:
    client = world.clients[0]
    bind = client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, FREE_CHANNEL), (XOR_PEER_ADDRESS, THIRD_PEER))
    before, after = frames(b"before", b"after!", number=FREE_CHANNEL)
    commands = world.take(lone(before, bind, after, after))
    assert flows_of(of_kind(SendToPeer, commands)) == {
        (world.allocations[0], THIRD_PEER): [(b"before", 0), (b"after!", 0), (b"after!", 0)]
    }
    world.expire_early()
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 0


def test_data_after_a_deletion_does_not_join_the_batch_before(world: World) -> None:
    end = world.clients[0].write(Method.REFRESH, (LIFETIME, 0))
    commands = world.take([*lone(*frames(b"11", b"22")), *lone(end), *lone(*frames(b"33")), train(*frames(b"44", b"55"))])
    assert commands[0] == SendToPeer(world.allocations[0], b"1122", PEER, 2)
    assert the(FreeAllocation, commands).allocation == world.allocations[0]
    assert of_kind(SendToPeer, commands[1:]) == []
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 3


def test_past_deadlines_are_handled_before_a_batch(world: World) -> None:
    world.relay.pass_time(CHANNEL_LIFETIME)
    assert world.take(lone(*frames(b"11", b"22"))) == []
    assert world.take_from_peers(lone(b"11", b"22", source=PEER)) == []
    assert world.take([train(*frames(b"11", b"22"))]) == []
    world.expire_early()
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 4
    assert world.counters.drops[DropReason.UNBOUND_PEER] == 2


def test_past_deadlines_are_handled_before_a_batch_of_a_peer(world: World) -> None:
    world.relay.pass_time(CHANNEL_LIFETIME)
    assert world.take_from_peers([train(b"11", b"22", source=PEER)]) == []
    assert world.counters.drops[DropReason.UNBOUND_PEER] == 2


def test_each_allocation_has_its_own_peers(world: World) -> None:
    # The first and the third allocation have a channel to OTHER_PEER.
    batch = lone(b"11", source=OTHER_PEER)
    clients = [world.relay.receive_batch_from_peers(allocation, batch) for allocation in world.allocations]
    assert clients == [
        [SendToClient(channel_data(OTHER_CHANNEL, b"11"), world.clients[0].address)],
        [],
        [SendToClient(channel_data(CHANNEL, b"11"), world.clients[2].address)],
    ]
    assert world.relay.receive_batch_from_peers(AllocationId(999), batch) == []


def test_interleaved_channels_leave_as_a_batch_each(world: World) -> None:
    (one, two), (three, four) = frames(b"11", b"22"), frames(b"33", b"44", number=OTHER_CHANNEL)
    assert world.take(lone(one, three, two, four)) == [
        SendToPeer(world.allocations[0], b"1122", PEER, 2),
        SendToPeer(world.allocations[0], b"3344", OTHER_PEER, 2),
    ]
