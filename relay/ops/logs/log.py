"""The log: events with fields, one a line, to standard error.

Modules log by a `relay.logger.Logger`. `Log` filters events by target and level (`relay.ops.logs.filter`), limits their rate
(`relay.ops.logs.rate_limiter`) and makes lines of them (`relay.ops.logs.render`); a thread writes the lines
(`relay.ops.logs.writer`). Reports of libraries and the interpreter are events as well (`relay.ops.logs.stdlib_bridge`).
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from relay import logger
from relay.config import LogFormat
from relay.logger import Fields, Level
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.rate_limiter import RateLimiter
from relay.ops.logs.render import JOURNAL_ERROR, Destination, renderer
from relay.ops.logs.stdlib_bridge import stdlib_logged
from relay.ops.logs.writer import LogWriter, Stream


class Log:
    """The log of this process: the filter, the rate limit and the format of its lines.

    Args:
        log_format: the format of lines.
        stream: the destination of lines.
        log_filter: the events to write.
        destination: the reader of the stream.
        clock: returns Unix seconds.
        monotonic: returns monotonic seconds.
    """

    def __init__(
        self,
        log_format: LogFormat,
        stream: Stream,
        log_filter: LogFilter | None = None,
        destination: Destination = Destination.FILE,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream
        self._limiter = RateLimiter(monotonic)
        self.filter_in_force = log_filter or LogFilter()
        """The events that are written. `change_filter` replaces it."""
        self._listeners: list[Callable[[], None]] = []
        self._clock = clock
        self._render = renderer(log_format, destination)

    def change_filter(self, log_filter: LogFilter) -> None:
        """Replace the filter; thread-safe."""
        self.filter_in_force = log_filter
        for listener in tuple(self._listeners):
            listener()

    @contextlib.contextmanager
    def followed_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call a function now and at each change of the filter, in the thread that changes it."""
        self._listeners.append(listener)
        listener()
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def admits(self, target: str, level: int) -> bool:
        """Return whether the filter admits events of a target and level."""
        return level >= self.filter_in_force.threshold(target)

    def write(self, target: str, level: Level, event: str, fields: Callable[[], Fields]) -> None:
        """Write an event, unless the filter or the rate limit excludes it."""
        if not self.admits(target, level):
            return
        # Below warn, events may come for each request: their fields are made only if they are written.
        known = fields() if level >= Level.WARN else None
        left_out = self._limiter.admit((target, event), level, known)
        if left_out is not None:
            more = {"left_out": left_out} if left_out else {}
            self.stream.write(self._render(self._clock(), target, level, event, {**(known or fields()), **more}))

    def report_suppressed(self) -> None:
        """Log the number of suppressed events of each kind that was not logged yet."""
        for (target, event), count in self._limiter.take_suppressed().items():
            self.stream.write(self.line("repeated events left out", what=event, of=target, left_out=count))

    def line(self, event: str, target: str = "relay.ops.logs", level: Level = Level.WARN, **fields: object) -> str:
        """Return the line of an event that is neither filtered nor limited: about the log itself, or of a dump."""
        return self._render(self._clock(), target, level, event, fields)


@contextlib.contextmanager
def events_to(log: Log) -> Iterator[None]:
    """Write the events of all modules to a log, for as long as the context lasts."""
    try:
        with logger.events_to(log.write):
            yield
    finally:
        log.report_suppressed()


@contextlib.contextmanager
def writing(log_format: LogFormat, log_filter: LogFilter, target: TextIO | None) -> Iterator[Log]:
    """Write all events of this process to a file, for as long as the context lasts.

    Args:
        log_format: the format of lines.
        log_filter: the events to write.
        target: the file; None discards all events.
    """
    writer = LogWriter(target)
    log = Log(log_format, writer, log_filter, destination_of(target, os.environ))
    writer.render_dropped = lambda count: log.line("lines of the log dropped", lines=count)
    try:
        with events_to(log), stdlib_logged():
            yield log
    finally:
        writer.close()


def destination_of(target: TextIO | None, environ: Mapping[str, str]) -> Destination:
    """Return the reader of a file. NO_COLOR makes a terminal like a file (no-color.org)."""
    if target is not None and target.isatty():
        is_plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
        return Destination.FILE if is_plain else Destination.TERMINAL
    journal = environ.get("JOURNAL_STREAM")
    if target is not None and journal:
        # systemd.exec(5): the device and inode of the stream that systemd connected to the journal.
        status = os.fstat(target.fileno())
        if journal == f"{status.st_dev}:{status.st_ino}":
            return Destination.JOURNAL
    return Destination.FILE


def error_line(text: str) -> str:
    """Return a line about a usage error, which has no other event, with its priority if standard error is the journal."""
    is_journal = destination_of(sys.stderr, os.environ) is Destination.JOURNAL
    return f"<{JOURNAL_ERROR}>{text}" if is_journal else text
