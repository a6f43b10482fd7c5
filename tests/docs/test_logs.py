"""docs/logs.md has every event that the source has, at its level and target, and each of them fits the schema."""

import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import structlog

from relay.config import LogFormat
from relay.ops.logs.filter import Level
from relay.ops.logs.log import events_to
from tests.docs.log_events import Logged, events
from tests.log_lines import SCHEMA, START, KeptLog, valid

PAGE = Path(__file__).parents[2] / "docs" / "logs.md"
EVENTS = sorted(events())
ROW = re.compile(r"^\| `(?P<event>[^`]+)` \| (?P<levels>[a-z, ]+) \| (?P<targets>[^|]+) \|.*\|$", re.MULTILINE)


def documented() -> Iterator[Logged]:
    for row in ROW.finditer(PAGE.read_text()):
        targets = re.findall(r"`([^`]+)`", row["targets"]) or ["(library)"]
        for level in row["levels"].split(", "):
            for target in targets:
                yield Logged(target, level, row["event"])


def test_the_source_has_the_events_that_this_looks_for() -> None:
    """What finds no event would find no event missing."""
    assert len(EVENTS) > 50
    assert Logged("relay.core.allocations", "info", "allocation created") in EVENTS
    assert Logged("relay.actors.portal", "warn", "no connection to the portal") in EVENTS
    assert Logged("relay.ops.logs", "warn", "repeated events left out") in EVENTS


def test_the_page_has_every_event_at_its_level_and_target_and_no_other() -> None:
    of_the_page = list(documented())
    assert set(EVENTS) - set(of_the_page) == set(), f"add to {PAGE.name}"
    assert set(of_the_page) - set(EVENTS) == set(), f"take from {PAGE.name}"
    assert len(of_the_page) == len(set(of_the_page)), "one event has two rows"


def test_events_are_short_and_one_printable_line() -> None:
    for each in EVENTS:
        assert each.event.isprintable()
        assert len(each.event) <= 120, each.event


@pytest.mark.parametrize("logged", EVENTS, ids=str)
def test_every_event_is_a_line_that_fits_the_schema(logged: Logged) -> None:
    """Those of the core, with all their fields, are seen in tests/ops/test_core_log.py."""
    log = KeptLog()
    level = Level.CRITICAL if logged.level == "critical" else Level[logged.level.upper()]
    with events_to(log):
        getattr(structlog.get_logger(logged.target), "warning" if level is Level.WARN else logged.level)(
            logged.event, error="x\n\x1b[31m", actor="server"
        )
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
def test_the_schema_refuses_what_no_line_may_be(wrong: dict[str, object]) -> None:
    right = {"timestamp": "2026-11-23T20:25:16.250000Z", "level": "info", "target": "relay", "event": "ready"}
    jsonschema.validate(right, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(right | wrong, SCHEMA)


def test_the_examples_of_the_page_are_what_is_written() -> None:
    text = PAGE.read_text()
    log = KeptLog(LogFormat.HUMAN)
    log.passed = 1_795_419_328.038 - START
    fields: dict[str, object] = {
        "allocation": 1,
        "client": "203.0.113.5:33043",
        "relayed": ["192.0.2.1:50591"],
        "lifetime": 600,
    }
    log.write("relay.core.allocations", Level.INFO, "allocation created", fields)
    log.passed += 13.734
    lost: dict[str, object] = {"reason": "Connection refused", "retry_in": 1.4}
    log.write("relay.actors.portal", Level.WARN, "no connection to the portal", lost)
    for line in log.take_text().splitlines():
        assert f"{line}\n" in text
    json_log = KeptLog()
    json_log.write("relay.actors.portal", Level.WARN, "no connection to the portal", lost)
    assert valid(json_log.take_text())["level"] in text
