"""A log that stores its lines, with a clock advanced by tests, and a check of lines."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from relay import logger
from relay.config import LogFormat
from relay.logger import Fields, Level
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.log import Log, events_to
from relay.ops.logs.render import Destination

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "log-line.schema.json").read_text())
START = 1_795_465_516.25
"""2026-11-23T20:25:16.25Z."""

_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


class Written:
    """A stream with its written text."""

    def __init__(self) -> None:
        self.text = ""
        self.lost = 0

    def write(self, text: str, /) -> None:
        self.text += text

    def close(self) -> None:
        """Do nothing."""


class KeptLog(Log):
    """A log for tests."""

    def __init__(
        self,
        log_format: LogFormat = LogFormat.JSON,
        directives: str = "trace",
        destination: Destination = Destination.FILE,
    ) -> None:
        self.written = Written()
        self.passed = 0.0
        super().__init__(
            log_format,
            self.written,
            LogFilter.parse(directives),
            destination,
            clock=lambda: START + self.passed,
            monotonic=lambda: self.passed,
        )

    def take_text(self) -> str:
        text, self.written.text = self.written.text, ""
        return text

    def take(self) -> list[dict[str, Any]]:
        """Return the entries written since the last call; each line must match the schema."""
        return [valid(line) for line in self.take_text().splitlines()]


@pytest.fixture
def log() -> Iterator[KeptLog]:
    """A log to which events of this process go."""
    kept = KeptLog()
    with events_to(kept):
        yield kept


@contextlib.contextmanager
def capture_logs() -> Iterator[list[dict[str, Any]]]:
    """Keep the events of all modules, instead of writing them to a log."""
    captured: list[dict[str, Any]] = []

    def keep(_: str, level: Level, event: str, fields: Callable[[], Fields]) -> None:
        name = "warning" if level is Level.WARN else level.name.lower()
        captured.append({**fields(), "event": event, "log_level": name})

    with logger.events_to(keep):
        yield captured


def valid(line: str) -> dict[str, Any]:
    """Parse a line, which must match the schema."""
    entry = json.loads(line)
    _VALIDATOR.validate(entry)
    assert isinstance(entry, dict)
    return entry
