"""What arrives together leaves together, and nothing else comes of it: the same datagrams, in their order, and counts."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias, cast

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from relay.core.addresses import AllocationId, PeerAddress, SocketAddress
from relay.core.attributes import CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS
from relay.core.commands import Command, FreeAllocation, SendToClient, SendToPeer
from relay.core.counters import Counters, DropReason
from relay.core.stun import MessageClass, Method, encode
from relay.core.trains import Arrival, cut, is_uniform
from tests.core.driver import (
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

FREE_CHANNEL = 0x4002
THIRD_PEER = PeerAddress(("198.51.100.11", 5000))
PEERS = (PEER, OTHER_PEER, THIRD_PEER)
STRANGER: SocketAddress = ("203.0.113.7", 40000)
EXPEDITED = 0xB8 | 1
"""DSCP EF, ECN ECT(1)."""

CHANNEL_LIFETIME = 600

Flows: TypeAlias = dict[Hashable, list[Hashable]]


class World:
    """A relay with three clients that have channels; every one is like every other to the byte."""

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

    def take(self, arrivals: Iterable[Arrival]) -> list[Command]:
        self.server.handle_client_arrivals(arrivals, self.relay.now)
        return self.server.drain()

    def take_from_peers(self, arrivals: Iterable[Arrival]) -> list[Command]:
        self.server.handle_peer_arrivals(self.allocations[0], arrivals, self.relay.now)
        return self.server.drain()

    def take_one_by_one(self, arrivals: Iterable[Arrival]) -> list[Command]:
        for arrival in one_by_one(arrivals):
            self.server.handle_client_arrival(arrival, self.relay.now)
        return self.server.drain()

    def take_from_peers_one_by_one(self, arrivals: Iterable[Arrival]) -> list[Command]:
        for arrival in one_by_one(arrivals):
            self.server.handle_peer_arrival(self.allocations[0], arrival, self.relay.now)
        return self.server.drain()


@pytest.fixture
def world() -> World:
    return World()


def one_by_one(arrivals: Iterable[Arrival]) -> Iterable[Arrival]:
    for data, source, segment, traffic_class in arrivals:
        for datagram in cut(data, segment):
            yield datagram, source, 0, traffic_class


def flows_of(commands: Iterable[Command]) -> Flows:
    """Sort what is to be done by what must keep its order: each channel's data one way, and the end of it after that."""
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


def lone(*datagrams: bytes, source: SocketAddress = CLIENT, traffic_class: int = 0) -> list[Arrival]:
    """What arrived one by one."""
    return [(datagram, source, 0, traffic_class) for datagram in datagrams]


def train(*datagrams: bytes, source: SocketAddress = CLIENT, traffic_class: int = 0) -> Arrival:
    """What arrived as one: all as long as the first, but for the last, which may be shorter."""
    assert {len(each) for each in datagrams[:-1]} == {len(datagrams[0])}
    assert 0 < len(datagrams[-1]) <= len(datagrams[0])
    return b"".join(datagrams), source, len(datagrams[0]), traffic_class


def binding_request(*, padding: int = 0) -> bytes:
    attributes = [(opaque(0x8FFF), bytes(padding))] if padding else []
    return encode(MessageClass.REQUEST, Method.BINDING, bytes(12), attributes)


# Few lengths, sources and channels, or nothing in a batch would go the same way.
LENGTHS = st.sampled_from([0, 1, 4, 4, 4, 9, 100])
CHANNELS = st.sampled_from([CHANNEL, CHANNEL, CHANNEL, OTHER_CHANNEL, FREE_CHANNEL])
CLIENTS: st.SearchStrategy[SocketAddress] = st.sampled_from([CLIENT, CLIENT, CLIENT, OTHER_CLIENT, CLIENT6, STRANGER])
PEER_SOURCES: st.SearchStrategy[SocketAddress] = st.sampled_from([PEER, PEER, PEER, OTHER_PEER, THIRD_PEER])
TRAFFIC_CLASSES = st.sampled_from([0, 0, 0, EXPEDITED])
NOT_DATA = st.sampled_from([b"", b"\x10garbage", b"\xff", b"\x40", b"\x40\0\0", b"\0\1\0\0", binding_request()])

OTHER_HEADERS = [binding_request(padding=4), b"\0\0\0\4", b"\x10\0\0\4", b"\xff\0\0\1"]

# What a client may change between two datagrams of its own: each is written once, since all worlds take the same bytes.
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
    # Few, or shrinking takes long; but no two alike by chance, so that a swap shows.
    return st.binary(min_size=length, max_size=length)


@st.composite
def client_datagrams(draw: st.DrawFn) -> bytes:
    payload = draw(LENGTHS.flatmap(payloads_of))
    padding = bytes(draw(st.sampled_from([0, 0, 0, 0, 1, 3])))
    beyond = draw(st.sampled_from([0, 0, 0, 0, 0, 0, 4]))
    return channel_data(draw(CHANNELS), payload + padding, length=len(payload) + beyond)


@st.composite
def client_trains(draw: st.DrawFn) -> bytes:
    """A train of frames with one header, most often; with its segment length."""
    header = draw(st.one_of(client_datagrams(), client_datagrams(), st.sampled_from(OTHER_HEADERS)))[:4]
    segment = draw(st.sampled_from([1, 4, 5, 8, 8, 8, 9, 13, 24]))
    count = draw(st.integers(1, 4))
    datagrams = [(header + draw(payloads_of(max(0, segment - 4))))[:segment] for _ in range(count)]
    if draw(st.integers(0, 3)) == 0:
        other = draw(st.one_of(client_datagrams(), NOT_DATA))
        datagrams[draw(st.integers(0, count - 1))] = other[:segment].ljust(segment, b"\0")
    # Never empty: the kernel would not say so.
    if segment > 1 and draw(st.booleans()):
        last = draw(st.one_of(client_datagrams(), NOT_DATA, payloads_of(segment).map(lambda data: header + data)))
        shorter = draw(st.integers(1, segment - 1))
        datagrams.append(last[:shorter].ljust(min(shorter, max(1, len(last))), b"\0"))
    return segment.to_bytes(2, "big") + b"".join(datagrams)


@st.composite
def client_arrivals(draw: st.DrawFn, *, changes: bool) -> Arrival:
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
def peer_arrivals(draw: st.DrawFn) -> Arrival:
    data = draw(LENGTHS.flatmap(payloads_of))
    segment = draw(st.sampled_from([0, 0, 1, 3, 4]))
    return data, draw(PEER_SOURCES), segment if segment < len(data) else 0, draw(TRAFFIC_CLASSES)


@st.composite
def batches(draw: st.DrawFn, arrivals: st.SearchStrategy[Arrival]) -> list[Arrival]:
    """Bursts: one or two arrivals of each, by turns, several times."""
    batch: list[Arrival] = []
    for _ in range(draw(st.integers(1, 5))):
        burst = [draw(arrivals) for _ in range(draw(st.integers(1, 2)))]
        for number in range(draw(st.integers(1, 4))):
            # Each with a last byte of its own: so a swap of two shows.
            batch += [
                arrival
                if number == 0 or arrival[2] or len(arrival[0]) <= 4
                else (_renumbered(arrival[0], number), *arrival[1:])
                for arrival in burst
            ]
    return batch


def _renumbered(data: bytes, number: int) -> bytes:
    return data if data[0] < 64 else data[:-1] + bytes((number,))


@settings(max_examples=200)
@given(batches(client_arrivals(changes=True)))
def test_a_batch_from_clients_leaves_what_its_datagrams_would_have_left_one_by_one(batch: list[Arrival]) -> None:
    together, alone = World(), World()
    assert flows_of(together.take(batch)) == flows_of(alone.take_one_by_one(batch))
    assert together.counters == alone.counters
    assert together.server.poll_timeout() == alone.server.poll_timeout()
    assert together.server._relaying.runs == {}


@given(batches(peer_arrivals()))
def test_a_batch_from_peers_leaves_what_its_datagrams_would_have_left_one_by_one(batch: list[Arrival]) -> None:
    together, alone = World(), World()
    assert flows_of(together.take_from_peers(batch)) == flows_of(alone.take_from_peers_one_by_one(batch))
    assert together.counters == alone.counters
    assert together.server._relaying.runs == {}


@st.composite
def uniform(draw: st.DrawFn, arrivals: st.SearchStrategy[Arrival]) -> list[Arrival]:
    """A batch that the short way takes, often; with one arrival in it that is not like the others, sometimes."""
    batch = [draw(arrivals)] * draw(st.integers(1, 4))
    if draw(st.integers(0, 2)) == 0:
        batch[draw(st.integers(0, len(batch) - 1))] = draw(arrivals)
    return batch


@given(uniform(client_arrivals(changes=False)))
def test_the_short_way_to_a_peer_does_what_the_long_one_does_or_nothing(batch: list[Arrival]) -> None:
    short, alone = World(), World()
    before = repr(short.counters)
    forwarded = short.server.forward_to_peer(batch, short.relay.now.monotonic)
    assert short.server.drain() == []
    if forwarded is None:
        assert repr(short.counters) == before
    else:
        assert flows_of([SendToPeer(*forwarded)]) == flows_of(alone.take_one_by_one(batch))
        assert short.counters == alone.counters


@given(uniform(peer_arrivals()))
def test_the_short_way_to_a_client_does_what_the_long_one_does_or_nothing(batch: list[Arrival]) -> None:
    short, alone = World(), World()
    before = repr(short.counters)
    forwarded = short.server.forward_to_client(batch, short.relay.now.monotonic, short.allocations[0])
    assert short.server.drain() == []
    if forwarded is None:
        assert repr(short.counters) == before
    else:
        assert flows_of([SendToClient(*forwarded)]) == flows_of(alone.take_from_peers_one_by_one(batch))
        assert short.counters == alone.counters


@given(st.binary(max_size=50), st.integers(1, 60))
def test_a_train_is_cut_into_datagrams_of_its_segment_length_and_a_rest(data: bytes, segment: int) -> None:
    datagrams = list(cut(data, segment))
    assert b"".join(datagrams) == data
    assert all(len(each) == segment for each in datagrams[:-1])
    assert all(0 < len(each) <= segment for each in datagrams)


@given(st.binary(max_size=50))
def test_a_single_datagram_is_not_cut_not_even_an_empty_one(data: bytes) -> None:
    assert list(cut(data, 0)) == [data]


@given(st.lists(st.sampled_from([b"ab", b"ac", b"bb"]), min_size=1, max_size=5), st.binary(max_size=2))
def test_a_train_is_uniform_if_each_whole_datagram_begins_alike(headers: list[bytes], rest: bytes) -> None:
    data = b"".join(header + bytes(1) for header in headers) + rest
    assert is_uniform(data, 3, b"ab") is (set(headers) == {b"ab"})


def test_a_train_of_one_channel_leaves_as_one_train_without_headers(world: World) -> None:
    assert world.take([train(*frames(b"1111", b"2222", b"33"), traffic_class=EXPEDITED)]) == [
        SendToPeer(world.allocations[0], b"1111222233", PEER, 4, EXPEDITED)
    ]
    assert (world.counters.to_peer_packets, world.counters.to_peer_bytes) == (3, 10)


def test_a_train_alone_is_taken_as_one_too(world: World) -> None:
    world.server.handle_client_arrival(train(*frames(b"1111", b"22")), world.relay.now)
    world.server.handle_peer_arrival(world.allocations[0], train(b"1111", b"22", source=PEER), world.relay.now)
    assert world.server.drain() == [
        SendToPeer(world.allocations[0], b"111122", PEER, 4),
        SendToClient(b"".join(frames(b"1111", b"22")), world.clients[0].address, 8),
    ]


def test_a_train_of_a_peer_leaves_as_one_train_with_a_header_each(world: World) -> None:
    assert world.take_from_peers([train(b"1111", b"2222", b"33", source=PEER, traffic_class=EXPEDITED)]) == [
        SendToClient(b"".join(frames(b"1111", b"2222", b"33")), world.clients[0].address, 8, EXPEDITED)
    ]
    assert (world.counters.to_client_packets, world.counters.to_client_bytes) == (3, 10)


def test_padding_in_a_train_is_left_behind(world: World) -> None:
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
def test_a_train_with_a_last_datagram_of_another_kind_is_taken_apart(world: World, last: bytes) -> None:
    alone = World()
    arrived = [train(*frames(b"1111", b"2222"), last)]
    assert flows_of(world.take(arrived)) == flows_of(alone.take_one_by_one(arrived))
    assert world.counters == alone.counters
    assert world.counters.to_peer_packets >= 2


@pytest.mark.parametrize("last", [channel_data(CHANNEL, b"333"), channel_data(CHANNEL, b"\0\0", length=0)], ids=bytes.hex)
def test_a_padded_train_with_a_longer_or_empty_last_payload_is_taken_apart(world: World, last: bytes) -> None:
    payload = last[4 : 4 + last[3]]
    padded = [frame + bytes(4) for frame in frames(b"11", b"22")]
    assert flows_of(world.take([train(*padded, last)])) == {
        (world.allocations[0], PEER): [(b"11", 0), (b"22", 0), (payload, 0)]
    }


def test_a_train_that_looks_like_the_next_datagram_of_another_is_none(world: World) -> None:
    whole = channel_data(CHANNEL, b"x" * 12)
    # Cut, the first half states more than it has, and so does the second.
    commands = world.take([*lone(whole), (whole, CLIENT, 8, 0)])
    assert flows_of(commands) == {(world.allocations[0], PEER): [(b"x" * 12, 0)]}
    assert world.counters.drops[DropReason.SHORT_CHANNEL_DATA] == 2


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_a_train_of_empty_payloads_is_taken_apart(world: World, padding: int) -> None:
    (empty,) = frames(b"")
    assert world.take([train(*[empty + bytes(padding)] * 3)]) == [SendToPeer(world.allocations[0], b"", PEER)] * 3


def test_a_train_of_two_channels_is_taken_apart(world: World) -> None:
    (one, three), (two,) = frames(b"11", b"33"), frames(b"22", number=OTHER_CHANNEL)
    assert flows_of(world.take([train(one, two, three)])) == {
        (world.allocations[0], PEER): [(b"11", 0), (b"33", 0)],
        (world.allocations[0], OTHER_PEER): [(b"22", 0)],
    }


def test_each_datagram_of_a_train_on_an_unbound_channel_is_counted(world: World) -> None:
    assert world.take([train(*frames(b"11", b"22", b"3", number=FREE_CHANNEL))]) == []
    assert world.take_from_peers([train(b"11", b"22", b"3", source=THIRD_PEER)]) == []
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 3
    assert world.counters.drops[DropReason.UNBOUND_PEER] == 3


def test_a_train_of_requests_is_answered_one_by_one(world: World) -> None:
    """A client that binds many channels at once sends requests of one length; the kernel may hand them over as one."""
    request = binding_request(padding=8)
    commands = world.take([train(request, request)])
    assert [answer_in([command]).code for command in commands] == [None, None]


@given(
    st.integers(0, 255).filter(lambda first: not 64 <= first < 128),
    st.integers(5, 30),
    st.integers(2, 4),
    st.binary(max_size=4),
)
def test_a_train_that_is_no_channel_data_is_taken_apart(first: int, segment: int, count: int, rest: bytes) -> None:
    together, alone = World(), World()
    datagram = bytes((first, 1, 0, 1)).ljust(segment, b"x")
    batch: list[Arrival] = [(datagram * count + rest, CLIENT, segment, 0)]
    assert flows_of(together.take(batch)) == flows_of(alone.take_one_by_one(batch))
    assert together.counters == alone.counters


def test_datagrams_of_one_flow_and_length_leave_as_one_train(world: World) -> None:
    assert world.take(lone(*frames(b"11", b"22", b"33"), traffic_class=EXPEDITED)) == [
        SendToPeer(world.allocations[0], b"112233", PEER, 2, EXPEDITED)
    ]
    assert world.take_from_peers(lone(b"11", b"22", b"33", source=PEER, traffic_class=EXPEDITED)) == [
        SendToClient(b"".join(frames(b"11", b"22", b"33")), world.clients[0].address, 6, EXPEDITED)
    ]


def test_a_shorter_datagram_is_the_last_of_its_train(world: World) -> None:
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


def test_a_padded_datagram_can_be_the_last_of_a_train(world: World) -> None:
    (padded,) = frames(b"22")
    assert world.take(lone(*frames(b"11"), padded + b"\0\0")) == [SendToPeer(world.allocations[0], b"1122", PEER, 2)]


def test_a_longer_datagram_begins_a_train_of_its_own(world: World) -> None:
    assert world.take(lone(*frames(b"1", b"22", b"33"))) == [
        SendToPeer(world.allocations[0], b"1", PEER),
        SendToPeer(world.allocations[0], b"2233", PEER, 2),
    ]
    assert world.take_from_peers(lone(b"1", b"22", b"33", source=PEER)) == [
        SendToClient(frames(b"1")[0], world.clients[0].address),
        SendToClient(b"".join(frames(b"22", b"33")), world.clients[0].address, 6),
    ]


def test_an_empty_payload_goes_alone_to_a_peer_and_ends_the_train_before_it(world: World) -> None:
    allocation = world.allocations[0]
    assert world.take(lone(*frames(b"11", b"22", b"", b"", b"33"))) == [
        SendToPeer(allocation, b"1122", PEER, 2),
        SendToPeer(allocation, b"", PEER),
        SendToPeer(allocation, b"", PEER),
        SendToPeer(allocation, b"33", PEER),
    ]
    assert world.counters.to_peer_packets == 5


def test_empty_payloads_on_the_short_way_are_not_lost(world: World) -> None:
    batch = lone(*frames(b"", b""))
    forwarded = world.server.forward_to_peer(batch, world.relay.now.monotonic)
    assert forwarded is None or flows_of([SendToPeer(*forwarded)]) == flows_of(World().take_one_by_one(batch))


def test_empty_payloads_to_a_client_are_frames_that_make_a_train(world: World) -> None:
    assert world.take_from_peers(lone(b"", b"", b"", source=PEER)) == [
        SendToClient(b"".join(frames(b"", b"", b"")), world.clients[0].address, 4)
    ]


def test_datagrams_of_different_traffic_class_share_no_train(world: World) -> None:
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


def test_flows_that_arrive_by_turns_leave_as_a_train_each(world: World) -> None:
    batch = [
        arrival
        for number in b"1234"
        for arrival in (
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
        arrival for number in b"12" for peer in (PEER, OTHER_PEER) for arrival in lone(bytes((number,)), source=peer)
    ]
    assert world.take_from_peers(from_peers) == [
        SendToClient(b"".join(frames(b"1", b"2")), world.clients[0].address, 5),
        SendToClient(b"".join(frames(b"1", b"2", number=OTHER_CHANNEL)), world.clients[0].address, 5),
    ]


def test_a_train_is_not_overtaken_by_what_follows_it(world: World) -> None:
    batch = [*lone(*frames(b"11")), train(*frames(b"22", b"33")), *lone(*frames(b"44"))]
    assert flows_of(world.take(batch)) == {(world.allocations[0], PEER): [(b"%d%d" % (n, n), 0) for n in range(1, 5)]}
    from_peer = [*lone(b"11", source=PEER), train(b"22", b"33", source=PEER), *lone(b"44", source=PEER)]
    assert flows_of(world.take_from_peers(from_peer)) == {
        (CLIENT, b"\x40\0"): [(frame, 0) for frame in frames(b"11", b"22", b"33", b"44")]
    }


def test_datagrams_that_do_not_go_the_same_way_are_no_train_though_they_look_alike(world: World) -> None:
    (frame,) = frames(b"data")
    assert flows_of(world.take([*lone(frame), *lone(frame, source=OTHER_CLIENT), *lone(frame, source=CLIENT6)])) == {
        (world.allocations[0], PEER): [(b"data", 0)],
        (world.allocations[1], PEER): [(b"data", 0)],
        (world.allocations[2], OTHER_PEER): [(b"data", 0)],
    }


def test_data_behind_a_bind_goes_to_the_new_channel_and_data_before_it_nowhere(world: World) -> None:
    client = world.clients[0]
    bind = client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, FREE_CHANNEL), (XOR_PEER_ADDRESS, THIRD_PEER))
    before, after = frames(b"before", b"after!", number=FREE_CHANNEL)
    commands = world.take(lone(before, bind, after, after))
    assert of_kind(SendToPeer, commands) == [SendToPeer(world.allocations[0], b"after!after!", THIRD_PEER, 6)]
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 1


def test_nothing_behind_the_end_of_an_allocation_joins_the_train_before_it(world: World) -> None:
    end = world.clients[0].write(Method.REFRESH, (LIFETIME, 0))
    commands = world.take([*lone(*frames(b"11", b"22")), *lone(end), *lone(*frames(b"33")), train(*frames(b"44", b"55"))])
    assert commands[0] == SendToPeer(world.allocations[0], b"1122", PEER, 2)
    assert the(FreeAllocation, commands).allocation == world.allocations[0]
    assert of_kind(SendToPeer, commands[1:]) == []
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 3


def test_what_is_due_comes_before_a_batch(world: World) -> None:
    world.relay.pass_time(CHANNEL_LIFETIME)
    assert world.take(lone(*frames(b"11", b"22"))) == []
    assert world.take_from_peers(lone(b"11", b"22", source=PEER)) == []
    assert world.take([train(*frames(b"11", b"22"))]) == []
    assert world.counters.drops[DropReason.UNBOUND_CHANNEL] == 4
    assert world.counters.drops[DropReason.UNBOUND_PEER] == 2


def test_what_is_due_comes_before_a_batch_of_a_peer(world: World) -> None:
    world.relay.pass_time(CHANNEL_LIFETIME)
    assert world.take_from_peers([train(b"11", b"22", source=PEER)]) == []
    assert world.counters.drops[DropReason.UNBOUND_PEER] == 2


@pytest.mark.parametrize("count", [1, 2])
def test_the_short_way_is_closed_while_something_is_due(world: World, count: int) -> None:
    from_client, from_peer = lone(*frames(b"11") * count), lone(*[b"11"] * count, source=PEER)

    def forwards() -> list[bool]:
        now = world.relay.now.monotonic
        return [
            world.server.forward_to_peer(from_client, now) is not None,
            world.server.forward_to_client(from_peer, now, world.allocations[0]) is not None,
        ]

    world.relay.pass_time(CHANNEL_LIFETIME - 0.001)
    assert forwards() == [True, True]
    counters = repr(world.counters)
    world.relay.pass_time(0.001)
    assert forwards() == [False, False]
    assert repr(world.counters) == counters
    # Once that is done, there is nothing that they could be relayed to.
    world.relay.wake()
    assert forwards() == [False, False]


def test_the_short_way_to_a_peer_takes_a_whole_batch_at_once(world: World) -> None:
    now = world.relay.now.monotonic
    batch = lone(*frames(b"11", b"22"), traffic_class=EXPEDITED)
    assert world.server.forward_to_peer(batch, now) == (world.allocations[0], b"1122", PEER, 2, EXPEDITED)
    assert (world.counters.to_peer_packets, world.counters.to_peer_bytes) == (2, 4)


def test_the_short_way_to_a_client_takes_a_whole_batch_at_once(world: World) -> None:
    now = world.relay.now.monotonic
    batch = lone(b"11", b"22", source=PEER, traffic_class=EXPEDITED)
    sent = (b"".join(frames(b"11", b"22")), CLIENT, 6, EXPEDITED)
    assert world.server.forward_to_client(batch, now, world.allocations[0]) == sent
    assert (world.counters.to_client_packets, world.counters.to_client_bytes) == (2, 4)


def test_the_short_way_takes_no_train(world: World) -> None:
    now = world.relay.now.monotonic
    assert world.server.forward_to_peer([train(*frames(b"11", b"22"))], now) is None
    assert world.server.forward_to_client([train(b"11", b"22", source=PEER)], now, world.allocations[0]) is None


@pytest.mark.parametrize(
    "odd",
    [
        lone(*frames(b"111")),
        lone(*frames(b"1")),
        lone(*frames(b"11", number=OTHER_CHANNEL)),
        lone(channel_data(CHANNEL, b"11\0", length=2)),
        lone(channel_data(CHANNEL, b"11", length=1)),
        lone(*frames(b"11"), source=OTHER_CLIENT),
        lone(*frames(b"11"), traffic_class=EXPEDITED),
        [train(*frames(b"11", b"11"))],
        lone(binding_request()),
        lone(b""),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_short_way_takes_no_batch_with_one_of_another_kind(world: World, odd: Sequence[Arrival], at: int) -> None:
    batch = lone(*frames(b"11", b"11"))
    batch[at:at] = odd
    assert world.server.forward_to_peer(batch, world.relay.now.monotonic) is None
    assert world.counters.to_peer_packets == 0


@pytest.mark.parametrize(
    "odd",
    [
        lone(b"111", source=PEER),
        lone(b"1", source=PEER),
        lone(b"", source=PEER),
        lone(b"11", source=OTHER_PEER),
        lone(b"11", source=THIRD_PEER),
        lone(b"11", source=PEER, traffic_class=EXPEDITED),
        [train(b"1", b"1", source=PEER)],
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_short_way_to_a_client_takes_no_batch_with_one_of_another_kind(
    world: World, odd: Sequence[Arrival], at: int
) -> None:
    batch = lone(b"11", b"11", source=PEER)
    batch[at:at] = odd
    assert world.server.forward_to_client(batch, world.relay.now.monotonic, world.allocations[0]) is None
    assert world.counters.to_client_packets == 0


def test_the_short_way_knows_the_peers_of_one_allocation_from_those_of_another(world: World) -> None:
    # OTHER_PEER is bound by the first and the third.
    now, batch = world.relay.now.monotonic, lone(b"11", source=OTHER_PEER)
    clients = [world.server.forward_to_client(batch, now, allocation) for allocation in world.allocations]
    assert clients == [
        (channel_data(OTHER_CHANNEL, b"11"), CLIENT, 6, 0),
        None,
        (channel_data(CHANNEL, b"11"), CLIENT6, 6, 0),
    ]
    assert world.server.forward_to_client(batch, now, AllocationId(999)) is None


def test_two_batches_share_no_train(world: World) -> None:
    (frame,) = frames(b"11")
    world.server.handle_client_arrivals(lone(frame), world.relay.now)
    world.server.handle_client_arrivals(lone(frame), world.relay.now)
    world.server.handle_peer_arrivals(world.allocations[0], lone(b"11", source=PEER), world.relay.now)
    world.server.handle_peer_arrivals(world.allocations[0], lone(b"11", source=PEER), world.relay.now)
    to_peer = SendToPeer(world.allocations[0], b"11", PEER)
    to_client = SendToClient(frame, world.clients[0].address)
    assert world.server.drain() == [to_peer, to_peer, to_client, to_client]


def test_nothing_of_a_batch_is_kept(world: World) -> None:
    bind = world.clients[0].write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, FREE_CHANNEL), (XOR_PEER_ADDRESS, THIRD_PEER))
    relaying = world.server._relaying
    for batch in (lone(*frames(b"11", b"22", b"3")), lone(*frames(b"11"), bind, *frames(b"22"), binding_request())):
        world.take(batch)
        assert (relaying.runs, relaying._latest, relaying._begun) == ({}, {}, [])
    world.take_from_peers(lone(b"11", b"22", source=PEER))
    assert (relaying.runs, relaying._latest, relaying._begun) == ({}, {}, [])


def test_what_follows_a_datagram_that_is_failed_on_is_taken_when_it_is_handed_in_again(world: World) -> None:
    poison = cast(Arrival, (None, CLIENT, 0, 0))
    rest = iter([*lone(*frames(b"11", b"22")), poison, *lone(*frames(b"33"))])
    with pytest.raises(TypeError):
        world.server.handle_client_arrivals(rest, world.relay.now)
    assert flows_of(world.take(rest)) == {(world.allocations[0], PEER): [(b"11", 0), (b"22", 0), (b"33", 0)]}
    assert world.counters.to_peer_packets == 3
