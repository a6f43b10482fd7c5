"""Write the log's lines to a file, in a thread that may block; its callers never do."""

import os
import queue
import threading
from collections.abc import Callable
from typing import Protocol, TextIO

MAX_QUEUED = 1000
"""Lines, or dumps, in the queue for a slow reader; further lines are dropped and counted."""

CLOSE_TIMEOUT = 1.0
"""Seconds in which the queue is written at the end."""


class Stream(Protocol):
    """A destination of lines."""

    @property
    def lost(self) -> int:
        """Texts that were not written, since the start."""

    def write(self, text: str, /) -> None:
        """Write a text."""

    def close(self) -> None:
        """Write what is waiting, and end."""


class LogWriter:
    """A stream that never blocks or fails its callers.

    A hanging log collector, a full disk or a closed standard error must not delay a packet or end the relay.

    Args:
        target: the file to write to; None discards every line.
    """

    def __init__(self, target: TextIO | None) -> None:
        # Written to below the file's buffer and lock: a thread blocked in a write would hold that lock, and the interpreter
        # would wait for the lock at its end.
        self._descriptor = None if target is None else target.fileno()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._count_lock = threading.Lock()
        self._is_torn = False
        self.lost = 0
        """Texts that were not written, since the start."""
        self.render_dropped: Callable[[int], str] | None = None
        """Returns the line that reports how many lines were dropped."""
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str, /) -> None:
        """Queue a text, or drop it if the queue is full."""
        if self._queue.qsize() < MAX_QUEUED:
            self._queue.put(text)
        else:
            self._count_lost()

    def close(self) -> None:
        """Write the queue, for at most `CLOSE_TIMEOUT`."""
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT)

    def _write_all(self) -> None:
        reported = 0
        while (text := self._queue.get()) is not None:
            lost = self.lost
            if lost > reported and self.render_dropped is not None:
                text = self.render_dropped(lost - reported) + text
            try:
                self._write(text.encode(errors="backslashreplace"))
                reported = lost
            except OSError:
                # The loss is reported as soon as a line can be written again.
                self._count_lost()

    def _count_lost(self) -> None:
        with self._count_lock:
            self.lost += 1

    def _write(self, line: bytes) -> None:
        if self._is_torn:
            # A full disk took the begin of a line: end that line first.
            line = b"\n" + line
        while line and self._descriptor is not None:
            written = os.write(self._descriptor, line)
            self._is_torn, line = line[written - 1 : written] != b"\n", line[written:]
