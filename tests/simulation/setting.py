"""What one relay is given at its start."""

from typing import NamedTuple


class Setting(NamedTuple):
    """Its ports, limits and families."""

    ports: range
    quota: int
    """Allocations at once."""
    offloads: bool
    max_channels: int = 4096
    """Of one allocation."""
    per_address: int | None = None
    """Allocations that clients of one address, or of one /64, may have at once."""
    tells: bool = False
    """Whether someone wants to hear of all that happens."""
    families: tuple[int, ...] = (1, 2)
    """Of its own addresses, which clients talk to and which are relayed."""
    rate: int = 500
    """Answers a second to an address that has proven nothing; 0 for no limit."""
    burst: int = 5000
    """Such answers at once."""
