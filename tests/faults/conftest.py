"""Relays on a failing machine."""

from tests.support.failing import failing, library
from tests.support.system import make_relay, relay

__all__ = ["failing", "library", "make_relay", "relay"]
