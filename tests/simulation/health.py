"""Current faults of a machine."""

from dataclasses import dataclass

USUALLY_SLOW = 0.03
"""Share of binds with a late or missing report on a healthy machine."""


@dataclass(slots=True)
class Health:
    """All faults of the relay's machine."""

    foreign_ports: frozenset[int] = frozenset()
    """Ports used by other programs."""
    is_exhausted: bool = False
    """No descriptors or threads are available."""
    slow_binds: float = USUALLY_SLOW
    """Share of binds with a late or missing report."""
    lateness: float = 0.001
    """Maximum delay of a wake-up in seconds."""
    stopped_until: float = 0.0
    clock_error: float = 0.0
    """Error of the wall clock in seconds."""

    def recover(self) -> None:
        """Remove all faults except a pause, which ends by itself."""
        self.foreign_ports, self.is_exhausted, self.slow_binds = frozenset(), False, USUALLY_SLOW
        self.lateness, self.clock_error = 0.001, 0.0
