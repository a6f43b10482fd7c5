"""The log: events with fields, one a line, to standard error."""

import contextlib
import logging
import os
import queue
import threading
from typing import Protocol, TextIO

import structlog

from relay.config import LogFormat

QUEUED_LINES = 1000
"""Lines, or dumps, that may wait for a reader of the log that is slow; what comes beyond that is dropped and counted."""

CLOSE_TIMEOUT = 1.0
"""Seconds in which what waits is written at the end."""


class Stream(Protocol):
    """Where lines go."""

    def write(self, text: str, /) -> int:
        """Write all of a text."""

    def flush(self) -> None:
        """See to it that what was written gets on its way."""

    def isatty(self) -> bool:
        """Tell whether people watch."""


class LogWriter:
    """A stream that never makes who writes to it wait, and never fails it.

    A log collector that hangs, a full disk or a closed standard error is no reason to hold up a packet, let alone to end.

    Args:
        target: the file that lines go to in the end; None if there is nowhere.
    """

    def __init__(self, target: TextIO | None) -> None:
        # Written to beneath the file's own buffer and lock: a thread that is stuck in a write would keep that lock, and the
        # interpreter would wait for it at its end.
        self._descriptor = None if target is None else target.fileno()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._drop_lock = threading.Lock()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str, /) -> int:
        """Queue a text."""
        if self._queue.qsize() < QUEUED_LINES:
            self._queue.put(text)
        else:
            with self._drop_lock:
                self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: all is on its way."""

    def isatty(self) -> bool:
        """Tell whether people watch."""
        return self._descriptor is not None and os.isatty(self._descriptor)

    def close(self) -> None:
        """Write what waits, if that can be done in time."""
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT)

    def _write_all(self) -> None:
        while (text := self._queue.get()) is not None:
            with self._drop_lock:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                text = f"{dropped} lines of the log were dropped: nobody read them in time\n{text}"
            # If that fails, there is nobody to be told: this is where it would be said.
            with contextlib.suppress(OSError):
                self._write(text.encode(errors="backslashreplace"))

    def _write(self, line: bytes) -> None:
        while line and self._descriptor is not None:
            line = line[os.write(self._descriptor, line) :]


def configure(log_format: LogFormat, stream: Stream) -> None:
    """Set how events are written, for the whole process; to be called before the first event."""
    common: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format is LogFormat.JSON:
        renderers: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        # Without local variables in a traceback: they would have secrets among them.
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain, pad_event_to=0)]
    structlog.configure(
        processors=[*common, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # It writes a line with its end in one call, so that a dump can't come in between.
        logger_factory=structlog.WriteLoggerFactory(stream),  # type: ignore[arg-type]  # it needs no more than a Stream
        cache_logger_on_first_use=False,
    )
    # Pykka logs what our supervisors hear of anyway.
    logging.getLogger("pykka").setLevel(logging.CRITICAL + 1)
