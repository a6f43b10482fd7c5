"""The log: what is written of what modules, libraries and the interpreter say."""

import gc
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from freezegun import freeze_time

from relay.config import LogFormat
from relay.ops.logs.filter import Level, LogFilter
from relay.ops.logs.foreign import others_heard_by
from relay.ops.logs.log import QUEUED_LINES, Log, LogWriter, events_to, writing
from relay.ops.logs.repeats import USUAL
from tests.log_lines import KeptLog, Written, valid

PORTAL = structlog.get_logger("relay.actors.portal")
CORE = structlog.get_logger("relay.core.allocations")


@pytest.fixture
def log() -> Iterator[KeptLog]:
    """A log to which events of this process go."""
    kept = KeptLog()
    with events_to(kept):
        yield kept


@pytest.fixture
def others(log: KeptLog) -> Iterator[KeptLog]:
    """The same, with what others say."""
    with others_heard_by(log.write):
        yield log


def events(log: KeptLog) -> list[str]:
    return [entry["event"] for entry in log.take()]


def test_an_event_is_written_with_the_level_target_and_fields_it_has(log: KeptLog) -> None:
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
def test_what_the_filter_does_not_admit_is_not_written(log: KeptLog, directives: str) -> None:
    log.change_filter(LogFilter.parse(directives))
    expected = {"info": ["core", "portal"], "relay=info": ["core", "portal"], "off": []}.get(
        directives, ["core", "core debug"]
    )
    PORTAL.info("portal")
    PORTAL.debug("portal debug")
    CORE.info("core")
    CORE.debug("core debug")
    assert sorted(events(log)) == sorted(expected)


def test_what_a_logger_is_bound_to_is_written_with_each_event(log: KeptLog) -> None:
    bound = PORTAL.bind(client="203.0.113.5:1")
    bound.info("allocation created", lifetime=600)
    (entry,) = log.take()
    assert (entry["client"], entry["lifetime"]) == ("203.0.113.5:1", 600)


def test_who_listens_to_structlog_hears_each_event_in_place_of_the_log(log: KeptLog) -> None:
    with structlog.testing.capture_logs() as heard:
        PORTAL.info("joined the portal", lifetime=1)
    assert heard == [{"event": "joined the portal", "log_level": "info", "lifetime": 1}]
    assert log.take() == []


def test_a_filter_holds_from_the_moment_it_is_changed(log: KeptLog) -> None:
    for directives, count in (("info", 0), ("debug", 1), ("core=debug,off", 1), ("core=info", 0)):
        log.change_filter(LogFilter.parse(directives))
        CORE.debug("core debug")
        assert len(log.take()) == count


def test_who_follows_the_filter_is_told_at_once_and_at_each_change_until_it_goes(log: KeptLog) -> None:
    told: list[bool] = []
    with log.followed_by(lambda: told.append(log.admits("relay.core.answers", Level.DEBUG))):
        log.change_filter(LogFilter.parse("info"))
        log.change_filter(LogFilter.parse("answers=debug"))
    log.change_filter(LogFilter.parse("info"))
    assert told == [True, False, True]


def test_a_repeating_event_says_how_many_were_left_out_before_it(log: KeptLog) -> None:
    for number in range(USUAL.burst + 20):
        CORE.info("again", number=number)
    PORTAL.info("again")
    assert events(log) == ["again"] * (USUAL.burst + 1)
    log.passed += 1
    CORE.info("again", number=1000)
    (entry,) = log.take()
    assert (entry["number"], entry["left_out"]) == (1000, 20)


def test_events_left_out_are_told_of_at_the_latest_at_the_end() -> None:
    log = KeptLog()
    with events_to(log):
        for _ in range(USUAL.burst + 20):
            CORE.error("again")
        log.take()
        log.tell_left_out()
        (entry,) = log.take()
        assert (entry["level"], entry["event"]) == ("warning", "repeated events left out")
        assert (entry["what"], entry["of"], entry["left_out"]) == ("again", "relay.core.allocations", 20)
        log.tell_left_out()
        assert log.take() == []
        CORE.error("again")
    (entry,) = log.take()
    assert entry["left_out"] == 1


def test_what_ends_the_relay_is_always_written(log: KeptLog) -> None:
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


def test_the_clock_of_the_machine_stamps_lines_to_the_microsecond() -> None:
    written = Written()
    with freeze_time("2026-02-03T04:05:06.789012Z"), events_to(Log(LogFormat.JSON, written)):
        CORE.info("now")
    assert valid(written.text)["timestamp"] == "2026-02-03T04:05:06.789012Z"


def test_a_library_that_logs_is_heard_as_any_other_and_its_text_is_harmless(others: KeptLog) -> None:
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


def test_a_library_that_can_not_even_log_is_heard(others: KeptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    # Without pytest's own, which fails on it.
    ours = [handler for handler in root.handlers if type(handler).__module__ == others_heard_by.__module__]
    monkeypatch.setattr(root, "handlers", ours)
    logging.getLogger("foreign.package").error("%d", "no number")
    (entry,) = others.take()
    assert entry["said"] == "'%d', which can't be written (TypeError)"


@pytest.mark.parametrize("library", ["pykka", "pykka._actor", "websocket"])
def test_libraries_whose_troubles_are_told_elsewhere_are_quiet(others: KeptLog, library: str) -> None:
    logging.getLogger(library).error("unhandled")
    assert others.take() == []


def test_a_warning_of_python_is_an_event(others: KeptLog) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # As `catch_warnings` puts its own in that place.
        with others_heard_by(others.write):
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


def test_an_exception_that_nobody_hears_of_is_an_event(others: KeptLog) -> None:
    class Failing:
        def __del__(self) -> None:
            raise OSError("oh")

    Failing()
    gc.collect()
    (entry,) = others.take()
    assert entry["event"] == "an exception that nobody hears of"
    assert entry["exception"].endswith("OSError: oh")


def test_afterwards_others_say_what_they_have_to_say_as_before() -> None:
    before = threading.excepthook, sys.unraisablehook, warnings.showwarning, logging.getLogger().handlers.copy()
    with others_heard_by(KeptLog().write):
        assert threading.excepthook is not before[0]
    assert before == (threading.excepthook, sys.unraisablehook, warnings.showwarning, logging.getLogger().handlers)


def test_lines_that_nobody_reads_are_dropped_and_counted_in_the_format_of_the_log() -> None:
    reading, writing_end = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing_end, "w") as target:
        with writing(LogFormat.JSON, LogFilter.parse("info"), target) as log:
            for number in range(3 * QUEUED_LINES):
                # Distinct events: none is left out as a repetition.
                log.stream.write(f'{{"number": {number}, "padding": "{"x" * 100}"}}\n')
            lines: list[bytes] = []
            while b"lines of the log dropped" not in (line := reader.readline()):
                lines.append(line)
            dropped = valid(line.decode())["lines"]
            rest = sum(1 for _ in range(3 * QUEUED_LINES - dropped - len(lines)) if reader.readline())
        assert dropped > 0
        assert len(lines) + rest + dropped == 3 * QUEUED_LINES


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_gets_colours_unless_it_wants_none(
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


def test_a_log_without_a_place_to_write_to_is_no_trouble() -> None:
    with writing(LogFormat.HUMAN, LogFilter.parse("info"), None):
        CORE.info("nobody hears")
    writer = LogWriter(None)
    assert not writer.isatty()
    writer.close()


def test_a_debug_event_that_the_filter_does_not_admit_is_not_even_looked_at(log: KeptLog) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("it was written")

    log.change_filter(LogFilter.parse("info"))
    CORE.debug("costly", value=Costly())
    assert log.take() == []
