"""Which events are written to the log: directives such as ``info,relay.core=debug,portal=trace``.

A level alone is for all targets; ``target=level`` is for a target and all beneath it. Targets are the names of modules. One
that does not begin with ``relay`` may leave out what comes before: ``portal`` is `relay.core.portal` and
`relay.actors.portal`. Of several that match, the one that reaches furthest into the target's name counts, and among equals
the last.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

ROOT = "relay"

LONGEST = 1024
"""Characters of directives."""

MOST = 32
"""Directives at once."""

_LONGEST_QUOTED = 40
_TARGET = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_-]*)*")


class Level(IntEnum):
    """How much an event matters; or how much one has to matter, at least, to be written."""

    TRACE = 5
    """Single packets."""
    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40
    CRITICAL = 50
    """The last words of a relay that can't go on."""
    OFF = 100
    """No event is of this level."""


_LEVELS = {
    "trace": Level.TRACE,
    "debug": Level.DEBUG,
    "info": Level.INFO,
    "warn": Level.WARN,
    "warning": Level.WARN,
    "error": Level.ERROR,
    "off": Level.OFF,
}


class Directive(NamedTuple):
    """The least level at which events of some targets are written."""

    parts: tuple[str, ...]
    """Of the target's name; none for all targets."""
    level: Level

    def reach(self, target: tuple[str, ...]) -> int:
        """Tell how many parts of a target's name are matched, with those that may be left out; -1 if it does not match."""
        length = len(self.parts)
        if not length or self.parts[0] == ROOT:
            return length if target[:length] == self.parts else -1
        ends = (at + length for at in range(len(target)) if target[at : at + length] == self.parts)
        return max(ends, default=-1)

    def __str__(self) -> str:
        level = self.level.name.lower()
        return f"{'.'.join(self.parts)}={level}" if self.parts else level


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Directives, in the order in which they were given."""

    directives: tuple[Directive, ...] = (Directive((), Level.INFO),)

    @classmethod
    def parse(cls, text: str) -> "LogFilter":
        """Read directives, with commas between them. Without one for all targets, the others are at ``info``.

        Raises:
            ValueError: they are none. The message says what is wrong, in one line, and what would be right.
        """
        if len(text) > LONGEST:
            raise ValueError(f"the directives are longer than {LONGEST} characters")
        given = [part.strip() for part in text.split(",") if part.strip()]
        if not given:
            raise ValueError("no directive is given: write a level, such as info, or target=level")
        if len(given) > MOST:
            raise ValueError(f"more than {MOST} directives are given")
        directives = [_directive(each) for each in given]
        if all(each.parts for each in directives):
            directives.insert(0, Directive((), Level.INFO))
        found = cls(tuple(directives))
        # What is shown can be given again.
        if len(directives) > MOST or len(str(found)) > LONGEST:
            raise ValueError(f"with info for all targets, these are more than {MOST} directives or {LONGEST} characters")
        return found

    def threshold(self, target: str) -> Level:
        """Give the level that an event of a target must have, at least, to be written."""
        parts = tuple(target.split("."))
        reached, _, level = max(
            (directive.reach(parts), number, directive.level) for number, directive in enumerate(self.directives)
        )
        return level if reached >= 0 else Level.INFO

    def __str__(self) -> str:
        return ",".join(map(str, self.directives))


def _directive(text: str) -> Directive:
    target, equals, level_name = (part.strip() for part in text.rpartition("="))
    level = _LEVELS.get(level_name.lower())
    if level is None:
        levels = ", ".join(name for name in _LEVELS if name != "warning")
        raise ValueError(f"{_quoted(level_name)} is no level: one of {levels}")
    if not equals:
        return Directive((), level)
    # As Rust has it; operators' files and fingers know it.
    target = target.replace("::", ".")
    if _TARGET.fullmatch(target) is None:
        raise ValueError(f"{_quoted(target)} is no target: write relay.core=debug, or portal=debug")
    return Directive(tuple(target.split(".")), level)


def _quoted(text: str) -> str:
    shown = text if len(text) <= _LONGEST_QUOTED else text[:_LONGEST_QUOTED] + "..."
    return ascii(shown)
