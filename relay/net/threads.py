"""How the threads of this process share CPUs and the interpreter.

One thread at a time runs Python, whatever the number of CPUs. On several CPUs the threads compete for the interpreter: each
wake-up starts a thread on another CPU, which finds the interpreter taken. On one CPU only one thread runs at a time. If
relaying threads do not preempt each other (SCHED_BATCH), each thread finds the interpreter free.
"""

import _thread
import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable

from relay.core.overload import GIVE_WAY, LOAD_BATCH_SECONDS, LOAD_WAITING

STACK_SIZE = 256 * 1024
"""Bytes of address space for the stack of a thread; untouched pages take no memory. Python itself uses little of the stack:
128 KiB would suffice, and the rest is for callbacks of libraries."""

# Before CPython 3.12, os.sched_yield does not release the interpreter; ctypes does.
yield_cpu: Callable[[], object] = (
    os.sched_yield if sys.version_info >= (3, 12) else ctypes.CDLL(None, use_errno=False).sched_yield
)
"""Yield the CPU to other threads that are ready."""


def yield_to_others(thread: int = 0, *, preempt: bool = False) -> None:
    """Prevent a thread from preempting another: a ready thread waits until the running thread yields.

    Args:
        thread: the native id, 0 for the calling thread.
        preempt: True to let the thread preempt others again.
    """
    # A sandbox may forbid this, and then the default policy applies; or the thread has ended.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, os.SCHED_OTHER if preempt else os.SCHED_BATCH, _NO_PRIORITY)


def current_cpu() -> int:
    """Return the CPU on which this thread runs: as good as any that the kernel would choose now."""
    cpu: int = ctypes.CDLL(None).sched_getcpu()
    return cpu


class Load:
    """Whether many readers of this process wait for the CPU.

    The CPU time of the process is no measure: with 16,384 threads the kernel takes a millisecond to add it up.

    Args:
        yield_: yields the CPU to other threads.
        clock: returns monotonic seconds.
    """

    __slots__ = ("_clock", "_readers", "_yield", "is_high", "preempts", "waiting", "work")

    def __init__(self, yield_: Callable[[], object] = yield_cpu, clock: Callable[[], float] = time.monotonic) -> None:
        self.work = 0
        """Batches done: a reader adds 1 for each, and calls `check` every `LOAD_CHECK_INTERVAL`. Some may get lost."""
        self.is_high = False
        """Whether many other readers of this process are usually ready to run."""
        self.waiting: list[None] = []
        """An element for each thread that waits for the core."""
        self.preempts = False
        """Whether readers preempt other threads: see `relay.net.neighbours`."""
        self._readers: set[int] = set()
        """The native ids of reading threads."""
        self._yield = yield_
        self._clock = clock

    def join(self) -> None:
        """Add this thread, a reader that does not preempt others, unless it should."""
        self._readers.add(threading.get_native_id())
        yield_to_others(preempt=self.preempts)

    def leave(self) -> None:
        """Remove this thread."""
        self._readers.discard(threading.get_native_id())

    def set_preempts(self, *, preempts: bool) -> None:
        """Let all readers preempt other threads, or not."""
        if preempts is self.preempts:
            return
        self.preempts = preempts
        for number, reader in enumerate(tuple(self._readers)):
            yield_to_others(reader, preempt=preempts)
            if not number % _THREADS_PER_SLICE:
                yield_cpu()

    def give_way(self) -> None:
        """Let the threads that wait for the core have it.

        A released lock wakes one of them, but this thread would take the lock again before the other thread runs, if another
        process has the CPU meanwhile. So sleep.
        """
        if self.waiting:
            time.sleep(GIVE_WAY)
        else:
            self._yield()

    def check(self) -> None:
        """Yield the CPU, and measure the work of other readers meanwhile.

        Readers that did a batch in that time were waiting. If the time went to another process, yielding more often would
        only help that process.
        """
        if self.preempts:
            # A yield would give another process a whole time slice, and packets would wait for 3 ms.
            self.is_high = False
            return
        work, began = self.work, self._clock()
        self._yield()
        done = self.work - work
        self.is_high = done >= LOAD_WAITING and self._clock() - began < done * LOAD_BATCH_SECONDS


_THREADS_PER_SLICE = 256
"""Threads that get another policy before packets are handled: 0.3 ms."""

_NO_PRIORITY = os.sched_param(0)

_light: dict[int, str] = {}
"""The names of running light threads by identifier."""


def start_light(target: Callable[[], None], name: str) -> None:
    """Run a function in a thread with a name but without a `threading.Thread`.

    The start does not wait until the thread runs. So it takes 65 µs instead of 100 µs, and the thread 2 KB less: this
    matters with thousands of threads. The function must not call `threading.current_thread`, which would make an object that
    is never freed. The thread does not keep the process alive.

    Raises:
        RuntimeError: the machine has no thread left.
    """

    def run() -> None:
        _light[threading.get_ident()] = name
        try:
            target()
        finally:
            del _light[threading.get_ident()]

    _thread.start_new_thread(run, ())


def names() -> dict[int, str]:
    """Return the names of all running threads by identifier."""
    heavy = {thread.ident: thread.name for thread in threading.enumerate() if thread.ident is not None}
    return heavy | _light.copy()
