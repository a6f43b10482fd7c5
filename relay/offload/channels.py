"""Which channels the kernel relays: carries out the core's commands on the tables of the XDP program.

Both directions of a channel are installed and removed together, many channels in one system call. What ends an allocation
is a store to `ends`, which is done at once and stops its channels; their entries are removed in the next batch. So the
order of a batch does not matter to packets, with one exception: an allocation's time is never extended before the entries
of whoever had its port are gone.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol, TypeAlias

from relay.core.addresses import ChannelNumber, ClientAddress, Family, SocketAddress
from relay.core.commands import ExtendAllocation, InstallChannel, OffloadCommand, RemoveChannel, StopAllocation
from relay.offload.layout import BINDING, END, HAIRPIN, in_packet, packed_address

_NANOSECONDS: Final = 1_000_000_000
_SPREAD: Final = 2654435761
"""A prime near 2³² over the golden ratio: neighbouring slots get labels far apart."""
_FLOW_LABEL: Final = 0xFFFF0F00
"""The 20 bits that a flow label has in an IPv6 header, read as a little-endian number."""
IPV4: Final = 2
"""Length of the address of an IPv4 socket."""


Entries: TypeAlias = tuple[list[bytes], list[bytes]]
"""Keys, and the value of each."""


class ChannelTables(Protocol):
    """The tables of the program, as far as channels go."""

    bindings: int
    """How many channels there is room for."""
    next_hops: int
    """How many destinations there is room for."""

    def install(self, channels: Entries, peers: Entries) -> None:
        """Put keys and values into the two tables; `OSError` if the kernel won't, and then there may be some of them."""

    def remove(self, channels: list[bytes], peers: list[bytes]) -> None:
        """Remove keys from the two tables, as far as they are there."""

    def clear(self, slots: list[int]) -> None:
        """Have the usage of channels begin at 0; `OSError` if the kernel won't."""

    def set_end(self, index: int, nanoseconds: int) -> None:
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
        self.count = count
        self.fresh = 0
        """All from this one up were never given out."""
        self._free: list[int] = []

    def take(self) -> int | None:
        """Give a number, or None if all are taken."""
        if self._free:
            return self._free.pop()
        if self.fresh == self.count:
            return None
        self.fresh += 1
        return self.fresh - 1

    def give_back(self, number: int) -> None:
        """Take one back."""
        self._free.append(number)


class _Destination:
    """A host that channels lead to."""

    __slots__ = ("channels", "entry", "host", "packed")

    def __init__(self, host: str, entry: int) -> None:
        self.host = host
        self.packed = packed_address(host)
        self.entry = entry
        self.channels = 0


_Installed: TypeAlias = tuple[int, _Destination, _Destination]
"""The slot of a channel that the kernel relays, whose usage is at slot * 2 (to the peer) and slot * 2 + 1 (to the client);
and its two ends, the client's first. No named tuple: to make one of those takes four times as long."""


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
        self._tables = tables
        self._service_port = in_packet(service_port)
        self._relayed_ports = relayed_ports
        self._public_hosts = frozenset(public_hosts)
        self._slots = _Slots(tables.bindings)
        self._entries = _Slots(tables.next_hops)
        self._destinations: dict[str, _Destination] = {}
        self._news: list[Follow | Unfollow] = []
        # What the next system call is to put or to remove: keys and values as the kernel reads them.
        self._channels: Entries = ([], [])
        self._peers: Entries = ([], [])
        self._entered: list[tuple[ClientAddress, ChannelNumber]] = []
        self._used_before: list[int] = []
        self._removed: tuple[list[bytes], list[bytes]] = ([], [])

    def carry_out(self, commands: Iterable[OffloadCommand]) -> list[Follow | Unfollow]:
        """Do what the core commands; give the destinations that are needed from now on, and those that no longer are."""
        for command in commands:
            if isinstance(command, InstallChannel):
                self._install(command)
            elif isinstance(command, RemoveChannel):
                self._remove(command)
            else:
                self._set_end(command)
        self._flush_removed()
        self._flush_installed()
        news = self._news
        self._news = []
        return news

    def _set_end(self, command: ExtendAllocation | StopAllocation) -> None:
        until = 0
        if isinstance(command, ExtendAllocation):
            # The port may have been another's a moment ago.
            self._flush_removed()
            until = int(command.until * _NANOSECONDS)
        for family in command.families:
            self._tables.set_end(command.port * 2 + (family is Family.IPV6), until)

    def _install(self, command: InstallChannel) -> None:
        client, number, port, peer, until = command
        if self._removed[0]:
            self._flush_removed()
        key = (client, number)
        installed = self.installed.get(key)
        if installed is None:
            installed = self._enter(key, peer)
            if installed is None:
                return
        slot, client_end, peer_end = installed
        expires = int(until * _NANOSECONDS)
        end = port * 2 + (len(peer) != IPV4)
        # Any number does as a flow label that is one flow's only (RFC 6437 §3).
        label = slot * _SPREAD & _FLOW_LABEL
        port_in_packet = in_packet(port)
        keys, values = self._channels
        keys.append(END.pack(client_end.packed, client[1], number))
        values.append(
            BINDING.pack(
                peer_end.packed,
                expires,
                peer_end.entry,
                slot * 2,
                end,
                label,
                in_packet(peer[1]),
                port_in_packet,
                0,
                HAIRPIN if peer[0] in self._public_hosts and self._is_relayed(peer) else 0,
            )
        )
        keys, values = self._peers
        keys.append(END.pack(peer_end.packed, peer[1], port))
        values.append(
            BINDING.pack(
                client_end.packed,
                expires,
                client_end.entry,
                slot * 2 + 1,
                end,
                label,
                in_packet(client[1]),
                self._service_port,
                in_packet(number),
                0,
            )
        )
        self._entered.append(key)

    def _is_relayed(self, peer: SocketAddress) -> bool:
        """Tell whether a peer at a public host is a relayed address of this relay: the other end is its client, too."""
        return peer[1] in self._relayed_ports and peer[0] in self.own_hosts

    def _enter(self, key: tuple[ClientAddress, ChannelNumber], peer: SocketAddress) -> _Installed | None:
        client = key[0]
        if not (_is_plain(client[0]) and _is_plain(peer[0])):
            return None
        fresh = self._slots.fresh
        slot = self._slots.take()
        ends = None if slot is None else self._follow_both(client[0], peer[0])
        if slot is None or ends is None:
            self.refused += 1
            if slot is not None:
                self._slots.give_back(slot)
            return None
        if slot < fresh:
            self._used_before.append(slot)
        installed = self.installed[key] = (slot, *ends)
        return installed

    def _remove(self, command: RemoveChannel) -> None:
        client, number, port, peer = command
        if self._entered:
            self._flush_installed()
        installed = self.installed.get((client, number))
        if installed is None:
            # There was no room for it.
            return
        _, client_end, peer_end = installed
        channels, peers = self._removed
        channels.append(END.pack(client_end.packed, client[1], number))
        peers.append(END.pack(peer_end.packed, peer[1], port))
        self._forget((client, number))

    def _forget(self, key: tuple[ClientAddress, ChannelNumber]) -> None:
        slot, client_end, peer_end = self.installed.pop(key)
        self._slots.give_back(slot)
        self._unfollow(client_end)
        self._unfollow(peer_end)

    def _follow_both(self, client: str, peer: str) -> tuple[_Destination, _Destination] | None:
        first = self._follow(client)
        second = None if first is None else self._follow(peer)
        if first is not None and second is not None:
            return first, second
        if first is not None:
            self._unfollow(first)
        return None

    def _follow(self, host: str) -> _Destination | None:
        destination = self._destinations.get(host)
        if destination is None:
            entry = self._entries.take()
            if entry is None:
                return None
            destination = self._destinations[host] = _Destination(host, entry)
            self._news.append(Follow(entry, host))
        destination.channels += 1
        return destination

    def _unfollow(self, destination: _Destination) -> None:
        destination.channels -= 1
        if not destination.channels:
            del self._destinations[destination.host]
            self._entries.give_back(destination.entry)
            self._news.append(Unfollow(destination.entry, destination.host))

    def _flush_installed(self) -> None:
        if not self._entered:
            return
        try:
            if self._used_before:
                self._tables.clear(self._used_before)
            self._tables.install(self._channels, self._peers)
        except OSError:
            # What is not in the kernel's tables is relayed by the sockets: nothing is lost but speed.
            self.failures += 1
            self._tables.remove(self._channels[0], self._peers[0])
            for key in dict.fromkeys(self._entered):
                self._forget(key)
        self._channels, self._peers = ([], []), ([], [])
        self._entered, self._used_before = [], []

    def _flush_removed(self) -> None:
        if self._removed[0]:
            self._tables.remove(*self._removed)
            self._removed = ([], [])


def _is_plain(host: str) -> bool:
    """Tell whether packets have a host's address as it is: not if it is link-local, nor if it is IPv4 in disguise."""
    return "%" not in host and not host.startswith("::ffff:")
