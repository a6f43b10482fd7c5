"""Loggers, by which modules log events with fields. `relay.ops.logs.log` writes the events."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from functools import partialmethod
from typing import TypeAlias


class Level(IntEnum):
    """The severity of an event, or the lowest severity to be written."""

    TRACE = 5
    """Accepted in directives, as in the Rust relay; no event has this level."""
    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40
    CRITICAL = 50
    """The last event of a relay that can't go on."""
    OFF = 100
    """No event has this level."""


Fields: TypeAlias = Mapping[str, object]

Sink: TypeAlias = Callable[[str, Level, str, Callable[[], Fields]], None]
"""Writes an event: target, level, name, and a function that returns the fields."""

_sinks: list[Sink] = []
"""Only the last gets events. Without a sink, events are discarded."""


@contextlib.contextmanager
def events_to(sink: Sink) -> Iterator[None]:
    """Pass the events of all modules to a sink while the context lasts."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


def emit(target: str, level: Level, event: str, fields: Callable[[], Fields]) -> None:
    """Pass an event to the sink. The sink calls `fields` only if it writes the event."""
    for sink in _sinks[-1:]:
        sink(target, level, event, fields)


class Logger:
    """Logger of a target, the name of a module.

    Args:
        target: the target.
    """

    def __init__(self, target: str) -> None:
        self.target = target

    def log(self, level: Level, event: str, **fields: object) -> None:
        """Log an event. The field `exc_info` is an exception that is logged with its stack, or None."""
        emit(self.target, level, event, lambda: fields)

    debug = partialmethod(log, Level.DEBUG)
    info = partialmethod(log, Level.INFO)
    warning = partialmethod(log, Level.WARN)
    error = partialmethod(log, Level.ERROR)
    critical = partialmethod(log, Level.CRITICAL)

    def exception(self, event: str, **fields: object) -> None:
        """Log an error with the exception that is being handled."""
        self.error(event, **fields, exc_info=sys.exception())
