"""How the threads of this process share CPUs and the interpreter.

One thread at a time runs Python, whatever the number of CPUs. On several CPUs they fight over that: each wake-up is another
thread on another CPU that finds the interpreter taken. On one CPU a thread only ever runs while no other does; and if those
that relay don't interrupt each other (SCHED_BATCH), each finds the interpreter free.
"""

import _thread
import contextlib
import ctypes
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from relay.config import ANY_CPU, BadUseError, Config

_log = structlog.get_logger("relay.ops.threads")

STACK_SIZE = 256 * 1024
"""Bytes of address space for the stack of a thread; what is not touched takes no memory. Python itself uses little of it:
128 KiB would do, and twice that is for a library's callback."""

_PROCESSOR = 38
"""Of the fields of /proc/PID/stat, counted from 0: the CPU that it last ran on (proc(5))."""


# With the interpreter given up meanwhile, which is the point of it; os.sched_yield keeps it before CPython 3.12.
yield_cpu: Callable[[], object] = (
    os.sched_yield if sys.version_info >= (3, 12) else ctypes.CDLL(None, use_errno=False).sched_yield
)
"""Let other threads that are ready have the CPU."""


@contextlib.contextmanager
def shared_fairly(switch_interval: float) -> Iterator[None]:
    """Set what new threads of this process get, and put it back afterwards."""
    interval, size = sys.getswitchinterval(), threading.stack_size()
    sys.setswitchinterval(switch_interval)
    threading.stack_size(STACK_SIZE)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        threading.stack_size(size)


def yield_to_others() -> None:
    """Have this thread never take the CPU from one that is running: it waits until that one gives it up."""
    # A sandbox may forbid it; then it is as fair as any other thread.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, _NO_PRIORITY)


def current_cpu() -> int:
    """Give the CPU that the main thread last ran on: as good as any that the kernel would choose now."""
    # The second field, a name in parentheses, may have anything in it.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[_PROCESSOR - 2])


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Keep all threads that are made from now on, and this one, on one CPU.

    Raises:
        OSError: this process may not use it.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def sharing_a_cpu(config: Config) -> Iterator[None]:
    """Have threads share a CPU and the interpreter as the config says, for as long as the context lasts.

    Raises:
        BadUseError: this process may not use the CPU.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(shared_fairly(config.switch_interval))
        try:
            if config.cpu is not None:
                stack.enter_context(pinned(current_cpu() if config.cpu == ANY_CPU else config.cpu))
        except OSError as error:
            if config.cpu != ANY_CPU:
                raise BadUseError(_why_not(config.cpu, error)) from error
            # A sandbox forbids it. It works without, only slower.
            _log.warning("threads can't be put on one CPU: relaying costs more", error=error.strerror)
        yield


def _why_not(cpu: int | None, error: OSError) -> str:
    if error.errno == errno.EINVAL:
        usable = ",".join(str(each) for each in sorted(os.sched_getaffinity(0)))
        return f"can't run on CPU {cpu}: --cpu-affinity takes one of {usable}, auto, or off"
    return f"can't choose a CPU ({error.strerror}): allow sched_setaffinity, or give --cpu-affinity off"


class Load:
    """Whether those who do the work of this process get in each other's way.

    Not the CPU time of the process: with 16,384 threads it takes a millisecond to add that up.

    Args:
        yield_: lets other threads have the CPU.
        clock: gives monotonic seconds.
    """

    __slots__ = ("_clock", "_yield", "is_high", "work")

    def __init__(self, yield_: Callable[[], object] = yield_cpu, clock: Callable[[], float] = time.monotonic) -> None:
        self.work = 0
        """Pieces of work done: who does one adds one, and calls `look` every `LOOK_EVERY`. Some may get lost."""
        self.is_high = False
        """Whether many others of this process are ready to do theirs, most often."""
        self._yield = yield_
        self._clock = clock

    def look(self) -> None:
        """Let others have the CPU, and see what comes of it.

        If they did their work in that time, they were waiting to. If the time went elsewhere, then to another process, which
        shall not have it given more often.
        """
        work, began = self.work, self._clock()
        self._yield()
        done = self.work - work
        self.is_high = done >= _MANY and self._clock() - began < done * _LONGEST_PIECE


LOOK_EVERY = 64

_MANY = 4
"""Others that were waiting. One or two now and then are no load: to let them go first costs more than it saves."""

_LONGEST_PIECE = 0.0005
"""Seconds for a piece of work, on the average: a full batch, on a slow machine."""

_NO_PRIORITY = os.sched_param(0)

_light: dict[int, str] = {}
"""The names of light threads that run, by identifier."""


def start_light(target: Callable[[], None], name: str) -> None:
    """Run something in a thread of its own, which has a name and no `threading.Thread`.

    That takes 35 µs less of the 100 that one takes, since it does not wait until it runs, and 2 KB less: it counts where
    there are thousands. Nothing that asks for `threading.current_thread` may run in it: that would make an object for it
    that stays for ever. It keeps no process alive.

    Raises:
        RuntimeError: the machine has no thread to give.
    """

    def run() -> None:
        _light[threading.get_ident()] = name
        try:
            target()
        finally:
            del _light[threading.get_ident()]

    _thread.start_new_thread(run, ())


def names() -> dict[int, str]:
    """Give the names of all threads that run, by identifier."""
    heavy = {thread.ident: thread.name for thread in threading.enumerate() if thread.ident is not None}
    return heavy | _light.copy()
