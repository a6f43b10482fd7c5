r"""Format events as lines, for people or for programs.

A text from outside (a client, a peer, the portal) can't forge a line, a field or a terminal's escape code. It is one line of
printable characters: line ends, escape codes and marks of writing direction are escaped as ``\n``, ``\x1b`` or ``\u202e``.
Only the text of an exception has several lines, and none of these lines looks like an event.
"""

import datetime as dt
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from itertools import islice
from typing import TypeAlias

from relay.config import LogFormat
from relay.logger import Fields, Level
from relay.ops.logs.filter import ROOT

BELOW = ("state", "stack")
"""Fields with an item per line below the event, for people. For programs, they are fields like all others."""

MAX_TEXT = 1000
"""Characters of a text in a field."""

MAX_EXCEPTION = 16_000
"""Characters of an exception; the end matters most."""

MAX_ITEMS = 100
"""Items of a list or a mapping in a field."""

_EVENT_WIDTH, _TARGET_WIDTH = 24, 18
_needs_quotes = re.compile('[ "=,]|^$').search
_BEFORE_EXCEPTION = "    | "

_QUOTING = (KeyError, ValueError)
"""Exceptions whose text quotes a value: the missing key, or the unreadable text."""

_RESET, _DIM, _BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
JOURNAL_ERROR = 3
_LEVELS = {
    Level.DEBUG: ("debug", "DEBUG", "\x1b[36m", 7),
    Level.INFO: ("info", "INFO ", "\x1b[32m", 6),
    Level.WARN: ("warning", "WARN ", "\x1b[33m", 4),
    Level.ERROR: ("error", "ERROR", "\x1b[31m", JOURNAL_ERROR),
    Level.CRITICAL: ("critical", "FATAL", "\x1b[1;31m", 2),
}
"""The name of each level for programs and for people, its color, and its priority in the journal (syslog(3))."""

Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"

Renderer: TypeAlias = Callable[[float, str, Level, str, Fields], str]
"""Returns the line of an event: Unix time, target, level, name and fields."""


class Destination(Enum):
    """The reader of the lines."""

    FILE = "file"
    TERMINAL = "terminal"
    """Lines for people have colors and no date."""
    JOURNAL = "journal"
    """Each line begins with its priority (sd-daemon(3)), which the journal removes. Lines for people have no time."""


def renderer(log_format: LogFormat, destination: Destination = Destination.FILE) -> Renderer:
    """Return the renderer of a format."""
    render = _render_json if log_format is LogFormat.JSON else partial(_render_columns, destination)
    return partial(_render_prioritized, render) if destination is Destination.JOURNAL else render


def _render_prioritized(render: Renderer, at: float, target: str, level: Level, event: str, fields: Fields) -> str:
    # Each line is an entry of the journal, also in a stack.
    return "".join(f"<{_LEVELS[level][3]}>{line}\n" for line in render(at, target, level, event, fields).splitlines())


def _render_json(at: float, target: str, level: Level, event: str, fields: Fields) -> str:
    head = {"timestamp": _stamp(at), "level": _LEVELS[level][0], "target": escape(target), "event": escape(event)}
    error = fields.get("exc_info")
    exception = {"exception": exception_text(error)} if isinstance(error, BaseException) else {}
    return json.dumps({**head, **_escape_fields(fields), **exception}) + "\n"


def _render_columns(destination: Destination, at: float, target: str, level: Level, event: str, fields: Fields) -> str:
    def paint(color: str, text: str) -> str:
        return f"{color}{text}{_RESET}" if destination is Destination.TERMINAL else text

    stamp, (_, name, color, _) = _stamp(at), _LEVELS[level]
    stamps = {Destination.FILE: f"{stamp[:23]}Z ", Destination.TERMINAL: f"{paint(_DIM, stamp[11:23])} "}
    escaped = _escape_fields(fields)
    below = [escaped.pop(name) for name in BELOW if name in escaped]
    columns = (
        paint(color, name),
        paint(_DIM, escape(target).removeprefix(f"{ROOT}.").ljust(_TARGET_WIDTH)),
        paint(_BOLD, escape(event).ljust(_EVENT_WIDTH)),
        *(f"{paint(_DIM, f'{key}=')}{_show(value)}" for key, value in escaped.items()),
    )
    lines = [stamps.get(destination, "") + " ".join(columns).rstrip(" ")]
    for each in below:
        items = [f"{key}={_show(value)}" for key, value in each.items()] if isinstance(each, dict) else each
        lines += [f"{_BEFORE_EXCEPTION}{item}" for item in (items if isinstance(items, list) else [items])]
    error = fields.get("exc_info")
    if isinstance(error, BaseException):
        # The prefix marks each line as part of the event, even a line made up by the exception's message.
        lines += [f"{_BEFORE_EXCEPTION}{line}" for line in exception_text(error).split("\n")]
    return "\n".join(lines) + "\n"


def _stamp(at: float) -> str:
    return f"{dt.datetime.fromtimestamp(at, dt.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def _escape_fields(fields: Fields) -> dict[str, Value]:
    return {name: _plain(value) for name, value in fields.items() if name != "exc_info"}


def escape(text: str, longest: int = MAX_TEXT) -> str:
    """Return a text as one line of printable characters."""
    if len(text) > longest:
        text = f"{text[:longest]}..."
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def exception_words(error: BaseException) -> str:
    """Return the type and text of an exception, without a text that quotes a value such as a username or a packet."""
    name = type(error).__name__
    return f"{name} (its text is left out)" if isinstance(error, _QUOTING) else f"{name}: {error}"


def exception_text(error: BaseException) -> str:
    """Return an exception with its stack, in lines of printable characters and without values of variables."""
    try:
        text = "".join(traceback.format_exception(error))
        for each in _chain(error):
            if isinstance(each, _QUOTING):
                text = text.replace("".join(traceback.format_exception_only(each)), f"{exception_words(each)}\n")
    except Exception as another:  # noqa: BLE001 - an exception is reported even if its text is broken
        text = f"{type(error).__name__}, of which the text failed with {type(another).__name__}"
    if len(text) > MAX_EXCEPTION:
        text = f"...{text[-MAX_EXCEPTION:]}"
    return "\n".join(escape(line, MAX_EXCEPTION) for line in text.rstrip("\n").split("\n"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes and its members, each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [earlier for earlier in (each.__cause__, each.__context__) if earlier is not None]
            waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def _plain(value: object, depth: int = 2) -> Value:
    """Return a value as JSON can represent it, with its texts escaped."""
    match value:
        case str():
            return escape(value)
        case None | int():
            return value
        case float() if value - value == 0:
            return value
        case Mapping() if depth:
            return {escape(str(key)): _plain(each, depth - 1) for key, each in islice(value.items(), MAX_ITEMS)}
        case list() | tuple() | set() | frozenset() if depth:
            return [_plain(each, depth - 1) for each in islice(value, MAX_ITEMS)]
    return escape(str(value))


def _show(value: object) -> str:
    """Return a plain value as people read it; a text is in quotes if it contains a separator."""
    match value:
        case str():
            # The only quotation marks are the outer ones.
            return '"{}"'.format(value.replace('"', "\\x22")) if _needs_quotes(value) else value
        case dict():
            return ",".join(f"{_show(name)}:{_show(each)}" for name, each in value.items()) or "none"
        case list():
            return ",".join(map(_show, value)) or "none"
        case None | bool():
            return str(value).lower()
    return str(value)
