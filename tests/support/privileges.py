"""Threads with fewer privileges than this process."""

import ctypes
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

CAP_NET_ADMIN: Final = 12
CAP_SYS_ADMIN: Final = 21
CAP_PERFMON: Final = 38
CAP_BPF: Final = 39

EVERY_CAPABILITY: Final = range(64)

_VERSION: Final = 0x20080522
_SETS: Final = 3
_BITS: Final = 32
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def give_up(capabilities: Iterable[int]) -> None:
    """Drop capabilities of this thread permanently. Use a temporary thread."""
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    # Effective, permitted and inheritable sets: first capabilities below 32, then capabilities from 32.
    sets = (ctypes.c_uint32 * (2 * _SETS))()
    assert _libc.capget(header, sets) == 0
    for number in capabilities:
        for each in range(_SETS):
            sets[number // _BITS * _SETS + each] &= ~(1 << number % _BITS)
    assert _libc.capset(header, sets) == 0


def in_a_thread(do: Callable[[], T]) -> T:
    """Call a function in a temporary thread, which may drop privileges. Its network namespace is the caller's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result(timeout=60)
