"""Counters of channels and packet sizes equal the sent packets, with batches and with channels that end in between."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import AllocationId
from relay.core.allocation import Allocation, ChannelBinding
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    XOR_PEER_ADDRESS,
)
from relay.core.commands import Command, SendToClient, SendToPeer, cut
from relay.core.counters import SIZE_STEPS, histogram
from relay.core.data import Datagram
from relay.core.stun import Message, Method, decode
from relay.net.grouping import grouped
from tests.support.core import CHANNEL, OTHER_CHANNEL, OTHER_CLIENT, OTHER_PEER, PEER, PEER6, Client, Relay, channel_data

STEP = 128
V6_CHANNEL = 0x4002
PEERS = {CHANNEL: PEER, OTHER_CHANNEL: OTHER_PEER, V6_CHANNEL: PEER6}

SIZES = st.sampled_from([0, 1, 100, 127, 128, 200, 255, 256, 1200, 1200, 1200, 1919, 1920, 9000])
NUMBERS = st.sampled_from([CHANNEL, CHANNEL, OTHER_CHANNEL, V6_CHANNEL, V6_CHANNEL])
CHANGES = st.sampled_from(["delete IPv6", "delete IPv6", "delete", "refresh", "bind again"])


class Tally(NamedTuple):
    """Packets and bytes to peers and to clients."""

    to_peer_packets: int
    to_peer_bytes: int
    to_client_packets: int
    to_client_bytes: int


def tally_of(counted: Allocation | ChannelBinding) -> Tally:
    return Tally(counted.to_peer_packets, counted.to_peer_bytes, counted.to_client_packets, counted.to_client_bytes)


def total(tallies: Iterable[Tally]) -> Tally:
    return Tally(*map(sum, zip(Tally(0, 0, 0, 0), *tallies, strict=True)))


Burst: TypeAlias = tuple[int, list[int], bool]
"""A channel, the sizes of payloads, and whether the payloads arrive as a GRO batch."""


class World:
    """Two clients with allocations of both families and three channels each. Records all sent packets."""

    def __init__(self) -> None:
        self.relay = Relay()
        self.clients = [Client(self.relay), Client(self.relay, OTHER_CLIENT, salt="other")]
        self.allocations: list[Allocation] = []
        for client in self.clients:
            id_ = client.allocate((LIFETIME, 3600), (ADDITIONAL_ADDRESS_FAMILY, 2)).id
            self.allocations.append(self.relay.server.allocations.by_id[id_])
            for number, peer in PEERS.items():
                client.bind_channel(number, peer)
        self.ids = {client.address: each.id for client, each in zip(self.clients, self.allocations, strict=True)}
        self.to_peer: list[tuple[AllocationId, int]] = []
        self.to_client: list[tuple[AllocationId, int]] = []

    def hear(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case SendToPeer(allocation, data, _, segment):
                    self.to_peer += [(allocation, len(each)) for each in cut(data, segment)]
                case SendToClient(data, client, segment) if not isinstance(decode(data), Message):
                    self.to_client += [(self.ids[client], len(each) - 4) for each in cut(data, segment)]

    def from_client(self, batch: list[Datagram]) -> None:
        self.hear(self.relay.receive_batch(grouped(batch)))

    def from_peers(self, allocation: AllocationId, batch: list[Datagram]) -> None:
        self.hear(self.relay.receive_batch_from_peers(allocation, grouped(batch)))

    def change(self, client: Client, what: str) -> Datagram:
        """Return a request that changes the relayed channels."""
        match what:
            case "delete IPv6":
                data = client.write(Method.REFRESH, (LIFETIME, 0), (REQUESTED_ADDRESS_FAMILY, 2))
            case "delete":
                data = client.write(Method.REFRESH, (LIFETIME, 0))
            case "refresh":
                data = client.write(Method.REFRESH, (LIFETIME, 3600))
            case _:
                data = client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, PEER))
        return data, client.address, 0, 0

    def check(self) -> None:
        counters = self.relay.counters
        assert counters.to_peer_packets == len(self.to_peer)
        assert counters.to_client_packets == len(self.to_client)
        for sizes, sent in ((counters.to_peer_sizes, self.to_peer), (counters.to_client_sizes, self.to_client)):
            steps = Counter(min(size // STEP, SIZE_STEPS - 1) for _, size in sent)
            assert histogram(sizes) == [steps[step] for step in range(SIZE_STEPS)]
        tallies: list[Tally] = []
        for allocation in self.allocations:
            mine = [[size for id_, size in sent if id_ == allocation.id] for sent in (self.to_peer, self.to_client)]
            both = total([tally_of(allocation), *(tally_of(each) for each in allocation.channels.values())])
            assert both == (len(mine[0]), sum(mine[0]), len(mine[1]), sum(mine[1]))
            tallies.append(both)
        assert (counters.to_peer_bytes, counters.to_client_bytes) == total(tallies)[1::2]


def datagrams_of(burst: Burst, client: Client | None) -> list[Datagram]:
    """Return a burst of a client, or without a client of a peer. A GRO batch gets valid sizes."""
    number, sizes, is_train = burst
    source = PEERS[number] if client is None else client.address
    if is_train:
        sizes = [*[size for size in sizes if size == sizes[0]], *[size for size in sizes if 0 < size < sizes[0]][:1]]
    datagrams = [bytes(size) if client is None else channel_data(number, bytes(size)) for size in sizes]
    if is_train and len(datagrams) > 1 and sizes[0]:
        return [(b"".join(datagrams), source, len(datagrams[0]), 0)]
    return [(datagram, source, 0, 0) for datagram in datagrams]


BURSTS = st.tuples(NUMBERS, st.lists(SIZES, min_size=1, max_size=3).map(sorted).map(lambda each: each[::-1]), st.booleans())


@given(st.data())
def test_current_and_former_channels_sum_to_all_sent_packets(data: st.DataObject) -> None:
    world = World()
    for _ in range(data.draw(st.integers(1, 4))):
        who = data.draw(st.integers(0, 1))
        client = world.clients[who]
        from_client: list[Datagram] = []
        for burst in data.draw(st.lists(BURSTS, max_size=4)):
            # A repeated burst may be interrupted by a change.
            from_client += datagrams_of(burst, client) * data.draw(st.integers(1, 2))
            if data.draw(st.integers(0, 3)) == 0:
                from_client.append(world.change(client, data.draw(CHANGES)))
        world.from_client(from_client)
        from_peers = [each for burst in data.draw(st.lists(BURSTS, max_size=4)) for each in datagrams_of(burst, None)]
        world.from_peers(world.allocations[who].id, from_peers)
        world.relay.pass_time(data.draw(st.sampled_from([0, 0, 0, 600, 900])))
        world.check()


def test_data_before_a_family_is_deleted_in_a_batch_is_counted() -> None:
    world = World()
    client = world.clients[0]
    burst = datagrams_of((V6_CHANNEL, [1200, 1200, 5], False), client)
    world.from_client([*burst, world.change(client, "delete IPv6"), *burst])
    assert tally_of(world.allocations[0]) == (3, 2405, 0, 0)
    world.check()


@pytest.mark.parametrize(("size", "step"), [(0, 0), (127, 0), (128, 1), (1919, 14), (1920, 15), (65_500, 15)])
def test_payload_sizes_are_counted_in_steps_of_128_bytes(size: int, step: int) -> None:
    world = World()
    world.from_client(datagrams_of((CHANNEL, [size], False), world.clients[0]))
    world.from_peers(world.allocations[0].id, datagrams_of((CHANNEL, [size], False), None))
    for sizes in (world.relay.counters.to_peer_sizes, world.relay.counters.to_client_sizes):
        assert [at for at, count in enumerate(histogram(sizes)) if count] == [step]
