"""Share a CPU and the interpreter among all threads, as configured."""

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator

from relay.config import ANY_CPU, Config, UsageError
from relay.logger import Logger
from relay.net.threads import STACK_SIZE, current_cpu

_log = Logger("relay.ops.threads")


@contextlib.contextmanager
def sharing_a_cpu(config: Config) -> Iterator[None]:
    """Let this thread, and threads that start meanwhile, share a CPU and the interpreter according to the config.

    Raises:
        UsageError: this process may not use the CPU.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(config.switch_interval)
        stack.callback(threading.stack_size, threading.stack_size(STACK_SIZE))
        before = os.sched_getaffinity(0)
        try:
            if config.cpu is not None:
                os.sched_setaffinity(0, {current_cpu() if config.cpu == ANY_CPU else config.cpu})
                stack.callback(os.sched_setaffinity, 0, before)
        except OSError as error:
            if config.cpu != ANY_CPU:
                raise UsageError(_why_not(config.cpu, error)) from error
            # A sandbox forbids the affinity. Relaying works without, but slower.
            _log.warning("threads can't be put on one CPU: relaying costs more", error=error.strerror)
        yield


def _why_not(cpu: int | None, error: OSError) -> str:
    if error.errno == errno.EINVAL:
        usable = ",".join(str(each) for each in sorted(os.sched_getaffinity(0)))
        return f"can't run on CPU {cpu}: --cpu-affinity takes one of {usable}, auto, or off"
    return f"can't choose a CPU ({error.strerror}): allow sched_setaffinity, or give --cpu-affinity off"
