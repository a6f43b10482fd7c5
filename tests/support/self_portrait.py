"""A process to print its initial state as a JSON object, and then act on its argument."""

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

_OF_LIBC = 1 << 31 | 1 << 32
"""Signals 32 and 33, reserved by the C library."""


def portrait() -> dict[str, Any]:
    """Return the initial state of this process."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "directory": str(Path.cwd()),
        "network": Path("/proc/self/ns/net").stat().st_ino,
        # One descriptor is the directory's.
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) - 1,
        "inheritable": [os.get_inheritable(number) for number in range(3)],
        "streams": [(each.encoding, each.line_buffering, each.isatty(), each.fileno()) for each in streams],
        "errors": sys.stderr.errors,
        "signals": [int(status[name], 16) & ~_OF_LIBC for name in ("SigBlk", "SigIgn", "SigCgt")],
        "interrupted": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "capabilities": [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
        "umask": status["Umask"],
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "threads": [each.name for each in threading.enumerate()],
        "stack": threading.stack_size(),
        "switch": sys.getswitchinterval(),
        "collector": [gc.isenabled(), *gc.get_threshold()],
        "traced": sys.gettrace() is not None,
    }


def main() -> None:
    """Print the state, then end according to the first argument."""
    print(json.dumps(portrait()), flush=True)  # noqa: T201
    match sys.argv[1:]:
        case ["exit", code]:
            sys.exit(int(code))
        case ["raise"]:
            raise ZeroDivisionError
        case ["wait"]:
            signal.pause()


if __name__ == "__main__":
    main()
