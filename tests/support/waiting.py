"""Wait for actions of other threads and processes."""

import time
from collections.abc import Callable

PATIENCE = 30.0
"""Seconds for actions of about 10 ms on an idle machine: a machine may be slow and busy."""


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Poll a condition until true; fail after a timeout."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not so within {seconds} s"
        # Yields to the interpreter's other threads.
        time.sleep(0.001)
