"""A process that has imported the relay and forks for each started process: ``python -m tests.support.fork_server``.

An import of the relay takes half a second of CPU, and a fork takes a few milliseconds. The standard library's fork server
(`multiprocessing.forkserver`) imports the main module of the tests into each child, installs its own signal handlers, and
its children skip the interpreter's shutdown. Here a child is indistinguishable from a new process for a program. The child
runs in the main thread, with a normal shutdown of the interpreter.

The server reads requests from a socket (its standard input) until the socket is closed. The server reaps a child only on
request, so that the kernel does not reuse the process id before.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import os
import socket
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypedDict

PRELOADED: Final = (
    *("relay.__main__", "relay.cli", "relay.system.process", "relay.tools.healthcheck", "relay.tools.probe.command"),
    *("relay.tools.top.command", "tests.support.hasty_top"),
)
"""All modules imported by the commands, except modules needed by few tests."""

MAX_REQUEST: Final = 1 << 17
"""Maximum bytes of a request, mostly for an environment."""
MAX_DESCRIPTORS: Final = 4

_CLONE_NEWNET: Final = 0x40000000


class Start(TypedDict):
    """A process to start. The message also carries descriptors of its standard streams and network namespace."""

    module: str
    """The module with the `main` function to run, also in ``argv[0]``."""
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    leads_session: bool
    """Whether the process leads a session, with standard input as its terminal."""


class Request(TypedDict, total=False):
    """A request to the server: `start` or `wait`."""

    start: Start
    wait: int
    """The id of an ended process."""


def main() -> None:
    """Serve until the socket is closed. In a child, run the requested module."""
    with socket.socket(fileno=os.dup(0)) as asked:
        for module in PRELOADED:
            importlib.import_module(module)
        # At its exit a child would search all objects for cycles, and copy each page.
        gc.freeze()
        start = _serve(asked)
    if start is not None:
        sys.argv = [str(importlib.import_module(start["module"]).__file__), *start["arguments"]]
        sys.modules[start["module"]].main()


def _serve(asked: socket.socket) -> Start | None:
    """Serve requests. Return None in the server at the end, and the request in each child at its start."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(asked, MAX_REQUEST, MAX_DESCRIPTORS)
        if not data:
            return None
        request: Request = json.loads(data)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            asked.send(b"%d" % os.waitstatus_to_exitcode(status))
            continue
        child = os.fork()
        if child == 0:
            asked.detach()
            _become(request["start"], descriptors)
            return request["start"]
        handle = os.pidfd_open(child)
        socket.send_fds(asked, [b"%d" % child], [handle])
        for each in (handle, *descriptors):
            os.close(each)


def _become(start: Start, descriptors: Sequence[int]) -> None:
    """Reset the state of this process to a new process with these descriptors."""
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    _enter(descriptors[3])
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if start["leads_session"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(start["directory"])
    os.environ.clear()
    os.environ.update(start["environment"])
    encoding = sys.stdout.encoding
    sys.stdin = os.fdopen(0, encoding=encoding, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)


def _enter(network: int) -> None:
    """Enter a network namespace. Staying in the current namespace needs no privilege."""
    if not os.path.samestat(os.fstat(network), Path("/proc/self/ns/net").stat()):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main()
