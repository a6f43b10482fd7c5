"""Scans of the traffic of all allocations, from which rates and orders are derived.

The tables belong to another thread, which keeps changing them. A copy of a dict is atomic. An allocation in the copy may end
meanwhile; then its last counts are used.
"""

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network
from itertools import islice

from relay.core.addresses import AllocationId, pack_host
from relay.core.allocation import Allocation, ChannelBinding
from relay.ops.totals import RelayState, RelayTotals, TrafficCounts, counts_in
from relay.ops.yielder import Yielder
from relay.status.model import Selection

RUN_LENGTH = 512
"""Allocations sorted in a step, which takes a quarter of a millisecond."""

_CHANNEL_BITS = 16
_NO_TRAFFIC = TrafficCounts()


class Scan:
    """Traffic of all allocations at a moment, and rates since the scan ``before``, of the last minute."""

    def __init__(self, state: RelayState, at: float, before: "Scan | None", yield_if_due: Yielder) -> None:
        self.at = at
        self._yield_if_due = yield_if_due
        self.before = before
        self.seconds = None if before is None else at - before.at
        """The time since the previous scan."""
        if before is not None:
            before.before = None
        self._tables = state.tables
        self._kernel_places: dict[int, int] = {}
        self._kernel_counts = array("Q")
        """Traffic relayed by the kernel: the fields of `TrafficCounts`, by channel. To free as many tuples takes
        milliseconds."""
        self._read_kernel(state)
        self.traffic = RelayTotals(state).traffic
        """Traffic of the relay on both data paths."""
        self._bytes: dict[AllocationId, tuple[int, int]] = {}
        """Bytes to peers and to clients, of all allocations."""
        for id_ in yield_if_due.between(list(state.tables.by_id)):
            allocation = state.tables.by_id.get(id_)
            if allocation is not None:
                counts, _ = self.counts_of(allocation, list(allocation.channels.values()))
                self._bytes[id_] = counts.to_peer_bytes, counts.to_client_bytes
        self._orders: dict[tuple[str, bool], tuple[list[AllocationId], Iterator[AllocationId]]] = {}
        """By sort key and direction: the ids so far, and the rest, which is merged when a page needs it."""

    def __len__(self) -> int:
        """Return the number of allocations."""
        return len(self._bytes)

    def matching(self, selection: Selection, ids: Iterable[AllocationId]) -> list[AllocationId]:
        """Return the ids of current allocations with the selected client, peer and port, in the given order."""
        client, peer = (each and ip_network(each) for each in (selection["client"], selection["peer"]))
        found = []
        for id_ in self._yield_if_due.between(ids):
            allocation = self._tables.by_id.get(id_)
            if allocation is None or selection["port"] not in (None, allocation.port):
                continue
            if client and ip_address(allocation.client[0]) not in client:
                continue
            channels = self._yield_if_due.between(allocation.channels.values() if peer else ())
            if not peer or any(ip_address(channel.peer[0]) in peer for channel in channels):
                found.append(id_)
        return found

    @property
    def rates(self) -> list[float] | None:
        """Traffic per second of the relay since the previous scan: the fields of `TrafficCounts`."""
        if self.before is None or self.seconds is None:
            return None
        return [(now - then) / self.seconds for now, then in zip(self.traffic, self.before.traffic, strict=True)]

    def bytes_of(self, allocation: AllocationId) -> tuple[int, int]:
        """Return the bytes to peers and to clients; 0 for an allocation made after the scan."""
        return self._bytes.get(allocation, (0, 0))

    def rates_of(self, allocation: AllocationId) -> tuple[float, float] | None:
        """Return the bytes per second to peers and to clients; None if unknown."""
        if self.before is None or self.seconds is None:
            return None
        # A new allocation relayed all its bytes since the previous scan.
        now, then = self.bytes_of(allocation), self.before.bytes_of(allocation)
        return max(0.0, (now[0] - then[0]) / self.seconds), max(0.0, (now[1] - then[1]) / self.seconds)

    def kernel_counts_of(self, channel: ChannelBinding) -> Sequence[int]:
        """Return the traffic that the kernel relayed for a channel: the fields of `TrafficCounts`."""
        at = self._kernel_places.get(_key(channel))
        return _NO_TRAFFIC if at is None else self._kernel_counts[at : at + len(_NO_TRAFFIC)]

    def counts_of(self, allocation: Allocation, channels: Sequence[ChannelBinding]) -> tuple[TrafficCounts, TrafficCounts]:
        """Return the traffic of an allocation, and the part that the kernel relayed.

        Traffic that the kernel relayed for closed channels is unknown.
        """
        to_peer_packets, to_peer_bytes, to_client_packets, to_client_bytes = counts_in(allocation)
        by_kernel = _NO_TRAFFIC
        # Four sums take half the time of `TrafficCounts.plus`.
        for channel in self._yield_if_due.between(channels):
            to_peer_packets += channel.to_peer_packets
            to_peer_bytes += channel.to_peer_bytes
            to_client_packets += channel.to_client_packets
            to_client_bytes += channel.to_client_bytes
            if self._kernel_places:
                by_kernel = by_kernel.plus(self.kernel_counts_of(channel))
        return by_kernel.plus((to_peer_packets, to_peer_bytes, to_client_packets, to_client_bytes)), by_kernel

    def order(self, sort: str, upto: int, *, descending: bool) -> list[AllocationId]:
        """Return the ids of the first allocations in an order. An allocation may have ended before its id is looked up."""
        ordered, rest = self._orders.setdefault((sort, descending), ([], self._sorted(sort, descending)))
        ordered.extend(self._yield_if_due.between(islice(rest, max(0, upto - len(ordered)))))
        return ordered[:upto]

    def _sorted(self, sort: str, descending: bool) -> Iterator[AllocationId]:  # noqa: FBT001 - the key of an order
        """Yield the ids of all allocations in an order. A single sort would take milliseconds."""
        keys: dict[AllocationId, float] = {}
        for id_ in self._yield_if_due.between(self._bytes):
            allocation = self._tables.by_id.get(id_)
            # The place of an ended allocation is irrelevant.
            keys[id_] = 0 if allocation is None else SORTS[sort](allocation, self)
        ids, runs = list(keys), []
        for first in range(0, len(ids), RUN_LENGTH):
            runs.append(sorted(ids[first : first + RUN_LENGTH], key=keys.__getitem__, reverse=descending))
            self._yield_if_due()
        yield from heapq.merge(*runs, key=keys.__getitem__, reverse=descending)

    def _read_kernel(self, state: RelayState) -> None:
        channels, inside = state.tables.live_channels, state.tables.inside_channels
        for portion in () if state.datapath is None else state.datapath.usage():
            for client, number, to_peer, to_client in portion:
                channel = channels.get(client, {}).get(number) or inside.get(client, {}).get(number)
                if channel is not None:
                    self._kernel_places[_key(channel)] = len(self._kernel_counts)
                    self._kernel_counts.extend((to_peer.packets, to_peer.bytes, to_client.packets, to_client.bytes))
            self._yield_if_due()


def _traffic(allocation: Allocation, scan: Scan) -> float:
    return sum(scan.bytes_of(allocation.id))


def _rate(allocation: Allocation, scan: Scan) -> float:
    rates = scan.rates_of(allocation.id)
    return _traffic(allocation, scan) if rates is None else sum(rates)


def _client(allocation: Allocation, _: Scan) -> int:
    host = pack_host(allocation.client)
    # IPv4 first. Numbers compare faster than tuples.
    return (len(host) << 128 | int.from_bytes(host)) << 16 | allocation.client[1]


SORTS: dict[str, Callable[[Allocation, Scan], float]] = {
    "traffic": _traffic,
    "rate": _rate,
    "age": lambda allocation, _: -allocation.made_at,
    "expiry": lambda allocation, _: allocation.ends,
    "client": _client,
    "port": lambda allocation, _: allocation.port,
    "channels": lambda allocation, _: allocation.channel_count,
}
"""Sort keys, by the values of the parameter `sort`. `rate` is the same as `traffic` while rates are unknown."""


def _key(channel: ChannelBinding) -> int:
    """Return a number that identifies a channel."""
    return channel.allocation << _CHANNEL_BITS | channel.number
