"""Puts the datagrams of a batch together by source, as GRO does in the kernel. Knows sources and lengths only."""

from collections.abc import Sequence

from relay.core.addresses import SocketAddress
from relay.core.data import Datagram


def grouped(batch: Sequence[Datagram]) -> Sequence[Datagram]:
    """Return GRO batches of all datagrams with one source, length and traffic class.

    The datagrams of each source keep their order. The last datagram of a GRO batch may be shorter; none is empty.
    """
    if len(batch) < 2:  # noqa: PLR2004 - nothing to put together
        return batch
    first, source, _, traffic_class = batch[0]
    size = len(first)
    for data, other, other_size, other_class in batch:
        if len(data) != size or other != source or other_size or other_class != traffic_class or not size:
            return _grouped_by_source(batch)
    # Datagrams of one flow: most batches of an allocation. Half the cost of the general case.
    return [(b"".join([each[0] for each in batch]), source, size, traffic_class)]


def _grouped_by_source(batch: Sequence[Datagram]) -> list[Datagram]:
    groups: list[tuple[list[bytes], SocketAddress, int, int]] = []
    growing: dict[SocketAddress, tuple[list[bytes], SocketAddress, int, int]] = {}
    for data, source, segment_size, traffic_class in batch:
        size = segment_size or len(data)
        group = growing.get(source)
        if (
            group is not None
            and traffic_class == group[3]
            and (size == group[2] or (0 < size < group[2] and not segment_size))
        ):
            group[0].append(data)
        else:
            group = growing[source] = [data], source, size, traffic_class
            groups.append(group)
        if not size or len(data) % group[2]:
            # A shorter datagram is the last.
            del growing[source]
    made: list[Datagram] = []
    for pieces, source, size, traffic_class in groups:
        data = b"".join(pieces)
        made.append((data, source, size if size < len(data) else 0, traffic_class))
    return made
