"""Check the kernel settings for a relay of the configured size, at its start.

`read_machine` only reads; `findings` only decides. An unreadable setting, in a sandbox for example, causes no warning,
because nobody could act on it.
"""

import itertools
import math
import os
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from relay.config import Config
from relay.net.udp import RECEIVE_BUFFER

OTHER_THREADS = 80
"""Threads besides those of allocations: some 20 of the relay, at most 16 for requests at each HTTP socket,
and name look-ups and threads that are just ending."""

MAPS_PER_THREAD = 3
"""Memory maps: 2.6 were measured, a stack and its guard among them."""

OTHER_MAPS = 1024
"""Memory maps of the program and its libraries: some 300."""

TRACKED_PER_ALLOCATION = 4
"""Entries in the connection tracking table: one for the client and one for each peer. ICE tries several addresses."""

LARGEST_PID_MAX = 4_194_304
"""The kernel's maximum on 64 bits (PID_MAX_LIMIT)."""

_EPHEMERAL_PORTS = 16_384
"""Size of the ephemeral port range, if it has to move."""

_MIN_EPHEMERAL_PORTS = 4096
"""Ports that must remain in the ephemeral range, if the relay's ports are reserved."""

_FIRST_UNPRIVILEGED = 1024
_LAST_PORT = 65535

_SMALL_BUFFERS = "receive buffers are small: bursts will lose packets until the relay is started with larger ones"
_FEW_THREADS = "not enough threads for all allocations: some will be refused"
_TAKEN_PORTS = "other programs are given ports of allocations: not all allocations will find one"
_SMALL_TABLE = "the table of tracked connections is small: once it is full, new ones lose their packets"
"""Events of the log."""


class TaskLimit(NamedTuple):
    """A control group's limit on threads."""

    file: str
    """The file of the limit."""
    limit: int
    used: int
    """Threads in the group now."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Settings and limits of this process; None where there is no limit, or the limit is unreadable."""

    receive_buffer: int = RECEIVE_BUFFER
    """Bytes that a socket got when `RECEIVE_BUFFER` was requested."""
    tasks: int = 0
    """Threads of all processes."""
    pid_max: int | None = None
    threads_max: int | None = None
    user_threads: int | None = None
    """RLIMIT_NPROC, unless this user is exempt."""
    max_map_count: int | None = None
    task_limit: TaskLimit | None = None
    """The limit of the fullest control group of this process."""
    local_ports: range = range(0)
    """The ephemeral port range."""
    reserved_ports: tuple[range, ...] = ()
    """Ports excluded from the ephemeral range."""
    tracked: int = 0
    """Tracked connections; 0 if connection tracking is not in use."""
    most_tracked: int | None = None


class Finding(NamedTuple):
    """A setting that will cause problems."""

    event: str
    """The problem and its effect."""
    setting: str
    has: str
    needs: str
    mend: str
    """The command that fixes the setting, for root."""


def findings(config: Config, machine: Machine) -> Iterator[Finding]:
    """Yield the settings that will cause problems before the relay reaches its maximum of allocations."""
    # Each allocation has a thread, and a thread takes a process id and memory maps.
    threads = config.capacity + OTHER_THREADS
    tasks, maps = machine.tasks + threads, MAPS_PER_THREAD * threads + OTHER_MAPS
    tracked = machine.tracked + TRACKED_PER_ALLOCATION * config.capacity
    most_tracked = machine.most_tracked if machine.tracked else None
    for event, setting, has, needs, value in (
        (_SMALL_BUFFERS, "net.core.rmem_max", machine.receive_buffer, RECEIVE_BUFFER, RECEIVE_BUFFER),
        (_FEW_THREADS, "kernel.pid_max", machine.pid_max, tasks, max(LARGEST_PID_MAX, tasks)),
        (_FEW_THREADS, "kernel.threads-max", machine.threads_max, tasks, _roomy(tasks)),
        (_FEW_THREADS, "vm.max_map_count", machine.max_map_count, maps, _roomy(maps)),
        (_SMALL_TABLE, "net.netfilter.nf_conntrack_max", most_tracked, tracked, _roomy(tracked)),
    ):
        if has is not None and has < needs:
            yield Finding(event, setting, f"{has}", f"{needs}", f"sysctl -w {setting}={value}")
    if machine.user_threads is not None and machine.user_threads < threads:
        mend = f"ulimit -u {_roomy(threads)}  # or LimitNPROC={_roomy(threads)} in the unit"
        yield Finding(_FEW_THREADS, "RLIMIT_NPROC", f"{machine.user_threads}", f"{threads}", mend)
    limit = machine.task_limit
    if limit is not None and limit.limit < (needs := limit.used + threads):
        yield Finding(_FEW_THREADS, limit.file, f"{limit.limit}", f"{needs}", _raise_tasks(limit.file, _roomy(needs)))
    yield from _ports(config, machine)


def _raise_tasks(file: str, number: int) -> str:
    """Return the command that raises the limit of a control group. systemd would reset a unit's limit set by another way."""
    unit = Path(file).parent.name
    if unit.endswith((".service", ".scope", ".slice")):
        return f"systemctl set-property {unit} TasksMax={number}"
    return f"echo {number} >{file}  # Docker: --pids-limit {number}; Kubernetes: podPidsLimit of the kubelet"


def _ports(config: Config, machine: Machine) -> Iterator[Finding]:
    """Check the ephemeral port range: the relay skips a port in use, and may run out of ports."""
    ports, given_out = config.ports, machine.local_ports
    reserved = set(itertools.chain(*machine.reserved_ports))
    ephemeral = set(given_out) - reserved
    if config.capacity <= len(set(ports) - ephemeral):
        return
    setting, has = "net.ipv4.ip_local_port_range", _text(given_out, " ")
    needs = f"none of {_text(ports)}"
    if len(ephemeral - set(ports)) >= _MIN_EPHEMERAL_PORTS:
        ranges = ",".join(map(_text, _ranges(reserved.union(ports))))
        yield Finding(_TAKEN_PORTS, setting, has, needs, f"sysctl -w net.ipv4.ip_local_reserved_ports={ranges}")
    else:
        below = range(max(_FIRST_UNPRIVILEGED, ports.start - _EPHEMERAL_PORTS), ports.start)
        above = range(ports.stop, min(_LAST_PORT + 1, ports.stop + _EPHEMERAL_PORTS))
        yield Finding(_TAKEN_PORTS, setting, has, needs, f'sysctl -w {setting}="{_text(max(below, above, key=len), " ")}"')


def _roomy(number: int) -> int:
    """Return a number with a reserve of a fifth, in whole thousands."""
    return math.ceil(number * 1.2 / 1000) * 1000


def _text(ports: range, separator: str = "-") -> str:
    return f"{ports[0]}{separator}{ports[-1]}" if separator != "-" or len(ports) > 1 else f"{ports[0]}"


def _ranges(ports: Iterable[int]) -> Iterator[range]:
    """Yield the ranges of consecutive ports, in order."""
    for _, run in itertools.groupby(enumerate(sorted(ports)), lambda each: each[1] - each[0]):
        consecutive = [port for _, port in run]
        yield range(consecutive[0], consecutive[-1] + 1)


def read_machine(receive_buffer: int, root: Path = Path("/")) -> Machine:
    """Read the settings that `findings` checks.

    The receive buffer is the buffer of a socket in bytes: the sysctl is invisible in a container, and does not limit
    processes with CAP_NET_ADMIN.
    """
    settings = root / "proc/sys"
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    # The kernel does not limit root.
    is_limited = limit != resource.RLIM_INFINITY and os.geteuid() != 0
    local_ports = [int(each) for each in _read(settings / "net/ipv4/ip_local_port_range").split()]
    return Machine(
        receive_buffer=receive_buffer,
        tasks=_tasks(_read(root / "proc/loadavg")),
        pid_max=_number(_read(settings / "kernel/pid_max")),
        threads_max=_number(_read(settings / "kernel/threads-max")),
        user_threads=limit if is_limited else None,
        max_map_count=_number(_read(settings / "vm/max_map_count")),
        task_limit=min(_task_limits(root), key=lambda each: each.limit - each.used, default=None),
        local_ports=range(local_ports[0], local_ports[1] + 1) if local_ports else range(0),
        reserved_ports=tuple(_parse_ranges(_read(settings / "net/ipv4/ip_local_reserved_ports"))),
        tracked=_number(_read(settings / "net/netfilter/nf_conntrack_count")) or 0,
        most_tracked=_number(_read(settings / "net/netfilter/nf_conntrack_max")),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _tasks(loadavg: str) -> int:
    """Parse the number of threads in ``0.20 0.18 0.12 1/80 11206`` (proc_loadavg(5))."""
    fields = loadavg.split()
    return _number(fields[3].partition("/")[2]) or 0 if len(fields) > 3 else 0  # noqa: PLR2004


def _parse_ranges(text: str) -> Iterator[range]:
    """Parse ``8080,49152-65535``."""
    for each in filter(None, text.split(",")):
        first, _, last = each.partition("-")
        yield range(int(first), int(last or first) + 1)


def _task_limits(root: Path) -> Iterator[TaskLimit]:
    """Yield the limits of this process's control group and its parents (cgroups(7)), version 1 and 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "pids"}:
            continue
        top = root / "sys/fs/cgroup" / controllers
        inner = top / path.lstrip("/")
        # In a container the path may be the host's, and only its last directory exists, at the top.
        for group in (inner, *(each for each in inner.parents if each.is_relative_to(top))):
            limit, used = _number(_read(group / "pids.max")), _number(_read(group / "pids.current"))
            if limit is not None:
                yield TaskLimit(f"{group / 'pids.max'}", limit, used or 0)
