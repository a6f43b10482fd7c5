"""Dump the relay's counters and the stacks of all threads into the log, to find out why a relay hangs.

Stacks show files, lines and functions. They show no values of variables, and therefore no secrets and no payloads. Equal
stacks are written once, so a relay with 16,384 allocations writes fewer than 200 lines.
"""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import TypeAlias

from relay.logger import Level
from relay.net import threads
from relay.ops.logs.log import Log
from relay.ops.metrics.metric import Histogram, Point
from relay.ops.metrics.table import read_table
from relay.ops.totals import RelayState
from relay.ops.yielder import Yielder

FIRST = ("server", "portal", "MainThread")
"""The threads without which the relay can't go on: their stacks are written first."""

MAX_LINES = 120
"""Lines of all stacks. The lines of the state are fewer than 80."""

_MAX_FRAMES = 12
"""Frames of a stack, from the innermost."""

_MAX_NAMES = 5
"""Names in a group of threads."""

_START = vars(threading.Thread)["_bootstrap_inner"].__code__
"""The code that starts every thread; a stack ends before it."""

_PARTS_OF_PATH = 3
"""Parts of a file's path in a line of a stack, as in relay/net/receiver.py."""

Stack: TypeAlias = tuple[tuple[CodeType, int], ...]
"""The code and the line of each frame, innermost first."""


def leave_last_words() -> None:
    """Write stacks to standard error if a signal such as SIGSEGV kills this process.

    A signal handler in C writes the stacks, even if no Python code runs any more. It shows the hundred newest threads and no
    names. Because it may crash on the stack of a running thread, `dump_stacks` is for a process that goes on.
    """
    # None if standard error was closed before the start.
    if sys.stderr is not None:
        faulthandler.enable(file=sys.stderr, all_threads=True)


def write_stacks_after(seconds: float) -> None:
    """Write stacks to standard error, as `leave_last_words` does, unless this function is called again in time."""
    if sys.stderr is not None:
        faulthandler.dump_traceback_later(seconds, file=sys.stderr)


def dump(state: RelayState, inboxes: Mapping[str, int], log: Log) -> None:
    """Write all metrics, the messages in each inbox, and the stacks of all threads."""
    shown = {metric.name: _shown(metric.points) for metric in read_table(state)}
    _write(log, "state", inboxes=inboxes, state={name: values for name, values in shown.items() if values != {}})
    dump_stacks(log)


def dump_stacks(log: Log, yield_if_due: Callable[[], None] | None = None) -> None:
    """Write the stacks of all threads, without a message to any actor: those of `FIRST`, then the rarest first."""
    names = threads.names()
    by_stack: dict[tuple[int, Stack], list[str]] = {}
    # The documented way to the stacks of other threads.
    frames, yield_if_due = sys._current_frames(), yield_if_due or Yielder()  # noqa: SLF001
    for ident, frame in frames.items():
        name = names.get(ident, "unknown")
        rank = FIRST.index(name) if name in FIRST else len(FIRST)
        by_stack.setdefault((rank, _stack(frame)), []).append(name)
        yield_if_due()
    groups = sorted(by_stack.items(), key=lambda group: (group[0][0], len(group[1])))
    left = MAX_LINES
    for number, ((_, stack), members) in enumerate(groups, 1):
        left -= 1 + len(stack)
        if left >= 0 or number == len(groups):
            _write(log, "threads", count=len(members), names=_shortened(members), stack=[_line(*each) for each in stack])
    _write(log, "end of dump", threads=len(frames), stacks=len(groups))


def abort(log: Log) -> None:
    """Write the stacks of all threads, and end this process by SIGABRT."""
    # At once: systemd waits for 2 s.
    dump_stacks(log, lambda: None)
    log.stream.close()
    # Its stacks are written already.
    faulthandler.disable()
    os.abort()


def _write(log: Log, event: str, **fields: object) -> None:
    log.stream.write(log.line(event, "relay.ops.dump", Level.INFO, **fields))


def _shown(points: list[Point]) -> object:
    """Return the value of a metric, or the values by label, without zeros."""
    values = {"/".join(filter(None, map(str, labels))): _number(value) for labels, value in points}
    return values[""] if values.keys() == {""} else {labels: value for labels, value in values.items() if value}


def _number(value: float | Histogram) -> float:
    return sum(value.counts) if isinstance(value, Histogram) else round(value, 1)


def _stack(frame: FrameType | None) -> Stack:
    stack: list[tuple[CodeType, int]] = []
    while frame is not None and frame.f_code is not _START and len(stack) < _MAX_FRAMES:
        stack.append((frame.f_code, frame.f_lineno or 0))
        frame = frame.f_back
    return tuple(stack)


def _line(code: CodeType, line: int) -> str:
    path = "/".join(code.co_filename.split("/")[-_PARTS_OF_PATH:])
    return f"{path}:{line} {code.co_qualname}"


def _shortened(names: list[str]) -> list[str]:
    """Return names of threads, or their common beginning if they are many."""
    # Character by character: names of threads are no paths.
    return sorted(names) if len(names) <= _MAX_NAMES else [f"{os.path.commonprefix(names)}..."]  # noqa: RUF071
