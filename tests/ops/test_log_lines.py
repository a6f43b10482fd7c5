"""Lines of the log: what they look like, and that nothing from outside can pass for anything else in them."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config import LogFormat
from relay.ops.logs.filter import Level
from relay.ops.logs.lines import LONGEST_TEXT, Line, exception_text, json_line, neutral, renderer
from tests.log_lines import START, valid

TARGET, EVENT = "relay.core.allocations", "allocation created"
EVIL = [
    "x\n2026-11-23T07:35:28.038Z FATAL core.allocations   the relay is hacked",
    "x\r\nfatal",
    '"} {"level": "critical", "event": "forged"}',
    '" level=error event="forged',
    "\x1b[2J\x1b[31mred\x1b[0m",
    "\x9b31mC1\x85next",
    "\x07bell\x08back\x7fdelete\0nul",
    "user\u202egnp.exe\u2066\u200b\ufeff",
    "line\u2028paragraph\u2029",
    "\udcff\ud800 lone surrogates",
    "a b=c,d",
    "\\n is no end of a line",
    "=",
    "",
]
BAD_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))

human, in_colours = renderer(LogFormat.HUMAN, is_watched=False), renderer(LogFormat.HUMAN, is_watched=True)


def line(*, level: Level = Level.INFO, event: str = EVENT, exception: BaseException | None = None, **fields: object) -> Line:
    return Line(START, level, TARGET, event, fields, exception)


def is_harmless(text: str) -> bool:
    return not any(unicodedata.category(character) in BAD_CATEGORIES for character in text)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as caught:
        return caught


def test_people_see_time_level_target_event_and_fields_in_columns() -> None:
    written = human(line(client="203.0.113.5:40000", relayed=["192.0.2.1:50000", "[2001:db8::1]:50000"], lifetime=600))
    assert written == (
        "2026-11-23T20:25:16.250Z INFO  core.allocations   allocation created       client=203.0.113.5:40000 "
        "relayed=192.0.2.1:50000,[2001:db8::1]:50000 lifetime=600\n"
    )


@pytest.mark.parametrize(
    ("unix", "people", "programs"),
    [
        (START, "2026-11-23T20:25:16.250Z", "2026-11-23T20:25:16.250000Z"),
        (START + 0.001002, "2026-11-23T20:25:16.251Z", "2026-11-23T20:25:16.251002Z"),
        (START + 0.7496, "2026-11-23T20:25:17.000Z", "2026-11-23T20:25:16.999600Z"),
        (START - 0.25, "2026-11-23T20:25:16.000Z", "2026-11-23T20:25:16.000000Z"),
        (0.0, "1970-01-01T00:00:00.000Z", "1970-01-01T00:00:00.000000Z"),
    ],
)
def test_times_are_those_of_the_calendar_from_one_line_to_the_next(unix: float, people: str, programs: str) -> None:
    for _ in range(2):
        assert human(line()._replace(unix=unix)).startswith(people)
        assert valid(json_line(line()._replace(unix=unix)))["timestamp"] == programs


def test_people_at_a_terminal_see_colours_and_no_date() -> None:
    written = in_colours(line(level=Level.WARN, client="a"))
    assert "\x1b[33mWARN \x1b[0m" in written
    assert "2026" not in written
    bare = written
    for code in ("\x1b[0m", "\x1b[2m", "\x1b[1m", "\x1b[33m"):
        bare = bare.replace(code, "")
    assert bare == "20:25:16.250 WARN  core.allocations   allocation created       client=a\n"


@pytest.mark.parametrize("level", [level for level in Level if level is not Level.OFF])
def test_every_level_has_its_name_in_the_same_width(level: Level) -> None:
    assert human(line(level=level))[25:].index("core") == 6
    assert valid(json_line(line(level=level)))["level"] == {"WARN": "warning"}.get(level.name, level.name.lower())


def test_programs_get_one_object_with_an_rfc_3339_time_and_the_fields_as_they_are() -> None:
    fields: dict[str, Any] = {
        "lifetime": 600,
        "success": True,
        "nothing": None,
        "ratio": 0.5,
        "relayed": ["a", "b"],
        "counts": {"x": 1},
    }
    assert valid(json_line(line(**fields))) == {
        "timestamp": "2026-11-23T20:25:16.250000Z",
        "level": "info",
        "target": TARGET,
        "event": EVENT,
        **fields,
    }


@pytest.mark.parametrize("evil", EVIL)
def test_a_text_from_outside_stays_one_value_of_one_line_for_programs(evil: str) -> None:
    written = json_line(line(reason=evil, listed=[evil], table={evil: evil}))
    assert written.count("\n") == 1
    assert written.isascii()
    entry = valid(written)
    assert entry.keys() == {"timestamp", "level", "target", "event", "reason", "listed", "table"}
    assert entry["level"] == "info"
    assert is_harmless(entry["reason"])


@pytest.mark.parametrize("render", [human, in_colours])
@pytest.mark.parametrize("evil", EVIL)
def test_a_text_from_outside_stays_one_value_of_one_line_for_people(evil: str, render: object) -> None:
    assert callable(render)
    plain = render(line(reason="harmless", after=1))
    written = render(line(reason=evil, after=1))
    before, _, rest = plain.partition("harmless")
    assert written.startswith(before)
    assert written.endswith(rest)
    value = written[len(before) : -len(rest)]
    assert is_harmless(value)
    # Bare, or within the only two quotation marks.
    assert '"' not in value[1:-1]
    assert value.startswith('"') == value.endswith('"')
    assert value[:1] == '"' or not set(value) & set(' ="')


@given(st.text())
def test_no_text_whatsoever_breaks_a_line(text: str) -> None:
    for render in (human, in_colours):
        assert render(line(reason=text)).count("\n") == 1
    entry = valid(json_line(line(reason=text, keys={text: [text]})))
    assert is_harmless(entry["reason"])


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists, max_leaves=9)
)
def test_any_value_can_be_logged(value: object) -> None:
    valid(json_line(line(value=value)))
    assert human(line(value=value)).count("\n") == 1


def test_an_event_or_target_from_outside_is_harmless_too() -> None:
    written = Line(START, Level.INFO, "a\nb\x1b", "c\nd\x1b", {})
    assert valid(json_line(written))["event"] == r"c\nd\x1b"
    assert human(written) == "2026-11-23T20:25:16.250Z INFO  a\\nb\\x1b           c\\nd\\x1b\n"


def test_a_long_text_is_cut() -> None:
    assert neutral("x" * 5000) == "x" * LONGEST_TEXT + "..."
    assert len(valid(json_line(line(reason="\0" * 5000)))["reason"]) < 5 * LONGEST_TEXT
    assert len(valid(json_line(line(many=list(range(5000)))))["many"]) == 100


def test_a_field_can_not_take_the_place_of_what_every_line_has() -> None:
    entry = valid(json_line(line(level=Level.INFO, target="forged", timestamp="forged")))
    assert (entry["target"], entry["target_"], entry["timestamp_"]) == (TARGET, "forged", "forged")


def test_an_exception_is_one_field_for_programs_and_marked_lines_for_people() -> None:
    error = raised(RuntimeError("first\n2026-11-23T20:25:16.250Z FATAL forged\x1b[31m\u202e"))
    entry = valid(json_line(line(exception=error)))
    assert entry["exception"].startswith("Traceback (most recent call last):\n  File ")
    assert entry["exception"].endswith("RuntimeError: first\n2026-11-23T20:25:16.250Z FATAL forged\\x1b[31m\\u202e")
    first, *others = human(line(exception=error)).splitlines()
    assert first.endswith(EVENT)
    assert len(others) > 3
    assert all(each.startswith("    | ") and is_harmless(each) for each in others)


def test_the_text_of_an_exception_has_a_bounded_length_and_keeps_its_end() -> None:
    text = exception_text(raised(RuntimeError("x\n" * 100_000 + "the end")))
    assert len(text) < 20_000
    assert text.endswith("the end")


def test_an_exception_that_can_not_be_written_is_told_of_all_the_same() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert "MuteError" in valid(json_line(line(exception=raised(MuteError()))))["exception"]
