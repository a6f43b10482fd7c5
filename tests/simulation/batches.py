"""Batches of waiting datagrams."""

from collections.abc import Iterable, Iterator, Sequence

from relay.core.addresses import SocketAddress
from relay.core.commands import cut
from relay.core.data import Datagram

FLOODS = 0.3
"""Share of batches that are treated as a flood."""


def ending_at_allocates(arrivals: Iterable[Datagram]) -> Iterator[list[Datagram]]:
    """Split batches after each Allocate, because the referee needs its port, which may be the last free port."""
    batch: list[Datagram] = []
    for arrival in arrivals:
        batch.append(arrival)
        if arrival[0].startswith(b"\0\3"):
            yield batch
            batch = []
    if batch:
        yield batch


def trains(arrivals: Sequence[Datagram]) -> list[Datagram]:
    """Coalesce adjacent datagrams of one source and length, as GRO does."""
    made: list[Datagram] = []
    for data, source, _, traffic_class in arrivals:
        last = made[-1] if made else None
        if last is not None and last[1] == source and last[3] == traffic_class and data and last[0]:
            segment = last[2] or len(last[0])
            if len(last[0]) % segment == 0 and len(data) <= segment and len(last[0]) < 16 * segment:
                made[-1] = (last[0] + data, source, segment, traffic_class)
                continue
        made.append((data, source, 0, traffic_class))
    return made


def one_by_one(batch: Iterable[Datagram]) -> list[tuple[bytes, SocketAddress]]:
    """Return the datagrams of a batch with their sources."""
    return [(each, source) for data, source, segment_size, _ in batch for each in cut(data, segment_size)]
