"""The system call bpf(2): the kernel's layout of its arguments, and its errors."""

import ctypes
import errno
import os
import platform
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final, Self

NAME_LENGTH: Final = 15
"""Characters of a name that the kernel keeps."""

_NUMBERS: Final[Mapping[str, int]] = {"x86_64": 321, "aarch64": 280}
NUMBER: Final = _NUMBERS.get(platform.machine(), -1)
"""Number of the system call on this machine, or -1 on an unknown machine."""

ENOTSUPP: Final = 524
"""An internal error number of the kernel, for which libraries have no text."""


class Command(IntEnum):
    """Commands of bpf(2)."""

    MAP_CREATE = 0
    PROG_LOAD = 5
    PROG_TEST_RUN = 10
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29


def _u32(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_uint32) for name in names)


# A field of type c_char_p keeps a reference to its bytes and does not copy them. It accepts an address, too.


class MapCreate(ctypes.Structure):
    """BPF_MAP_CREATE."""

    _fields_ = (
        *_u32("type", "key_size", "value_size", "max_entries", "flags", "inner_map", "numa_node"),
        ("name", ctypes.c_char * (NAME_LENGTH + 1)),
    )


class Batch(ctypes.Structure):
    """BPF_MAP_LOOKUP_BATCH, BPF_MAP_UPDATE_BATCH and BPF_MAP_DELETE_BATCH."""

    _fields_ = (
        *(("after", ctypes.c_void_p), ("last", ctypes.c_void_p)),
        *(("keys", ctypes.c_char_p), ("values", ctypes.c_char_p)),
        *_u32("count", "map"),
        *(("element_flags", ctypes.c_uint64), ("flags", ctypes.c_uint64)),
    )


class ProgramLoad(ctypes.Structure):
    """BPF_PROG_LOAD."""

    _fields_ = (
        *_u32("type", "instruction_count"),
        *(("instructions", ctypes.c_char_p), ("license", ctypes.c_char_p)),
        *_u32("log_level", "log_size"),
        ("log", ctypes.c_void_p),
        *_u32("kernel_version", "flags"),
        ("name", ctypes.c_char * (NAME_LENGTH + 1)),
        *_u32("ifindex", "attach_type"),
    )


class LinkCreate(ctypes.Structure):
    """BPF_LINK_CREATE."""

    _fields_ = _u32("program", "ifindex", "attach_type", "flags")


class LinkUpdate(ctypes.Structure):
    """BPF_LINK_UPDATE."""

    _fields_ = _u32("link", "program", "flags", "old_program")


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype, _syscall.argtypes = ctypes.c_long, (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long)


def described(number: int, action: str) -> OSError:
    """Return an error of the kernel, with the failed action."""
    return OSError(number, f"{action}: {'not supported' if number == ENOTSUPP else os.strerror(number)}")


def call(command: Command, arguments: ctypes.Structure, subject: str, *, number: int = NUMBER) -> int:
    """Call bpf(2) without holding the GIL. The error names the subject.

    Raises:
        OSError: the call failed, or the number is unknown (ENOSYS).
    """
    if number < 0:
        known = " and ".join(_NUMBERS)
        raise OSError(errno.ENOSYS, f"bpf(2) can be called on {known}, not on {platform.machine()}")
    result: int = _syscall(number, command, ctypes.addressof(arguments), ctypes.sizeof(arguments))
    if result < 0:
        raise described(ctypes.get_errno(), f"BPF_{command.name} of {subject}")
    return result


class Owned:
    """The owner of a file descriptor, which is closed at the end of a `with` block, and then -1."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
