"""How bpf(2) is called: its arguments as the kernel lays them out, and its errors."""

import ctypes
import errno
import os
import platform
from collections.abc import Callable, Mapping
from enum import IntEnum
from types import TracebackType
from typing import Final, Self

NAME_LENGTH: Final = 15
"""Letters of a name that the kernel keeps."""

_NUMBERS: Final[Mapping[str, int]] = {"x86_64": 321, "aarch64": 280}
NUMBER: Final = _NUMBERS.get(platform.machine(), -1)
"""Of the system call on this machine; -1, which the kernel answers with ENOSYS, where it isn't known."""


ENOTSUPP: Final = 524
"""A number that the kernel should keep to itself, and libraries have no words for."""


class Command(IntEnum):
    """What bpf(2) can be asked for."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    PROG_LOAD = 5
    PROG_TEST_RUN = 10
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    LINK_CREATE = 28


class MapCreate(ctypes.Structure):
    """BPF_MAP_CREATE."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("inner_map", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("name", ctypes.c_char * (NAME_LENGTH + 1)),
    )


class Element(ctypes.Structure):
    """BPF_MAP_UPDATE_ELEM."""

    # c_char_p points into the bytes that it is given, and keeps them: no copy, and nothing that threads would share.
    _fields_ = (
        ("map", ctypes.c_uint64),
        ("key", ctypes.c_char_p),
        ("value", ctypes.c_char_p),
        ("flags", ctypes.c_uint64),
    )


class Lookup(ctypes.Structure):
    """BPF_MAP_LOOKUP_ELEM."""

    _fields_ = (
        ("map", ctypes.c_uint64),
        ("key", ctypes.c_char_p),
        ("value", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


class Batch(ctypes.Structure):
    """BPF_MAP_UPDATE_BATCH."""

    _fields_ = (
        ("after", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("keys", ctypes.c_char_p),
        ("values", ctypes.c_char_p),
        ("count", ctypes.c_uint32),
        ("map", ctypes.c_uint32),
        ("element_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class LookupBatch(ctypes.Structure):
    """BPF_MAP_LOOKUP_BATCH."""

    _fields_ = (
        ("after", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
        ("map", ctypes.c_uint32),
        ("element_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class ProgramLoad(ctypes.Structure):
    """BPF_PROG_LOAD."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("instruction_count", ctypes.c_uint32),
        ("instructions", ctypes.c_char_p),
        ("license", ctypes.c_char_p),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log", ctypes.c_void_p),
        ("kernel_version", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * (NAME_LENGTH + 1)),
        ("ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
    )


class TestRun(ctypes.Structure):
    """BPF_PROG_TEST_RUN."""

    _fields_ = (
        ("program", ctypes.c_uint32),
        ("verdict", ctypes.c_uint32),
        ("size_in", ctypes.c_uint32),
        ("size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_char_p),
        ("data_out", ctypes.c_void_p),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
        ("context_size_in", ctypes.c_uint32),
        ("context_size_out", ctypes.c_uint32),
        ("context_in", ctypes.c_void_p),
        ("context_out", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


class XdpContext(ctypes.Structure):
    """`struct xdp_md`: what a program is told of a packet."""

    _fields_ = (
        ("data", ctypes.c_uint32),
        ("data_end", ctypes.c_uint32),
        ("data_meta", ctypes.c_uint32),
        ("ingress_ifindex", ctypes.c_uint32),
        ("rx_queue_index", ctypes.c_uint32),
        ("egress_ifindex", ctypes.c_uint32),
    )


class LinkCreate(ctypes.Structure):
    """BPF_LINK_CREATE."""

    _fields_ = (
        ("program", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


_SIGNATURE: Final = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long)
_patient = ctypes.CDLL(None, use_errno=True).syscall
_patient.restype, _patient.argtypes = ctypes.c_long, _SIGNATURE
_quick = ctypes.PyDLL(None, use_errno=True).syscall
_quick.restype, _quick.argtypes = ctypes.c_long, _SIGNATURE

quick_call: Callable[[int, int, int, int], int] = _quick
"""Call it, and keep the interpreter meanwhile: for what takes a microsecond, since having it back may take milliseconds."""


def described(number: int, what: str) -> OSError:
    """An error of the kernel's, with what was tried."""
    return OSError(number, f"{what}: {'not supported' if number == ENOTSUPP else os.strerror(number)}")


def failure(command: Command, subject: str) -> OSError:
    """What the last call of this thread failed with."""
    return described(ctypes.get_errno(), f"BPF_{command.name} of {subject}")


def call(command: Command, arguments: ctypes.Structure, subject: str) -> int:
    """Call it, and let others have the interpreter meanwhile.

    Args:
        command: what for.
        arguments: its own; what they point to is the caller's to keep.
        subject: what it is about, for the error.

    Raises:
        OSError: it failed, or its number isn't known for this machine (ENOSYS).
    """
    if NUMBER < 0:
        known = " and ".join(_NUMBERS)
        raise OSError(errno.ENOSYS, f"bpf(2) can be called on {known}, not on {platform.machine()}")
    result: int = _patient(NUMBER, command, ctypes.addressof(arguments), ctypes.sizeof(arguments))
    if result < 0:
        raise failure(command, subject)
    return result


class Owned:
    """A file descriptor of one's own, closed at the end of a `with` block.

    Attributes:
        fd: the descriptor, -1 once it is closed.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        """The descriptor, -1 once it is closed."""
        return self.fd

    def close(self) -> None:
        """Give it back; again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
