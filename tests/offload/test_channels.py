"""Channels in the tables of the XDP program, after any commands in any batches."""

import errno
import math
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from relay.core.addresses import ChannelNumber, ClientAddress, Family, PeerAddress, RelayedPort
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.offload.channels import Channels
from relay.offload.layout import CHANNEL, END, packed_address
from relay.offload.program import XdpProgram
from tests.support.examples import examples
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.tables import Read, entries, read

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


class Observed(Protocol):
    """Tables with access to their content."""

    bindings: int

    @property
    def tables(self) -> XdpProgram: ...

    def contents(self) -> dict[int, Read]:
        """Return the channels by slot."""

    def usage(self, entry: int) -> int:
        """Return the number of counted packets."""

    def count(self, entry: int) -> None:
        """Count packets."""


class Memory:
    """Tables in this process, as strict as the kernel's. They can reject changes."""

    def __init__(self, bindings: int = 64) -> None:
        self.bindings = bindings
        self.clients: dict[bytes, bytes] = {}
        self.peers: dict[bytes, bytes] = {}
        self.counted: dict[int, int] = {}
        self.calls: list[int] = []
        """The number of channels in each change."""
        self.works = True

    @property
    def tables(self) -> XdpProgram:
        return cast(XdpProgram, self)

    def write_channels(self, clients: Mapping[bytes, bytes], peers: Mapping[bytes, bytes]) -> None:
        self._change(len(clients))
        self.clients |= clients
        self.peers |= peers
        assert max(len(self.clients), len(self.peers)) <= self.bindings

    def delete_channels(self, clients: Sequence[bytes], peers: Sequence[bytes], slots: Sequence[int]) -> None:
        self._change(len(clients))
        for client, peer, slot in zip(clients, peers, slots, strict=True):
            del self.clients[client], self.peers[peer]
            self.counted[2 * slot] = self.counted[2 * slot + 1] = 0

    def write_ways(self, ways: Mapping[int, bytes]) -> None:
        assert not set(ways) - set(range(self.bindings))

    def _change(self, count: int) -> None:
        if not self.works:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.calls.append(count)

    def contents(self) -> dict[int, Read]:
        return read(self.clients, self.peers)

    def usage(self, entry: int) -> int:
        return self.counted.get(entry, 0)

    def count(self, entry: int) -> None:
        self.counted[entry] = self.usage(entry) + 1


class Kernel:
    """The program's own."""

    def __init__(self, program: XdpProgram) -> None:
        self._program = program
        self.bindings = program.bindings
        program.delete_channels([], [], range(program.bindings))

    @property
    def tables(self) -> XdpProgram:
        return self._program

    def contents(self) -> dict[int, Read]:
        return read(*(entries(self._program.maps[name].fd, END.size, CHANNEL.size) for name in ("clients", "peers")))

    def usage(self, entry: int) -> int:
        return self._program.usage(entry // 2, 1)[0][entry % 2].packets

    def count(self, entry: int) -> None:
        packets = struct.pack("=Q", self.usage(entry) + 1)
        usage = self._program.maps["usage"]
        usage.update({struct.pack("=I", entry): packets.ljust(usage.size, b"\0")})


def nanoseconds(until: float) -> int:
    """Return the expiry in the tables: a tick of the program's clock early."""
    return int((until - time.clock_getres(6)) * 1e9)


@dataclass
class Channel:
    """A channel to install."""

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
    """All channels, including expired channels kept for their peers."""


def is_inside(peer: PeerAddress) -> bool:
    return peer[0] in PUBLIC and peer[1] in PORTS


class ChannelsMachine(RuleBasedStateMachine):
    """Sends batches of possible commands of the core, and checks the tables after each batch."""

    def __init__(self, observed: Memory | Kernel) -> None:
        super().__init__()
        self.observed = observed
        self.channels = Channels(observed.tables)
        self.now = 1000.0
        self.allocations: dict[ClientAddress, Allocation] = {}
        self.batch: list[OffloadCommand] = []
        self.installed: dict[tuple[ClientAddress, ChannelNumber], Channel] = {}
        self.followed: set[str] = set()
        self.refused = 0

    # Possible commands of the core.

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
            self.batch.append(InstallChannel(client, number, allocation.port, peer, self.now + 300, is_inside(peer)))

    @rule(client=st.sampled_from(CLIENTS), number=st.sampled_from(NUMBERS), kept=st.booleans())
    def expire(self, client: ClientAddress, number: ChannelNumber, kept: bool) -> None:  # noqa: FBT001
        """Let a channel expire, and perhaps its grace period, too."""
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

    # The expected result.

    def expect(self, commands: list[OffloadCommand]) -> None:
        for command in commands:
            match command:
                case InstallChannel(client, number, port, peer, until, _):
                    self.expect_installed(client, number, Channel(port, peer, until))
                case RemoveChannel(client, number, _, _):
                    self.installed.pop((client, number), None)

    def expect_installed(self, client: ClientAddress, number: ChannelNumber, channel: Channel) -> None:
        known = self.installed.get((client, number))
        if known is not None:
            known.until = channel.until
            return
        if client[0] in ODD_HOSTS or channel.peer[0] in ODD_HOSTS:
            return
        hosts = self.hosts() | {client[0], channel.peer[0]}
        if max(len(self.installed) + 1, len(hosts)) > self.observed.bindings:
            self.refused += 1
        else:
            self.installed[client, number] = channel

    def hosts(self) -> set[str]:
        return {host for (client, _), each in self.installed.items() for host in (client[0], each.peer[0])}

    def take_changes(self, changes: dict[str, bool]) -> None:
        for host, is_used in changes.items():
            if is_used:
                self.followed.add(host)
            else:
                self.followed.discard(host)

    def check(self) -> None:
        channels = self.observed.contents()
        assert (self.channels.refused, self.channels.failures) == (self.refused, 0)
        assert set(self.channels.installed) == set(self.installed)
        assert {slot: self.channels.by_slot[slot] for slot in channels} == {
            slot: key for slot, key in enumerate(self.channels.by_slot) if key is not None
        }
        assert self.followed == self.hosts()
        by_client = {each.client: slot for slot, each in channels.items()}
        assert len(channels) == len(self.installed)
        for (client, number), channel in self.installed.items():
            host, peer = packed_address(client[0]), packed_address(channel.peer[0])
            slot = by_client[host, client[1], number]
            ends = (host, client[1], number), (peer, channel.peer[1], channel.port)
            assert channels[slot] == Read(*ends, nanoseconds(channel.until), is_inside(channel.peer))
            self.check_usage(channel, 2 * slot, 2 * slot + 1)

    def check_usage(self, channel: Channel, *entries: int) -> None:
        for entry in entries:
            assert (self.observed.usage(entry) == 0) is channel.is_new
            self.observed.count(entry)
        channel.is_new = False

    def teardown(self) -> None:
        """Remove everything: the tables must be empty."""
        for client in tuple(self.allocations):
            self.free(client)
        if self.batch:
            self.carry_out()
        assert self.observed.contents() == {}
        assert not self.followed


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bindings", [4, 100])
def test_the_tables_match_any_sequence_of_commands(bindings: int) -> None:
    run_state_machine_as_test(
        lambda: ChannelsMachine(Memory(bindings)),  # type: ignore[arg-type]
        settings=examples(20, stateful_step_count=40),
    )


@pytest.fixture
def program(object_file: bytes) -> Iterator[XdpProgram]:
    """The program with room for four channels."""
    opened = XdpProgram(4, object_file)
    yield opened
    opened.close()


@needs_bpf
@pytest.mark.timeout(600)
def test_the_kernels_tables_match_any_sequence_of_commands(program: XdpProgram) -> None:
    run_state_machine_as_test(
        lambda: ChannelsMachine(Kernel(program)),  # type: ignore[arg-type]
        settings=examples(10, stateful_step_count=30),
    )


CLIENT, PEER, PORT, NUMBER = CLIENTS[0], PEERS[0], RelayedPort(50000), NUMBERS[0]
UNTIL = 2000.25


def installing(client: ClientAddress = CLIENT, peer: PeerAddress = PEER, **changes: Any) -> InstallChannel:  # noqa: ANN401
    return InstallChannel(client, NUMBER, PORT, peer, UNTIL)._replace(**changes)


def removing(installed: InstallChannel) -> RemoveChannel:
    return RemoveChannel(*installed[:4])


def many(count: int) -> list[InstallChannel]:
    """Return channels of many clients to one peer."""
    return [
        installing(ClientAddress((f"198.51.{i >> 8}.{i & 255}", 40000)), port=RelayedPort(50000 + i)) for i in range(count)
    ]


def there(tables: Memory) -> list[Read]:
    return list(tables.contents().values())


@pytest.mark.parametrize(
    ("client", "peer"), [(CLIENT, PEER), (CLIENTS[3], PEERS[4]), (CLIENTS[3], PEER)], ids=["ipv4", "ipv6", "both"]
)
def test_ends_are_encoded_as_in_packets(client: ClientAddress, peer: PeerAddress) -> None:
    tables = Memory()
    Channels(tables.tables).carry_out([installing(client, peer)])
    packed = b"".join(
        packed_address(host) + struct.pack(">HH", port, tag)
        for host, port, tag in ((client[0], client[1], NUMBER), (peer[0], peer[1], PORT))
    )
    assert b"".join((*tables.clients, *tables.peers)) == packed


@pytest.mark.parametrize("host", ["fe80::7", "febf::7", "fe80::7%eth0", "::ffff:192.0.2.9", "::ffff:c000:209"])
def test_link_local_and_mapped_hosts_are_left_to_the_sockets(host: str) -> None:
    """A link-local host depends on the link, and packets contain an IPv4 address instead of a mapped address."""
    tables = Memory()
    channels = Channels(tables.tables)
    odd = (host, 9000, 0, 2)
    changes = channels.carry_out([installing(ClientAddress(odd)), installing(peer=PeerAddress(odd))])
    assert (there(tables), changes, channels.refused) == ([], {}, 0)


@pytest.mark.parametrize("host", ["fe8::7", "fec0::7", "ff:fe80::1", "2001:db8::ffff:1", "fd00::fe80"])
def test_hosts_similar_to_link_local_and_mapped_are_installed(host: str) -> None:
    tables = Memory()
    Channels(tables.tables).carry_out([installing(peer=PeerAddress((host, 9000, 0, 0)))])
    assert len(there(tables)) == 1


@pytest.mark.parametrize("inside", [True, False])
def test_only_inside_channels_are_hairpins(*, inside: bool) -> None:
    tables = Memory()
    Channels(tables.tables).carry_out([installing(inside=inside)])
    assert [each.is_hairpin for each in there(tables)] == [inside]


def test_a_peer_can_use_the_next_allocation_of_a_port() -> None:
    tables = Memory()
    channels = Channels(tables.tables)
    mine = installing()
    others = installing(CLIENTS[1])
    channels.carry_out([mine])
    channels.carry_out([removing(mine), others])
    assert [each.client[1] for each in there(tables)] == [CLIENTS[1][1]]


def test_a_channel_reinstalled_in_the_same_batch_counts_from_0() -> None:
    tables = Memory(bindings=2)
    channels = Channels(tables.tables)
    channels.carry_out([installing()])
    tables.count(0)
    channels.carry_out([removing(installing()), installing(until=UNTIL + 1)])
    (channel,) = there(tables)
    assert (channel.expires, tables.usage(0)) == (nanoseconds(UNTIL + 1), 0)


def test_a_channel_installed_twice_in_a_batch_has_the_later_expiry() -> None:
    tables = Memory()
    channels = Channels(tables.tables)
    changes = channels.carry_out([installing(), installing(until=UNTIL + 1)])
    assert [(slot, each.expires) for slot, each in tables.contents().items()] == [(0, nanoseconds(UNTIL + 1))]
    assert changes == {CLIENT[0]: True, PEER[0]: True}
    assert channels.carry_out([removing(installing())]) == {CLIENT[0]: False, PEER[0]: False}


def test_a_refreshed_channel_keeps_its_counts() -> None:
    tables = Memory()
    channels = Channels(tables.tables)
    channels.carry_out([installing()])
    tables.count(0)
    assert channels.carry_out([installing(until=UNTIL + 1)]) == {}
    assert tables.usage(0) == 1


def test_nothing_is_relayed_after_the_expiry() -> None:
    """The program's clock is late by up to a tick, and relays until its time is the entry's."""
    tables = Memory()
    Channels(tables.tables).carry_out([installing()])
    (channel,) = there(tables)
    assert channel.expires / 1e9 + time.clock_getres(6) <= UNTIL
    assert math.isclose(channel.expires / 1e9, UNTIL, abs_tol=0.02)


def test_channels_beyond_the_capacity_are_left_to_the_sockets() -> None:
    tables = Memory(bindings=2)
    channels = Channels(tables.tables)
    first, second, third = (installing(ClientAddress((CLIENT[0], 40000 + i)), port=RelayedPort(50000 + i)) for i in range(3))
    channels.carry_out([first, second, third])
    assert (len(there(tables)), channels.refused) == (2, 1)
    assert channels.carry_out([removing(third)]) == {}
    channels.carry_out([removing(first), third])
    assert (set(channels.installed), channels.refused) == ({(second.client, NUMBER), (third.client, NUMBER)}, 1)


def test_a_channel_without_room_for_its_second_host_uses_no_entry() -> None:
    tables = Memory(bindings=1)
    channels = Channels(tables.tables)
    assert channels.carry_out([installing()]) == {}
    assert (there(tables), channels.refused) == ([], 1)
    channels.carry_out([installing(CLIENTS[0], PEERS[2])])
    assert len(there(tables)) == 1


@pytest.mark.parametrize("count", [256, 257, 1000])
def test_many_channels_are_written_and_deleted_in_portions(count: int) -> None:
    """Other threads run during a system call."""
    tables = Memory(1001)
    channels = Channels(tables.tables)
    commands = many(count)
    channels.carry_out(commands)
    channels.carry_out(map(removing, commands))
    assert sum(tables.calls) == 2 * count
    assert max(tables.calls) == 256
    assert (there(tables), channels.installed, channels.refused) == ([], {}, 0)


def test_a_rejected_change_is_counted_and_raised() -> None:
    """The tables may still have ended channels: the caller detaches the program."""
    tables = Memory()
    channels = Channels(tables.tables)
    channels.carry_out([installing()])
    tables.works = False
    for command in (removing(installing()), installing(CLIENTS[1])):
        with pytest.raises(OSError, match="Cannot allocate memory"):
            channels.carry_out([command])
    assert channels.failures == 2


@needs_bpf
def test_ten_thousand_similar_channels_fit(object_file: bytes) -> None:
    """Consecutive hosts, ports and numbers."""
    program = XdpProgram(1 << 14, object_file)
    try:
        channels = Channels(program)
        channels.carry_out(
            InstallChannel(
                ClientAddress((f"10.{i % 7}.{i >> 8}.{i & 255}", 10000)),
                NUMBERS[0],
                RelayedPort(49152 + i),
                PeerAddress(("10.9.0.1", 10000 + i)),
                UNTIL,
            )
            for i in range(10000)
        )
        assert (len(channels.installed), channels.refused) == (10000, 0)
        assert len(Kernel(program).contents()) == 10000
    finally:
        program.close()
