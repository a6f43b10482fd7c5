"""Check the kernel settings for a relay of the configured size, at its start.

An unreadable setting, in a sandbox for example, causes no warning, because nobody could act on it.
"""

import itertools
import math
import os
import resource
from collections.abc import Iterable, Iterator
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


class Finding(NamedTuple):
    """A setting that will cause problems."""

    event: str
    """The problem and its effect."""
    setting: str
    has: str
    needs: str
    mend: str
    """The command that fixes the setting, for root."""


def findings(config: Config, receive_buffer: int, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield the settings that will cause problems before the relay reaches its maximum of allocations.

    Args:
        config: the settings of the relay.
        receive_buffer: bytes that a socket got when `RECEIVE_BUFFER` was requested. The sysctl is invisible in a container,
            and does not limit processes with CAP_NET_ADMIN.
        root: has /proc and /sys.
    """
    # Each allocation has a thread, and a thread takes a process id and memory maps.
    threads = config.capacity + OTHER_THREADS
    tasks, maps = _tasks(_read(root / "proc/loadavg")) + threads, MAPS_PER_THREAD * threads + OTHER_MAPS
    connections = _number(_sysctl(root, "net.netfilter.nf_conntrack_count"))
    # Without connections, tracking is not in use.
    tracked = connections + TRACKED_PER_ALLOCATION * config.capacity if connections else 0
    if receive_buffer < RECEIVE_BUFFER:
        mend = f"sysctl -w net.core.rmem_max={RECEIVE_BUFFER}"
        yield Finding(_SMALL_BUFFERS, "net.core.rmem_max", f"{receive_buffer}", f"{RECEIVE_BUFFER}", mend)
    for event, setting, needs, value in (
        (_FEW_THREADS, "kernel.pid_max", tasks, max(LARGEST_PID_MAX, tasks)),
        (_FEW_THREADS, "kernel.threads-max", tasks, _roomy(tasks)),
        (_FEW_THREADS, "vm.max_map_count", maps, _roomy(maps)),
        (_SMALL_TABLE, "net.netfilter.nf_conntrack_max", tracked, _roomy(tracked)),
    ):
        has = _number(_sysctl(root, setting))
        if has is not None and has < needs:
            yield Finding(event, setting, f"{has}", f"{needs}", f"sysctl -w {setting}={value}")
    limit = user_threads()
    if limit is not None and limit < threads:
        mend = f"ulimit -u {_roomy(threads)}  # or LimitNPROC={_roomy(threads)} in the unit"
        yield Finding(_FEW_THREADS, "RLIMIT_NPROC", f"{limit}", f"{threads}", mend)
    # The fullest control group of this process.
    for limit, used, file in sorted(_task_limits(root), key=lambda each: each[0] - each[1])[:1]:
        if limit < (needs := used + threads):
            yield Finding(_FEW_THREADS, file, f"{limit}", f"{needs}", _raise_tasks(file, _roomy(needs)))
    yield from _ports(config, root)


def _raise_tasks(file: str, number: int) -> str:
    """Return the command that raises the limit of a control group. systemd would reset a unit's limit set by another way."""
    unit = Path(file).parent.name
    if unit.endswith((".service", ".scope", ".slice")):
        return f"systemctl set-property {unit} TasksMax={number}"
    return f"echo {number} >{file}  # Docker: --pids-limit {number}; Kubernetes: podPidsLimit of the kubelet"


def _ports(config: Config, root: Path) -> Iterator[Finding]:
    """Check the ephemeral port range: the relay skips a port in use, and may run out of ports."""
    setting, ports = "net.ipv4.ip_local_port_range", config.ports
    has = " ".join(_sysctl(root, setting).split())
    reserved = _parse_ranges(_sysctl(root, "net.ipv4.ip_local_reserved_ports"))
    ephemeral = _parse_ranges(has.replace(" ", "-")) - reserved
    if config.capacity <= len(set(ports) - ephemeral):
        return
    needs = f"none of {_format_ranges(ports)}"
    if len(ephemeral - set(ports)) >= _MIN_EPHEMERAL_PORTS:
        ranges = _format_ranges(reserved.union(ports))
        yield Finding(_TAKEN_PORTS, setting, has, needs, f"sysctl -w net.ipv4.ip_local_reserved_ports={ranges}")
    else:
        below = range(max(_FIRST_UNPRIVILEGED, ports.start - _EPHEMERAL_PORTS), ports.start)
        above = range(ports.stop, min(_LAST_PORT + 1, ports.stop + _EPHEMERAL_PORTS))
        free = max(below, above, key=len)
        yield Finding(_TAKEN_PORTS, setting, has, needs, f'sysctl -w {setting}="{free[0]} {free[-1]}"')


def _roomy(number: int) -> int:
    """Return a number with a reserve of a fifth, in whole thousands."""
    return math.ceil(number * 1.2 / 1000) * 1000


def _format_ranges(ports: Iterable[int]) -> str:
    """Return ports as in ``8080,49152-65535``."""
    ranges = []
    for _, run in itertools.groupby(enumerate(sorted(ports)), lambda each: each[1] - each[0]):
        first, *rest = (port for _, port in run)
        ranges.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return ",".join(ranges)


def user_threads() -> int | None:
    """Return the limit on threads of this user; None if the user, such as root, has none."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return None if limit == resource.RLIM_INFINITY or os.geteuid() == 0 else limit


def _sysctl(root: Path, name: str) -> str:
    return _read(root / "proc/sys" / name.replace(".", "/"))


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


def _parse_ranges(text: str) -> set[int]:
    """Parse ``8080,49152-65535``."""
    ports = set[int]()
    for each in filter(None, text.split(",")):
        first, _, last = each.partition("-")
        ports.update(range(int(first), int(last or first) + 1))
    return ports


def _task_limits(root: Path) -> Iterator[tuple[int, int, str]]:
    """Yield limit, present threads and file of the control group and its parents (cgroups(7)), version 1 and 2."""
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
                yield limit, used or 0, f"{group / 'pids.max'}"
