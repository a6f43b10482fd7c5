"""Fixtures of tests with sockets."""

from tests.support.descriptors import only_new_garbage

__all__ = ["only_new_garbage"]
