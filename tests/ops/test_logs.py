"""The log: events of modules, libraries and the interpreter become lines."""

import datetime as dt
import gc
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.config import LogFormat
from relay.logger import Level, Logger
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.log import Log, events_to, writing
from relay.ops.logs.rate_limiter import USUAL
from relay.ops.logs.stdlib_bridge import stdlib_logged
from relay.ops.logs.writer import MAX_QUEUED, LogWriter
from tests.support.log_lines import KeptLog, Written, log, valid

__all__ = ["log"]

PORTAL = Logger("relay.actors.portal")
CORE = Logger("relay.core.allocations")


@pytest.fixture
def others(log: KeptLog) -> Iterator[KeptLog]:
    """The same, with the reports of libraries and the interpreter."""
    with stdlib_logged():
        yield log


def events(log: KeptLog) -> list[str]:
    return [entry["event"] for entry in log.take()]


def test_an_event_is_written_with_level_target_and_fields(log: KeptLog) -> None:
    PORTAL.warning("no connection to the portal", reason="Connection refused", retry_in=1.5)
    (entry,) = log.take()
    assert entry == {
        "timestamp": "2026-11-23T20:25:16.250000Z",
        "level": "warning",
        "target": "relay.actors.portal",
        "event": "no connection to the portal",
        "reason": "Connection refused",
        "retry_in": 1.5,
    }


@pytest.mark.parametrize("directives", ["info", "relay=info", "off,relay.core=debug,portal=error", "off"])
def test_an_event_excluded_by_the_filter_is_not_written(log: KeptLog, directives: str) -> None:
    log.change_filter(LogFilter.parse(directives))
    expected = {"info": ["core", "portal"], "relay=info": ["core", "portal"], "off": []}.get(
        directives, ["core", "core debug"]
    )
    PORTAL.info("portal")
    PORTAL.debug("portal debug")
    CORE.info("core")
    CORE.debug("core debug")
    assert sorted(events(log)) == sorted(expected)


def test_a_new_filter_applies_at_once(log: KeptLog) -> None:
    for directives, count in (("info", 0), ("debug", 1), ("core=debug,off", 1), ("core=info", 0)):
        log.change_filter(LogFilter.parse(directives))
        CORE.debug("core debug")
        assert len(log.take()) == count


def test_a_listener_is_called_at_once_and_at_each_change_of_the_filter(log: KeptLog) -> None:
    told: list[bool] = []
    with log.followed_by(lambda: told.append(log.admits("relay.core.answers", Level.DEBUG))):
        log.change_filter(LogFilter.parse("info"))
        log.change_filter(LogFilter.parse("answers=debug"))
    log.change_filter(LogFilter.parse("info"))
    assert told == [True, False, True]


def test_a_repeated_event_contains_the_number_suppressed(log: KeptLog) -> None:
    for number in range(USUAL.burst + 20):
        CORE.info("again", number=number)
    PORTAL.info("again")
    assert events(log) == ["again"] * (USUAL.burst + 1)
    log.passed += 1
    CORE.info("again", number=1000)
    (entry,) = log.take()
    assert (entry["number"], entry["left_out"]) == (1000, 20)


def test_equal_warnings_become_one_with_a_count(log: KeptLog) -> None:
    for _ in range(15):
        CORE.warning("again", setting="small")
    CORE.warning("again", setting="other")
    log.report_suppressed()
    assert [(each["event"], each.get("setting"), each.get("left_out")) for each in log.take()] == [
        ("again", "small", None),
        ("again", "other", 14),
    ]
    CORE.warning("again", setting="other")
    log.report_suppressed()
    (entry,) = log.take()
    assert (entry["event"], entry["what"], entry["left_out"]) == ("repeated events left out", "again", 1)


def test_suppressed_events_are_reported_at_the_latest_at_the_end() -> None:
    log = KeptLog()
    with events_to(log):
        for number in range(USUAL.burst + 20):
            CORE.error("again", number=number)
        log.take()
        log.report_suppressed()
        (entry,) = log.take()
        assert (entry["level"], entry["event"]) == ("warning", "repeated events left out")
        assert (entry["what"], entry["of"], entry["left_out"]) == ("again", "relay.core.allocations", 20)
        log.report_suppressed()
        assert log.take() == []
        CORE.error("again")
    (entry,) = log.take()
    assert entry["left_out"] == 1


def test_critical_events_are_always_written(log: KeptLog) -> None:
    for _ in range(200):
        CORE.critical("the end")
    assert events(log) == ["the end"] * 200


def test_an_exception_is_written_with_its_stack(log: KeptLog) -> None:
    try:
        os.stat("a\nb\x1b[31m")  # noqa: PTH116 - fails with a text
    except OSError as error:
        CORE.exception("failed on it")
        kept = error
    CORE.error("failed of it", exc_info=kept)
    for entry in log.take():
        assert entry["level"] == "error"
        assert entry["exception"].endswith(r"FileNotFoundError: [Errno 2] No such file or directory: 'a\nb\x1b[31m'")


def test_timestamps_come_from_the_system_clock() -> None:
    written = Written()
    before = time.time()
    with events_to(Log(LogFormat.JSON, written)):
        CORE.info("now")
    logged_at = dt.datetime.fromisoformat(valid(written.text)["timestamp"]).timestamp()
    assert before - 1e-6 <= logged_at <= time.time()


def test_a_librarys_record_is_an_event_with_an_escaped_text(others: KeptLog) -> None:
    foreign = logging.getLogger("foreign.package")
    foreign.warning("trouble with %s", "x\n\x1b[31m")
    foreign.error("more trouble")
    foreign.info("nobody wants to know")
    first, second = others.take()
    assert (first["target"], first["level"], first["event"]) == ("foreign.package", "warning", "a library logged")
    assert first["said"] == r"trouble with x\n\x1b[31m"
    assert second["level"] == "error"
    others.change_filter(LogFilter.parse("info,foreign.package=off"))
    foreign.error("more trouble")
    assert others.take() == []


def test_a_librarys_broken_record_is_an_event(others: KeptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    # Without pytest's own, which fails on it.
    ours = [handler for handler in root.handlers if type(handler).__module__ == stdlib_logged.__module__]
    monkeypatch.setattr(root, "handlers", ours)
    logging.getLogger("foreign.package").error("%d", "no number")
    (entry,) = others.take()
    assert entry["said"] == "'%d', which can't be written (TypeError)"


@pytest.mark.parametrize("library", ["pykka", "pykka._actor", "websocket"])
def test_records_of_quiet_libraries_are_ignored(others: KeptLog, library: str) -> None:
    logging.getLogger(library).error("unhandled")
    assert others.take() == []


def test_a_warning_of_python_is_an_event(others: KeptLog) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # `catch_warnings` replaces the hook.
        with stdlib_logged():
            warnings.warn("old \x1b", DeprecationWarning, stacklevel=1)
    (entry,) = others.take()
    assert (entry["target"], entry["event"], entry["kind"]) == ("python", "Python warned", "DeprecationWarning")
    assert entry["said"] == r"old \x1b"


def test_a_thread_that_fails_is_an_event(others: KeptLog) -> None:
    def fail() -> None:
        raise OSError("oh\x1b")

    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    (entry,) = others.take()
    assert (entry["event"], entry["thread"]) == ("a thread failed", "worker")
    assert entry["exception"].endswith("OSError: oh\\x1b")


def test_an_unraisable_exception_is_an_event(others: KeptLog) -> None:
    class Failing:
        def __del__(self) -> None:
            raise OSError("oh")

    Failing()
    gc.collect()
    (entry,) = others.take()
    assert entry["event"] == "an exception that nobody hears of"
    assert entry["exception"].endswith("OSError: oh")


def test_hooks_and_handlers_are_restored() -> None:
    before = threading.excepthook, sys.unraisablehook, warnings.showwarning, logging.getLogger().handlers.copy()
    with stdlib_logged():
        assert threading.excepthook is not before[0]
    assert before == (threading.excepthook, sys.unraisablehook, warnings.showwarning, logging.getLogger().handlers)


def test_lines_without_a_reader_are_dropped_and_reported_in_the_logs_format() -> None:
    reading, writing_end = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing_end, "w") as target:
        with writing(LogFormat.JSON, LogFilter.parse("info"), target) as log:
            for number in range(3 * MAX_QUEUED):
                # Distinct events: none is left out as a repetition.
                log.stream.write(f'{{"number": {number}, "padding": "{"x" * 100}"}}\n')
            lines: list[bytes] = []
            while b"lines of the log dropped" not in (line := reader.readline()):
                lines.append(line)
            dropped = valid(line.decode())["lines"]
            rest = sum(1 for _ in range(3 * MAX_QUEUED - dropped - len(lines)) if reader.readline())
        assert dropped > 0
        assert len(lines) + rest + dropped == 3 * MAX_QUEUED


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_gets_colours_unless_disabled(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], *, coloured: bool
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        with writing(LogFormat.HUMAN, LogFilter.parse("info"), terminal):
            CORE.info("allocation created")
        written = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("\x1b[32mINFO" in written) is coloured


def test_a_file_gets_no_colours(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as target, writing(LogFormat.HUMAN, LogFilter.parse("info"), target):
        CORE.info("allocation created", client="a")
    assert re.fullmatch(r"\S+Z INFO  core\.allocations   allocation created +client=a\n", path.read_text())


def test_a_log_without_a_file_discards_events() -> None:
    with writing(LogFormat.HUMAN, LogFilter.parse("info"), None):
        CORE.info("nobody hears")
    writer = LogWriter(None)
    writer.close()


def test_fields_of_an_excluded_event_are_not_formatted(log: KeptLog) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("it was written")

    log.change_filter(LogFilter.parse("info"))
    CORE.debug("costly", value=Costly())
    assert log.take() == []
