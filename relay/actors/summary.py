"""What is counted, for people to read."""

import dataclasses
from collections.abc import Sequence

from relay.actors.server import ServerCounters
from relay.core.counters import SIZE_SHIFT, Counters, histogram
from relay.net.udp import UdpCounters


def fields_of(counters: Counters | ServerCounters | UdpCounters) -> dict[str, object]:
    """Give all that is counted but the counters that are counters of something else, and but sizes."""
    values = {field.name: getattr(counters, field.name) for field in dataclasses.fields(counters)}
    return {
        name: value for name, value in values.items() if not (dataclasses.is_dataclass(value) or isinstance(value, list))
    }


def relayed_in(counters: Counters) -> dict[str, object]:
    """Give the packets that were relayed each way, and their sizes."""
    return {
        "to_peer_packets": counters.to_peer_packets,
        "to_client_packets": counters.to_client_packets,
        "to_peer_sizes": _readable(histogram(counters.to_peer_sizes)),
        "to_client_sizes": _readable(histogram(counters.to_client_sizes)),
    }


def _readable(sizes: Sequence[int]) -> dict[str, int]:
    return {f"{at << SIZE_SHIFT}+": count for at, count in enumerate(sizes) if count}
