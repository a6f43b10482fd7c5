"""Which channels the kernel relays: carries out the core's commands on the tables of the XDP program.

Both directions of a channel are installed and removed together, and all commands are carried out in their order: so the
channels of whoever had a port are gone before those of its next owner come.

A client may come with thousands of neighbours, and packets wait meanwhile: so this makes no objects that it can do without.
"""

import array
import gc
import itertools
import re
from collections.abc import Callable, Iterable
from socket import inet_aton
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from relay.core.addresses import ChannelNumber, ClientAddress, SocketAddress
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.offload import layout
from relay.offload.channel_tables import (
    BOTH_HALVES,
    EXPIRES,
    FLAGS,
    LOWER_HALF,
    MIX,
    UPPER_HALF,
    VERSION,
    WORDS,
    ChannelTable,
    EndTable,
    HashKeys,
)
from relay.offload.layout import CHANNEL, CHANNEL_SIZE, HAIRPIN, PLACES, V4_MAPPED, packed_address
from relay.offload.ticks import Ticks

_SPREAD: Final = 2654435761
"""A prime near 2³² over the golden ratio: neighbouring slots get labels far apart, and each one another."""
_FLOW_LABEL: Final = 0xFFFF0F00
"""The 20 bits that a flow label has in an IPv6 header, read as a little-endian number."""
IPV4: Final = 2
"""Length of the address of an IPv4 socket."""
_NOT_AS_IN_PACKETS: Final = re.compile("::ffff:|fe[89ab][0-9a-f]:|.*%")
"""IPv6 hosts that packets don't have as they are, or that aren't the same host everywhere: IPv4 in disguise; link-local."""

_pack_into = CHANNEL.pack_into
# As calling the class does, in half the time.
_new = tuple.__new__


class ChannelTables(Protocol):
    """The tables of the program, as far as channels go."""

    bindings: int
    """How many channels there is room for."""
    next_hops: int
    """How many destinations there is room for."""
    ticks: Ticks
    """How they count time."""
    channels: ChannelTable
    clients: EndTable
    """Channels by client and channel number."""
    peers: EndTable
    """Channels by peer and relayed port."""
    hash_keys: HashKeys
    """Of the two."""

    def clear(self, indices: list[int]) -> None:
        """Have the usage of channels begin at 0; `OSError` if the kernel won't."""


class Follow(NamedTuple):
    """Someone is needed to keep the next hop for a host current, at an entry of `next_hops`."""

    entry: int
    host: str
    address: bytes
    """As the tables have it."""
    sum: int
    """What it adds to a hash."""


class Unfollow(NamedTuple):
    """That entry is free again."""

    entry: int
    host: str


class _Indices:
    """Numbers from 0 up, given out and taken back; there are only as many as were ever needed at once."""

    def __init__(self, count: int) -> None:
        self.free: list[int] = []
        self.used: list[int] = []
        """Those taken back, whose usage is another channel's."""
        self._fresh = 0
        """All from this one up were never given out."""
        self._count = count

    def take(self) -> int | None:
        """Give a number, or None if all are taken or used."""
        if self.free:
            return self.free.pop()
        if self._fresh == self._count:
            return None
        self._fresh += 1
        return self._fresh - 1

    def cleared(self) -> None:
        """Let those that were used be given out again."""
        self.free += self.used
        self.used.clear()


class _Hosts:
    """Those that channels lead to."""

    def __init__(self, count: int, hash_keys: HashKeys) -> None:
        self.ends: dict[str, Follow] = {}
        self.channels: list[int] = []
        """How many lead there, by entry."""
        self._count = count
        self._hash_keys = hash_keys
        self._free: list[int] = []
        """Entries that were used before."""
        self._news: list[Follow | Unfollow] = []

    def follow(self, host: str) -> Follow | None:
        """Enter a host to which no channel leads yet; None if there is no room for it."""
        if self._free:
            entry = self._free.pop()
        else:
            entry = len(self.channels)
            if entry == self._count:
                return None
            self.channels.append(0)
        if ":" in host:
            address = packed_address(host)
            sum_ = self._hash_keys.of_host(address)
        else:
            ipv4 = inet_aton(host)
            address, sum_ = V4_MAPPED + ipv4, self._hash_keys.of_ipv4(ipv4)
        end = self.ends[host] = _new(Follow, (entry, host, address, sum_))
        self._news.append(end)
        return end

    def unfollow(self, end: Follow) -> None:
        """Count one channel less."""
        entry = end[0]
        self.channels[entry] -= 1
        if not self.channels[entry]:
            self._leave(end)

    def unfollow_unused(self, end: Follow) -> None:
        """Leave a host to which no channel leads."""
        if not self.channels[end.entry] and end.host in self.ends:
            self._leave(end)

    def _leave(self, end: Follow) -> None:
        entry, host, _, _ = end
        del self.ends[host]
        self._free.append(entry)
        self._news.append(_new(Unfollow, (entry, host)))

    def news(self) -> list[Follow | Unfollow]:
        """Give what has changed since the last time."""
        news, self._news = self._news, []
        return news


_Key: TypeAlias = tuple[ClientAddress, ChannelNumber]

_Installed: TypeAlias = tuple[int, Follow, Follow, int, int]
"""A channel that the kernel relays: its index, with its usage at index * 2 (to the peer) and index * 2 + 1 (to the client);
the hosts of its client and its peer; and where those are in their tables."""


class Channels:
    """The channels that are installed, and the one place that installs and removes them.

    One thread at a time may use it; counters may be read by any.

    Args:
        tables: the program's.
        relayed_ports: of allocations.
        public_hosts: of relayed addresses.
    """

    def __init__(self, tables: ChannelTables, relayed_ports: range, public_hosts: Iterable[str]) -> None:
        self.installed: dict[_Key, _Installed] = {}
        self.by_index: list[_Key | None] = []
        """The same by index, as far as any was given out; None where there is no channel."""
        self.own_hosts: frozenset[str] = frozenset()
        """This machine's addresses, as they are now; any thread may set it."""
        self.refused = 0
        """Channels that the kernel's tables had no room for: userspace relays them."""
        self.failures = 0
        """How often the kernel did not let counters begin at 0: what they belong to isn't used until it does."""
        self._tables = tables
        self._relayed_ports = relayed_ports
        self._public_hosts = frozenset(public_hosts)
        # A look-up takes a third of the time of a call.
        self._in_packet = array.array("H", map(layout.in_packet, range(1 << 16)))
        self._ticks = tables.ticks
        self._indices = _Indices(tables.bindings)
        self._hosts = _Hosts(tables.next_hops, tables.hash_keys)
        self._act: dict[type, Callable[[Iterable[Any]], None]] = {
            InstallChannel: self._install,
            RemoveChannel: self._remove,
        }

    def carry_out(self, commands: Iterable[OffloadCommand]) -> list[Follow | Unfollow]:
        """Do what the core commands; give the destinations that are needed from now on, and those that no longer are."""
        # Nothing here is garbage, and to look for some among thousands of new entries would take a fifth of the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            for kind, run in itertools.groupby(commands, type):
                self._act[kind](run)
        finally:
            if collects:
                gc.enable()
        if self._indices.used:
            self._clear()
        return self._hosts.news()

    def _install(self, commands: Iterable[InstallChannel]) -> None:  # noqa: PLR0915 - see there
        """Install channels, or refresh them.

        As long as it is, without a call for the common case: a call takes as long as three or four of these lines.
        """
        installed, in_packet, public = self.installed, self._in_packet, self._public_hosts
        memory, words = self._tables.channels.memory, self._tables.channels.words
        clients, peers = self._tables.clients, self._tables.peers
        client_places, peer_places, mask, last = clients.places, peers.places, clients.mask, self._tables.hash_keys.last
        ends, follow, leading_to = self._hosts.ends.get, self._hosts.follow, self._hosts.channels
        free, take, by_index = self._indices.free, self._take_index, self.by_index
        epoch, per_second = self._ticks
        for client, number, port, peer, until in commands:
            expires = int((until - epoch) * per_second) & LOWER_HALF
            flags = HAIRPIN if peer[0] in public and self._is_relayed(peer) else 0
            key = (client, number)
            known = installed.get(key)
            if known is not None:
                word = known[0] * WORDS
                words[word + EXPIRES], words[word + FLAGS] = expires, flags
                continue
            if (len(client) != IPV4 and not _is_plain(client)) or (len(peer) != IPV4 and not _is_plain(peer)):
                continue
            to_client, to_peer = ends(client[0]) or follow(client[0]), ends(peer[0]) or follow(peer[0])
            index = free.pop() if free else take()
            if index is None or to_client is None or to_peer is None:
                self._refuse(index, to_client, to_peer)
                continue
            client_hop, _, client_host, client_sum = to_client
            peer_hop, _, peer_host, peer_sum = to_peer
            leading_to[client_hop] += 1
            leading_to[peer_hop] += 1
            client_port, tag = in_packet[client[1]], in_packet[number]
            peer_port, relayed_port = in_packet[peer[1]], in_packet[port]
            # Any number but 0 does as a flow label, if it is one flow's only (RFC 6437 §3).
            label = (index + 1) * _SPREAD & _FLOW_LABEL
            # Without the stars that would have these in fewer lines: they make lists.
            _pack_into(
                memory,
                index * CHANNEL_SIZE,
                client_host,
                client_port,
                tag,
                peer_host,
                peer_port,
                relayed_port,
                client_hop,
                peer_hop,
                expires,
                label,
                flags,
            )
            version = index * WORDS + VERSION
            words[version] = words[version] + 1 & LOWER_HALF
            low = client_sum + last * (tag << 16 | client_port) & BOTH_HALVES
            hash_ = (low >> 32 ^ low) * MIX
            entry = hash_ & UPPER_HALF | index + 1
            at_client = (hash_ >> 16 & mask) * PLACES
            if client_places[at_client]:
                at_client = clients.beside(at_client, entry)
            low = peer_sum + last * (relayed_port << 16 | peer_port) & BOTH_HALVES
            hash_ = (low >> 32 ^ low) * MIX
            other_entry = hash_ & UPPER_HALF | index + 1
            at_peer = (hash_ >> 16 & mask) * PLACES
            if peer_places[at_peer]:
                at_peer = peers.beside(at_peer, other_entry)
            installed[key] = (index, to_client, to_peer, at_client, at_peer)
            by_index[index] = key
            if at_client < 0 or at_peer < 0:
                self.refused += 1
                self._remove([RemoveChannel(client, number, port, peer)])
                continue
            client_places[at_client], peer_places[at_peer] = entry, other_entry

    def _take_index(self) -> int | None:
        """Give the index of no channel, or None if there is none."""
        index = self._indices.take()
        if index is None and self._indices.used:
            self._clear()
            index = self._indices.take()
        if index == len(self.by_index):
            self.by_index.append(None)
        return index

    def _refuse(self, index: int | None, *ends: Follow | None) -> None:
        """Give back what was taken for a channel that there is no room for."""
        self.refused += 1
        if index is not None:
            self._indices.free.append(index)
        for end in ends:
            if end is not None:
                self._hosts.unfollow_unused(end)

    def _remove(self, commands: Iterable[RemoveChannel]) -> None:
        words = self._tables.channels.words
        client_places, peer_places = self._tables.clients.places, self._tables.peers.places
        take, used, unfollow = self.installed.pop, self._indices.used.append, self._hosts.unfollow
        for client, number, _, _ in commands:
            known = take((client, number), None)
            if known is None:
                # There was no room for it.
                continue
            index, to_client, to_peer, at_client, at_peer = known
            version = index * WORDS + VERSION
            words[version] = words[version] + 1 & LOWER_HALF
            if at_client >= 0:
                client_places[at_client] = 0
            if at_peer >= 0:
                peer_places[at_peer] = 0
            self.by_index[index] = None
            used(index)
            unfollow(to_client)
            unfollow(to_peer)

    def _clear(self) -> None:
        """Have the usage of indices that were used begin at 0, and let other channels have them."""
        try:
            self._tables.clear(self._indices.used)
        except OSError:
            self.failures += 1
        else:
            self._indices.cleared()

    def _is_relayed(self, peer: SocketAddress) -> bool:
        """Tell whether a peer at a public host is a relayed address of this relay: the other end is its client, too."""
        return peer[1] in self._relayed_ports and peer[0] in self.own_hosts


def _is_plain(address: SocketAddress) -> bool:
    """Tell whether packets have an IPv6 address's host as it is, and whether there is only one such host."""
    return _NOT_AS_IN_PACKETS.match(address[0]) is None
