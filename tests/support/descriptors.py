"""Count open descriptors of this process."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def only_new_garbage() -> Iterator[None]:
    """Exclude older objects from garbage collections of a module's tests, which saves 50 ms each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def open_descriptors() -> int:
    """Return the number of open descriptors, after a garbage collection."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))
