"""Relays to watch, and a terminal to watch them on."""

from tests.support.terminal import closed_port, stage, start

__all__ = ["closed_port", "stage", "start"]
