"""Lines of the log: format, and escaping of untrusted text (lines, fields, escape codes)."""

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config import LogFormat
from relay.logger import Level
from relay.ops.logs.render import MAX_TEXT, Destination, escape, exception_text, renderer
from tests.support.log_lines import valid

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

Render = Callable[..., str]

AT = 1_795_465_516.250999
"""2026-11-23T20:25:16.250999Z."""


def rendered_by(log_format: LogFormat, destination: Destination = Destination.FILE) -> Render:
    """Return a function to render level, name, exception and fields of an event."""
    render_event = renderer(log_format, destination)

    def render(
        level: str = "info",
        event: str = EVENT,
        target: str = TARGET,
        exception: BaseException | None = None,
        at: float = AT,
        **fields: object,
    ) -> str:
        number = Level.WARN if level == "warning" else Level[level.upper()]
        return render_event(at, target, number, event, {"exc_info": exception, **fields})

    return render


human, in_colors, json_line = (
    rendered_by(LogFormat.HUMAN),
    rendered_by(LogFormat.HUMAN, Destination.TERMINAL),
    rendered_by(LogFormat.JSON),
)


def is_harmless(text: str) -> bool:
    return not any(unicodedata.category(character) in BAD_CATEGORIES for character in text)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as caught:
        return caught


def test_the_text_format_has_columns() -> None:
    written = human(client="203.0.113.5:40000", relayed=["192.0.2.1:50000", "[2001:db8::1]:50000"], lifetime=600)
    assert written == (
        "2026-11-23T20:25:16.250Z INFO  core.allocations   allocation created       client=203.0.113.5:40000 "
        "relayed=192.0.2.1:50000,[2001:db8::1]:50000 lifetime=600\n"
    )


def test_timestamps_are_utc_to_the_microsecond() -> None:
    assert valid(json_line(at=1_770_091_506))["timestamp"] == "2026-02-03T04:05:06.000000Z"
    assert valid(json_line(at=1_770_091_506.789012))["timestamp"] == "2026-02-03T04:05:06.789012Z"


def test_a_terminal_gets_colors_and_no_date() -> None:
    written = in_colors("warning", client="a")
    assert "\x1b[33mWARN \x1b[0m" in written
    assert "2026" not in written
    bare = written
    for code in ("\x1b[0m", "\x1b[2m", "\x1b[1m", "\x1b[33m"):
        bare = bare.replace(code, "")
    assert bare == "20:25:16.250 WARN  core.allocations   allocation created       client=a\n"


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_every_level_has_its_name_in_the_same_width(level: str) -> None:
    assert human(level)[25:].index("core") == 6
    assert valid(json_line(level))["level"] == level


def test_the_json_format_has_rfc_3339_times_and_typed_fields() -> None:
    fields: dict[str, Any] = {
        "lifetime": 600,
        "success": True,
        "nothing": None,
        "ratio": 0.5,
        "relayed": ["a", "b"],
        "counts": {"x": 1},
    }
    assert valid(json_line(**fields)) == {
        "timestamp": "2026-11-23T20:25:16.250999Z",
        "level": "info",
        "target": TARGET,
        "event": EVENT,
        **fields,
    }


@pytest.mark.parametrize("evil", EVIL)
def test_untrusted_text_is_one_value_in_json(evil: str) -> None:
    written = json_line(reason=evil, listed=[evil], table={evil: evil})
    assert written.count("\n") == 1
    assert written.isascii()
    entry = valid(written)
    assert entry.keys() == {"timestamp", "level", "target", "event", "reason", "listed", "table"}
    assert entry["level"] == "info"
    assert is_harmless(entry["reason"])


@pytest.mark.parametrize("render", [human, in_colors])
@pytest.mark.parametrize("evil", EVIL)
def test_untrusted_text_is_one_value_in_text(evil: str, render: object) -> None:
    assert callable(render)
    plain = render(reason="harmless", after=1)
    written = render(reason=evil, after=1)
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
def test_no_text_breaks_a_line(text: str) -> None:
    for render in (human, in_colors):
        assert render(reason=text).count("\n") == 1
    entry = valid(json_line(reason=text, keys={text: [text]}))
    assert is_harmless(entry["reason"])


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists, max_leaves=9)
)
def test_any_value_can_be_logged(value: object) -> None:
    valid(json_line(value=value))
    assert human(value=value).count("\n") == 1


def test_names_of_events_and_targets_are_escaped() -> None:
    names = {"target": "a\nb\x1b", "event": "c\nd\x1b"}
    assert valid(json_line(**names))["event"] == r"c\nd\x1b"
    assert human(**names) == "2026-11-23T20:25:16.250Z INFO  a\\nb\\x1b           c\\nd\\x1b\n"


def test_a_long_text_is_cut() -> None:
    assert escape("x" * 5000) == "x" * MAX_TEXT + "..."
    assert len(valid(json_line(reason="\0" * 5000))["reason"]) < 5 * MAX_TEXT
    assert len(valid(json_line(many=list(range(5000))))["many"]) == 100


def test_an_exception_is_a_json_field_or_marked_lines() -> None:
    error = raised(RuntimeError("first\n2026-11-23T20:25:16.250Z FATAL forged\x1b[31m\u202e"))
    entry = valid(json_line(exception=error))
    assert entry["exception"].startswith("Traceback (most recent call last):\n  File ")
    assert entry["exception"].endswith("RuntimeError: first\n2026-11-23T20:25:16.250Z FATAL forged\\x1b[31m\\u202e")
    first, *others = human(exception=error).splitlines()
    assert first.endswith(EVENT)
    assert len(others) > 3
    assert all(each.startswith("    | ") and is_harmless(each) for each in others)


def test_the_text_of_an_exception_has_a_bounded_length_and_keeps_its_end() -> None:
    text = exception_text(raised(RuntimeError("x\n" * 100_000 + "the end")))
    assert len(text) < 20_000
    assert text.endswith("the end")


def test_an_exception_without_a_readable_text_is_logged() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert "MuteError" in valid(json_line(exception=raised(MuteError())))["exception"]
