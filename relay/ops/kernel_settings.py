"""Settings of the machine that would bite a relay of this size: found at its start, said with the command that mends them.

`read_machine` reads and decides nothing; `findings` decides and reads nothing. What can't be read, in a sandbox for
example, is taken to be fine: a warning that nobody can act on is noise.
"""

import math
import os
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from relay.config import Config
from relay.net.udp import RECEIVE_BUFFER

OTHER_THREADS = 64
"""Threads beside those of allocations: some 20 while it runs, at most 16 for requests at each of the two HTTP addresses, and
name look-ups and those that are just ending."""

MAPS_PER_THREAD = 3
"""Memory maps: 2.6 were measured, a stack and its guard among them."""

OTHER_MAPS = 1024
"""Memory maps of the program and its libraries: some 300."""

TRACKED_PER_ALLOCATION = 4
"""Entries in the table of connection tracking: one for the client, and one for each peer. ICE tries several addresses."""

LARGEST_PID_MAX = 4_194_304
"""What 64-bit Linux allows (PID_MAX_LIMIT)."""

_EPHEMERAL_PORTS = 16_384
"""What is left to other programs if the range of their ports has to be moved."""

_FEWEST_EPHEMERAL_PORTS = 4096
"""Which other programs must be left with, if ports are taken out of their range."""

_FIRST_UNPRIVILEGED = 1024
_LAST_PORT = 65535


class TaskLimit(NamedTuple):
    """How many threads a control group may have."""

    file: str
    """Where the limit is read and set."""
    limit: int
    used: int
    """By all that is in the group now."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process was given; None where there is no limit, or it can't be read."""

    receive_buffer: int = RECEIVE_BUFFER
    """Bytes that a socket got when it asked for `RECEIVE_BUFFER`."""
    tasks: int = 0
    """Threads of all processes."""
    pid_max: int | None = None
    threads_max: int | None = None
    user_threads: int | None = None
    """RLIMIT_NPROC, unless this user is exempt from it."""
    max_map_count: int | None = None
    task_limit: TaskLimit | None = None
    """Of the control group with the least room, of all that this process is in."""
    local_ports: range = range(0)
    """What the kernel gives to sockets that ask for no port."""
    reserved_ports: tuple[range, ...] = ()
    """Of these, the ones that it does not."""
    tracked: int = 0
    """Connections that are tracked; 0 also says that nothing asks for them to be."""
    most_tracked: int | None = None


class Finding(NamedTuple):
    """A setting that bites."""

    event: str
    """What is wrong, and what it leads to."""
    setting: str
    has: str
    needs: str
    mend: str
    """A command for root."""


def findings(config: Config, machine: Machine) -> list[Finding]:
    """Give what will bite before the relay has as many allocations as it may have."""
    return [*_buffer(machine), *_threads(config, machine), *_ports(config, machine), *_tracking(config, machine)]


def _buffer(machine: Machine) -> Iterator[Finding]:
    if machine.receive_buffer < RECEIVE_BUFFER:
        event = "receive buffers are small: bursts will lose packets until the relay is started with larger ones"
        yield _sysctl(event, "net.core.rmem_max", machine.receive_buffer, RECEIVE_BUFFER)


def _threads(config: Config, machine: Machine) -> Iterator[Finding]:
    """Each allocation has a thread, and a thread takes a process id and memory maps."""
    event = "not enough threads for all allocations: some will be refused"
    needed = config.capacity + OTHER_THREADS
    everyone = machine.tasks + needed
    if machine.pid_max is not None and machine.pid_max < everyone:
        yield _sysctl(event, "kernel.pid_max", machine.pid_max, everyone, max(LARGEST_PID_MAX, everyone))
    if machine.threads_max is not None and machine.threads_max < everyone:
        yield _sysctl(event, "kernel.threads-max", machine.threads_max, everyone, _roomy(everyone))
    maps = MAPS_PER_THREAD * needed + OTHER_MAPS
    if machine.max_map_count is not None and machine.max_map_count < maps:
        yield _sysctl(event, "vm.max_map_count", machine.max_map_count, maps, _roomy(maps))
    if machine.user_threads is not None and machine.user_threads < needed:
        mend = f"ulimit -u {_roomy(needed)}  # or LimitNPROC={_roomy(needed)} in the unit"
        yield Finding(event, "RLIMIT_NPROC", f"{machine.user_threads}", f"{needed}", mend)
    limit = machine.task_limit
    if limit is not None and limit.limit < limit.used + needed:
        roomy = _roomy(limit.used + needed)
        yield Finding(event, limit.file, f"{limit.limit}", f"{limit.used + needed}", _raise_tasks(limit.file, roomy))


def _raise_tasks(file: str, number: int) -> str:
    """Give what raises the limit of a control group; a unit's is systemd's to set, or it would be set back."""
    unit = Path(file).parent.name
    if unit.endswith((".service", ".scope", ".slice")):
        return f"systemctl set-property {unit} TasksMax={number}"
    return f"echo {number} >{file}  # Docker: --pids-limit {number}; Kubernetes: podPidsLimit of the kubelet"


def _ports(config: Config, machine: Machine) -> Iterator[Finding]:
    """A port of an allocation that another program was given is skipped: it bites where the others are not enough."""
    ports, given_out = config.ports, machine.local_ports
    reserved = tuple(_merged(machine.reserved_ports))
    contested = _outside(reserved, _overlap(ports, given_out))
    if config.capacity <= len(ports) - contested:
        return
    event = "other programs are given ports of allocations: not all allocations will find one"
    setting, has = "net.ipv4.ip_local_port_range", _text(given_out, " ")
    needs = f"none of {_text(ports)}"
    if _outside(reserved, given_out) - contested >= _FEWEST_EPHEMERAL_PORTS:
        ranges = ",".join(map(_text, _merged((*reserved, ports))))
        yield Finding(event, setting, has, needs, f"sysctl -w net.ipv4.ip_local_reserved_ports={ranges}")
    else:
        below = range(max(_FIRST_UNPRIVILEGED, ports.start - _EPHEMERAL_PORTS), ports.start)
        above = range(ports.stop, min(_LAST_PORT + 1, ports.stop + _EPHEMERAL_PORTS))
        yield Finding(event, setting, has, needs, f'sysctl -w {setting}="{_text(max(below, above, key=len), " ")}"')


def _tracking(config: Config, machine: Machine) -> Iterator[Finding]:
    needed = machine.tracked + TRACKED_PER_ALLOCATION * config.capacity
    if machine.tracked and machine.most_tracked is not None and machine.most_tracked < needed:
        event = "the table of tracked connections is small: once it is full, new ones lose their packets"
        yield _sysctl(event, "net.netfilter.nf_conntrack_max", machine.most_tracked, needed, _roomy(needed))


def _sysctl(event: str, setting: str, has: int, needs: int, value: int | None = None) -> Finding:
    return Finding(event, setting, f"{has}", f"{needs}", f"sysctl -w {setting}={value or needs}")


def _roomy(number: int) -> int:
    """Give a number of whole thousands, a fifth above."""
    return math.ceil(number * 1.2 / 1000) * 1000


def _text(ports: range, separator: str = "-") -> str:
    return f"{ports[0]}{separator}{ports[-1]}" if separator != "-" or len(ports) > 1 else f"{ports[0]}"


def _merged(ranges: Iterable[range]) -> Iterator[range]:
    """Give ranges in order, those that overlap or touch as one."""
    whole = range(0)
    for each in sorted(ranges, key=lambda each: each.start):
        if whole and each.start > whole.stop:
            yield whole
            whole = each
        else:
            whole = range(whole.start if whole else each.start, max(whole.stop, each.stop))
    if whole:
        yield whole


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _outside(merged: Iterable[range], ports: range) -> int:
    """Count the ports that are in none of some ranges, which don't overlap."""
    return len(ports) - sum(len(_overlap(each, ports)) for each in merged)


def read_machine(receive_buffer: int, root: Path = Path("/")) -> Machine:
    """Read what `findings` wants to know.

    Args:
        receive_buffer: bytes that a socket got. The setting itself can't be seen from inside of a container, and is not
            what limits those who have CAP_NET_ADMIN.
        root: where ``proc`` and ``sys`` are.
    """
    settings = root / "proc/sys"
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    # The kernel lets root have as many as it likes.
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
    """Read the threads of the machine, as in ``0.20 0.18 0.12 1/80 11206`` (proc_loadavg(5))."""
    fields = loadavg.split()
    return _number(fields[3].partition("/")[2]) or 0 if len(fields) > 3 else 0  # noqa: PLR2004


def _parse_ranges(text: str) -> Iterator[range]:
    """Read ``8080,49152-65535``."""
    for each in filter(None, text.split(",")):
        first, _, last = each.partition("-")
        yield range(int(first), int(last or first) + 1)


def _task_limits(root: Path) -> Iterator[TaskLimit]:
    """Give the limits of this process's control group and of those it is in (cgroups(7)), version 1 and 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "pids"}:
            continue
        top = root / "sys/fs/cgroup" / controllers
        inner = top / path.lstrip("/")
        # In a container the path may be the host's, of which only the end is there, at the top.
        for group in (inner, *(each for each in inner.parents if each.is_relative_to(top))):
            limit, used = _number(_read(group / "pids.max")), _number(_read(group / "pids.current"))
            if limit is not None:
                yield TaskLimit(f"{group / 'pids.max'}", limit, used or 0)
