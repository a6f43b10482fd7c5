"""What a server costs, as Linux accounts for it, and the machine it was measured on."""

import os
import platform
import re
import resource
import shutil
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks.failure import FailedError

_ROOT = Path(__file__).parent.parent
_KERNEL_FIELDS = ("Slab", "KernelStack", "Percpu")
"""Of /proc/meminfo: sockets, files, threads and what else hangs on them; the stacks of threads; counters for each CPU."""

_SYSCTLS = (
    "net.core.rmem_max",
    "net.core.rmem_default",
    "net.core.wmem_max",
    "net.core.netdev_max_backlog",
    "net.ipv4.ip_local_port_range",
    "kernel.threads-max",
    "kernel.pid_max",
    "vm.max_map_count",
)


class Memory(NamedTuple):
    """Memory in KB, of one process and of the kernel for it."""

    resident: int
    kernel: int
    """Page tables are the process's own. The rest Linux counts for the whole machine only: what counts is the difference of
    two readings between which nobody else did much. The load's sockets are opened before the first."""

    def __sub__(self, other: tuple[int, ...]) -> "Memory":
        return Memory(self.resident - other[0], self.kernel - other[1])

    @property
    def total(self) -> int:
        """Both together."""
        return self.resident + self.kernel


def cpu_ns(pid: int) -> int:
    """Give the CPU time of a process so far: user and system, all threads, those that have ended included.

    It is the process's own clock (clock_getcpuclockid(3)), exact to the nanosecond: the sum of what each thread's schedstat
    says, in one system call. In it is what the kernel does in its threads: sending includes loopback's delivery up to the
    receiver's socket buffer, just as delivery to the server's own sockets is paid by who sends to it.

    Raises:
        FailedError: there is no such process any more.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError as error:
        raise FailedError("the server has ended") from error


def memory(pid: int) -> Memory:
    """Give the memory of a process now, and the kernel's.

    Raises:
        FailedError: there is no such process any more.
    """
    try:
        status = _fields(f"/proc/{pid}/status")
        resident, tables = _resident(pid, status), _number(status["VmPTE"])
    except (OSError, KeyError) as error:
        raise FailedError("the server has ended") from error
    machine_wide = _fields("/proc/meminfo")
    return Memory(resident, tables + sum(_number(machine_wide.get(field, "0")) for field in _KERNEL_FIELDS))


def _resident(pid: int, status: dict[str, str]) -> int:
    try:
        return _number(_fields(f"/proc/{pid}/smaps_rollup")["Rss"])
    except PermissionError:
        # The relay shows it to root only. This is off by some pages for each CPU.
        return _number(status["VmRSS"])


def machine(coturn_version: str | None) -> dict[str, str]:
    """Describe the machine, and what is measured on it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "cpu": _fields("/proc/cpuinfo").get("model name") or platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "coturn": coturn_version or "not installed",
        "compiler": _first_line("cc", "--version"),
        "descriptors": str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "load average before": f"{os.getloadavg()[0]:.1f}",
        "softirqs charged to processes": _irq_accounting(),
        **{name: _sysctl(name) for name in _SYSCTLS},
    }


def _revision() -> str:
    git = ("git", "--no-optional-locks", "-C", str(_ROOT))
    revision = _first_line(*git, "rev-parse", "--short=12", "HEAD")
    return revision + (" with changes" if _first_line(*git, "status", "--porcelain", "--", "relay") != "unknown" else "")


def _irq_accounting() -> str:
    """Tell whether loopback's work in softirqs is in a process's CPU time; some kernels account for it apart."""
    file = Path(f"/boot/config-{platform.release()}")
    text = _first_line("zcat", "/proc/config.gz", whole=True)
    if text == "unknown" and file.exists():
        text = file.read_text(encoding="utf-8")
    if text == "unknown":
        return text
    return "no" if re.search(r"^CONFIG_IRQ_TIME_ACCOUNTING=y", text, re.MULTILINE) else "yes"


def _first_line(*command: str, whole: bool = False) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    text = done.stdout.strip() if done.returncode == 0 else ""
    return (text if whole else text.partition("\n")[0]) or "unknown"


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", *name.split(".")).read_text(encoding="ascii").strip().replace("\t", "–")
    except OSError:
        return "unknown"


def _fields(path: str) -> dict[str, str]:
    lines = (line.partition(":") for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {name.strip(): value.strip() for name, colon, value in lines if colon}


def _number(value: str) -> int:
    return int(value.removesuffix(" kB"))
