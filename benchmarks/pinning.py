"""CPU affinity: the servers have one CPU to themselves, and the load generator uses the others."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Places(NamedTuple):
    """CPUs by purpose."""

    server: frozenset[int]
    load: frozenset[int]

    @property
    def shared(self) -> bool:
        """Return whether load and servers compete for a CPU."""
        return bool(self.server & self.load)

    def __str__(self) -> str:
        server, load = (",".join(map(str, sorted(cpus))) for cpus in self)
        return f"servers on CPU {server}, load on {load}"


def places() -> Places:
    """Divide the CPUs of this process: the last is for servers, and its hyperthread is left idle if possible."""
    cpus = frozenset(os.sched_getaffinity(0))
    if len(cpus) == 1:
        return Places(cpus, cpus)
    server = max(cpus)
    others = cpus - {server}
    return Places(frozenset({server}), (others - _siblings(server)) or others)


@contextlib.contextmanager
def on(cpus: Iterable[int]) -> Iterator[None]:
    """Run on some CPUs. Child processes started meanwhile stay there, with all their threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def busy(cpus: Iterable[int]) -> Iterator[None]:
    """Run a busy loop on each CPU meanwhile."""
    with contextlib.ExitStack() as stack:
        for cpu in cpus:
            with on({cpu}):
                loop = subprocess.Popen((sys.executable, "-c", "while True: pass"), start_new_session=True)
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        yield


def _siblings(cpu: int) -> frozenset[int]:
    """Return the hyperthreads of a CPU's core, from a list like ``0,64`` or ``0-1``."""
    file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    text = file.read_text(encoding="ascii").strip() if file.exists() else str(cpu)
    bounds = [[int(bound) for bound in part.split("-")] for part in text.split(",")]
    return frozenset(each for bound in bounds for each in range(bound[0], bound[-1] + 1))
