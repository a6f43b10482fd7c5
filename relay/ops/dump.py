"""What every thread is doing, and the state of the system in numbers: for finding out why a relay hangs.

Stacks name files, lines and functions; no value of any variable is shown, so no secret and no payload is.
"""

import faulthandler
import sys
import traceback
from collections.abc import Mapping

from relay.ops import threads
from relay.ops.logs.log import Stream


def leave_last_words() -> None:
    """Have whatever kills this process by SIGABRT, SIGSEGV or the like leave all stacks on standard error.

    So also if no Python code runs any more: they are written by a signal handler in C, which knows no names of threads and
    stops after a hundred of them. It reads the stack of a thread while that one goes on, which may go wrong: a process that
    is to live has `dump_stacks`.
    """
    # It may have been closed before the start: then there is nowhere to write to.
    if sys.stderr is not None:
        faulthandler.enable(file=sys.stderr, all_threads=True)


def dump(summary: Mapping[str, object], stream: Stream) -> None:
    """Write the summary and the stack of each thread, by name, in one piece."""
    lines = ["--- relay state", *(f"{name}: {_show(value)}" for name, value in summary.items())]
    lines += _stacks()
    _write([*lines, "--- end of dump"], stream)


def dump_stacks(stream: Stream) -> None:
    """Write the stacks alone, for which nobody is asked for anything."""
    lines = _stacks()
    _write([*lines, "--- end of stacks"], stream)


def _stacks() -> list[str]:
    names = threads.names()
    frames = sys._current_frames()  # noqa: SLF001 - the documented way to other threads' stacks
    lines = [f"--- {len(frames)} threads"]
    for ident, frame in sorted(frames.items(), key=lambda item: names.get(item[0], "")):
        lines.append(f"thread {names.get(ident, 'unknown')}:")
        lines += [line.rstrip("\n") for line in traceback.format_stack(frame)]
    return lines


def _write(lines: list[str], stream: Stream) -> None:
    stream.write("\n".join(lines) + "\n")
    stream.flush()


def _show(value: object) -> str:
    """Write a number, or a table of counts without its zeros."""
    if isinstance(value, Mapping):
        # A copy, made in one go: its owner goes on counting.
        return ", ".join(f"{_name(key)}={count}" for key, count in dict(value).items() if count) or "none"
    return str(value)


def _name(key: object) -> str:
    return "/".join(str(part) for part in key) if isinstance(key, tuple) else str(key)
