"""A look at all allocations: what has been relayed for each, and how much that is in a second.

The tables belong to another thread, which goes on writing them. A copy of a table is made in one go; what is in it may be
gone a moment later, and is then counted as it last was.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from relay.core.addresses import AllocationId
from relay.core.allocations import Allocation, Allocations, ChannelBinding
from relay.core.counters import Counters
from relay.status.kernel import Kernel, Tally
from relay.status.ledger import Ledger
from relay.status.pace import Pace

FRESH_FOR = 1.0
"""Seconds for which a look at all allocations serves every request. So however often it is asked for, it costs no more than
one a second; and rates are the average of a second at least."""

OLDEST = 60.0
"""Seconds that rates are the average of, at most: of what was longer ago, they would say nothing."""

_AT_ONCE = 16
"""Allocations, or channels of one, between two looks at the clock."""

_IDS_AT_ONCE = 1024

_CHANNEL_BITS = 16


class Look(NamedTuple):
    """What was seen at one moment."""

    at: float
    """Monotonic seconds, at its beginning."""
    all: Tally
    """What was relayed on all data paths."""
    by_allocation: Ledger
    """Bytes to peers and to clients, by id."""


class Findings(NamedTuple):
    """The latest look, and what it is compared with."""

    ids: "array[int]"
    """Of all allocations that there were."""
    latest: Look
    before: Look | None
    """None if there was none, or none in the last minute."""
    by_kernel: Ledger
    """What the kernel relayed: the fields of a `Tally`, by channel."""

    @property
    def seconds(self) -> float | None:
        """Give the time between both looks."""
        return None if self.before is None else self.latest.at - self.before.at

    def bytes_of(self, allocation: AllocationId) -> Sequence[int]:
        """Give the bytes to peers and to clients; 0 of what came after the look."""
        return self.latest.by_allocation.get(allocation) or (0, 0)

    def rates_of(self, allocation: AllocationId) -> tuple[float, float] | None:
        """Give the bytes a second to peers and to clients; None if they can't be known."""
        if self.before is None:
            return None
        seconds = self.latest.at - self.before.at
        now = self.bytes_of(allocation)
        # What was not there before has relayed all of it since.
        then = self.before.by_allocation.get(allocation) or (0, 0)
        return max(0.0, (now[0] - then[0]) / seconds), max(0.0, (now[1] - then[1]) / seconds)

    def kernel_tally_of(self, channel: ChannelBinding) -> Sequence[int]:
        """Give what the kernel relayed for a channel: the fields of a `Tally`."""
        return self.by_kernel.get(_key(channel)) or NOTHING


NOTHING = Tally()


class Census:
    """Looks at all allocations, at most once a second. One thread at a time may ask.

    Args:
        tables: where they are.
        counters: what was relayed for all of them, by the sockets.
        kernel: what it relayed; None if it relays nothing.
        clock: gives monotonic seconds.
    """

    def __init__(self, tables: Allocations, counters: Counters, kernel: Kernel | None, clock: Callable[[], float]) -> None:
        self._tables = tables
        self._counters = counters
        self._kernel = kernel
        self._clock = clock
        self._findings: Findings | None = None

    def findings(self, pace: Pace) -> Findings:
        """Give what was seen a moment ago, or look now."""
        now = self._clock()
        last = self._findings
        if last is None:
            self._findings = self._look(now, None, pace)
        elif now >= last.latest.at + FRESH_FOR:
            recent = now < last.latest.at + OLDEST
            self._findings = self._look(now, last.latest if recent else None, pace)
            for ledger in (last.by_kernel, last.before and last.before.by_allocation):
                if ledger is not None:
                    ledger.clear(pace)
        assert self._findings is not None  # noqa: S101 - see above
        return self._findings

    def relayed(self) -> tuple[Tally, Tally]:
        """Give what was relayed on all data paths, and how much of it the kernel relayed by itself."""
        counters = self._counters
        sockets = Tally(
            counters.to_peer_packets, counters.to_peer_bytes, counters.to_client_packets, counters.to_client_bytes
        )
        by_kernel = Tally() if self._kernel is None else self._kernel.relayed()
        return sockets.plus(by_kernel), by_kernel

    def _look(self, now: float, before: Look | None, pace: Pace) -> Findings:
        by_kernel = self._ask_kernel(pace)
        relayed, _ = self.relayed()
        by_allocation = Ledger(2)
        ids = self._everyone(pace)
        for at, id_ in enumerate(ids):
            if at % _AT_ONCE == 0:
                pace()
            allocation = self._tables.by_id.get(AllocationId(id_))
            if allocation is None:
                continue
            (_, to_peer, _, to_client), _ = tally_of(allocation, list(allocation.channels.values()), by_kernel, pace)
            by_allocation.put(allocation.id, (to_peer, to_client))
        return Findings(ids, Look(now, relayed, by_allocation), before, by_kernel)

    def _everyone(self, pace: Pace) -> "array[int]":
        """Give the ids of all allocations there are.

        Not as a list, whose thousands the garbage collector would look at; nor at once, which takes two milliseconds.
        """
        listed = list(self._tables.by_id)
        ids = array("Q")
        for at in range(0, len(listed), _IDS_AT_ONCE):
            ids.extend(listed[at : at + _IDS_AT_ONCE])
            pace()
        return ids

    def _ask_kernel(self, pace: Pace) -> Ledger:
        used = Ledger(4)
        if self._kernel is not None:
            for portion in self._kernel.usage():
                for client, number, to_peer, to_client in portion:
                    channel = self._tables.live_channels.get((client, number))
                    if channel is not None:
                        row = (to_peer.packets, to_peer.bytes, to_client.packets, to_client.bytes)
                        used.put(_key(channel), row)
                pace()
        return used


def tally_of(
    allocation: Allocation, channels: Sequence[ChannelBinding], by_kernel: Ledger, pace: Pace
) -> tuple[Tally, Tally]:
    """Add up what was relayed for an allocation: for some channels, and for those that are gone.

    Gives the sum, and how much of it the kernel relayed by itself: that of channels that are gone is not known.
    """
    to_peer_packets, to_peer_bytes = allocation.to_peer_packets, allocation.to_peer_bytes
    to_client_packets, to_client_bytes = allocation.to_client_packets, allocation.to_client_bytes
    kernel = NOTHING
    for at, channel in enumerate(channels, 1):
        to_peer_packets += channel.to_peer_packets
        to_peer_bytes += channel.to_peer_bytes
        to_client_packets += channel.to_client_packets
        to_client_bytes += channel.to_client_bytes
        if by_kernel:
            kernel = kernel.plus(by_kernel.get(_key(channel)) or NOTHING)
        if at % _AT_ONCE == 0:
            pace()
    return kernel.plus((to_peer_packets, to_peer_bytes, to_client_packets, to_client_bytes)), kernel


def _key(channel: ChannelBinding) -> int:
    """Give a number that no other channel has."""
    return channel.allocation << _CHANNEL_BITS | channel.number
