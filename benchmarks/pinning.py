"""Which CPU does what: the servers have one to themselves, so that each gets the same, and the load has the others."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Places(NamedTuple):
    """CPUs by what they are for."""

    server: frozenset[int]
    load: frozenset[int]

    @property
    def shared(self) -> bool:
        """Tell whether load and servers are in each other's way."""
        return bool(self.server & self.load)

    def __str__(self) -> str:
        return f"servers on CPU {_listed(self.server)}, load on {_listed(self.load)}"


def places() -> Places:
    """Divide the CPUs that this process may use: the last is for servers, and its hyperthread is left idle if possible."""
    cpus = frozenset(os.sched_getaffinity(0))
    if len(cpus) == 1:
        return Places(cpus, cpus)
    server = max(cpus)
    others = cpus - {server}
    return Places(frozenset({server}), (others - _siblings(server)) or others)


@contextlib.contextmanager
def on(cpus: Iterable[int]) -> Iterator[None]:
    """Be on some CPUs; processes made meanwhile stay there, with all their threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _siblings(cpu: int) -> frozenset[int]:
    """Give the hyperthreads of a CPU's core, from a list like ``0,64`` or ``0-1``."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return frozenset()
    bounds = [[int(bound) for bound in part.split("-")] for part in text.strip().split(",")]
    return frozenset(each for bound in bounds for each in range(bound[0], bound[-1] + 1))


def _listed(cpus: Iterable[int]) -> str:
    return ",".join(str(cpu) for cpu in sorted(cpus))
