"""User, standard streams and memory protection of this process."""

import contextlib
import ctypes
import os
import resource
from pathlib import Path

from relay.config import UsageError

_PR_SET_DUMPABLE = 4

_ROOT = 0
_STREAMS = (0, 1, 2)


def keep_streams() -> None:
    """Open /dev/null for each closed standard stream, so that no socket gets the number of a standard stream.

    The interpreter and its libraries write to these numbers in an emergency.
    """
    for descriptor in _STREAMS:
        try:
            os.fstat(descriptor)
        except OSError:
            # The kernel assigns the lowest free number: this descriptor.
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


def conceal_memory() -> None:
    """Protect this process's memory from all users but root: it contains tokens, secrets and packets.

    There are no core dumps, and other processes of the same user may neither trace this process nor read its environment.
    Processes with CAP_SYS_PTRACE (gdb, py-spy) still may. Private files of /proc/PID belong to root from now on; the process
    can still read its own.
    """
    # Both: the limit does not apply to a core_pattern with a pipe, which systemd sets.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # A sandbox may forbid the second; the first suffices.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refuse_root(users: Path = Path("/proc/self/uid_map")) -> None:
    """Raise an error if this process runs as root, unless root of this user namespace is another user outside.

    Raises:
        UsageError: this process runs as root.
    """
    if os.geteuid() == _ROOT and _is_of_the_machine(users):
        raise UsageError(
            "this is root, and a vulnerability in the relay would compromise the whole machine: run it as an unprivileged "
            "user (DynamicUser= in a unit, --user for a container), or give --allow-root"
        )


def _is_of_the_machine(users: Path) -> bool:
    """Return whether root of this user namespace is root outside as well."""
    try:
        lines = users.read_text(encoding="ascii").splitlines()
    except OSError:
        return True
    # The first user inside, the first user outside, and the length of the range (user_namespaces(7)).
    ranges = [[int(field) for field in line.split()] for line in lines]
    return not ranges or any(inside == _ROOT == outside for inside, outside, _ in ranges)
