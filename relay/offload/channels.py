"""Which channels the kernel relays: carries out the core's commands on the tables of the XDP program.

Both directions of a channel are installed and removed together, many channels in one system call: commands are carried out
in their order, run by run, where a run is either what lets the kernel relay more, or what lets it relay less. What ends an
allocation is a store to `ends`, which stops its channels before their entries are removed; and its time is not extended
before the entries of whoever had its port are gone.

A client may come with thousands of neighbours, and packets wait meanwhile: so this makes no objects that it can do without.
"""

import array
import itertools
import re
from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol, TypeAlias

from relay.core.addresses import ChannelNumber, ClientAddress, Family, SocketAddress
from relay.core.commands import ExtendAllocation, InstallChannel, OffloadCommand, RemoveChannel, StopAllocation
from relay.offload import layout
from relay.offload.layout import BINDING, END, HAIRPIN, packed_address
from relay.offload.ticks import Ticks

_SPREAD: Final = 2654435761
"""A prime near 2³² over the golden ratio: neighbouring slots get labels far apart, and each one another."""
_FLOW_LABEL: Final = 0xFFFF0F00
"""The 20 bits that a flow label has in an IPv6 header, read as a little-endian number."""
IPV4: Final = 2
"""Length of the address of an IPv4 socket."""
_NOT_AS_IN_PACKETS: Final = re.compile("::ffff:|fe[89ab][0-9a-f]:|.*%")
"""IPv6 hosts that packets don't have as they are, or that aren't the same host everywhere: IPv4 in disguise; link-local."""

_LESS: Final = (RemoveChannel, StopAllocation)
"""Commands to relay less."""

_pack_end, _pack_binding = END.pack, BINDING.pack
# As calling the class does, in half the time.
_new = tuple.__new__

Entries: TypeAlias = tuple[list[bytes], list[bytes]]
"""Keys, and the value of each."""


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


class Follow(NamedTuple):
    """Someone is needed to keep the next hop for a host current, at an entry of `next_hops`."""

    entry: int
    host: str


class Unfollow(NamedTuple):
    """That entry is free again."""

    entry: int
    host: str


class _Slots:
    """Numbers from 0 up, given out and taken back; there are only as many as were ever needed at once."""

    def __init__(self, count: int) -> None:
        self.fresh = 0
        """All from this one up were never given out."""
        self._count = count
        self._free: list[int] = []

    def take(self) -> int | None:
        """Give a number, or None if all are taken."""
        if self._free:
            return self._free.pop()
        if self.fresh == self._count:
            return None
        self.fresh += 1
        return self.fresh - 1

    def give_back(self, number: int) -> None:
        """Take one back."""
        self._free.append(number)


_End: TypeAlias = tuple[int, bytes, str]
"""A host that channels lead to: its entry in `next_hops`, and its address as the tables have it and as text."""


class _Hosts:
    """Those that channels lead to."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._ends: dict[str, _End] = {}
        self._channels: list[int] = []
        """How many lead there, by entry."""
        self._free: list[int] = []
        """Entries that were used before."""
        self._news: list[Follow | Unfollow] = []

    def follow(self, host: str) -> _End | None:
        """Count one more channel to a host; None if there is no room for it."""
        end = self._ends.get(host)
        if end is not None:
            self._channels[end[0]] += 1
            return end
        if self._free:
            entry = self._free.pop()
            self._channels[entry] = 1
        else:
            entry = len(self._channels)
            if entry == self._count:
                return None
            self._channels.append(1)
        end = self._ends[host] = (entry, packed_address(host), host)
        self._news.append(_new(Follow, (entry, host)))
        return end

    def unfollow(self, end: _End) -> None:
        """Count one channel less."""
        entry, _, host = end
        self._channels[entry] -= 1
        if not self._channels[entry]:
            del self._ends[host]
            self._free.append(entry)
            self._news.append(_new(Unfollow, (entry, host)))

    def news(self) -> list[Follow | Unfollow]:
        """Give what has changed since the last time."""
        news, self._news = self._news, []
        return news


_Installed: TypeAlias = tuple[int, _End, _End]
"""The slot of a channel that the kernel relays, whose usage is at slot * 2 (to the peer) and slot * 2 + 1 (to the client);
and its two ends, the client's first."""

_Key: TypeAlias = tuple[ClientAddress, ChannelNumber]


class _Batch:
    """What the next system calls are to put: keys and values as the kernel reads them."""

    __slots__ = ("channels", "keys", "peers", "to_clients", "to_peers", "used_before")

    def __init__(self) -> None:
        self.channels: list[bytes] = []
        self.to_peers: list[bytes] = []
        self.peers: list[bytes] = []
        self.to_clients: list[bytes] = []
        self.keys: list[_Key] = []
        self.used_before: list[int] = []
        """Slots whose usage is another channel's."""


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
        # A look-up takes a third of the time of a call.
        self._in_packet = array.array("H", map(layout.in_packet, range(1 << 16)))
        self._ticks = tables.ticks
        # Ticks.at, without the call.
        self._epoch, self._per_second = tables.ticks
        self._slots = _Slots(tables.bindings)
        self._hosts = _Hosts(tables.next_hops)

    def carry_out(self, commands: Iterable[OffloadCommand]) -> list[Follow | Unfollow]:
        """Do what the core commands; give the destinations that are needed from now on, and those that no longer are."""
        for is_less, run in itertools.groupby(commands, _is_less):
            if is_less:
                self._relay_less(run)
            else:
                self._relay_more(run)
        return self._hosts.news()

    def _relay_more(self, commands: Iterable[OffloadCommand]) -> None:
        batch = _Batch()
        find, enter, put = self.installed.get, self._enter, self._put
        for command in commands:
            if isinstance(command, InstallChannel):
                client, number, _, peer, _ = command
                key = (client, number)
                installed = find(key) or enter(key, peer, batch)
                if installed is not None:
                    batch.keys.append(key)
                    put(command, installed, batch)
            elif isinstance(command, ExtendAllocation):
                self._set_ends(command.port, command.families, self._ticks.at(command.until))
        if batch.keys:
            self._flush(batch)

    def _put(self, command: InstallChannel, installed: _Installed, batch: _Batch) -> None:
        client, number, port, peer, until = command
        in_packet = self._in_packet
        slot, (client_entry, client_host, _), (peer_entry, peer_host, _) = installed
        client_port, peer_port = client[1], peer[1]
        expires = int((until - self._epoch) * self._per_second)
        end = port * 2 + (len(peer) != IPV4)
        # Any number but 0 does as a flow label, if it is one flow's only (RFC 6437 §3).
        label = (slot + 1) * _SPREAD & _FLOW_LABEL
        sent_from, sent_to = in_packet[port], in_packet[peer_port]
        hairpin = HAIRPIN if peer[0] in self._public_hosts and self._is_relayed(peer) else 0
        batch.channels.append(_pack_end(client_host, client_port, number))
        batch.to_peers.append(
            _pack_binding(peer_host, expires, peer_entry, slot * 2, end, label, sent_to, sent_from, 0, hairpin)
        )
        sent_from, sent_to = self._service_port, in_packet[client_port]
        batch.peers.append(_pack_end(peer_host, peer_port, port))
        batch.to_clients.append(
            _pack_binding(
                client_host, expires, client_entry, slot * 2 + 1, end, label, sent_to, sent_from, in_packet[number], 0
            )
        )

    def _flush(self, batch: _Batch) -> None:
        try:
            if batch.used_before:
                self._tables.clear(batch.used_before)
            self._tables.install((batch.channels, batch.to_peers), (batch.peers, batch.to_clients))
        except OSError:
            # What is not in the kernel's tables is relayed by the sockets: nothing is lost but speed.
            self.failures += 1
            try:
                self._tables.remove(batch.channels, batch.peers)
            except OSError:
                self.is_broken = True
            for key in dict.fromkeys(batch.keys):
                self._forget(self.installed.pop(key))

    def _relay_less(self, commands: Iterable[OffloadCommand]) -> None:
        channels: list[bytes] = []
        peers: list[bytes] = []
        take, forget = self.installed.pop, self._forget
        for command in commands:
            if isinstance(command, RemoveChannel):
                client, number, port, peer = command
                installed = take((client, number), None)
                # None: there was no room for it.
                if installed is not None:
                    forget(installed)
                    channels.append(_pack_end(installed[1][1], client[1], number))
                    peers.append(_pack_end(installed[2][1], peer[1], port))
            elif isinstance(command, StopAllocation):
                self._set_ends(command.port, command.families, 0)
        if channels:
            try:
                self._tables.remove(channels, peers)
            except OSError:
                self.failures += 1
                self.is_broken = True

    def _set_ends(self, port: int, families: Iterable[Family], until: int) -> None:
        for family in families:
            self._tables.set_end(port * 2 + (family is Family.IPV6), until)

    def _is_relayed(self, peer: SocketAddress) -> bool:
        """Tell whether a peer at a public host is a relayed address of this relay: the other end is its client, too."""
        return peer[1] in self._relayed_ports and peer[0] in self.own_hosts

    def _enter(self, key: _Key, peer: SocketAddress, batch: _Batch) -> _Installed | None:
        client = key[0]
        if not (_is_plain(client) and _is_plain(peer)):
            return None
        fresh = self._slots.fresh
        slot = self._slots.take()
        if slot is None:
            self.refused += 1
            return None
        client_end = self._hosts.follow(client[0])
        peer_end = None if client_end is None else self._hosts.follow(peer[0])
        if client_end is None or peer_end is None:
            if client_end is not None:
                self._hosts.unfollow(client_end)
            self._slots.give_back(slot)
            self.refused += 1
            return None
        if slot < fresh:
            batch.used_before.append(slot)
        installed = self.installed[key] = (slot, client_end, peer_end)
        return installed

    def _forget(self, installed: _Installed) -> None:
        slot, client_end, peer_end = installed
        self._slots.give_back(slot)
        self._hosts.unfollow(client_end)
        self._hosts.unfollow(peer_end)


def _is_less(command: OffloadCommand) -> bool:
    return isinstance(command, _LESS)


def _is_plain(address: SocketAddress) -> bool:
    """Tell whether packets have an address's host as it is, and whether there is only one such host."""
    return len(address) == IPV4 or _NOT_AS_IN_PACKETS.match(address[0]) is None
