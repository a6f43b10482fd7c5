"""Processes of the relay started by tests: forked from a process with the imports, or started normally."""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Final, Protocol, Self

from tests.support.fork_server import MAX_REQUEST, Request, Start

COMMAND: Final = (sys.executable, "-m", "relay")
"""The relay, started normally. Costs half a second of CPU more than `Forked`."""

RUN_SECONDS: Final = 60

_ROOT: Final = Path(__file__).parents[2]


class Process(Protocol):
    """The common interface of `subprocess.Popen` and `Forked`."""

    stdout: IO[str] | None
    stderr: IO[str] | None

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


class _Server:
    """The fork server, which lives as long as this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server"],
                stdin=theirs.fileno(),
                cwd=_ROOT,
                # Variables read at the interpreter's startup are the same for all children.
                env=os.environ | {"LC_ALL": "C.UTF-8"},
                # Only the tests handle Ctrl-C, and end their processes.
                start_new_session=True,
            )
        atexit.register(self._close)

    def fork(self, start: Start, descriptors: list[int]) -> tuple[int, int]:
        """Start a process; return its process id and its pidfd."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(Request(start=start)).encode()], descriptors)
            answer, (handle,), _, _ = socket.recv_fds(self._socket, MAX_REQUEST, 1)
        return int(answer), handle

    def exit_code(self, pid: int) -> int:
        """Return the exit code of an ended process; negative for a signal. Works once per process."""
        with self._lock:
            self._socket.send(json.dumps(Request(wait=pid)).encode())
            return int(self._socket.recv(MAX_REQUEST))

    def _close(self) -> None:
        self._socket.close()
        self._process.wait(RUN_SECONDS)


_server = functools.cache(_Server)


class Forked:
    """A process of the relay, with the interface of `subprocess.Popen` in text mode.

    Not covered: actions before `relay.__main__` runs. /proc shows the fork server's command line and environment.

    Args:
        arguments: arguments of the command line.
        env: the environment.
        stdin: a descriptor, or a constant of `subprocess`; the same for `stdout` and `stderr`.
        leads_session: whether the process leads a session, with standard input as its terminal.
        module: the module with the `main` function to run.
    """

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        leads_session: bool = False,
        module: str = "relay.__main__",
    ) -> None:
        start = Start(
            module=module,
            arguments=list(arguments),
            environment=dict(env),
            directory=str(Path.cwd()),
            leads_session=leads_session,
        )
        self.returncode: int | None = None
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            read_end, out = _stream(stack, stdout)
            error_read_end, error = _stream(stack, stderr)
            descriptors = [_stream(stack, stdin)[1], out, error, _opened(stack, "/proc/thread-self/ns/net", os.O_RDONLY)]
            self.pid, self._handle = _server().fork(start, descriptors)
        self.stdout, self.stderr = _reader(read_end), _reader(error_read_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        with self._lock:
            return self._code() if self._has_ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code.

        Raises:
            subprocess.TimeoutExpired: the process has not ended in time.
        """
        with self._lock:
            if not self._has_ended(timeout):
                raise subprocess.TimeoutExpired("relay", timeout or 0)
            return self._code()

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            os.close(self._handle)

    def _has_ended(self, timeout: float | None) -> bool:
        if self.returncode is not None:
            return True
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _code(self) -> int:
        if self.returncode is None:
            self.returncode = _server().exit_code(self.pid)
        return self.returncode


def _opened(stack: contextlib.ExitStack, path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _stream(stack: contextlib.ExitStack, given: int) -> tuple[int | None, int]:
    """Return this process' end of a pipe, if any, and the child's end, which is closed with the stack."""
    if given == subprocess.DEVNULL:
        return None, _opened(stack, os.devnull, os.O_RDWR)
    if given != subprocess.PIPE:
        return None, given
    read_end, write_end = os.pipe()
    stack.callback(os.close, write_end)
    return read_end, write_end


def _reader(descriptor: int | None) -> IO[str] | None:
    return None if descriptor is None else os.fdopen(descriptor, encoding="utf-8")


def run(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    stdout: int = subprocess.PIPE,
) -> "subprocess.CompletedProcess[str]":
    """Run the command line to its end. The default environment is the environment of the tests."""
    process = Forked(*arguments, env=os.environ if env is None else env, stdout=stdout)
    with process, ThreadPoolExecutor(2) as pool:
        said, complained = pool.map(lambda stream: "" if stream is None else stream.read(), (process.stdout, process.stderr))
        code = process.wait(RUN_SECONDS)
    return subprocess.CompletedProcess(["firezone-relay", *arguments], code, said, complained)
