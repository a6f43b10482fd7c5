"""What every thread is doing, and the state of the system in numbers: for finding out why a relay hangs.

Stacks name files, lines and functions; no value of any variable is shown, so no secret and no payload is.
"""

import faulthandler
import signal
import sys
import traceback
from collections.abc import Mapping

from relay.ops import threads
from relay.ops.logs.log import Stream


def register_wedged_dump() -> None:
    """Let SIGQUIT write all stacks to standard error even if no Python code runs any more.

    It is written by a signal handler in C, which knows no names of threads and stops after a hundred of them.
    """
    if sys.stderr is None:
        # It was closed before the start: there is nowhere to write to, and no reason to end.
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        return
    faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True, chain=False)


def dump(summary: Mapping[str, object], stream: Stream) -> None:
    """Write the summary and the stack of each thread, by name, in one piece."""
    lines = ["--- relay state", *(f"{name}: {_show(value)}" for name, value in summary.items())]
    names = threads.names()
    frames = sys._current_frames()  # noqa: SLF001 - the documented way to other threads' stacks
    lines.append(f"--- {len(frames)} threads")
    for ident, frame in sorted(frames.items(), key=lambda item: names.get(item[0], "")):
        lines.append(f"thread {names.get(ident, 'unknown')}:")
        lines += [line.rstrip("\n") for line in traceback.format_stack(frame)]
    lines.append("--- end of dump")
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
