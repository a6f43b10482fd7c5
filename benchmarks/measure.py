"""CPU time and memory of a server, as Linux accounts for them, and a description of the machine."""

import os
import platform
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_KERNEL_FIELDS = ("Slab", "KernelStack", "Percpu")
"""Fields of /proc/meminfo: sockets, files and threads with their data; stacks of threads; counters for each CPU."""


class MeasurementError(Exception):
    """A failure: a server ended, lost all packets, or rejected a request, or a tool is missing. The message is one line."""


class Memory(NamedTuple):
    """Memory in KB, of one process and of the kernel on its behalf."""

    resident: int
    kernel: int
    """Page tables belong to the process. Linux counts the rest for the whole machine only, so the difference of two readings
    is meaningful if no other process did much in between. The generator opens its sockets before the first reading."""

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.resident + self.kernel


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process so far: user and system, all threads, ended threads included.

    The process's own clock (clock_getcpuclockid(3)) is exact to the nanosecond. Kernel work in its threads is included: a
    sending thread delivers over loopback up to the receiver's socket buffer.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError as error:
        raise MeasurementError("the server has ended") from error


def memory(pid: int) -> Memory:
    """Return the current memory of a process and of the kernel."""
    try:
        status = _fields(f"/proc/{pid}/status")
        try:
            resident = _number(_fields(f"/proc/{pid}/smaps_rollup")["Rss"])
        except PermissionError:
            # Only root can read the relay's file. VmRSS is off by some pages for each CPU.
            resident = _number(status["VmRSS"])
    except (OSError, KeyError) as error:
        raise MeasurementError("the server has ended") from error
    machine_wide = _fields("/proc/meminfo")
    kernel = sum(_number(machine_wide.get(field, "0")) for field in _KERNEL_FIELDS)
    return Memory(resident, _number(status["VmPTE"]) + kernel)


def receive_buffer_drops(host: str) -> tuple[int, int]:
    """Return the packets for which IPv4 sockets of a host had no room, and of other hosts, in this network namespace."""
    # The kernel writes addresses as numbers in host byte order.
    start = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:"
    rows = [line.split() for line in Path("/proc/self/net/udp").read_text(encoding="ascii").splitlines()[1:]]
    drops = [(row[1].startswith(start), int(row[-1])) for row in rows]
    return sum(count for is_here, count in drops if is_here), sum(count for is_here, count in drops if not is_here)


def machine(coturn_version: str) -> dict[str, str]:
    """Return a description of the machine and of the software under test."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "cpu": _fields("/proc/cpuinfo").get("model name") or platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "coturn": coturn_version,
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }


def _revision() -> str:
    git = ("git", "--no-optional-locks", "-C", str(ROOT))
    revision = _output(*git, "rev-parse", "--short=12", "HEAD") or "unknown"
    return revision + (" with changes" if _output(*git, "status", "--porcelain", "--", "relay") else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _fields(path: str) -> dict[str, str]:
    lines = (line.partition(":") for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {name.strip(): value.strip() for name, colon, value in lines if colon}


def _number(value: str) -> int:
    return int(value.removesuffix(" kB"))
