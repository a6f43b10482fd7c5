"""Early data: ChannelData that arrives before its ChannelBind.

Firezone clients send data right behind a ChannelBind, without waiting for the response. Different threads read requests and
data, and networks reorder datagrams, so the data may arrive first. Such data is held, and relayed in order when the
ChannelBind succeeds. A retransmission of a lost ChannelBind is still in time. Without a ChannelBind, the data is dropped.

Data is held only for clients with an established allocation: without the response to its Allocate, a client can't have sent
a ChannelBind. The data belongs to one allocation, and ids of allocations are never reused. So a later allocation can't relay
the data, and the end of an allocation needs no action here.

The thresholds are in `relay.core.overload`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from relay.core.addresses import AllocationId, ClientAddress
from relay.core.allocation import AllocationState
from relay.core.allocations import Allocations
from relay.core.counters import Counters, DropReason
from relay.core.data import Datagram, count_drop, count_of
from relay.core.overload import EARLY_AGE, EARLY_BYTES, EARLY_CLIENT_BYTES, EARLY_OVERHEAD, EARLY_SHARE

EARLY_DEADLINE: Final = AllocationId(0)
"""The deadline of the oldest early data. No allocation has this id."""


@dataclass(slots=True)
class _EarlyChannel:
    """The early data of one channel."""

    expires_at: float
    datagrams: list[Datagram] = field(default_factory=list)
    count: int = 0
    """Datagrams, of which a GRO batch has many."""
    size: int = 0
    """Bytes, with `EARLY_OVERHEAD` for each datagram."""


class EarlyData:
    """Holds early data of all clients within limits, for `EARLY_AGE` after the first datagram of its channel.

    Args:
        relay: relays ChannelData of a live channel.
        tables: the tables of allocations.
        counters: the counters of packets.
    """

    def __init__(self, relay: Callable[[Datagram, float], bool], tables: Allocations, counters: Counters) -> None:
        self._relay = relay
        self._by_client = tables.by_client
        self._by_id = tables.by_id
        self._deadlines = tables.deadlines
        self._counters = counters
        # Oldest first, because all channels are held for the same time.
        self._channels: dict[tuple[AllocationId, int], _EarlyChannel] = {}
        self._sizes: dict[AllocationId, int] = {}
        self._size = 0

    def hold(self, datagram: Datagram, now: float) -> None:
        """Hold a datagram, or a GRO batch, of valid ChannelData of an unbound channel, or drop it.

        Nothing more is held for a client at its limit: the first data is kept.
        """
        data, client, _, _ = datagram
        count = count_of(datagram)
        allocation = self._by_client.get(ClientAddress(client))
        if allocation is None or allocation.state is AllocationState.BINDING:
            count_drop(self._counters, DropReason.UNBOUND_CHANNEL, allocation, count)
            return
        # The last datagram or batch may exceed the limit.
        room = min(EARLY_CLIENT_BYTES, (EARLY_BYTES - self._size) // EARLY_SHARE)
        if self._sizes.get(allocation.id, 0) >= room:
            count_drop(self._counters, DropReason.EARLY_LIMIT, allocation, count)
            return
        self._keep((allocation.id, int.from_bytes(data[:2], "big")), datagram, now + EARLY_AGE)
        self._set_deadline()
        self._counters.early_held += count

    def release(self, allocation: AllocationId, number: int, now: float) -> None:
        """Relay the early data of a channel that was bound."""
        if (allocation, number) not in self._channels:
            return
        channel = self._remove((allocation, number))
        self._set_deadline()
        self._counters.early_relayed += channel.count
        for each in channel.datagrams:
            self._relay(each, now)

    def expire(self, now: float) -> None:
        """Drop the data that is due at ``now``."""
        due = itertools.takewhile(lambda each: each[1].expires_at <= now, self._channels.items())
        for key, _ in list(due):
            count_drop(self._counters, DropReason.UNBOUND_CHANNEL, self._by_id.get(key[0]), self._remove(key).count)
        self._set_deadline()

    def export(self) -> dict[str, Any]:
        """Return the early data of all channels as plain data."""
        return {
            "deadline": self._deadlines.entry(EARLY_DEADLINE) if self._channels else None,
            "datagrams": [
                [*key, channel.expires_at, data.hex(), *more]
                for key, channel in self._channels.items()
                for data, *more in channel.datagrams
            ],
        }

    def restore(self, exported: dict[str, Any]) -> None:
        """Hold the early data of another relay."""
        for allocation, number, expires_at, data, client, *more in exported["datagrams"]:
            self._keep((AllocationId(allocation), number), (bytes.fromhex(data), tuple(client), *more), expires_at)
        if exported["deadline"] is not None:
            self._deadlines.restore(EARLY_DEADLINE, *exported["deadline"])

    def _keep(self, key: tuple[AllocationId, int], datagram: Datagram, expires_at: float) -> None:
        channel = self._channels.setdefault(key, _EarlyChannel(expires_at))
        count = count_of(datagram)
        size = len(datagram[0]) + count * EARLY_OVERHEAD
        channel.datagrams.append(datagram)
        channel.count += count
        channel.size += size
        self._sizes[key[0]] = self._sizes.get(key[0], 0) + size
        self._size += size

    def _remove(self, key: tuple[AllocationId, int]) -> _EarlyChannel:
        channel = self._channels.pop(key)
        self._size -= channel.size
        self._sizes[key[0]] -= channel.size
        if not self._sizes[key[0]]:
            del self._sizes[key[0]]
        return channel

    def _set_deadline(self) -> None:
        if not self._channels:
            self._deadlines.discard(EARLY_DEADLINE)
            return
        earliest = next(iter(self._channels.values())).expires_at
        if self._deadlines.get(EARLY_DEADLINE) != earliest:
            self._deadlines.set(EARLY_DEADLINE, earliest)
