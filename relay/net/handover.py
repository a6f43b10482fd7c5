"""A Unix socket on which a relay hands its sockets to its successor, and the withdrawal of readers from these sockets."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

MOST_DESCRIPTORS: Final = 250
"""In one message; the kernel refuses more than 253 (SCM_MAX_FD)."""

_HEADER = struct.Struct("!IB?")
_CREDENTIALS = struct.Struct("=3i")
_ANCILLARY = socket.CMSG_SPACE(MOST_DESCRIPTORS * struct.calcsize("i"))
_MOST_BYTES: Final = 1 << 28
_LARGE: Final = 1 << 16
"""Bytes above which a message is in shared memory. A larger message would fill the buffer of the socket."""

_OVERFLOW_USER: Final = 65534
"""The kernel's stand-in for all users of other user namespaces."""

_SO_NETNS_COOKIE: Final = 71
_SYS_TGKILL: Final = {"x86_64": 234, "aarch64": 131}
WAKE_SIGNAL: Final = signal.SIGRTMIN
_SIGNAL_AGAIN: Final = 0.02
"""Seconds after which the remaining readers get a further signal."""


class HandoverError(Exception):
    """The remote process is gone, too slow, or sends an unexpected message. The text is for the log."""


class Message(NamedTuple):
    """A message of the remote process."""

    kind: str
    content: Any
    descriptors: list[int]


class HandoverLink:
    """An end of the connection between a relay and its successor.

    Args:
        connection: a connected Unix stream socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        # Its timeouts are its own.
        self._sender = connection.dup()
        self._sending = threading.Lock()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        self._sender.close()

    @property
    def process(self) -> int:
        """The id of the remote process; 0 if that is in another PID namespace."""
        return self._credentials()[0]

    def is_of_same_user(self) -> bool:
        """Check whether the remote process has the user of this process."""
        user = self._credentials()[1]
        return user == os.geteuid() and user != _OVERFLOW_USER

    def _credentials(self) -> tuple[int, int, int]:
        told = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, group = _CREDENTIALS.unpack(told)
        return process, user, group

    def send(self, kind: str, content: object = None, descriptors: Sequence[int] = (), *, timeout: float = 5.0) -> None:
        """Send a message. Any thread may call this.

        Args:
            kind: the kind of the message.
            content: plain data.
            descriptors: at most `MOST_DESCRIPTORS`, which stay open here.
            timeout: seconds.

        Raises:
            HandoverError: the remote process is gone or does not read.
        """
        data = json.dumps([kind, content], separators=(",", ":")).encode()
        with self._sending, _errors_explained(), contextlib.ExitStack() as stack:
            is_large = len(data) > _LARGE
            if is_large:
                descriptors = [*descriptors, stack.enter_context(_in_memory(data)).fileno()]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))]
            self._sender.settimeout(timeout)
            header = _HEADER.pack(len(data), len(descriptors), is_large)
            self._sender.sendmsg([header], rights if descriptors else [])
            if not is_large:
                self._sender.sendall(data)

    def receive(self, *kinds: str, timeout: float = 5.0) -> Message:
        """Wait for a message of one of these kinds.

        Raises:
            HandoverError: the remote process is gone, refuses, sends another message, or sends nothing in time.
            TimeoutError: nothing came in time.
        """
        with _errors_explained():
            self._connection.settimeout(timeout)
            header, ancillary, flags, _ = self._connection.recvmsg(_HEADER.size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            descriptors = [each for _, _, data in ancillary for each in struct.unpack(f"={len(data) // 4}i", data)]
            try:
                kind, content = self._content(header, descriptors, is_cut=bool(flags & socket.MSG_CTRUNC))
                _check(kind, content, kinds)
            except BaseException:
                close_all(descriptors)
                raise
        return Message(kind, content, descriptors)

    def _content(self, header: bytes, descriptors: list[int], *, is_cut: bool) -> tuple[str, Any]:
        length, count, is_large = _HEADER.unpack(header + self._read(_HEADER.size - len(header)))
        if is_cut or len(descriptors) != count or length > _MOST_BYTES:
            raise HandoverError("descriptors were lost: raise the limit of open files (ulimit -n)")
        if is_large:
            with os.fdopen(descriptors.pop(), "rb") as memory:
                data = memory.read(length)
        else:
            data = self._read(length)
        kind, content = json.loads(data)
        return kind, content

    def _read(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            received = self._connection.recv(min(length - len(parts), 1 << 20))
            if not received:
                raise HandoverError("the connection was closed")
            parts += received
        return bytes(parts)


def _check(kind: str, content: object, kinds: Sequence[str]) -> None:
    if kind == "refuse":
        raise HandoverError(str(content))
    if kind not in kinds:
        raise HandoverError(f"the remote process sent {kind!r}")


@contextlib.contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:
        raise HandoverError(error.strerror or str(error)) from error
    except (ValueError, TypeError) as error:
        raise HandoverError(f"invalid message: {error}") from error


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[BinaryIO]:
    with os.fdopen(os.memfd_create("handover"), "w+b") as memory:
        memory.write(data)
        memory.seek(0)
        yield memory


def connect(path: Path) -> HandoverLink | None:
    """Connect to the relay that listens at a path; return None if no relay does.

    Raises:
        HandoverError: the socket can't be used.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise HandoverError(f"can't connect to {path}: {error.strerror}") from error
    return HandoverLink(connection)


def listen(path: Path) -> socket.socket:
    """Listen at a path, in place of any former process.

    Raises:
        OSError: the path can't be used.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The new socket replaces the old socket in one step, so a relay is always at the path.
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        listening.bind(str(new))
        new.chmod(0o600)
        listening.listen(1)
        new.replace(path)
    except BaseException:
        listening.close()
        raise
    return listening


def network_of(sock: socket.socket) -> int:
    """Return the number of a socket's network namespace; 0 if the kernel has none (before Linux 5.14)."""
    try:
        told = sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return 0
    return int.from_bytes(told, "little")


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for each in descriptors:
        os.close(each)


class Reader(Protocol):
    """A thread that reads sockets."""

    thread: int
    """The native id of the thread; 0 when the thread reads no more."""

    def descriptors(self) -> list[int]:
        """Return the descriptors of the sockets."""

    def withdraw(self) -> None:
        """Let the next read end."""


def withdraw(readers: Sequence[Reader], timeout: float) -> int:
    """End all reads of sockets that a second process reads too. Return the number of readers left.

    No packet is lost: a thread first hands over the packets in its hand. A shutdown of the sockets would also end the reads
    of the remote process. So a closed socket takes the place of each descriptor in this process only, and a signal
    interrupts the reads, which Python repeats with the same descriptor.

    Args:
        readers: the readers of these sockets.
        timeout: seconds in which all threads should have left.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dummy:
        with contextlib.suppress(OSError):
            # The error is ENOTCONN, and the socket is shut down nevertheless.
            dummy.shutdown(socket.SHUT_RDWR)
        for reader in readers:
            reader.withdraw()
            for each in reader.descriptors():
                os.dup2(dummy.fileno(), each, inheritable=False)
    until = time.monotonic() + timeout
    left = [each for each in readers if each.thread]
    while left and time.monotonic() < until:
        for staying in left:
            _interrupt(staying.thread)
        time.sleep(_SIGNAL_AGAIN)
        left = [each for each in left if each.thread]
    return len(left)


def _interrupt(thread: int) -> None:
    # signal.pthread_kill with the id of an ended thread may crash the process.
    number = _SYS_TGKILL.get(os.uname().machine)
    if thread and number is not None:
        ctypes.CDLL(None).syscall(number, os.getpid(), thread, int(WAKE_SIGNAL))
