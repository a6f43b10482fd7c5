"""Fixtures: the program for the kernel."""

from tests.support.offload.fixtures import object_file

__all__ = ["object_file"]
