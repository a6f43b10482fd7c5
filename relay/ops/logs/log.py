"""The log: events with fields, one a line, to standard error.

An event is filtered by its target and level (`relay.ops.logs.filter`), limited by its kind (`relay.ops.logs.repeats`),
made a line (`relay.ops.logs.lines`) and queued; a thread writes what is queued. What libraries and the interpreter have to
say goes the same way.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TextIO

import structlog

from relay.config import LogFormat
from relay.ops.logs.filter import Level, LogFilter
from relay.ops.logs.foreign import others_heard_by
from relay.ops.logs.lines import Line, renderer
from relay.ops.logs.repeats import Kind, Repeats

QUEUED_LINES = 1000
"""Lines, or dumps, that may wait for a reader of the log that is slow; what comes beyond that is dropped and counted."""

CLOSE_TIMEOUT = 1.0
"""Seconds in which what waits is written at the end."""

_TARGET = "relay.ops.logs"


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
        self._is_torn = False
        self.lost = 0
        """Texts that were not written, since the start."""
        self.tell_dropped: Callable[[int], str] | None = None
        """Gives the line that says how many lines were dropped."""
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str, /) -> int:
        """Queue a text."""
        if self._queue.qsize() < QUEUED_LINES:
            self._queue.put(text)
        else:
            self._lose(1)
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
            if dropped and self.tell_dropped is not None:
                text = self.tell_dropped(dropped) + text
            try:
                self._write(text.encode(errors="backslashreplace"))
            except OSError:
                # There is nobody to be told now: this is where it would be said. It is once something can be written again.
                self._lose(1, before=dropped)

    def _lose(self, count: int, before: int = 0) -> None:
        with self._drop_lock:
            self._dropped += count + before
            self.lost += count

    def _write(self, line: bytes) -> None:
        if self._is_torn:
            # A full disk took the begin of a line: the next one is not to be a part of it.
            line = b"\n" + line
        while line and self._descriptor is not None:
            written = os.write(self._descriptor, line)
            self._is_torn, line = line[written - 1 : written] != b"\n", line[written:]


class Log:
    """The log of this process: what is written, and how.

    Args:
        log_format: how lines look.
        stream: where they go.
        log_filter: which events are written.
        is_watched: people watch the stream, on a terminal that knows colours.
        clock: gives seconds since 1970.
        monotonic: gives monotonic seconds.
    """

    def __init__(
        self,
        log_format: LogFormat,
        stream: Stream,
        log_filter: LogFilter | None = None,
        *,
        is_watched: bool = False,
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self.stream = stream
        self._render = renderer(log_format, is_watched=is_watched)
        self._clock = clock or time.time
        self._repeats = Repeats(monotonic or time.monotonic)
        self._filter = log_filter or LogFilter()
        self._thresholds: dict[str, Level] = {}
        self._listeners: list[Callable[[], None]] = []

    @property
    def lines_lost(self) -> int:
        """How many lines were not written: nobody read them in time, or the disk was full."""
        return self.stream.lost if isinstance(self.stream, LogWriter) else 0

    @property
    def filter_in_force(self) -> LogFilter:
        """Which events are written."""
        return self._filter

    def change_filter(self, log_filter: LogFilter) -> None:
        """Write other events from now on; any thread may."""
        self._filter = log_filter
        # After the filter: who looks something up meanwhile may enter what is old, but into the old table.
        self._thresholds = {}
        for listener in tuple(self._listeners):
            listener()

    @contextlib.contextmanager
    def followed_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """Have a function called now, and whenever the filter is changed, in the thread that changes it."""
        self._listeners.append(listener)
        listener()
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def admits(self, target: str, level: Level) -> bool:
        """Tell whether the filter has events of a target and level written."""
        thresholds = self._thresholds
        threshold = thresholds.get(target)
        if threshold is None:
            threshold = thresholds[target] = self._filter.threshold(target)
        return level >= threshold

    def leaves_out(self, target: str, level: Level, event: str) -> bool:
        """Tell whether an event repeats too often to be written now; counted, if so. It need not be made up then."""
        return self._repeats.leaves_out(Kind(target, event), level)

    def write(
        self, target: str, level: Level, event: str, fields: dict[str, object], exception: BaseException | None = None
    ) -> None:
        """Write an event, if the filter admits it and it does not repeat too often."""
        if not self.admits(target, level):
            return
        left_out = self._repeats.admit(Kind(target, event), level)
        if left_out is None:
            return
        if left_out:
            fields = {**fields, "left_out": left_out}
        self.stream.write(self._render(Line(self._clock(), level, target, event, fields, exception)))

    def tell_left_out(self) -> None:
        """Write how many events were left out, since they repeated too often, and were not told of yet."""
        for kind, count in self._repeats.take_left_out().items():
            fields = {"what": kind.event, "of": kind.target, "left_out": count}
            self.stream.write(self._render(Line(self._clock(), Level.WARN, _TARGET, "repeated events left out", fields)))

    def dropped_line(self, count: int) -> str:
        """Give the line that says that others were not read in time."""
        return self._render(Line(self._clock(), Level.WARN, _TARGET, "lines of the log dropped", {"lines": count}))


class _Target:
    """What structlog asks for each logger: which log, and as whose event."""

    __slots__ = ("log", "name")

    def __init__(self, log: Log, name: str) -> None:
        self.log = log
        self.name = name


class _BoundLogger(structlog.BoundLoggerBase):
    """The methods that modules call; an event that the filter does not admit costs a look-up."""

    _logger: _Target
    _processors: Sequence[structlog.typing.Processor]

    def debug(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        self._tell("debug", Level.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        self._tell("info", Level.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        self._tell("warning", Level.WARN, event, fields)

    def error(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        self._tell("error", Level.ERROR, event, fields)

    def critical(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        self._tell("critical", Level.CRITICAL, event, fields)

    def exception(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        self._tell("error", Level.ERROR, event, {"exc_info": True, **fields})

    def _tell(self, method: str, level: Level, event: str, fields: dict[str, Any]) -> None:
        target = self._logger
        if not target.log.admits(target.name, level):
            return
        if self._processors[-1] is _write and not self._context:
            # What structlog would do with it comes to this, and takes it as long as all the rest.
            _write_to(target, level, event, fields)
        else:
            # Tests can listen there.
            self._proxy_to_logger(method, event, **fields)


_METHODS = {
    "debug": Level.DEBUG,
    "info": Level.INFO,
    "warning": Level.WARN,
    "error": Level.ERROR,
    "critical": Level.CRITICAL,
}


def _write(target: _Target, method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Write an event; the last of structlog's processors."""
    event = fields.pop("event")
    _write_to(target, _METHODS[method], event, dict(fields))
    raise structlog.DropEvent


def _write_to(target: _Target, level: Level, event: str, fields: dict[str, object]) -> None:
    given = fields.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given
    target.log.write(target.name, level, event, fields, error if isinstance(error, BaseException) else None)


@contextlib.contextmanager
def events_to(log: Log) -> Iterator[None]:
    """Have the events of all our modules written to a log, for as long as the context lasts."""
    targets: dict[str, _Target] = {}

    def target_of(name: str = "relay") -> _Target:
        return targets.setdefault(name, _Target(log, name))

    before = structlog.get_config()
    structlog.configure(
        processors=[_write],
        wrapper_class=_BoundLogger,
        logger_factory=target_of,
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
        log.tell_left_out()


@contextlib.contextmanager
def writing(log_format: LogFormat, log_filter: LogFilter, target: TextIO | None) -> Iterator[Log]:
    """Write all events of this process to a file, for as long as the context lasts.

    Args:
        log_format: how lines look; in colours if the file is a terminal, unless NO_COLOR is set (no-color.org).
        log_filter: which events are written.
        target: the file; None if there is nowhere to write to.
    """
    writer = LogWriter(target)
    in_colours = writer.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    log = Log(log_format, writer, log_filter, is_watched=in_colours)
    writer.tell_dropped = log.dropped_line
    try:
        with events_to(log), others_heard_by(log.write):
            yield log
    finally:
        writer.close()
