"""Check and drop the capabilities of this process for bpf(2) and the network."""

import ctypes
import os
from collections.abc import Callable
from typing import Final

_SYS_ADMIN: Final = "CAP_SYS_ADMIN"
_NUMBERS: Final = {"CAP_NET_ADMIN": 12, _SYS_ADMIN: 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
_SHARES: Final = frozenset({"CAP_BPF", "CAP_PERFMON"})
"""Former parts of CAP_SYS_ADMIN, which still includes both."""

_VERSION: Final = 0x20080522
_BITS: Final = 32
_SETS: Final = 3
_PR_CAPBSET_DROP: Final = 24


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("thread", ctypes.c_int))


_Sets = ctypes.c_uint32 * (2 * _SETS)
"""Effective, permitted and inheritable set: first of the capabilities 0 to 31, then of the capabilities from 32."""

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> tuple[str, ...]:
    """Return the names of the capabilities that this thread lacks for loading network programs.

    CAP_SYS_ADMIN replaces CAP_BPF and CAP_PERFMON. Capabilities of a user namespace count here, but not for the kernel.

    Raises:
        OSError: the kernel rejects the query.
    """
    sets = _read()
    held = {name for name, number in _NUMBERS.items() if sets[number // _BITS * _SETS] >> number % _BITS & 1}
    if _SYS_ADMIN in held:
        held |= _SHARES
    return tuple(name for name in _NUMBERS if name not in held and name != _SYS_ADMIN)


def drop() -> None:
    """Drop the capabilities for loading programs permanently. Open maps, programs and links stay usable.

    This drops CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN, which includes two of the former. It affects this
    thread, threads started later and, with CAP_SETPCAP, executed programs. Running threads keep their capabilities, so call
    this before the process starts a thread. Capabilities that the thread lacks are ignored.

    Before Linux 5.19 with unprivileged bpf(2) disabled, maps without CAP_BPF are usable only through mapped memory. Sockets
    need CAP_NET_ADMIN for buffers larger than `net.core.rmem_max`.

    Raises:
        OSError: the kernel rejects the change, and nothing is dropped.
    """
    sets = _read()
    # The bounding set comes first, because changing it needs a capability that is dropped below. Without CAP_SETPCAP, only
    # executing a program with file capabilities, or as root, could restore them. This process executes no program.
    for number in _NUMBERS.values():
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        for each in range(_SETS):
            sets[number // _BITS * _SETS + each] &= ~(1 << number % _BITS)
    # The kernel removes the same capabilities from the ambient set.
    _call(_libc.capset, "capset", sets)


def _read() -> ctypes.Array[ctypes.c_uint32]:
    sets = _Sets()
    _call(_libc.capget, "capget", sets)
    return sets


def _call(function: Callable[..., int], name: str, sets: ctypes.Array[ctypes.c_uint32]) -> None:
    if function(ctypes.byref(_Header(_VERSION, 0)), sets):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
