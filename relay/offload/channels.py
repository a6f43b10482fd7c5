"""Channels in the kernel: applies the core's commands to the tables of the XDP program.

Both directions of a channel are installed and removed together, and commands are applied in order: the channels of a port's
previous owner are removed before the channels of its next owner are installed.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from relay.core.addresses import ChannelNumber, ClientAddress, RelayedPort, SocketAddress
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.offload.layout import ADDRESS_LENGTH, END, HAIRPIN, NO_WAY, packed_address, packed_channel
from relay.offload.program import XdpProgram

_AT_ONCE: Final = 256
"""Channels per system call: other threads get the GIL about once a millisecond."""

_TICK: Final = time.clock_getres(6)
"""Seconds by which the program's clock may be late: the resolution of CLOCK_MONOTONIC_COARSE (6 in linux/time.h)."""

_NOT_AS_IN_PACKETS: Final = re.compile("::ffff:|fe[89ab][0-9a-f]:|.*%")
"""IPv6 hosts that packets spell differently (mapped IPv4) or depend on the link (link-local)."""


_Key: TypeAlias = tuple[ClientAddress, ChannelNumber]
_Installed: TypeAlias = tuple[int, bytes, bytes]
"""The slot of the counters, and the keys of both ends."""


class Channels:
    """The installed channels. No other class installs or removes channels.

    One thread at a time may use it. Any thread may read the counters.
    """

    def __init__(self, tables: XdpProgram) -> None:
        self.installed: dict[_Key, _Installed] = {}
        self.by_slot: list[_Key | None] = []
        """The channels by slot of their counters; None for a free slot."""
        self.refused = 0
        """Channels left to the sockets because a table was full."""
        self.failures = 0
        """Changes that the kernel has rejected."""
        self._tables = tables
        self._free: list[int] = []
        self._hosts: dict[str, int] = {}
        """The number of channels per destination."""
        self.places: dict[bytes, int] = {}
        """The places of destinations in `ways`."""
        self._free_places: list[int] = []
        self._changes: dict[str, bool] = {}
        self._act: dict[type, Callable[[Iterable[Any]], None]] = {
            InstallChannel: self._install,
            RemoveChannel: self._remove,
        }

    def carry_out(self, commands: Iterable[OffloadCommand]) -> dict[str, bool]:
        """Apply commands of the core.

        Returns:
            The hosts to which channels lead for the first time (True), or no longer (False).

        Raises:
            OSError: the kernel rejects a change, so that the tables may contain ended channels.
        """
        try:
            for kind, run in itertools.groupby(commands, type):
                while some := list(itertools.islice(run, _AT_ONCE)):
                    self._act[kind](some)
        except OSError:
            self.failures += 1
            raise
        changes, self._changes = self._changes, {}
        return changes

    def _install(self, commands: Iterable[InstallChannel]) -> None:
        """Install or refresh channels."""
        clients, peers = {}, {}
        for client, number, port, peer, until, inside in commands:
            key = (client, number)
            known = self.installed.get(key) or self._enter(key, port, peer)
            if known is None:
                continue
            slot, client_end, peer_end = known
            if inside:
                slot |= HAIRPIN
            expires = int((until - _TICK) * 1e9)
            places = self.places[client_end[:ADDRESS_LENGTH]], self.places[peer_end[:ADDRESS_LENGTH]]
            clients[client_end], peers[peer_end] = packed_channel(client_end, peer_end, expires, slot, places)
        self._tables.write_channels(clients, peers)

    def _enter(self, key: _Key, port: RelayedPort, peer: SocketAddress) -> _Installed | None:
        """Reserve a slot and the destinations of a new channel. Return None for a channel that the sockets relay."""
        client, number = key
        host, other = client[0], peer[0]
        followed, capacity = self._hosts, self._tables.bindings
        for each in (host, other):
            if ":" in each and _NOT_AS_IN_PACKETS.match(each):
                return None
        more = (host not in followed) + (other not in followed and other != host)
        if len(self.installed) >= capacity or len(followed) + more > capacity:
            self.refused += 1
            return None
        client_end = END.pack(packed_address(host), client[1], number)
        peer_end = END.pack(packed_address(other), peer[1], port)
        for each, end in ((host, client_end), (other, peer_end)):
            count = followed.get(each, 0)
            followed[each] = count + 1
            if not count:
                self._changes[each] = True
                place = self._free_places.pop() if self._free_places else len(self.places)
                self.places[end[:ADDRESS_LENGTH]] = place
        if self._free:
            slot = self._free.pop()
            self.by_slot[slot] = key
        else:
            slot = len(self.by_slot)
            self.by_slot.append(key)
        installed = self.installed[key] = (slot, client_end, peer_end)
        return installed

    def _remove(self, commands: Iterable[RemoveChannel]) -> None:
        clients, peers, slots, places = [], [], [], []
        for client, number, _, peer in commands:
            known = self.installed.pop((client, number), None)
            if known is None:
                # The sockets relay the channel.
                continue
            slot, client_end, peer_end = known
            clients.append(client_end)
            peers.append(peer_end)
            slots.append(slot)
            self.by_slot[slot] = None
            for host, end in ((client[0], client_end), (peer[0], peer_end)):
                count = self._hosts[host] = self._hosts[host] - 1
                if not count:
                    del self._hosts[host]
                    self._changes[host] = False
                    places.append(self.places.pop(end[:ADDRESS_LENGTH]))
        self._tables.delete_channels(clients, peers, slots)
        # The next hosts at these places start without a way.
        self._tables.write_ways(dict.fromkeys(places, NO_WAY))
        self._free += slots
        self._free_places += places
