"""What is counted, for people to read."""

import dataclasses

from relay.actors.server import ServerCounters
from relay.core.counters import Counters
from relay.net.udp import UdpCounters


def fields_of(counters: Counters | ServerCounters | UdpCounters) -> dict[str, object]:
    """Give all that is counted but the counters that are counters of something else."""
    values = {field.name: getattr(counters, field.name) for field in dataclasses.fields(counters)}
    return {name: value for name, value in values.items() if not dataclasses.is_dataclass(value)}
