r"""How events look as lines: for people, and for programs.

What came from outside, whichever way, can't pass for anything else there: a text is one line of printable characters, with
all others (ends of lines, escape codes of terminals, marks that turn the direction of writing) written as ``\n``, ``\x1b``
or ``\u202e``. Only the text of an exception has lines, and none of them can be taken for an event.
"""

import datetime as dt
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeAlias

from relay.config import LogFormat
from relay.ops.logs.filter import ROOT, Level

LONGEST_TEXT = 1000
"""Characters of a text in a field."""

LONGEST_EXCEPTION = 16_000
"""Characters of the text of an exception, of which the end matters most."""

MOST_PARTS = 100
"""Of a list or a table in a field."""

_EVENT_WIDTH, _TARGET_WIDTH = 24, 18
_MILLISECONDS, _MICROSECONDS = 3, 6
_TWO_TEXTS = re.compile('[ "=,]').search
_BEFORE_EXCEPTION = "    | "

_QUOTING = (KeyError, ValueError)
"""Exceptions whose text has the value in it that was not found, or could not be read."""

_RESET, _DIM, _BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
_NAMES = {
    Level.TRACE: ("TRACE", "\x1b[2m"),
    Level.DEBUG: ("DEBUG", "\x1b[36m"),
    Level.INFO: ("INFO", "\x1b[32m"),
    Level.WARN: ("WARN", "\x1b[33m"),
    Level.ERROR: ("ERROR", "\x1b[31m"),
    Level.CRITICAL: ("FATAL", "\x1b[1;31m"),
}
_JSON_NAMES = {level: "warning" if level is Level.WARN else level.name.lower() for level in Level}
_RESERVED = frozenset(("timestamp", "level", "target", "event", "exception"))

_encode = json.JSONEncoder(allow_nan=False).encode

Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"


class Line(NamedTuple):
    """An event that is to be written."""

    unix: float
    """When it happened."""
    level: Level
    target: str
    event: str
    fields: Mapping[str, object]
    exception: BaseException | None = None


Renderer: TypeAlias = Callable[[Line], str]
"""Gives the text of an event, with the end of its last line."""


def renderer(log_format: LogFormat, *, is_watched: bool) -> Renderer:
    """Give what makes lines of a format.

    Args:
        log_format: which.
        is_watched: people watch a terminal: in colours, and without the date.
    """
    return json_line if log_format is LogFormat.JSON else _Human(is_watched=is_watched)


def json_line(line: Line) -> str:
    """Write one JSON object; its texts have no control characters in them, not even when they are read back."""
    written: dict[str, Value] = {
        "timestamp": _time(line.unix, _MICROSECONDS),
        "level": _JSON_NAMES[line.level],
        "target": neutral(line.target),
        "event": neutral(line.event),
    }
    for name, value in line.fields.items():
        written[f"{name}_" if name in _RESERVED else name] = _plain(value)
    if line.exception is not None:
        written["exception"] = exception_text(line.exception)
    return f"{_encode(written)}\n"


def neutral(text: str, longest: int = LONGEST_TEXT) -> str:
    """Give a text in one line of printable characters."""
    if len(text) > longest:
        text = f"{text[:longest]}..."
    # Of most texts, that is all.
    return text if text.isprintable() else "".join(map(_escaped, text))


def exception_words(error: BaseException) -> str:
    """Give the kind of an exception and what it says, unless that quotes what it is about: a username, a packet."""
    name = type(error).__name__
    return f"{name} (its text is left out)" if isinstance(error, _QUOTING) else f"{name}: {error}"


def exception_text(error: BaseException) -> str:
    """Give an exception with its stack: lines of printable characters. No value of any variable is among them."""
    try:
        text = "".join(traceback.format_exception(error))
        for each in _chain(error):
            if isinstance(each, _QUOTING):
                text = text.replace("".join(traceback.format_exception_only(each)), f"{exception_words(each)}\n")
    except Exception as another:  # noqa: BLE001 - whatever its text is made of, that it happened has to be told
        text = f"{type(error).__name__}, of which the text failed with {type(another).__name__}"
    if len(text) > LONGEST_EXCEPTION:
        text = f"...{text[-LONGEST_EXCEPTION:]}"
    return "\n".join("".join(map(_escaped, each)) for each in text.rstrip("\n").split("\n"))


def short(target: str) -> str:
    """Give a target as a filter may name it."""
    return target.removeprefix(f"{ROOT}.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Give an exception and those that it followed, each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [earlier for earlier in (each.__cause__, each.__context__) if earlier is not None]
            waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


class _Human:
    """Writes time, level, target, event and fields, in columns."""

    def __init__(self, *, is_watched: bool) -> None:
        self._is_watched = is_watched

    def __call__(self, line: Line) -> str:
        paint = _painted if self._is_watched else _plainly
        name, colour = _NAMES[line.level]
        time = _time(line.unix, _MILLISECONDS)
        written = [
            paint(time[11:23] if self._is_watched else time, _DIM),
            paint(f"{name:5}", colour),
            paint(f"{short(neutral(line.target)):{_TARGET_WIDTH}}", _DIM),
            paint(f"{neutral(line.event):{_EVENT_WIDTH}}", _BOLD),
            *(f"{paint(f'{name}=', _DIM)}{_shown(value)}" for name, value in line.fields.items()),
        ]
        text = " ".join(written).rstrip()
        if line.exception is not None:
            # Each line of it, also those that an exception's message might have made up, is seen to be part of this event.
            text += "".join(f"\n{_BEFORE_EXCEPTION}{each}" for each in exception_text(line.exception).split("\n"))
        return f"{text}\n"


def _painted(text: str, colour: str) -> str:
    return f"{colour}{text}{_RESET}"


def _plainly(text: str, _: str) -> str:
    return text


def _time(unix: float, digits: int) -> str:
    """Write a time as RFC 3339 does, with some digits of the second."""
    seconds, fraction = divmod(round(unix * 10**digits), 10**digits)
    return f"{_second(seconds)}.{fraction:0{digits}}Z"


@lru_cache(maxsize=1)
def _second(unix: int) -> str:
    return dt.datetime.fromtimestamp(unix, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _plain(value: object, depth: int = 2) -> Value:
    """Give what JSON can hold of a value."""
    if type(value) is str:
        return neutral(value)
    return value if type(value) is int else _plain_other(value, depth)


def _plain_other(value: object, depth: int) -> Value:
    """Give it of what is neither a text nor a number, which most are."""
    match value:
        case None | bool():
            return value
        case int():
            return int(value)
        case float():
            return value if value - value == 0 else str(value)
        case Mapping() if depth:
            return {neutral(str(key)): _plain(each, depth - 1) for key, each in islice(value.items(), MOST_PARTS)}
        case list() | tuple() | set() | frozenset() if depth:
            return [_plain(each, depth - 1) for each in islice(value, MOST_PARTS)]
    return neutral(str(value))


def _shown(value: object) -> str:
    """Write a value for people; a text in quotes if it could be taken for more than one."""
    plain = _plain(value)
    if isinstance(plain, dict):
        return ",".join(f"{_shown(name)}:{_shown(each)}" for name, each in plain.items()) or "none"
    if isinstance(plain, list):
        return ",".join(map(_shown, plain)) or "none"
    if plain is None:
        return "none"
    if not isinstance(plain, str):
        return str(plain).lower() if isinstance(plain, bool) else str(plain)
    if plain and _TWO_TEXTS(plain) is None:
        return plain
    # No quotation mark but those around it.
    inner = plain.replace('"', "\\x22")
    return f'"{inner}"'
