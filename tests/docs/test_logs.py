"""docs/logs.md lists every event of the source with level and target, and each event matches the schema."""

import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from relay.config import LogFormat
from relay.logger import Level, Logger
from relay.ops.logs.log import events_to
from tests.support.log_events import Logged, events
from tests.support.log_lines import SCHEMA, START, KeptLog, valid

PAGE = Path(__file__).parents[2] / "docs" / "logs.md"
EVENTS = sorted(events())
ROW = re.compile(r"^\| `(?P<event>[^`]+)` \| (?P<levels>[a-z, ]+) \| (?P<targets>[^|]+) \|.*\|$", re.MULTILINE)


def documented() -> Iterator[Logged]:
    for row in ROW.finditer(PAGE.read_text()):
        targets = re.findall(r"`([^`]+)`", row["targets"]) or ["(library)"]
        for level in row["levels"].split(", "):
            for target in targets:
                yield Logged(target, level, row["event"])


def test_the_search_finds_events_in_the_source() -> None:
    """Check the search itself: without events, none would be missing."""
    assert len(EVENTS) > 50
    assert Logged("relay.core.allocations", "info", "allocation created") in EVENTS
    assert Logged("relay.actors.portal", "warn", "no connection to the portal") in EVENTS
    assert Logged("relay.ops.logs", "warn", "repeated events left out") in EVENTS


def test_the_page_has_exactly_the_events_of_the_source() -> None:
    of_the_page = list(documented())
    assert set(EVENTS) - set(of_the_page) == set(), f"add to {PAGE.name}"
    assert set(of_the_page) - set(EVENTS) == set(), f"take from {PAGE.name}"
    assert len(of_the_page) == len(set(of_the_page)), "one event has two rows"


def test_events_are_short_and_one_printable_line() -> None:
    for each in EVENTS:
        assert each.event.isprintable()
        assert len(each.event) <= 120, each.event


@pytest.mark.parametrize("logged", EVENTS, ids=str)
def test_every_event_matches_the_schema(logged: Logged) -> None:
    """Check lines of all events; tests/ops/test_core_log.py checks the fields of the core's events."""
    log = KeptLog()
    level = Level.CRITICAL if logged.level == "critical" else Level[logged.level.upper()]
    with events_to(log):
        Logger(logged.target).log(level, logged.event, error="x\n\x1b[31m", actor="server")
    (entry,) = log.take()
    assert (entry["target"], entry["event"], entry["error"]) == (logged.target, logged.event, r"x\n\x1b[31m")


@pytest.mark.parametrize(
    "wrong",
    [
        {"timestamp": "2026-11-23 20:25:16"},
        {"timestamp": "2026-11-23T20:25:16.250000+00:00"},
        {"level": "loud"},
        {"event": ""},
        {"event": "two\nlines"},
        {"reason": "\x1b[31m"},
        {"other": ["a\u202eb"]},
        {"other": {"a\nb": 1}},
        {"client": "somebody"},
        {"channel": 0x4000},
        {"allocation": "1"},
        {"exception": "a\x1b[31m"},
        {"target": None},
    ],
    ids=str,
)
def test_the_schema_rejects_invalid_lines(wrong: dict[str, object]) -> None:
    right = {"timestamp": "2026-11-23T20:25:16.250000Z", "level": "info", "target": "relay", "event": "ready"}
    jsonschema.validate(right, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(right | wrong, SCHEMA)


def test_the_examples_on_the_page_match_the_output() -> None:
    text = PAGE.read_text()
    log = KeptLog(LogFormat.HUMAN)
    log.passed = 1_795_419_328.038 - START
    fields: dict[str, object] = {
        "allocation": 1,
        "client": "203.0.113.5:33043",
        "relayed": ["192.0.2.1:50591"],
        "lifetime": 600,
    }
    lost: dict[str, object] = {"reason": "Connection refused", "retry_in": 1.4}
    with events_to(log):
        Logger("relay.core.allocations").info("allocation created", **fields)
        log.passed += 13.734
        Logger("relay.actors.portal").warning("no connection to the portal", **lost)
    for line in log.take_text().splitlines():
        assert f"{line}\n" in text
    json_log = KeptLog()
    with events_to(json_log):
        Logger("relay.actors.portal").warning("no connection to the portal", **lost)
    assert valid(json_log.take_text())["level"] in text
