"""Channels in the tables of the XDP program: after any commands, in any batches, they are what was commanded."""

import errno
import functools
import itertools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from relay.core.addresses import ChannelNumber, ClientAddress, Family, PeerAddress, RelayedPort, SocketAddress
from relay.core.commands import ExtendAllocation, InstallChannel, OffloadCommand, RemoveChannel, StopAllocation
from relay.offload.channels import Channels, ChannelTables, Entries, Follow, Unfollow
from relay.offload.layout import BINDING, packed_address
from relay.offload.program import XdpProgram
from relay.offload.ticks import Ticks
from tests.offload.conftest import needs_bpf
from tests.offload.model import Binding, key_of

SERVICE = 3478
PORTS = range(50000, 50003)
PUBLIC = ("203.0.113.1", "2001:db8::1")
CLIENTS = [
    ClientAddress(("198.51.100.7", 40001)),
    ClientAddress(("198.51.100.7", 40002)),
    ClientAddress(("198.51.100.8", 40001)),
    ClientAddress(("2001:db8:1::7", 40001, 0, 0)),
    ClientAddress(("fe80::7", 40001, 0, 2)),
]
PEERS = [
    PeerAddress(("192.0.2.9", 9000)),
    PeerAddress(("192.0.2.9", 9001)),
    PeerAddress(("198.51.100.7", 40001)),
    PeerAddress(("203.0.113.1", 50001)),
    PeerAddress(("2001:db8:2::9", 9000, 0, 0)),
    PeerAddress(("2001:db8::1", 50000, 0, 0)),
    PeerAddress(("::ffff:192.0.2.9", 9000, 0, 0)),
]
NUMBERS = [ChannelNumber(0x4000), ChannelNumber(0x7FFE)]
ODD_HOSTS = ("fe80::7", "::ffff:192.0.2.9")
BOTH = (Family.IPV4, Family.IPV6)

Entry = dict[bytes, bytes]


class Observed(Protocol):
    """Tables that can be looked into."""

    bindings: int
    next_hops: int

    @property
    def tables(self) -> ChannelTables: ...

    def contents(self) -> tuple[Entry, Entry, dict[int, int]]:
        """Give `channels`, `peers`, and what isn't 0 of `ends`."""

    def usage(self, entry: int) -> int:
        """Give the packets that were counted."""

    def count(self, entry: int) -> None:
        """Count packets."""


TICKS = Ticks(-1000.0, 250.0)


class Memory:
    """Tables as the kernel has them, in which a batch can be made to fail after some of its elements."""

    def __init__(self, bindings: int = 64, next_hops: int = 128) -> None:
        self.bindings = bindings
        self.next_hops = next_hops
        self.ticks = TICKS
        self.channels: Entry = {}
        self.peers: Entry = {}
        self.ends: dict[int, int] = {}
        self.counted: dict[int, int] = {}
        self.calls: list[str] = []
        self.elements_left: int | None = None
        """None: as many as anyone likes."""

    @property
    def tables(self) -> ChannelTables:
        return self

    def install(self, channels: Entries, peers: Entries) -> None:
        self.calls.append(f"install {len(channels[0])}")
        for table, (keys, values) in ((self.channels, channels), (self.peers, peers)):
            for key, value in zip(keys, values, strict=True):
                self._spend()
                table[key] = value

    def remove(self, channels: list[bytes], peers: list[bytes]) -> None:
        self.calls.append(f"remove {len(channels)}")
        for table, keys in ((self.channels, channels), (self.peers, peers)):
            for key in keys:
                table.pop(key, None)

    def clear(self, slots: list[int]) -> None:
        for slot in slots:
            self._spend()
            self.counted[2 * slot] = self.counted[2 * slot + 1] = 0

    def set_end(self, index: int, tick: int) -> None:
        self.calls.append(f"end {index}")
        self.ends[index] = tick

    def _spend(self) -> None:
        if self.elements_left == 0:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if self.elements_left is not None:
            self.elements_left -= 1

    def contents(self) -> tuple[Entry, Entry, dict[int, int]]:
        return self.channels, self.peers, {index: end for index, end in self.ends.items() if end}

    def usage(self, entry: int) -> int:
        return self.counted.get(entry, 0)

    def count(self, entry: int) -> None:
        self.counted[entry] = self.usage(entry) + 1


class Kernel:
    """The program's own."""

    elements_left: int | None = None

    def __init__(self, program: XdpProgram) -> None:
        self._program = program
        self.bindings = program.bindings
        self.next_hops = program.next_hops
        self.ticks = program.ticks
        program.clear(list(range(program.bindings)))

    @property
    def tables(self) -> ChannelTables:
        return self._program

    def contents(self) -> tuple[Entry, Entry, dict[int, int]]:
        hosts = {each: packed_address(each[0]) for each in (*CLIENTS, *PEERS)}
        channels = (key_of((hosts[each], each[1], number)) for each in CLIENTS for number in NUMBERS)
        peers = (key_of((hosts[each], each[1], port)) for each in PEERS for port in PORTS)
        found_channels = {key: self._program._channels.lookup(key) for key in channels}
        found_peers = {key: self._program._peers.lookup(key) for key in peers}
        ends = {index: end for index, end in enumerate(self._program._ends) if end}
        return (
            {key: value for key, value in found_channels.items() if value is not None},
            {key: value for key, value in found_peers.items() if value is not None},
            ends,
        )

    def usage(self, entry: int) -> int:
        return self._program.usage(entry // 2, 1)[0][entry % 2].packets

    def count(self, entry: int) -> None:
        packets = struct.pack("=Q", self.usage(entry) + 1)
        usage = self._program._usage
        usage.update(entry.to_bytes(4, "little"), packets.ljust(usage.size, b"\0"))


@dataclass
class Channel:
    """A channel that the kernel is to relay."""

    port: int
    peer: PeerAddress
    until: float
    is_new: bool = True
    """Nothing was counted yet."""


@dataclass
class Allocation:
    port: RelayedPort
    families: tuple[Family, ...]
    channels: dict[ChannelNumber, PeerAddress] = field(default_factory=dict)
    """With those that have expired, and are kept for their peers."""


class Read(NamedTuple):
    """A value of `channels` or `peers`."""

    destination: bytes
    expires: int
    next_hop: int
    usage: int
    end: int
    label: int


def read(value: bytes) -> Read:
    destination, expires, next_hop, usage, end = struct.unpack_from("=16sQIII", value)
    return Read(destination, expires, next_hop, usage, end, int.from_bytes(value[36:40], "big"))


def new_channels(tables: ChannelTables) -> Channels:
    channels = Channels(tables, SERVICE, PORTS, PUBLIC)
    channels.own_hosts = frozenset((*PUBLIC, "192.0.2.9"))
    return channels


class ChannelsMachine(RuleBasedStateMachine):
    """Commands what the core might, many at a time, and looks at the tables after each batch."""

    def __init__(self, observed: Memory | Kernel) -> None:
        super().__init__()
        self.observed = observed
        self.channels = new_channels(observed.tables)
        self.now = 1000.0
        self.allocations: dict[ClientAddress, Allocation] = {}
        self.batch: list[OffloadCommand] = []
        self.installed: dict[tuple[ClientAddress, ChannelNumber], Channel] = {}
        self.ends: dict[int, int] = {}
        self.followed: dict[int, str] = {}
        self.refused = 0
        self.failures = 0

    # What the core might command.

    @initialize(data=st.data())
    def some_are_here_already(self, data: st.DataObject) -> None:
        for client in CLIENTS[:3]:
            self.establish(client, BOTH, data)
            for number, peer in zip(NUMBERS, data.draw(st.permutations(PEERS)), strict=False):
                self.bind(client, number, peer)

    @rule(client=st.sampled_from(CLIENTS), families=st.sampled_from([BOTH, BOTH, BOTH[:1], BOTH[1:]]), data=st.data())
    def establish(self, client: ClientAddress, families: tuple[Family, ...], data: st.DataObject) -> None:
        free = set(PORTS) - {each.port for each in self.allocations.values()}
        if client not in self.allocations and free:
            port = RelayedPort(data.draw(st.sampled_from(sorted(free))))
            self.allocations[client] = Allocation(port, families)
            self.extend(client)

    @rule(client=st.sampled_from(CLIENTS))
    def extend(self, client: ClientAddress) -> None:
        self.now += 0.5
        if client in self.allocations:
            allocation = self.allocations[client]
            self.batch.append(ExtendAllocation(allocation.port, allocation.families, self.now + 600))

    @rule(client=st.sampled_from(CLIENTS), number=st.sampled_from(NUMBERS), peer=st.sampled_from(PEERS))
    def bind(self, client: ClientAddress, number: ChannelNumber, peer: PeerAddress) -> None:
        self.now += 0.5
        allocation = self.allocations.get(client)
        if allocation is None or (Family.IPV6 if ":" in peer[0] else Family.IPV4) not in allocation.families:
            return
        peer = allocation.channels.get(number, peer)
        if all((n == number) is (p == peer) for n, p in allocation.channels.items()):
            allocation.channels[number] = peer
            self.batch.append(InstallChannel(client, number, allocation.port, peer, self.now + 300))

    @rule(client=st.sampled_from(CLIENTS), number=st.sampled_from(NUMBERS), kept=st.booleans())
    def expire(self, client: ClientAddress, number: ChannelNumber, kept: bool) -> None:  # noqa: FBT001
        """Let a channel's time pass, and perhaps its cool-down, too."""
        allocation = self.allocations.get(client)
        if allocation is not None and number in allocation.channels:
            self.batch.append(RemoveChannel(client, number, allocation.port, allocation.channels[number]))
            if not kept:
                del allocation.channels[number]

    @rule(client=st.sampled_from(CLIENTS))
    def free(self, client: ClientAddress) -> None:
        allocation = self.allocations.pop(client, None)
        if allocation is not None:
            self.batch.append(StopAllocation(allocation.port, allocation.families))
            for number, peer in allocation.channels.items():
                self.batch.append(RemoveChannel(client, number, allocation.port, peer))

    @precondition(lambda self: self.batch)
    @rule()
    def carry_out(self) -> None:
        self.expect(self.batch, fails=False)
        self.take_news(self.channels.carry_out(self.batch))
        self.batch.clear()
        self.check()

    @precondition(lambda self: self.batch and isinstance(self.observed, Memory))
    @rule()
    def carry_out_in_vain(self) -> None:
        self.observed.elements_left = 1
        self.expect(self.batch, fails=True)
        self.take_news(self.channels.carry_out(self.batch))
        self.observed.elements_left = None
        self.batch.clear()
        self.check()

    # What must come of it.

    def expect(self, commands: list[OffloadCommand], *, fails: bool) -> None:
        run: set[tuple[ClientAddress, ChannelNumber]] = set()
        for command in [*commands, StopAllocation(RelayedPort(0), ())]:
            match command:
                case InstallChannel(client, number, port, peer, until):
                    if self.expect_installed(client, number, Channel(port, peer, until)):
                        run.add((client, number))
                case RemoveChannel(client, number, _, _):
                    self.expect_run_done(run, fails=fails)
                    self.installed.pop((client, number), None)
                case ExtendAllocation(port, families, until):
                    self.ends |= {2 * port + (each is Family.IPV6): self.observed.ticks.at(until) for each in families}
                case StopAllocation(port, families):
                    self.expect_run_done(run, fails=fails)
                    for each in families:
                        self.ends.pop(2 * port + (each is Family.IPV6), None)

    def expect_installed(self, client: ClientAddress, number: ChannelNumber, channel: Channel) -> bool:
        known = self.installed.get((client, number))
        if known is not None:
            known.until = channel.until
            return True
        if client[0] in ODD_HOSTS or channel.peer[0] in ODD_HOSTS:
            return False
        if len(self.installed) == self.observed.bindings or self.hosts_with(client, channel.peer) > self.observed.next_hops:
            self.refused += 1
            return False
        self.installed[client, number] = channel
        return True

    def expect_run_done(self, run: set[tuple[ClientAddress, ChannelNumber]], *, fails: bool) -> None:
        """All that was to be installed at once is, or nothing of it."""
        if run and fails:
            self.failures += 1
            for key in run:
                del self.installed[key]
        run.clear()

    def hosts_with(self, *more: SocketAddress) -> int:
        return len(self.hosts() | {each[0] for each in more})

    def hosts(self) -> set[str]:
        return {host for (client, _), each in self.installed.items() for host in (client[0], each.peer[0])}

    def take_news(self, news: list[Follow | Unfollow]) -> None:
        for each in news:
            if isinstance(each, Follow):
                assert each.entry not in self.followed
                assert 0 <= each.entry < self.observed.next_hops
                self.followed[each.entry] = each.host
            else:
                assert self.followed.pop(each.entry) == each.host

    def check(self) -> None:
        channels, peers, ends = self.observed.contents()
        assert ends == self.ends
        assert (self.channels.refused, self.channels.failures) == (self.refused, self.failures)
        assert set(self.channels.installed) == set(self.installed)
        assert sorted(self.followed.values()) == sorted(self.hosts())
        entries = {packed_address(host): entry for entry, host in self.followed.items()}
        expected_channels: Entry = {}
        expected_peers: Entry = {}
        slots = set()
        for (client, number), channel in self.installed.items():
            host, peer = packed_address(client[0]), packed_address(channel.peer[0])
            keys = key_of((host, client[1], number)), key_of((peer, channel.peer[1], channel.port))
            there, back = read(channels[keys[0]]), read(peers[keys[1]])
            assert there.usage % 2 == 0
            assert back.usage == there.usage + 1
            assert 0 < there.label == back.label < 1 << 20
            slots.add(there.usage // 2)
            expires, end = self.observed.ticks.at(channel.until), 2 * channel.port + (len(channel.peer) == 4)
            either = functools.partial(Binding, end=end, flow_label=there.label, expires=expires)
            to_peer = either(peer, channel.peer[1], channel.port, entries[peer], there.usage)
            to_client = either(host, client[1], SERVICE, entries[host], back.usage, number=number)
            relayed = channel.peer[0] in PUBLIC and channel.peer[1] in PORTS
            expected_channels[keys[0]] = to_peer._replace(is_hairpin=relayed).packed()
            expected_peers[keys[1]] = to_client.packed()
            self.check_usage(channel, there.usage, back.usage)
        assert (channels, peers) == (expected_channels, expected_peers)
        # None is used twice, and none is taken while one that was used before is free.
        assert len(slots) == len(self.installed)
        assert all(slot < self.observed.bindings for slot in slots)

    def check_usage(self, channel: Channel, *entries: int) -> None:
        for entry in entries:
            assert (self.observed.usage(entry) == 0) is channel.is_new
            self.observed.count(entry)
        channel.is_new = False

    def teardown(self) -> None:
        """Let all end: nothing must be left."""
        for client in tuple(self.allocations):
            self.free(client)
        if self.batch:
            self.carry_out()
        assert self.observed.contents() == ({}, {}, {})
        assert not self.followed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("bindings", "next_hops"), [(4, 100), (100, 5), (100, 100)])
def test_after_any_commands_the_tables_are_what_was_commanded(bindings: int, next_hops: int) -> None:
    run_state_machine_as_test(
        lambda: ChannelsMachine(Memory(bindings, next_hops)),  # type: ignore[arg-type]
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None),
    )


@pytest.fixture
def program(object_file: bytes) -> Iterator[XdpProgram]:
    """The program with room for four channels."""
    del object_file
    opened = XdpProgram(4)
    yield opened
    opened.close()


@needs_bpf
@pytest.mark.timeout(600)
def test_after_any_commands_the_kernels_tables_are_what_was_commanded(program: XdpProgram) -> None:
    run_state_machine_as_test(
        lambda: ChannelsMachine(Kernel(program)),  # type: ignore[arg-type]
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


# One by one.

CLIENT, PEER, PORT, NUMBER = CLIENTS[0], PEERS[0], RelayedPort(50000), NUMBERS[0]
UNTIL = 2000.25


def installing(client: ClientAddress = CLIENT, peer: PeerAddress = PEER, **changes: Any) -> InstallChannel:  # noqa: ANN401
    return InstallChannel(client, NUMBER, PORT, peer, UNTIL)._replace(**changes)


def removing(installed: InstallChannel) -> RemoveChannel:
    return RemoveChannel(*installed[:4])


def many(count: int) -> list[InstallChannel]:
    """Channels with a client each, and all to one peer."""
    return [
        installing(ClientAddress((f"198.51.{i >> 8}.{i & 255}", 40000)), port=RelayedPort(50000 + i)) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("client", "peer", "in_tables"),
    [
        (CLIENT, PEER, ("00000000000000000000ffffc6336407 9c41 4000", "00000000000000000000ffffc0000209 2328 c350")),
        (CLIENTS[3], PEERS[4], ("20010db8000100000000000000000007 9c41 4000", "20010db8000200000000000000000009 2328 c350")),
        (CLIENTS[3], PEER, ("20010db8000100000000000000000007 9c41 4000", "00000000000000000000ffffc0000209 2328 c350")),
    ],
)
def test_keys_are_address_port_and_number_or_relayed_port_as_in_packets(
    client: ClientAddress, peer: PeerAddress, in_tables: tuple[str, str]
) -> None:
    tables = Memory()
    new_channels(tables).carry_out([installing(client, peer)])
    assert [key.hex() for key in (*tables.channels, *tables.peers)] == [each.replace(" ", "") for each in in_tables]


@pytest.mark.parametrize("host", ["fe80::7", "febf::7", "fe80::7%eth0", "::ffff:192.0.2.9", "::ffff:c000:209"])
def test_link_local_and_mapped_hosts_are_left_to_the_sockets(host: str) -> None:
    """A link-local one is another host on another link; packets have an address in disguise without its disguise."""
    tables = Memory()
    channels = new_channels(tables)
    odd = (host, 9000, 0, 2)
    news = channels.carry_out([installing(ClientAddress(odd)), installing(peer=PeerAddress(odd))])
    assert (tables.channels, tables.peers, news, channels.refused) == ({}, {}, [], 0)


@pytest.mark.parametrize("host", ["fe8::7", "fec0::7", "ff:fe80::1", "2001:db8::ffff:1", "fd00::fe80"])
def test_hosts_that_only_look_like_those_are_installed(host: str) -> None:
    tables = Memory()
    new_channels(tables).carry_out([installing(peer=PeerAddress((host, 9000, 0, 0)))])
    assert len(tables.peers) == 1


@pytest.mark.parametrize(
    ("peer", "is_hairpin"),
    [
        (("203.0.113.1", 50000), True),
        (("203.0.113.1", 50002), True),
        (("2001:db8::1", 50002, 0, 0), True),
        (("203.0.113.1", 50003), False),
        (("203.0.113.1", 49999), False),
        (("203.0.113.2", 50000), False),
        (("192.0.2.9", 50000), False),
    ],
)
def test_only_the_relays_own_relayed_addresses_are_hairpins(peer: SocketAddress, *, is_hairpin: bool) -> None:
    tables = Memory()
    new_channels(tables).carry_out([installing(peer=PeerAddress(peer))])
    (to_peer,), (to_client,) = tables.channels.values(), tables.peers.values()
    assert (BINDING.unpack(to_peer)[-1], BINDING.unpack(to_client)[-1]) == (is_hairpin, 0)


def test_a_public_address_that_the_machine_does_not_have_is_no_hairpin() -> None:
    """Behind a 1:1 NAT, what is sent there goes out and comes back."""
    tables = Memory()
    channels = new_channels(tables)
    channels.own_hosts = frozenset(("10.0.0.1",))
    channels.carry_out([installing(peer=PEERS[3])])
    assert [BINDING.unpack(each)[-1] for each in tables.channels.values()] == [0]


def test_flow_labels_have_20_bits_are_never_0_and_differ() -> None:
    tables = Memory(bindings=1 << 16, next_hops=1 << 17)
    new_channels(tables).carry_out(many(2000))
    labels = [read(value).label for value in tables.channels.values()]
    assert len(set(labels)) == len(labels)
    assert all(0 < label < 1 << 20 for label in labels)
    assert min(abs(a - b) for a, b in itertools.pairwise(labels)) > 1 << 16


def test_neighbouring_commands_are_carried_out_together() -> None:
    tables = Memory()
    channels = new_channels(tables)
    commands = many(10)
    extending = ExtendAllocation(PORT, BOTH[:1], UNTIL)
    stopping = StopAllocation(PORT, BOTH[:1])
    end = f"end {2 * PORT}"
    channels.carry_out([extending, *commands[:5], extending, *commands[5:]])
    channels.carry_out([stopping, *map(removing, commands[:5]), stopping, *map(removing, commands[5:])])
    assert tables.calls == [end, end, "install 10", end, end, "remove 10"]


def test_an_allocation_is_stopped_before_its_channels_are_removed_and_its_port_goes_on_only_afterwards() -> None:
    tables = Memory()
    channels = new_channels(tables)
    mine = installing()
    others = installing(CLIENTS[1])
    channels.carry_out([mine])
    tables.calls.clear()
    extending = ExtendAllocation(PORT, BOTH[:1], UNTIL)
    channels.carry_out([StopAllocation(PORT, BOTH[:1]), removing(mine), extending, others])
    assert tables.calls == [f"end {2 * PORT}", "remove 1", f"end {2 * PORT}", "install 1"]
    (to_client,) = tables.peers.values()
    assert BINDING.unpack(to_client)[6] == struct.unpack("=H", struct.pack(">H", CLIENTS[1][1]))[0]


def test_a_channel_that_was_removed_and_installed_again_at_once_is_there_and_counts_from_0() -> None:
    tables = Memory()
    channels = new_channels(tables)
    channels.carry_out([installing()])
    tables.count(0)
    channels.carry_out([removing(installing()), installing(until=UNTIL + 1)])
    (to_peer,) = map(read, tables.channels.values())
    assert (to_peer.expires, to_peer.usage, tables.usage(0)) == (TICKS.at(UNTIL + 1), 0, 0)


def test_a_channel_that_was_installed_twice_at_once_has_the_later_end_and_one_slot() -> None:
    tables = Memory()
    channels = new_channels(tables)
    news = channels.carry_out([installing(), installing(until=UNTIL + 1)])
    (to_peer,) = map(read, tables.channels.values())
    assert (to_peer.expires, to_peer.usage) == (TICKS.at(UNTIL + 1), 0)
    assert [each.host for each in news] == [CLIENT[0], PEER[0]]
    assert [type(each) for each in channels.carry_out([removing(installing())])] == [Unfollow, Unfollow]


def test_a_refreshed_channel_keeps_its_counts() -> None:
    tables = Memory()
    channels = new_channels(tables)
    channels.carry_out([installing()])
    tables.count(0)
    assert channels.carry_out([installing(until=UNTIL + 1)]) == []
    assert tables.usage(0) == 1


def test_without_room_channels_are_left_to_the_sockets_until_there_is_some() -> None:
    tables = Memory(bindings=2)
    channels = new_channels(tables)
    first, second, third = many(3)
    channels.carry_out([first, second, third])
    assert (len(tables.channels), channels.refused) == (2, 1)
    assert channels.carry_out([removing(third)]) == []
    channels.carry_out([removing(first), third])
    assert (set(channels.installed), channels.refused) == ({(second.client, NUMBER), (third.client, NUMBER)}, 1)


def test_without_room_for_its_second_host_a_channel_takes_nothing() -> None:
    tables = Memory(bindings=1, next_hops=1)
    channels = new_channels(tables)
    assert channels.carry_out([installing()]) == [Follow(0, CLIENT[0]), Unfollow(0, CLIENT[0])]
    assert (tables.channels, channels.refused) == ({}, 1)
    channels.carry_out([installing(CLIENTS[0], PEERS[2])])
    assert len(tables.channels) == 1


@pytest.mark.parametrize("elements", range(7))
def test_a_batch_that_fails_anywhere_leaves_nothing_and_takes_nothing(elements: int) -> None:
    tables = Memory()
    channels = new_channels(tables)
    old, *new = many(3)
    channels.carry_out([old, new[0]])
    channels.carry_out([removing(new[0])])
    tables.elements_left = elements
    channels.carry_out([*new, old])
    assert (tables.channels, tables.peers, channels.installed, channels.failures) == ({}, {}, {}, 1)
    tables.elements_left = None
    news = channels.carry_out([*new, old])
    assert sorted(each.entry for each in news if isinstance(each, Follow)) == [0, 1, 2, 3]
    assert sorted(read(each).usage for each in tables.channels.values()) == [0, 2, 4]


@needs_bpf
def test_a_batch_that_the_kernel_does_not_take_is_rolled_back(program: XdpProgram) -> None:
    strangers = [bytes([i]) * 20 for i in range(2)]
    program._peers.update_batch(strangers, [bytes(48)] * 2)
    channels = new_channels(program)
    news = channels.carry_out(many(4))
    assert (channels.failures, channels.installed) == (1, {})
    assert sum(isinstance(each, Follow) for each in news) == sum(isinstance(each, Unfollow) for each in news) == 5
    program.remove([], strangers)
    channels.carry_out(many(4))
    assert (channels.failures, len(channels.installed)) == (1, 4)
    channels.carry_out(map(removing, many(4)))
    assert channels.installed == {}


def test_channels_that_the_kernel_does_not_remove_make_it_untrustworthy(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Memory()
    channels = new_channels(tables)
    channels.carry_out([installing()])
    assert not channels.is_broken

    def refuse(*_: list[bytes]) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(tables, "remove", refuse)
    channels.carry_out([StopAllocation(PORT, BOTH[:1]), removing(installing())])
    assert (channels.is_broken, channels.failures, channels.installed) == (True, 1, {})
    assert not any(tables.ends.values()), "what is still there relays nothing all the same"
