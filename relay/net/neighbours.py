"""Watches how busy other processes keep the CPUs of this process, and lets readers preempt them."""

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

from relay.core.overload import NEIGHBOUR_SHARE
from relay.net.threads import Load

_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds in a unit of /proc/stat."""


class CpuTimes(NamedTuple):
    """CPU time in seconds, since some moment in the past."""

    taken_at: float
    busy: float
    """Of all processes, on the CPUs of this process. Interrupts are left out: most of them are this relay's packets."""
    own: float
    """Of this process, on any CPU."""

    @classmethod
    def read(cls, cpus: Iterable[int]) -> Self:
        """Read the times from /proc/stat (proc_stat(5)).

        Raises:
            OSError: the file can't be read, as in some sandboxes.
            ValueError: a CPU is missing in the file, as in some containers.
        """
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        by_cpu = {name: fields for name, *fields in map(str.split, lines) if name.startswith("cpu")}
        try:
            # user, nice, system
            ticks = sum(int(each) for cpu in cpus for each in by_cpu[f"cpu{cpu}"][:3])
        except KeyError as error:
            raise ValueError(f"/proc/stat has no {error.args[0]}") from error
        return cls(time.monotonic(), ticks * _TICK, time.process_time())

    def share_of_others(self, before: "CpuTimes", cpus: int) -> float:
        """Return the share of the CPUs' time that went to other processes since ``before``, 0-1."""
        used = (self.busy - before.busy) - (self.own - before.own)
        return max(0.0, used / (self.taken_at - before.taken_at) / cpus)


@contextlib.contextmanager
def watching_neighbours(load: Load, interval: float) -> Iterator[None]:
    """Look at the CPU times from a thread, and let readers preempt other processes or not.

    A sandbox may hide the CPU times: then readers never preempt.

    Args:
        load: the load of this process.
        interval: seconds between two looks.
    """
    stopped = threading.Event()

    def watch() -> None:
        cpus = os.sched_getaffinity(0)
        with contextlib.suppress(OSError, ValueError):
            before = CpuTimes.read(cpus)
            while not stopped.wait(interval):
                now = CpuTimes.read(cpus)
                load.set_preempts(preempts=now.share_of_others(before, len(cpus)) > NEIGHBOUR_SHARE)
                before = now

    thread = threading.Thread(target=watch, name="neighbours", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
