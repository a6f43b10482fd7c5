"""What this process may do to the kernel, and giving that up."""

import ctypes
import os
from collections.abc import Callable
from typing import Final

_SYS_ADMIN: Final = "CAP_SYS_ADMIN"
_NUMBERS: Final = {"CAP_NET_ADMIN": 12, _SYS_ADMIN: 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
_SHARES: Final = frozenset({"CAP_BPF", "CAP_PERFMON"})
"""Once parts of CAP_SYS_ADMIN, which therefore includes them."""

_VERSION: Final = 0x20080522
_BITS: Final = 32
_SETS: Final = 3
_PR_CAPBSET_DROP: Final = 24


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("thread", ctypes.c_int))


_Sets = ctypes.c_uint32 * (2 * _SETS)
"""Effective, permitted and inheritable, of the capabilities below 32; and then of those from 32."""

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> tuple[str, ...]:
    """Tell which capabilities this thread lacks for loading programs for the network, by name.

    CAP_SYS_ADMIN will do for CAP_BPF and CAP_PERFMON. What a user namespace gives counts here, but not for the kernel.

    Raises:
        OSError: the kernel doesn't tell.
    """
    sets = _read()
    held = {name for name, number in _NUMBERS.items() if sets[number // _BITS * _SETS] >> number % _BITS & 1}
    if _SYS_ADMIN in held:
        held |= _SHARES
    return tuple(name for name in _NUMBERS if name not in held and name != _SYS_ADMIN)


def drop() -> None:
    """Give up, for good, what loading programs takes; open maps, programs and links can be used as before.

    Gone are CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and CAP_SYS_ADMIN too, which stands in for them: from this thread, from
    those that it starts and, if it has CAP_SETPCAP, from any program that it runs. Threads that run already keep them: this
    is for the first thread, before it starts any. Dropping what isn't held does nothing.

    Before Linux 5.19, where unprivileged users may not use bpf(2), maps can't be used without CAP_BPF either, but for those
    that are mapped into memory. CAP_NET_ADMIN is also what lets sockets have more than `net.core.rmem_max`.

    Raises:
        OSError: the kernel won't, and nothing is dropped.
    """
    sets = _read()
    # First, since it may take what is dropped thereafter. A process that may not do this can only have them back by running
    # a program that has them by its file, or as root: nothing of this one does.
    for number in _NUMBERS.values():
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        for each in range(_SETS):
            sets[number // _BITS * _SETS + each] &= ~(1 << number % _BITS)
    # The ambient set loses what the permitted one does.
    _call(_libc.capset, "capset", sets)


def _read() -> ctypes.Array[ctypes.c_uint32]:
    sets = _Sets()
    _call(_libc.capget, "capget", sets)
    return sets


def _call(function: Callable[..., int], name: str, sets: ctypes.Array[ctypes.c_uint32]) -> None:
    if function(ctypes.byref(_Header(_VERSION, 0)), sets):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
