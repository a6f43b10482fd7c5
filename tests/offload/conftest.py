"""Fixtures: networks, and the program for the kernel."""

from tests.support.offload.fixtures import host, kernel, lab, machine, object_file, program_object, runner

__all__ = ["host", "kernel", "lab", "machine", "object_file", "program_object", "runner"]
