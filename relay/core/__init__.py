"""The relay as a sans-IO core: bytes, addresses and a time go in, commands come out.

This package uses no socket, thread, clock, log or environment variable. Its only imports are this package and the standard
library. The docstring of `relay.core.server` explains how the core works.
"""
