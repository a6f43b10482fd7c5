"""What a server costs, as Linux accounts for it, and the machine it was measured on."""

import os
import platform
from pathlib import Path
from typing import NamedTuple

_THREAD_STACK_KB = 16
"""Of kernel memory, for each thread: THREAD_SIZE on x86-64 and arm64."""


class Memory(NamedTuple):
    """Memory of one process, in KB."""

    rss: int
    pss: int
    kernel: int
    """Only what can be told by process: page tables, and a kernel stack for each thread. Sockets, task structures and other
    slab objects are the machine's in Linux, not a process's, and are not included."""


def cpu_ns(pid: int) -> int:
    """Give the CPU time of a process so far: user and system, in nanoseconds, the schedstat of all its threads summed.

    In it is what the kernel does in its threads: sending includes loopback's delivery up to the receiver's socket buffer,
    just as delivery to the server's own sockets is paid by who sends to it. Threads that have ended are not in it.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def memory(pid: int) -> Memory:
    """Give the memory of a process now."""
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    status = _fields(Path(f"/proc/{pid}/status"))
    kernel = _number(status["VmPTE"]) + _number(status["Threads"]) * _THREAD_STACK_KB
    return Memory(_number(rollup["Rss"]), _number(rollup["Pss"]), kernel)


def machine(coturn_version: str | None) -> dict[str, str]:
    """Describe the machine."""
    model = _fields(Path("/proc/cpuinfo")).get("model name")
    return {
        "cpu": model or platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "coturn": coturn_version or "not installed",
    }


def _fields(file: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    return {name.strip(): value.strip() for name, colon, value in lines if colon}


def _number(value: str) -> int:
    return int(value.removesuffix(" kB"))
