"""What this process takes of its machine, as /proc has it (proc(5)).

With tens of thousands of threads and sockets, most other ways to ask take tens of milliseconds.
"""

import contextlib
import os
import resource
from pathlib import Path
from typing import Final, NamedTuple

from relay.ops.threads import yield_cpu

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_DESCRIPTORS: Final = "/proc/self/fd"

# Places in /proc/self/stat, counted from the state, which follows the name.
_USER, _SYSTEM, _THREADS, _STARTED, _VIRTUAL, _RESIDENT = 11, 12, 17, 19, 20, 21

_PORTION: Final = 100
"""Descriptors that are counted in half a millisecond."""


class ProcessFigures(NamedTuple):
    """What there is to be seen."""

    user_seconds: float
    """CPU time outside the kernel, since the start."""
    system_seconds: float
    """CPU time in the kernel."""
    threads: int
    resident: int
    """Bytes of memory."""
    virtual: int
    """Bytes of address space."""
    started_at: float
    """Unix seconds."""
    descriptors: int
    """Open ones."""
    most_descriptors: int
    """That it may open."""


def read_process() -> ProcessFigures:
    """Look at this process.

    Raises:
        OSError: /proc is not there.
    """
    # The name is in parentheses, and may have anything in it.
    text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    fields = {at: int(text[at]) for at in (_USER, _SYSTEM, _THREADS, _STARTED, _VIRTUAL, _RESIDENT)}
    return ProcessFigures(
        fields[_USER] / _TICKS,
        fields[_SYSTEM] / _TICKS,
        fields[_THREADS],
        fields[_RESIDENT] * _PAGE,
        fields[_VIRTUAL],
        _booted_at() + fields[_STARTED] / _TICKS,
        _count_descriptors(),
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _booted_at() -> float:
    """Give when the machine was started, in unix seconds; 0 if it does not tell."""
    with contextlib.suppress(OSError), Path("/proc/stat").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("btime "):
                return float(line.split()[1])
    return 0.0


def _count_descriptors() -> int:
    # Since Linux 6.2, which counts them in microseconds. To list 20,000 takes 100 ms.
    return Path(_DESCRIPTORS).stat().st_size or _list_descriptors()


def _list_descriptors() -> int:
    count = 0
    with os.scandir(_DESCRIPTORS) as entries:
        for count, _ in enumerate(entries, 1):
            if not count % _PORTION:
                yield_cpu()
    # One of them is the listing's own.
    return count - 1
