"""Channels in the tables of the XDP program: after any commands, in any batches, they are what was commanded."""

import errno
import gc
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from relay.core.addresses import ChannelNumber, ClientAddress, Family, PeerAddress, RelayedPort, SocketAddress
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.offload.channel_tables import ChannelTable, EndTable, HashKeys
from relay.offload.channels import Channels, ChannelTables
from relay.offload.layout import CHANNEL, CHANNEL_SIZE, PLACES, packed_address
from relay.offload.program import XdpProgram
from relay.offload.ticks import Ticks
from tests.offload.conftest import needs_bpf
from tests.offload.model import TICKS as ALL_TICKS
from tests.offload.model import tick_of
from tests.offload.tables import Read, read

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

TICKS = Ticks(-1000.0, 250.0)
KEYS = HashKeys([0xDB4F0B9175AE2165 * (each + 1) & (1 << 64) - 1 for each in range(6)])


class Observed(Protocol):
    """Tables that can be looked into."""

    bindings: int
    next_hops: int

    @property
    def tables(self) -> ChannelTables: ...

    def contents(self) -> dict[int, Read]:
        """Give the channels."""

    def usage(self, entry: int) -> int:
        """Give the packets that were counted."""

    def count(self, entry: int) -> None:
        """Count packets."""


class Memory:
    """Tables as the kernel has them, of which it may not take every order."""

    def __init__(self, bindings: int = 64, next_hops: int = 128, buckets: int = 64) -> None:
        self.bindings = bindings
        self.next_hops = next_hops
        self.ticks = TICKS
        self.hash_keys = KEYS
        self._channels = bytearray(bindings * CHANNEL_SIZE)
        self._ends = bytearray(buckets * PLACES * 8), bytearray(buckets * PLACES * 8)
        self.channels = ChannelTable(memoryview(self._channels))
        self.clients, self.peers = (EndTable(memoryview(each)) for each in self._ends)
        self.counted: dict[int, int] = {}
        self.clears = True
        """Whether the kernel lets counters begin at 0."""

    @property
    def tables(self) -> ChannelTables:
        return self

    def clear(self, indices: list[int]) -> None:
        if not self.clears:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        for index in indices:
            self.counted[2 * index] = self.counted[2 * index + 1] = 0

    def contents(self) -> dict[int, Read]:
        return read(bytes(self._channels), (bytes(self._ends[0]), bytes(self._ends[1])), KEYS.numbers)

    def usage(self, entry: int) -> int:
        return self.counted.get(entry, 0)

    def count(self, entry: int) -> None:
        self.counted[entry] = self.usage(entry) + 1


class Kernel:
    """The program's own."""

    clears = True

    def __init__(self, program: XdpProgram) -> None:
        self._program = program
        self.bindings = program.bindings
        self.next_hops = program.next_hops
        self.ticks = program.ticks
        program.clear(list(range(program.bindings)))

    @property
    def tables(self) -> ChannelTables:
        return self._program

    def contents(self) -> dict[int, Read]:
        program = self._program
        tables = bytes(program.clients._memory), bytes(program.peers._memory)
        return read(bytes(program.channels.memory), tables, program.hash_keys.numbers)

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


def new_channels(tables: ChannelTables) -> Channels:
    channels = Channels(tables, PORTS, PUBLIC)
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
        self.followed: dict[int, str] = {}
        self.refused = 0
        self.failures = 0
        self.used = 0
        """Indices whose counters don't begin at 0 yet."""

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
            for number, peer in allocation.channels.items():
                self.batch.append(RemoveChannel(client, number, allocation.port, peer))

    @precondition(lambda self: self.batch)
    @rule()
    def carry_out(self) -> None:
        self.expect(self.batch)
        self.take_changes(self.channels.carry_out(self.batch))
        self.batch.clear()
        self.check()

    @precondition(lambda self: isinstance(self.observed, Memory))
    @rule(clears=st.booleans())
    def let_it_clear(self, clears: bool) -> None:  # noqa: FBT001
        self.observed.clears = clears

    # What must come of it.

    def expect(self, commands: list[OffloadCommand]) -> None:
        for command in commands:
            match command:
                case InstallChannel(client, number, port, peer, until):
                    self.expect_installed(client, number, Channel(port, peer, until))
                case RemoveChannel(client, number, _, _):
                    self.used += self.installed.pop((client, number), None) is not None
        if self.used:
            self.expect_cleared()

    def expect_installed(self, client: ClientAddress, number: ChannelNumber, channel: Channel) -> None:
        known = self.installed.get((client, number))
        if known is not None:
            known.until = channel.until
            return
        if client[0] in ODD_HOSTS or channel.peer[0] in ODD_HOSTS:
            return
        if self.used and len(self.installed) + self.used == self.observed.bindings:
            self.expect_cleared()
        is_full = len(self.installed) + self.used == self.observed.bindings
        if is_full or self.hosts_with(client, channel.peer) > self.observed.next_hops:
            self.refused += 1
        else:
            self.installed[client, number] = channel

    def expect_cleared(self) -> None:
        if self.observed.clears:
            self.used = 0
        else:
            self.failures += 1

    def hosts_with(self, *more: SocketAddress) -> int:
        return len(self.hosts() | {each[0] for each in more})

    def hosts(self) -> set[str]:
        return {host for (client, _), each in self.installed.items() for host in (client[0], each.peer[0])}

    def take_changes(self, changes: dict[int, str | None]) -> None:
        for entry, host in changes.items():
            assert 0 <= entry < self.observed.next_hops
            self.followed.pop(entry, None)
            if host is not None:
                self.followed[entry] = host

    def check(self) -> None:
        channels = self.observed.contents()
        assert (self.channels.refused, self.channels.failures) == (self.refused, self.failures)
        assert set(self.channels.installed) == set(self.installed)
        assert sorted(self.followed.values()) == sorted(self.hosts())
        entries = {packed_address(host): entry for entry, host in self.followed.items()}
        by_client = {each.client: index for index, each in channels.items()}
        assert len(channels) == len(self.installed)
        for (client, number), channel in self.installed.items():
            host, peer = packed_address(client[0]), packed_address(channel.peer[0])
            index = by_client[host, client[1], number]
            expires = tick_of(self.observed.ticks.at(channel.until))
            relayed = channel.peer[0] in PUBLIC and channel.peer[1] in PORTS
            label = channels[index].label
            assert 0 < label < 1 << 20
            assert channels[index] == Read(
                (host, client[1], number),
                (peer, channel.peer[1], channel.port),
                entries[host],
                entries[peer],
                expires,
                label,
                relayed,
            )
            self.check_usage(channel, 2 * index, 2 * index + 1)

    def check_usage(self, channel: Channel, *entries: int) -> None:
        for entry in entries:
            assert (self.observed.usage(entry) == 0) is channel.is_new
            self.observed.count(entry)
        channel.is_new = False

    def teardown(self) -> None:
        """Let all end: nothing must be left."""
        self.observed.clears = True
        for client in tuple(self.allocations):
            self.free(client)
        if self.batch:
            self.carry_out()
        assert self.observed.contents() == {}
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


def there(tables: Memory) -> list[Read]:
    return list(tables.contents().values())


@pytest.mark.parametrize(
    ("client", "peer"), [(CLIENT, PEER), (CLIENTS[3], PEERS[4]), (CLIENTS[3], PEER)], ids=["ipv4", "ipv6", "both"]
)
def test_ends_are_address_port_and_number_or_relayed_port_as_in_packets(client: ClientAddress, peer: PeerAddress) -> None:
    tables = Memory()
    new_channels(tables).carry_out([installing(client, peer)])
    packed = b"".join(
        packed_address(host) + struct.pack(">HH", port, tag)
        for host, port, tag in ((client[0], client[1], NUMBER), (peer[0], peer[1], PORT))
    )
    assert bytes(tables.channels.memory[:40]) == packed


@pytest.mark.parametrize("host", ["fe80::7", "febf::7", "fe80::7%eth0", "::ffff:192.0.2.9", "::ffff:c000:209"])
def test_link_local_and_mapped_hosts_are_left_to_the_sockets(host: str) -> None:
    """A link-local one is another host on another link; packets have an address in disguise without its disguise."""
    tables = Memory()
    channels = new_channels(tables)
    odd = (host, 9000, 0, 2)
    changes = channels.carry_out([installing(ClientAddress(odd)), installing(peer=PeerAddress(odd))])
    assert (there(tables), set(changes.values()), channels.refused) == ([], {None}, 0)


@pytest.mark.parametrize("host", ["fe8::7", "fec0::7", "ff:fe80::1", "2001:db8::ffff:1", "fd00::fe80"])
def test_hosts_that_only_look_like_those_are_installed(host: str) -> None:
    tables = Memory()
    new_channels(tables).carry_out([installing(peer=PeerAddress((host, 9000, 0, 0)))])
    assert len(there(tables)) == 1


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
    assert [each.is_hairpin for each in there(tables)] == [is_hairpin]


def test_a_public_address_that_the_machine_does_not_have_is_no_hairpin() -> None:
    """Behind a 1:1 NAT, what is sent there goes out and comes back."""
    tables = Memory()
    channels = new_channels(tables)
    channels.own_hosts = frozenset(("10.0.0.1",))
    channels.carry_out([installing(peer=PEERS[3])])
    assert [each.is_hairpin for each in there(tables)] == [False]
    channels.own_hosts = frozenset(PUBLIC)
    channels.carry_out([installing(peer=PEERS[3])])
    assert [each.is_hairpin for each in there(tables)] == [True], "a refresh sees that it has it now"


def test_flow_labels_have_20_bits_are_never_0_and_differ() -> None:
    tables = Memory(bindings=1 << 16, next_hops=1 << 17, buckets=1 << 15)
    new_channels(tables).carry_out(many(2000))
    labels = [each.label for each in there(tables)]
    assert len(set(labels)) == len(labels)
    assert all(0 < label < 1 << 20 for label in labels)
    assert min(abs(a - b) for a, b in itertools.pairwise(labels)) > 1 << 16


def test_a_peer_goes_on_with_its_ports_next_owner() -> None:
    tables = Memory()
    channels = new_channels(tables)
    mine = installing()
    others = installing(CLIENTS[1])
    channels.carry_out([mine])
    channels.carry_out([removing(mine), others])
    assert [each.client[1] for each in there(tables)] == [CLIENTS[1][1]]


def test_a_channel_that_was_removed_and_installed_again_at_once_is_there_and_counts_from_0() -> None:
    tables = Memory(bindings=1)
    channels = new_channels(tables)
    channels.carry_out([installing()])
    tables.count(0)
    channels.carry_out([removing(installing()), installing(until=UNTIL + 1)])
    (channel,) = there(tables)
    assert (channel.expires, tables.usage(0)) == (TICKS.at(UNTIL + 1), 0)


def test_a_channel_that_was_installed_twice_at_once_has_the_later_end_and_one_index() -> None:
    tables = Memory()
    channels = new_channels(tables)
    changes = channels.carry_out([installing(), installing(until=UNTIL + 1)])
    assert [(index, each.expires) for index, each in tables.contents().items()] == [(0, TICKS.at(UNTIL + 1))]
    assert changes == {0: CLIENT[0], 1: PEER[0]}
    assert channels.carry_out([removing(installing())]) == {0: None, 1: None}


def test_a_refreshed_channel_keeps_its_counts_and_its_version() -> None:
    tables = Memory()
    channels = new_channels(tables)
    channels.carry_out([installing()])
    tables.count(0)
    before = bytes(tables.channels.memory[CHANNEL.size : CHANNEL_SIZE])
    assert channels.carry_out([installing(until=UNTIL + 1)]) == {}
    assert tables.usage(0) == 1
    assert bytes(tables.channels.memory[CHANNEL.size : CHANNEL_SIZE]) == before


def test_an_expiry_is_the_lower_half_of_its_tick() -> None:
    """A machine that has been up for months is beyond 32 bits."""
    tables = Memory()
    until = ALL_TICKS / TICKS.per_second + 5000
    new_channels(tables).carry_out([installing(until=until)])
    assert [each.expires for each in there(tables)] == [TICKS.at(until) - ALL_TICKS]


def test_without_room_channels_are_left_to_the_sockets_until_there_is_some() -> None:
    tables = Memory(bindings=2)
    channels = new_channels(tables)
    first, second, third = many(3)
    channels.carry_out([first, second, third])
    assert (len(there(tables)), channels.refused) == (2, 1)
    assert channels.carry_out([removing(third)]) == {}
    channels.carry_out([removing(first), third])
    assert (set(channels.installed), channels.refused) == ({(second.client, NUMBER), (third.client, NUMBER)}, 1)


def test_without_room_for_its_second_host_a_channel_takes_nothing() -> None:
    tables = Memory(bindings=1, next_hops=1)
    channels = new_channels(tables)
    assert channels.carry_out([installing()]) == {0: None}
    assert (there(tables), channels.refused) == ([], 1)
    channels.carry_out([installing(CLIENTS[0], PEERS[2])])
    assert len(there(tables)) == 1


def test_a_full_bucket_leaves_a_channel_to_the_sockets_and_takes_nothing() -> None:
    tables = Memory(buckets=1)
    channels = new_channels(tables)
    commands = many(PLACES + 1)
    channels.carry_out(commands)
    assert (len(there(tables)), channels.refused) == (PLACES, 1)
    channels.carry_out([removing(commands[3])])
    channels.carry_out([commands[PLACES]])
    assert {each.peer[2] for each in there(tables)} == {each.port for each in commands} - {commands[3].port}
    channels.carry_out(map(removing, commands))
    assert (there(tables), channels.installed) == ([], {})


def test_two_ends_that_the_hash_does_not_tell_apart_are_not_both_entered() -> None:
    """The program would find the first of them only."""
    tables = Memory()
    tables.hash_keys = HashKeys([1 << 40, 0, 0, 0, 0, 0])
    channels = new_channels(tables)
    first, second = many(2)
    channels.carry_out([first, second])
    assert (set(channels.installed), channels.refused) == ({(first.client, NUMBER)}, 1)


def test_all_fit_by_the_ten_thousand_however_alike_they_are() -> None:
    """Hosts, ports and numbers that follow each other, from which a weak hash makes heaps."""
    tables = Memory(bindings=1 << 16, next_hops=1 << 17, buckets=1 << 15)
    channels = new_channels(tables)
    for command in (
        InstallChannel(
            ClientAddress((f"10.{i % 7}.{i >> 8}.{i & 255}", 10000)),
            NUMBERS[0],
            RelayedPort(49152 + i),
            PeerAddress(("10.9.0.1", 10000 + i)),
            UNTIL,
        )
        for i in range(10000)
    ):
        channels.carry_out([command])
    assert (len(channels.installed), channels.refused) == (10000, 0)


def test_what_the_kernel_does_not_clear_is_not_used_until_it_does() -> None:
    tables = Memory(bindings=2)
    channels = new_channels(tables)
    first, second, third = many(3)
    channels.carry_out([first, second])
    tables.clears = False
    channels.carry_out([removing(first), third])
    assert (set(channels.installed), channels.refused, channels.failures) == ({(second.client, NUMBER)}, 1, 2)
    tables.clears = True
    channels.carry_out([third])
    assert set(channels.installed) == {(second.client, NUMBER), (third.client, NUMBER)}


class Watched:
    """Memory that is looked at before each store to it."""

    def __init__(self, words: memoryview, look: Callable[[], None]) -> None:
        self._words = words
        self._look = look

    def __getitem__(self, at: int) -> int:
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self._look()
        self._words[at] = value


def test_a_channel_is_there_only_when_all_of_it_is_written_and_gone_before_anything_is_written_over() -> None:
    tables = Memory(bindings=1)
    channels = new_channels(tables)
    seen: list[tuple[bytes, int]] = []
    entry = tables.channels.memory

    def look() -> None:
        seen.append((bytes(entry[: CHANNEL.size]), entry[CHANNEL.size] % 2))

    tables.channels.words = Watched(tables.channels.words, look)  # type: ignore[assignment]
    channels.carry_out([installing()])
    first = bytes(entry[: CHANNEL.size])
    channels.carry_out([removing(installing())])
    channels.carry_out([installing(CLIENTS[3])])
    assert seen == [(first, 0), (first, 1), (bytes(entry[: CHANNEL.size]), 0)]
    assert entry[CHANNEL.size] == 3


def test_versions_begin_anew_before_their_32_bits_are_over_and_stay_odd() -> None:
    tables = Memory(bindings=2)
    channels = new_channels(tables)
    channels._version = (1 << 32) - 1
    channels.carry_out(many(2))
    versions = [tables.channels.words[at * CHANNEL_SIZE // 4 + CHANNEL_SIZE // 4 - 1] for at in (0, 1)]
    assert versions == [(1 << 31) - 1, (1 << 31) + 1]


def test_no_two_channels_that_had_an_entry_had_the_same_version() -> None:
    """The program takes one that comes while it reads another for what it is."""
    tables = Memory(bindings=1)
    channels = new_channels(tables)
    versions = []
    for each in many(3):
        channels.carry_out([each])
        versions.append(tables.channels.words[CHANNEL_SIZE // 4 - 1])
        channels.carry_out([removing(each)])
        assert tables.channels.words[CHANNEL_SIZE // 4 - 1] % 2 == 0
    assert len(set(versions)) == 3
    assert all(each % 2 for each in versions)


def test_the_garbage_collector_is_left_as_it_was() -> None:
    channels = new_channels(Memory())
    for collects in (True, False):
        (gc.enable if collects else gc.disable)()
        try:
            channels.carry_out([installing()])
            assert gc.isenabled() is collects
        finally:
            gc.enable()
