"""Allocations in an order, of which no more is worked out than is asked for."""

import heapq
import math
from array import array
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple, TypeAlias

from relay.core.addresses import AllocationId, pack_host
from relay.core.allocations import Allocation, Allocations
from relay.status.census import Findings
from relay.status.pace import Pace

_AT_ONCE = 512
"""Allocations that are sorted in one go: a quarter of a millisecond."""

_BETWEEN_LOOKS = 16
"""Allocations between two looks at the clock."""

Key: TypeAlias = Callable[[Allocation, Allocations, Findings], float]


class Sort(NamedTuple):
    """What allocations are ordered by."""

    key: Key
    descends: bool
    """Whether the largest come first, unless someone says otherwise."""


def _traffic(allocation: Allocation, _: Allocations, findings: Findings) -> float:
    return sum(findings.bytes_of(allocation.id))


def _rate(allocation: Allocation, tables: Allocations, findings: Findings) -> float:
    rates = findings.rates_of(allocation.id)
    return _traffic(allocation, tables, findings) if rates is None else sum(rates)


def _time_left(allocation: Allocation, tables: Allocations, _: Findings) -> float:
    at = tables.deadlines.get((allocation.id, None))
    return math.inf if at is None else at


def _client(allocation: Allocation, _: Allocations, __: Findings) -> int:
    host = pack_host(allocation.client)
    # IPv4 first. One number, and no tuple: see `Ledger`.
    return (len(host) << 128 | int.from_bytes(host)) << 16 | allocation.client[1]


SORTS: dict[str, Sort] = {
    "traffic": Sort(_traffic, descends=True),
    "rate": Sort(_rate, descends=True),
    "age": Sort(lambda allocation, _, __: -allocation.made_at, descends=True),
    "expiry": Sort(_time_left, descends=False),
    "client": Sort(_client, descends=False),
    "port": Sort(lambda allocation, _, __: allocation.port, descends=False),
    "channels": Sort(lambda allocation, _, __: len(allocation.channels), descends=True),
}
"""By the names that requests have for them. `rate` is `traffic` as long as no rate can be known."""


class Ranking:
    """All allocations of a moment, in one order.

    It keeps their ids, and nothing of them: those that are gone by the time that they are looked at are left out.

    Args:
        tables: where they are.
        findings: which there are; what traffic and rates are taken from.
        by: what they are ordered by.
        descending: whether the largest come first.
        pace: rests.
    """

    def __init__(self, tables: Allocations, findings: Findings, by: Sort, pace: Pace, *, descending: bool) -> None:
        self.findings = findings
        self._ids = findings.ids
        self._keys: list[float] = []
        self._runs: list[array[int]] = []
        for first in range(0, len(self._ids), _AT_ONCE):
            for at, id_ in enumerate(self._ids[first : first + _AT_ONCE]):
                if at % _BETWEEN_LOOKS == 0:
                    pace()
                allocation = tables.by_id.get(AllocationId(id_))
                # Where one that is gone would have been, nobody is going to look.
                self._keys.append(0 if allocation is None else by.key(allocation, tables, findings))
            places = range(first, len(self._keys))
            self._runs.append(array("Q", sorted(places, key=self._keys.__getitem__, reverse=descending)))
            pace()
        self._rest = heapq.merge(*self._runs, key=self._keys.__getitem__, reverse=descending)
        self._ranked = array("Q")

    def slice(self, offset: int, limit: int, pace: Pace) -> list[AllocationId]:
        """Give those at some places; fewer if there are fewer."""
        for count, at in enumerate(islice(self._rest, max(0, offset + limit - len(self._ranked)))):
            self._ranked.append(self._ids[at])
            if count % _BETWEEN_LOOKS == 0:
                pace()
        return [AllocationId(id_) for id_ in self._ranked[offset : offset + limit]]

    def clear(self, pace: Pace) -> None:
        """Forget it, in portions."""
        while self._keys:
            del self._keys[-_AT_ONCE:]
            pace()
