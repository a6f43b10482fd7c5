"""Fixtures: servers to probe, and timeouts."""

from tests.support.probe import closed_port, command, credential, families, ipv6, run, silent_port, start_coturn

__all__ = ["closed_port", "command", "credential", "families", "ipv6", "run", "silent_port", "start_coturn"]
