"""The state of a relay as plain data, for a successor that continues with every allocation.

The data is JSON, and includes everything on which a later input depends, except for the settings and for derived keys. A
successor with the same settings then behaves like this relay, byte for byte.

The relay goes on while most of its state is written: `Handover.begin` notes all later changes, `allocations` and `replays`
write the state in portions, and `rest` writes all later changes. No input may come between `rest` and the
first input of the successor.

`FORMAT` changes with the content. A relay reads its own format and the format of the previous release.
"""

from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, Family, PeerAddress, RelayedPort
from relay.core.allocation import Allocation, AllocationState, ChannelBinding
from relay.core.allocations import Allocations
from relay.core.counters import DropReason
from relay.core.early import EarlyData
from relay.core.requests import Requests

FORMAT: Final = 1

Row: TypeAlias = list[Any]
"""One allocation, in the order of `_row_of`."""

Rest: TypeAlias = dict[str, Any]

_COUNTS: Final = ("to_peer_packets", "to_peer_bytes", "to_client_packets", "to_client_bytes")

_REPLAYS: Final = 1024
"""Requests in one portion: 1 ms."""


class Handover:
    """Writes the state of a core, or reads the state of another core into a new core.

    Args:
        tables: the allocations.
        requests: the state of requests, of the limiter and of nonces.
        early: the early data.
    """

    def __init__(self, tables: Allocations, requests: Requests, early: EarlyData) -> None:
        self._tables = tables
        self._requests = requests
        self._early = early
        self._written: set[AllocationId] = set()
        self._replays = 0

    def begin(self) -> list[AllocationId]:
        """Return the ids of all allocations, and note changes from now on."""
        self._tables.changed = set()
        self._written.clear()
        self._replays = 0
        return list(self._tables.by_id)

    def end(self) -> None:
        """Note no more changes."""
        self._tables.changed = None
        self._written.clear()

    def allocations(self, ids: Iterable[AllocationId]) -> list[Row]:
        """Return the rows of these allocations, without ended allocations."""
        by_id = self._tables.by_id
        present = [by_id[id_] for id_ in ids if id_ in by_id]
        self._written.update(each.id for each in present)
        return [self._row_of(each) for each in present]

    def replays(self) -> list[Row]:
        """Return the next portion of remembered requests; an empty list if all are written."""
        rows, self._replays = self._requests.replays.export(self._replays, _REPLAYS)
        return rows

    def rest(self) -> Rest:
        """Return the state that `allocations` and `replays` have not written, and all changes since."""
        tables = self._tables
        changed = tables.changed or set()
        new = [id_ for id_ in tables.by_id if id_ not in self._written or id_ in changed]
        ended = sorted(self._written - tables.by_id.keys())
        return {
            "ended": ended,
            "allocations": self.allocations(new),
            "replays": self._requests.replays.export(self._replays)[0],
            "sequence": tables.deadlines.sequence,
            "early": self._early.export(),
            "lifecycle": self._requests.lifecycle.export(),
            "requests": self._requests.export(),
        }

    def counts(self, id_: AllocationId) -> tuple[int, ...]:
        """Return the packets and bytes of an allocation, of all its channels: to peers, then to clients."""
        allocation = self._tables.by_id[id_]
        counts = [_counts_of(allocation), *map(_counts_of, allocation.channels.values())]
        return tuple(map(sum, zip(*counts, strict=True)))

    def add_counts(self, rows: Iterable[Row]) -> None:
        """Add the packets of a predecessor after `rest`: rows of an id and `counts`."""
        for id_, *counts in rows:
            allocation = self._tables.by_id.get(id_)
            for name, count in zip(_COUNTS, counts, strict=True) if allocation is not None else ():
                setattr(allocation, name, getattr(allocation, name) + count)

    def read_allocations(self, rows: Iterable[Row]) -> None:
        """Read rows. A later row of an allocation replaces the former."""
        for row in rows:
            self._read(row)

    def read_replays(self, rows: Iterable[Row]) -> None:
        """Read a portion of remembered requests."""
        self._requests.replays.restore(rows)

    def read_rest(self, rest: Rest) -> None:
        """Read the rest of the state, as the last portion."""
        for id_ in rest["ended"]:
            self._tables.remove(self._tables.by_id[AllocationId(id_)])
        while self._tables.is_kernel_behind:
            self._tables.update_kernel()
        self.read_allocations(rest["allocations"])
        self.read_replays(rest["replays"])
        self._early.restore(rest["early"])
        self._requests.lifecycle.restore(rest["lifecycle"])
        self._requests.restore(rest["requests"])
        self._tables.deadlines.sequence = rest["sequence"]

    def _row_of(self, allocation: Allocation) -> Row:
        at, sequence = self._tables.deadlines.entry(allocation.id)
        return [
            allocation.id,
            allocation.client,
            allocation.username,
            allocation.transaction_id.hex(),
            allocation.families,
            allocation.missing_families,
            allocation.port,
            allocation.even_port,
            allocation.lifetime,
            allocation.fingerprint,
            allocation.made_at,
            allocation.ends,
            allocation.state.value,
            allocation.refused_ports,
            allocation.success.hex(),
            list(allocation.cut_short),
            _counts_of(allocation),
            allocation.drops,
            [_channel_row(each) for each in (*allocation.live.values(), *allocation.expired.values())],
            at,
            sequence,
        ]

    def _read(self, row: Row) -> None:
        (
            id_, client, username, transaction_id, families, missing, port, even_port, lifetime, fingerprint, made_at, ends,
            state, refused, success, cut_short, counts, drops, channels, at, sequence,
        ) = row  # fmt: skip
        allocation = Allocation(
            AllocationId(id_),
            ClientAddress(tuple(client)),
            username,
            bytes.fromhex(transaction_id),
            tuple(map(Family, families)),
            tuple(map(Family, missing)),
            RelayedPort(port),
            even_port,
            lifetime,
            fingerprint,
            made_at,
            ends,
            AllocationState(state),
            refused,
            bytes.fromhex(success),
            cut_short=dict.fromkeys(map(ChannelNumber, cut_short)),
            drops={DropReason(reason): count for reason, count in drops.items()},
            **dict(zip(_COUNTS, counts, strict=True)),
        )
        bindings = [
            ChannelBinding(allocation.id, allocation.client, number, allocation.port, PeerAddress(tuple(peer)), *more)
            for number, peer, *more in channels
        ]
        self._tables.restore(allocation, bindings, at, sequence)


def _channel_row(binding: ChannelBinding) -> Row:
    return [binding.number, binding.peer, binding.inside, binding.until, binding.live, *_counts_of(binding)]


def _counts_of(counted: Allocation | ChannelBinding) -> list[int]:
    return [getattr(counted, name) for name in _COUNTS]
