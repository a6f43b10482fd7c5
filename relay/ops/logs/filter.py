"""Filter the log by directives such as ``info,relay.core=debug,portal=trace``.

A level alone applies to all targets; ``target=level`` applies to a target and all targets below it. Targets are names of
modules. A target without ``relay`` in front matches anywhere in a name: ``portal`` is `relay.core.portal` and
`relay.actors.portal`. If several directives match, the match that reaches furthest into the target's name wins, and among
equals the last.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.logger import Level

ROOT = "relay"

MAX_LENGTH = 1024
"""Characters of a filter."""

MAX_DIRECTIVES = 32
"""Directives of a filter."""

_MAX_QUOTED = 40
_TARGET = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_-]*)*")


_LEVELS = {level.name.lower(): level for level in Level if level is not Level.CRITICAL}


class Directive(NamedTuple):
    """The lowest level at which events of some targets are written."""

    parts: tuple[str, ...]
    """The parts of the target's name; empty for all targets."""
    level: Level

    def reach(self, target: tuple[str, ...]) -> int:
        """Return the number of leading parts of a target up to the end of the match; -1 if there is no match."""
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
    """Directives, in their given order."""

    directives: tuple[Directive, ...] = (Directive((), Level.INFO),)
    _thresholds: dict[str, Level] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> "LogFilter":
        """Parse directives, separated by commas.

        Raises:
            ValueError: the text is not a filter. The message is one line: the reason, and what is accepted.
        """
        if len(text) > MAX_LENGTH:
            raise ValueError(f"the directives are longer than {MAX_LENGTH} characters")
        given = [part.strip() for part in text.split(",") if part.strip()]
        if not given:
            raise ValueError("no directive is given: write a level, such as info, or target=level")
        if len(given) > MAX_DIRECTIVES:
            raise ValueError(f"more than {MAX_DIRECTIVES} directives are given")
        return cls(tuple(_directive(each) for each in given))

    def threshold(self, target: str) -> Level:
        """Return the lowest level at which events of a target are written."""
        known = self._thresholds.get(target)
        if known is None:
            parts = tuple(target.split("."))
            reached, _, level = max(
                (directive.reach(parts), number, directive.level) for number, directive in enumerate(self.directives)
            )
            # Without a directive for all targets.
            known = self._thresholds[target] = level if reached >= 0 else Level.INFO
        return known

    def __str__(self) -> str:
        return ",".join(map(str, self.directives))


def _directive(text: str) -> Directive:
    target, equals, level_name = (part.strip() for part in text.rpartition("="))
    level = _LEVELS.get(level_name.lower().replace("warning", "warn"))
    if level is None:
        raise ValueError(f"{_quoted(level_name)} is not a level: use one of {', '.join(_LEVELS)}")
    if not equals:
        return Directive((), level)
    # Filters of the Rust relay separate the parts by "::".
    target = target.replace("::", ".")
    if _TARGET.fullmatch(target) is None:
        raise ValueError(f"{_quoted(target)} is not a target: write relay.core=debug, or portal=debug")
    return Directive(tuple(target.split(".")), level)


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")
