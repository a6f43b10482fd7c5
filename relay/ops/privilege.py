"""What a process is given and what it shows: as whom it runs, its streams, and who may look into its memory."""

import contextlib
import ctypes
import os
import resource
from pathlib import Path

from relay.config import BadUseError

_PR_SET_DUMPABLE = 4

_ROOT = 0
_STREAMS = (0, 1, 2)


def keep_streams() -> None:
    """Have the numbers of standard streams that are closed lead nowhere, rather than to the next socket that is opened.

    The interpreter and its libraries write to them by number when something is badly wrong.
    """
    for descriptor in _STREAMS:
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free is taken, so this is the one.
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


def conceal_memory() -> None:
    """Let nobody but root see this process's memory, in a core dump or otherwise: tokens, secrets and packets are in it.

    Another process of the same user may then neither trace it nor read its environment; whoever has CAP_SYS_PTRACE still may
    (gdb, py-spy). The files of /proc/PID that are not for everybody belong to root from now on; the process itself may go on
    reading its own.
    """
    # Both: the limit is not asked where a program takes the dump (core_pattern with a pipe), which is so under systemd.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # A sandbox may forbid it, and has its reasons: the first of the two is enough.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refuse_root(users: Path = Path("/proc/self/uid_map")) -> None:
    """See to it that this process is not root's.

    Args:
        users: who its users are outside of its user namespace.

    Raises:
        BadUseError: it is.
    """
    if os.geteuid() == _ROOT and _is_of_the_machine(users):
        raise BadUseError(
            "this is root: a flaw in the relay, which talks to the whole internet, would then be one of the whole machine, "
            "and nothing it does needs root: run it as another user (DynamicUser= in a unit, --user for a container), or "
            "give --allow-root"
        )


def _is_of_the_machine(users: Path) -> bool:
    """Tell whether root in here is root outside, too, rather than somebody in a user namespace."""
    try:
        lines = users.read_text(encoding="ascii").splitlines()
    except OSError:
        return True
    # Who it is in here, who that is one namespace further out, and for how many in a row (user_namespaces(7)).
    ranges = [[int(field) for field in line.split()] for line in lines]
    return not ranges or any(inside == _ROOT == outside for inside, outside, _ in ranges)
