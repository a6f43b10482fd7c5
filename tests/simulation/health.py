"""What is wrong with a machine at the moment."""

from dataclasses import dataclass

USUALLY_SLOW = 0.03
"""Share of binds that are reported on late, or never, when all is well."""


@dataclass(slots=True)
class Health:
    """Everything that a machine fails its relay in."""

    foreign_ports: frozenset[int] = frozenset()
    """Those that other programs have."""
    is_exhausted: bool = False
    """No descriptor or thread is to be had."""
    slow_binds: float = USUALLY_SLOW
    """Share of binds that are reported on late, or never."""
    lateness: float = 0.001
    """Seconds by which a wake-up comes late, at most."""
    stopped_until: float = 0.0
    clock_error: float = 0.0
    """Seconds by which the wall clock is wrong."""

    def recover(self) -> None:
        """Be well again, but for a stop, which ends by itself."""
        self.foreign_ports, self.is_exhausted, self.slow_binds = frozenset(), False, USUALLY_SLOW
        self.lateness, self.clock_error = 0.001, 0.0
