"""Which channels the kernel relays: carries out the core's commands on the tables of the XDP program.

Both directions of a channel are installed and removed together, and all commands are carried out in their order: so the
channels of whoever had a port are gone before those of its next owner come.

A client may come with thousands of neighbours, and packets wait meanwhile: so this makes no objects that it can do without.
"""

import array
import gc
import itertools
import math
import re
import struct
from collections.abc import Callable, Iterable
from socket import inet_aton
from typing import Any, Final, Protocol, TypeAlias

from relay.core.addresses import ChannelNumber, ClientAddress, SocketAddress
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.offload import layout
from relay.offload.channel_tables import (
    BOTH_HALVES,
    BUCKET_SHIFT,
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
from relay.offload.layout import CHANNEL, CHANNEL_SIZE, HAIRPIN, V4_MAPPED, packed_address
from relay.offload.ticks import Ticks

_SPREAD: Final = 2654435761
"""A prime near 2³² over the golden ratio: neighbouring slots get labels far apart, and each one another."""
_FLOW_LABEL: Final = 0xFFFF0F00
"""The 20 bits that a flow label has in an IPv6 header, read as a little-endian number."""
_AT_ONCE: Final = 256
"""Numbers made ready when there is none left: to make them one by one would take a tenth of a channel's time."""
_VERSIONS: Final = 0x7FFFFFFF
"""A run of commands begins with a version below, so that none of it needs more than 32 bits."""
_NONE: Final = -1
"""An index that there is not."""
_NOT_AS_IN_PACKETS: Final = re.compile("::ffff:|fe[89ab][0-9a-f]:|.*%")
"""IPv6 hosts that packets don't have as they are, or that aren't the same host everywhere: IPv4 in disguise; link-local."""

_pack_into = CHANNEL.pack_into
_word = struct.Struct("=I").unpack


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


_Host: TypeAlias = tuple[int, bytes, int, str]
"""A host that channels lead to: its entry of `next_hops`, its address as the tables have it, what that adds to a hash, and
how the operating system spells it. No NamedTuple, which takes four times as long to be made, and five to be taken apart."""


class _Numbers:
    """Numbers from 0 up, given out and taken back; there are hardly more than were ever needed at once."""

    def __init__(self, count: int) -> None:
        self.free: list[int] = []
        """Those to be given out next, from the end."""
        self._made = 0
        self._count = count

    def make(self) -> int:
        """Make some that are free, if there may be more; give how many."""
        first = self._made
        self._made = min(first + _AT_ONCE, self._count)
        self.free += range(self._made - 1, first - 1, -1)
        return self._made - first


class _Hosts:
    """Those that channels lead to."""

    def __init__(self, count: int, hash_keys: HashKeys) -> None:
        self.known: dict[str, _Host] = {}
        self.channels: list[int] = []
        """How many lead there, by entry."""
        self.changes: dict[int, str | None] = {}
        """The hosts that entries are for from now on; None for nobody."""
        self._entries = _Numbers(count)
        self._hash_keys = hash_keys

    def follow(self, host: str) -> _Host | None:
        """Enter a host to which no channel leads yet; None if there is no room for it, or packets don't have it as it is."""
        free = self._entries.free
        if not free:
            self.channels += [0] * self._entries.make()
            if not free:
                return None
        if ":" in host:
            if not _is_plain(host):
                return None
            address = packed_address(host)
            sum_ = self._hash_keys.of_host(address)
        else:
            ipv4 = inet_aton(host)
            address, (word,) = V4_MAPPED + ipv4, _word(ipv4)
            sum_ = self._hash_keys.of_ipv4 + self._hash_keys.of_ipv4_host * word
        entry = free.pop()
        self.changes[entry] = host
        known = self.known[host] = (entry, address, sum_, host)
        return known

    def unfollow(self, host: _Host) -> None:
        """Count one channel less."""
        entry = host[0]
        count = self.channels[entry] = self.channels[entry] - 1
        if not count:
            self._leave(host)

    def unfollow_unused(self, host: str) -> None:
        """Leave a host if no channel leads to it."""
        known = self.known.get(host)
        if known is not None and not self.channels[known[0]]:
            self._leave(known)

    def _leave(self, host: _Host) -> None:
        entry = host[0]
        del self.known[host[3]]
        self._entries.free.append(entry)
        self.changes[entry] = None

    def take_changes(self) -> dict[int, str | None]:
        """Give what has changed since the last time."""
        changes, self.changes = self.changes, {}
        return changes


_Key: TypeAlias = tuple[ClientAddress, ChannelNumber]

_Installed: TypeAlias = tuple[_Key, _Host, _Host, int, int]
"""A channel that the kernel relays: the hosts of its client and its peer, and where those are in their tables."""


class Channels:
    """The channels that are installed, and the one place that installs and removes them.

    One thread at a time may use it; counters may be read by any.

    Args:
        tables: the program's.
        relayed_ports: of allocations.
        public_hosts: of relayed addresses.
    """

    def __init__(self, tables: ChannelTables, relayed_ports: range, public_hosts: Iterable[str]) -> None:
        self.installed: dict[_Key, int] = {}
        """Their indices: the usage of each is at index * 2 (to the peer) and index * 2 + 1 (to the client)."""
        self.by_index: list[_Installed | None] = []
        """They by index, as far as any may have been given out; None where there is no channel."""
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
        self._in_upper_half = array.array("I", (each << 16 for each in self._in_packet))
        self._ticks = tables.ticks
        self._indices = _Numbers(tables.bindings)
        self._used: list[int] = []
        """Indices that were taken back, whose usage is another channel's."""
        self._labels: list[int] = []
        """Flow labels, by index."""
        self._version = 1
        """Of the next channel. An odd number that no other has, so that whoever reads an entry meanwhile notices."""
        self._hosts = _Hosts(tables.next_hops, tables.hash_keys)
        self._act: dict[type, Callable[[Iterable[Any]], None]] = {
            InstallChannel: self._install,
            RemoveChannel: self._remove,
        }

    def carry_out(self, commands: Iterable[OffloadCommand]) -> dict[int, str | None]:
        """Do what the core commands.

        Returns:
            The entries of `next_hops` that have changed: the host that each is for from now on, or None for nobody.
        """
        # Nothing here is garbage, and to look for some among thousands of new entries would take a fifth of the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            for kind, run in itertools.groupby(commands, type):
                self._act[kind](run)
        finally:
            if collects:
                gc.enable()
        if self._used:
            self._clear()
        return self._hosts.take_changes()

    def _install(self, commands: Iterable[InstallChannel]) -> None:  # noqa: PLR0915 - see there
        """Install channels, or refresh them.

        As long as it is, without a call for the common case: a call takes as long as three or four of these lines.
        """
        enter, public = self.installed.setdefault, self._public_hosts
        in_packet, in_upper_half = self._in_packet, self._in_upper_half
        memory, words = self._tables.channels.memory, self._tables.channels.words
        clients, peers = self._tables.clients, self._tables.peers
        client_places, peer_places, mask, last = clients.places, peers.places, clients.mask, self._tables.hash_keys.last
        hosts, follow, leading_to = self._hosts.known.get, self._hosts.follow, self._hosts.channels
        free, labels, by_index = self._indices.free, self._labels, self.by_index
        epoch, per_second = self._ticks
        expires, previous = 0, math.nan
        version = self._version & _VERSIONS
        for client, number, port, peer, until in commands:
            if until != previous:
                expires, previous = int((until - epoch) * per_second) & LOWER_HALF, until
            flags = HAIRPIN if peer[0] in public and self._is_relayed(peer) else 0
            key = (client, number)
            index = free[-1] if free else _NONE
            known = enter(key, index)
            if known != index:
                word = known * WORDS
                words[word + EXPIRES], words[word + FLAGS] = expires, flags
                continue
            to_client, to_peer = hosts(client[0]) or follow(client[0]), hosts(peer[0]) or follow(peer[0])
            if index < 0 and to_client and to_peer:
                index = self.installed[key] = self._make_indices()
            if index < 0 or not to_client or not to_peer:
                self._refuse(key, peer)
                continue
            client_hop, client_host, client_sum, _ = to_client
            peer_hop, peer_host, peer_sum, _ = to_peer
            leading_to[client_hop] += 1
            leading_to[peer_hop] += 1
            client_rest = in_upper_half[number] | in_packet[client[1]]
            peer_rest = in_upper_half[port] | in_packet[peer[1]]
            # Without the stars that would have these in fewer lines: they make lists.
            _pack_into(
                memory,
                index * CHANNEL_SIZE,
                client_host,
                client_rest,
                peer_host,
                peer_rest,
                client_hop,
                peer_hop,
                expires,
                labels[index],
                flags,
            )
            words[index * WORDS + VERSION] = version
            version += 2
            place = index + 1
            low = client_sum + last * client_rest & BOTH_HALVES
            hash_ = (low >> 32 ^ low) * MIX
            entry = hash_ & UPPER_HALF | place
            at_client = hash_ >> BUCKET_SHIFT & mask
            if client_places[at_client]:
                at_client = clients.beside(at_client, entry)
            low = peer_sum + last * peer_rest & BOTH_HALVES
            hash_ = (low >> 32 ^ low) * MIX
            other_entry = hash_ & UPPER_HALF | place
            at_peer = hash_ >> BUCKET_SHIFT & mask
            if peer_places[at_peer]:
                at_peer = peers.beside(at_peer, other_entry)
            by_index[index] = (key, to_client, to_peer, at_client, at_peer)
            free.pop()
            if at_client < 0 or at_peer < 0:
                self.refused += 1
                self._remove([RemoveChannel(client, number, port, peer)])
                continue
            client_places[at_client], peer_places[at_peer] = entry, other_entry
        self._version = version

    def _make_indices(self) -> int:
        """Have some free indices, and give the next of them; `_NONE` if there is none."""
        indices = self._indices
        made = indices.make()
        if made:
            first = len(self.by_index)
            self.by_index += [None] * made
            # Any number but 0 does as a flow label, if it is one flow's only (RFC 6437 §3).
            self._labels += [(index + 1) * _SPREAD & _FLOW_LABEL for index in range(first, first + made)]
        elif self._used:
            self._clear()
        return indices.free[-1] if indices.free else _NONE

    def _refuse(self, key: _Key, peer: SocketAddress) -> None:
        """Leave a channel to the sockets; what was taken for it is given back."""
        del self.installed[key]
        hosts = key[0][0], peer[0]
        if all(map(_is_plain, hosts)):
            self.refused += 1
        for host in hosts:
            self._hosts.unfollow_unused(host)

    def _remove(self, commands: Iterable[RemoveChannel]) -> None:
        words = self._tables.channels.words
        client_places, peer_places = self._tables.clients.places, self._tables.peers.places
        take, used, unfollow, by_index = self.installed.pop, self._used.append, self._hosts.unfollow, self.by_index
        for client, number, _, _ in commands:
            index = take((client, number), None)
            known = None if index is None else by_index[index]
            if index is None or known is None:
                # There was no room for it.
                continue
            _, to_client, to_peer, at_client, at_peer = known
            words[index * WORDS + VERSION] = 0
            if at_client >= 0:
                client_places[at_client] = 0
            if at_peer >= 0:
                peer_places[at_peer] = 0
            by_index[index] = None
            used(index)
            unfollow(to_client)
            unfollow(to_peer)

    def _clear(self) -> None:
        """Have the usage of indices that were used begin at 0, and let other channels have them."""
        try:
            self._tables.clear(self._used)
        except OSError:
            self.failures += 1
        else:
            self._indices.free += self._used
            self._used.clear()

    def _is_relayed(self, peer: SocketAddress) -> bool:
        """Tell whether a peer at a public host is a relayed address of this relay: the other end is its client, too."""
        return peer[1] in self._relayed_ports and peer[0] in self.own_hosts


def _is_plain(host: str) -> bool:
    """Tell whether packets have a host as it is spelled, and whether there is only one such host."""
    return _NOT_AS_IN_PACKETS.match(host) is None
