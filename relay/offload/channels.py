"""Which channels the kernel relays: carries out the core's commands on the tables of the XDP program.

Both directions of a channel are installed and removed together, many channels in one system call: commands are carried out
in their order, run by run, where a run is either what lets the kernel relay more, or what lets it relay less. What ends an
allocation is a store to `ends`, which stops its channels before their entries are removed; and its time is not extended
before the entries of whoever had its port are gone.

A client may come with thousands of neighbours, and packets wait meanwhile: so this makes no objects that it can do without.
"""

import itertools
import operator
import re
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol, TypeAlias, cast

from relay.core.addresses import ChannelNumber, ClientAddress, Family, PeerAddress, SocketAddress
from relay.core.commands import ExtendAllocation, InstallChannel, OffloadCommand, RemoveChannel, StopAllocation
from relay.offload import layout
from relay.offload.layout import BINDING, END, HAIRPIN, packed_address
from relay.offload.rows import pack_rows
from relay.offload.ticks import Ticks

_SPREAD: Final = 2654435761
"""A prime near 2³² over the golden ratio: neighbouring slots get labels far apart, and each one another."""
_FLOW_LABEL: Final = 0xFFFF0F00
"""The 20 bits that a flow label has in an IPv6 header, read as a little-endian number."""
PORTION: Final = 512
"""Channels that a batch has at most: each is made in memory that the one before has left, and the kernel gives no new."""
IPV4: Final = 2
"""Length of the address of an IPv4 socket."""
_NOT_AS_IN_PACKETS: Final = re.compile("::ffff:|fe[89ab][0-9a-f]:|.*%")
"""IPv6 hosts that packets don't have as they are, or that aren't the same host everywhere: IPv4 in disguise; link-local."""

_pack_end = END.pack
_host, _port = operator.itemgetter(0), operator.itemgetter(1)
_V4_MAPPED: Final = packed_address("0.0.0.0")[:12]  # noqa: S104 - nothing is bound

Entries: TypeAlias = tuple[bytes, bytes]
"""Keys, one after the other, and the value of each."""


class ChannelTables(Protocol):
    """The tables of the program, as far as channels go."""

    bindings: int
    """How many channels there is room for."""
    next_hops: int
    """How many destinations there is room for."""
    ticks: Ticks
    """How they count time."""

    def install(self, channels: Entries, peers: Entries) -> None:
        """Put keys and values into the two tables; `OSError` if the kernel won't, and then there may be some of them."""

    def remove(self, channels: list[bytes], peers: list[bytes]) -> None:
        """Remove keys from the two tables, as far as they are there; `OSError` if the kernel won't."""

    def clear(self, slots: list[int]) -> None:
        """Have the usage of channels begin at 0; `OSError` if the kernel won't."""

    def set_end(self, index: int, tick: int) -> None:
        """Set until when anything is relayed for a relayed address."""


Follow: TypeAlias = tuple[int, str]
"""Someone is needed to keep the next hop current: at an entry of `next_hops`, for a host."""

Unfollow: TypeAlias = int
"""That entry is free again."""


class _Numbers:
    """Numbers from 0 up, given out and taken back; there are only as many as were ever needed at once."""

    def __init__(self, count: int) -> None:
        self.fresh = 0
        """All from this one up were never given out."""
        self._count = count
        self._free: list[int] = []

    @property
    def left(self) -> int:
        """How many there are to be given out."""
        return len(self._free) + self._count - self.fresh

    def take(self, count: int) -> list[int]:
        """Give some, no more than are left; those that were given out before come first."""
        first = max(0, len(self._free) - count)
        taken = self._free[first:]
        del self._free[first:]
        end = self.fresh + count - len(taken)
        taken.extend(range(self.fresh, end))
        self.fresh = end
        return taken

    def give_back(self, number: int) -> None:
        """Take one back."""
        self._free.append(number)


class _Hosts:
    """Those that channels lead to, each with an entry of `next_hops`."""

    def __init__(self, count: int) -> None:
        self.packed: list[bytes] = []
        """Each as the tables have it, by entry."""
        self._names: list[str] = []
        """And as text."""
        self._channels: list[int] = []
        """And how many lead there."""
        self._known: dict[str, int] = {}
        self._entries = _Numbers(count)
        self._news: list[Follow | Unfollow] = []

    def follow(self, hosts: list[str]) -> list[int] | None:
        """Count one more channel to each, and give their entries; None, and nothing done, if there is no room for all."""
        known, channels = self._known, self._channels
        missing = list(dict.fromkeys(itertools.filterfalse(known.__contains__, hosts)))
        if missing:
            if len(missing) > self._entries.left:
                return None
            self._enter(missing)
        entries = list(map(known.__getitem__, hosts))
        for entry in entries:
            channels[entry] += 1
        return entries

    def _enter(self, hosts: list[str]) -> None:
        entries = self._entries.take(len(hosts))
        self._known.update(zip(hosts, entries, strict=True))
        self._news += zip(entries, hosts, strict=True)
        packed = _packed_addresses(hosts)
        # Those that others had come first, and all the rest is new.
        reused = len(hosts) - (self._entries.fresh - len(self.packed))
        for entry, host, address in zip(entries[:reused], hosts, packed, strict=False):
            self._names[entry], self.packed[entry] = host, address
        self._names += hosts[reused:]
        self.packed += packed[reused:]
        self._channels += bytes(len(hosts) - reused)

    def unfollow(self, entry: int) -> None:
        """Count one channel less."""
        self._channels[entry] -= 1
        if not self._channels[entry]:
            del self._known[self._names[entry]]
            self._entries.give_back(entry)
            self._news.append(entry)

    def news(self) -> list[Follow | Unfollow]:
        """Give what has changed since the last time."""
        news, self._news = self._news, []
        return news


_Installed: TypeAlias = tuple[int, int, int]
"""The slot of a channel that the kernel relays, whose usage is at slot * 2 (to the peer) and slot * 2 + 1 (to the client);
and the entries of its two ends in `next_hops`, the client's first."""

_Key: TypeAlias = tuple[ClientAddress, ChannelNumber]

_Columns: TypeAlias = tuple[tuple[Any, ...], ...]
"""The fields of many `InstallChannel`s."""


class Channels:
    """The channels that are installed, and the one place that installs and removes them.

    One thread at a time may use it; counters may be read by any.

    Args:
        tables: the program's.
        service_port: where clients send to.
        relayed_ports: of allocations.
        public_hosts: of relayed addresses.
    """

    def __init__(self, tables: ChannelTables, service_port: int, relayed_ports: range, public_hosts: Iterable[str]) -> None:
        self.installed: dict[tuple[ClientAddress, ChannelNumber], _Installed] = {}
        self.own_hosts: frozenset[str] = frozenset()
        """This machine's addresses, as they are now; any thread may set it."""
        self.refused = 0
        """Channels that the kernel's tables had no room for: userspace relays them."""
        self.failures = 0
        """Batches that the kernel did not take."""
        self.is_broken = False
        """Whether there are channels in the tables that should not be: then the program is not to be trusted any more."""
        self._tables = tables
        self._service_port = layout.in_packet(service_port)
        self._relayed_ports = relayed_ports
        self._public_hosts = frozenset(public_hosts)
        self._ticks = tables.ticks
        # Ticks.at, without the call.
        self._epoch, self._per_second = tables.ticks
        self._slots = _Numbers(tables.bindings)
        self._hosts = _Hosts(tables.next_hops)

    def carry_out(self, commands: Iterable[OffloadCommand]) -> list[Follow | Unfollow]:
        """Do what the core commands; give the destinations that are needed from now on, and those that no longer are."""
        more: list[InstallChannel] = []
        less: list[RemoveChannel] = []
        for kind, run in itertools.groupby(commands, type):
            if kind is InstallChannel or kind is ExtendAllocation:
                self._remove(less)
            else:
                self._install(more)
            if kind is InstallChannel:
                more.extend(cast("Iterable[InstallChannel]", run))
            elif kind is RemoveChannel:
                less.extend(cast("Iterable[RemoveChannel]", run))
            else:
                self._set_ends(cast("Iterable[ExtendAllocation | StopAllocation]", run))
        self._install(more)
        self._remove(less)
        return self._hosts.news()

    def _install(self, commands: list[InstallChannel]) -> None:
        """Install or refresh channels, and forget the commands."""
        for first in range(0, len(commands), PORTION):
            self._install_portion(commands[first : first + PORTION])
        commands.clear()

    def _install_portion(self, commands: list[InstallChannel]) -> None:
        columns = tuple(zip(*commands, strict=True))
        clients, numbers, _, peers, _ = columns
        keys: list[_Key] = list(zip(clients, numbers, strict=True))
        known = self.installed
        new = {key: peer for key, peer in zip(keys, peers, strict=True) if key not in known}
        if new and {*map(len, clients), *map(len, peers)} != {IPV4}:
            new = {key: peer for key, peer in new.items() if _is_plain(key[0]) and _is_plain(peer)}
        used_before = self._enter(new) if new else []
        found = list(map(known.get, keys))
        installed = list(filter(None, found))
        if len(installed) < len(keys):
            left_out = [command for command, each in zip(commands, found, strict=True) if each is None]
            self.refused += sum(_is_plain(client) and _is_plain(peer) for client, _, _, peer, _ in left_out)
            columns = tuple(zip(*itertools.compress(commands, found), strict=True))
            keys = list(itertools.compress(keys, found))
        if installed:
            self._put(keys, *self._packed(columns, installed), used_before)

    def _enter(self, channels: dict[_Key, PeerAddress]) -> list[int]:
        """Take what new channels need, as far as there is room; give the slots whose usage is another channel's."""
        clients = [client for client, _ in channels]
        count = len(clients)
        ends = None
        if count <= self._slots.left:
            ends = self._hosts.follow([*map(_host, clients), *map(_host, channels.values())])
        if ends is None:
            # One by one, there may be room for some.
            return [slot for each in channels.items() for slot in self._enter(dict((each,)))] if count > 1 else []
        fresh = self._slots.fresh
        slots = self._slots.take(count)
        self.installed.update(zip(channels, zip(slots, ends[:count], ends[count:], strict=True), strict=True))
        return [slot for slot in slots if slot < fresh]

    def _packed(self, columns: _Columns, installed: list[_Installed]) -> tuple[Entries, Entries]:
        """Give what is to be in the two tables, column by column."""
        clients, numbers, ports, peers, untils = columns
        slots, client_entries, peer_entries = zip(*installed, strict=True)
        packed = self._hosts.packed.__getitem__
        client_hosts, peer_hosts = list(map(packed, client_entries)), list(map(packed, peer_entries))
        client_ports, peer_ports = list(map(_port, clients)), list(map(_port, peers))
        # What comes together ends together. As Ticks.at does, without the call.
        epoch, per_second = self._epoch, self._per_second
        ticks = {until: int((until - epoch) * per_second) for until in set(untils)}
        expiries = list(map(ticks.__getitem__, untils))
        ends = [port * 2 + (len(peer) != IPV4) for port, peer in zip(ports, peers, strict=True)]
        # Any number but 0 does as a flow label, if it is one flow's only (RFC 6437 §3).
        labels = [(slot + 1) * _SPREAD & _FLOW_LABEL for slot in slots]
        there = [slot * 2 for slot in slots]
        back = [slot * 2 + 1 for slot in slots]
        public = self._public_hosts
        hairpins = [HAIRPIN if peer[0] in public and self._is_relayed(peer) else 0 for peer in peers]
        none = [0] * len(slots)
        service = [self._service_port] * len(slots)
        to_client, to_peer, relayed, carried = map(_in_packets, (client_ports, peer_ports, ports, numbers))
        # In the order of `BINDING`.
        values = (peer_hosts, expiries, peer_entries, there, ends, labels, to_peer, relayed, none, hairpins)
        values_back = (client_hosts, expiries, client_entries, back, ends, labels, to_client, service, carried, none)
        return (
            (pack_rows(END, client_hosts, client_ports, numbers), pack_rows(BINDING, *values)),
            (pack_rows(END, peer_hosts, peer_ports, ports), pack_rows(BINDING, *values_back)),
        )

    def _put(self, keys: list[_Key], channels: Entries, peers: Entries, used_before: list[int]) -> None:
        try:
            if used_before:
                self._tables.clear(used_before)
            self._tables.install(channels, peers)
        except OSError:
            # What is not in the kernel's tables is relayed by the sockets: nothing is lost but speed.
            self.failures += 1
            try:
                self._tables.remove(_split(channels), _split(peers))
            except OSError:
                self.is_broken = True
            for key in dict.fromkeys(keys):
                self._forget(self.installed.pop(key))

    def _remove(self, commands: list[RemoveChannel]) -> None:
        """Remove channels, and forget the commands."""
        if not commands:
            return
        channels: list[bytes] = []
        peers: list[bytes] = []
        take, forget, packed = self.installed.pop, self._forget, self._hosts.packed
        for client, number, port, peer in commands:
            installed = take((client, number), None)
            # None: there was no room for it.
            if installed is not None:
                forget(installed)
                channels.append(_pack_end(packed[installed[1]], client[1], number))
                peers.append(_pack_end(packed[installed[2]], peer[1], port))
        commands.clear()
        if channels:
            try:
                self._tables.remove(channels, peers)
            except OSError:
                self.failures += 1
                self.is_broken = True

    def _set_ends(self, commands: Iterable[ExtendAllocation | StopAllocation]) -> None:
        for command in commands:
            until = self._ticks.at(command.until) if isinstance(command, ExtendAllocation) else 0
            for family in command.families:
                self._tables.set_end(command.port * 2 + (family is Family.IPV6), until)

    def _is_relayed(self, peer: SocketAddress) -> bool:
        """Tell whether a peer at a public host is a relayed address of this relay: the other end is its client, too."""
        return peer[1] in self._relayed_ports and peer[0] in self.own_hosts

    def _forget(self, installed: _Installed) -> None:
        slot, client_entry, peer_entry = installed
        self._slots.give_back(slot)
        self._hosts.unfollow(client_entry)
        self._hosts.unfollow(peer_entry)


def _packed_addresses(hosts: list[str]) -> list[bytes]:
    """Do what `packed_address` does, with many."""
    if ":" in "".join(hosts):
        return list(map(packed_address, hosts))
    return list(map(_V4_MAPPED.__add__, map(socket.inet_aton, hosts)))


def _is_plain(address: SocketAddress) -> bool:
    """Tell whether packets have an address's host as it is, and whether there is only one such host."""
    return len(address) == IPV4 or _NOT_AS_IN_PACKETS.match(address[0]) is None


def _in_packets(numbers: Sequence[int]) -> Sequence[int]:
    """Do what `layout.in_packet` does, with many."""
    return struct.unpack(f"={len(numbers)}H", struct.pack(f">{len(numbers)}H", *numbers))


def _split(entries: Entries) -> list[bytes]:
    """Give the keys one by one."""
    keys, _ = entries
    return [keys[at : at + END.size] for at in range(0, len(keys), END.size)]
