"""How arrivals that wait come to be read together."""

from collections.abc import Iterable, Iterator, Sequence

from relay.core.trains import Arrival

FLOODS = 0.3
"""Share of batches of which the relay is told that more arrives than it can take."""


def ending_at_allocates(arrivals: Iterable[Arrival]) -> Iterator[list[Arrival]]:
    """Cut a batch after each Allocate: which port it gets is known only then, and it may be the last one."""
    batch: list[Arrival] = []
    for arrival in arrivals:
        batch.append(arrival)
        if arrival[0].startswith(b"\0\3"):
            yield batch
            batch = []
    if batch:
        yield batch


def trains(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Put neighbours of one source and length together, as a network card does."""
    made: list[Arrival] = []
    for data, source, _, traffic_class in arrivals:
        last = made[-1] if made else None
        if last is not None and last[1] == source and last[3] == traffic_class and data and last[0]:
            segment = last[2] or len(last[0])
            if len(last[0]) % segment == 0 and len(data) <= segment and len(last[0]) < 16 * segment:
                made[-1] = (last[0] + data, source, segment, traffic_class)
                continue
        made.append((data, source, 0, traffic_class))
    return made
