"""A log that keeps its lines, with time that stands still until it is moved; and what a line has to be like."""

import json
from pathlib import Path
from typing import Any

import jsonschema

from relay.config import LogFormat
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.log import Log

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "log-line.schema.json").read_text())
START = 1_795_465_516.25
"""2026-11-23T20:25:16.25Z."""

_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


class Written:
    """What was written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str, /) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """All is here."""

    def isatty(self) -> bool:
        return False


class KeptLog(Log):
    """A log for tests."""

    def __init__(
        self, log_format: LogFormat = LogFormat.JSON, directives: str = "trace", *, is_watched: bool = False
    ) -> None:
        self.written = Written()
        self.passed = 0.0
        super().__init__(
            log_format,
            self.written,
            LogFilter.parse(directives),
            is_watched=is_watched,
            clock=lambda: START + self.passed,
            monotonic=lambda: self.passed,
        )

    def take_text(self) -> str:
        text, self.written.text = self.written.text, ""
        return text

    def take(self) -> list[dict[str, Any]]:
        """Give what was written since the last time; each line has to be as the schema says."""
        return [valid(line) for line in self.take_text().splitlines()]


def valid(line: str) -> dict[str, Any]:
    """Read a line, which has to be as the schema says."""
    entry = json.loads(line)
    _VALIDATOR.validate(entry)
    assert isinstance(entry, dict)
    return entry
