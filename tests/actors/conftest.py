"""A relay in this process."""

from tests.support.descriptors import only_new_garbage
from tests.support.system import make_relay, relay

__all__ = ["make_relay", "only_new_garbage", "relay"]
