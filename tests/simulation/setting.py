"""Settings of a relay."""

from typing import NamedTuple


class Setting(NamedTuple):
    """A relay's ports, limits and families."""

    ports: range
    quota: int
    """Maximum number of allocations."""
    offloads: bool
    max_channels: int = 4096
    """Maximum number of channels per allocation."""
    per_address: int | None = None
    """Maximum number of allocations per address, or per /64."""
    tells: bool = False
    """Whether events are recorded."""
    families: tuple[int, ...] = (1, 2)
    """Families of the relay's own addresses, both for clients and for allocations."""
    rate: int = 500
    """Responses per second to an unauthenticated address; 0 disables the limit."""
    burst: int = 5000
    """Burst of these responses."""
