"""Directives: which events are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.ops.logs.filter import LONGEST, MOST, Level, LogFilter

ALLOCATIONS, PORTAL, STATS = "relay.core.allocations", "relay.actors.portal", "relay.ops.stats"


@pytest.mark.parametrize(
    ("directives", "target", "threshold"),
    [
        ("info", ALLOCATIONS, Level.INFO),
        ("warn", ALLOCATIONS, Level.WARN),
        ("warning", ALLOCATIONS, Level.WARN),
        ("off", ALLOCATIONS, Level.OFF),
        ("INFO,Relay.core=DEBUG", ALLOCATIONS, Level.INFO),
        (" info , relay.core = debug ,", ALLOCATIONS, Level.DEBUG),
        ("info,relay.core=debug,portal=trace", ALLOCATIONS, Level.DEBUG),
        ("info,relay.core=debug,portal=trace", PORTAL, Level.TRACE),
        ("info,relay.core=debug,portal=trace", "relay.core.portal", Level.TRACE),
        ("info,relay.core=debug,portal=trace", STATS, Level.INFO),
        ("relay=debug", ALLOCATIONS, Level.DEBUG),
        ("relay=debug", "waitress", Level.INFO),
        ("off,relay=debug", "waitress", Level.OFF),
        ("waitress=off", "waitress.queue", Level.OFF),
        ("relay.co=debug", ALLOCATIONS, Level.INFO),
        ("relay.core.allocations.more=debug", ALLOCATIONS, Level.INFO),
        ("relay::core=debug", ALLOCATIONS, Level.DEBUG),
        ("core.allocations=debug", ALLOCATIONS, Level.DEBUG),
        ("core=debug,relay=warn", ALLOCATIONS, Level.DEBUG),
        ("relay.core.allocations=error,core=debug", ALLOCATIONS, Level.ERROR),
        ("core=debug,core=warn", ALLOCATIONS, Level.WARN),
        ("debug,info", ALLOCATIONS, Level.INFO),
    ],
)
def test_the_directive_that_reaches_furthest_counts_and_among_equals_the_last(
    directives: str, target: str, threshold: Level
) -> None:
    assert LogFilter.parse(directives).threshold(target) is threshold


@pytest.mark.parametrize(
    ("directives", "why"),
    [
        ("", "no directive"),
        (" , ", "no directive"),
        ("loud", "'loud' is no level: one of trace, debug, info, warn, error, off"),
        ("relay.core", "'relay.core' is no level"),
        ("relay=", "'' is no level"),
        ("relay=1", "'1' is no level"),
        ("=info", "'' is no target"),
        ("a=b=info", "'a=b' is no target"),
        ("relay..core=info", "is no target"),
        ("relay[span]=info", "is no target"),
        ("relay/core=info", "is no target"),
        ("relay\x1b[31m=info", r"relay\\x1b\[31m' is no target"),
        ("info\nrelay=evil", r"'evil' is no level"),
        ("ünfo", r"'\\xfcnfo' is no level"),
        ("x" * 1000, "'" + "x" * 40 + r"\.\.\.' is no level"),
        ("x" * (LONGEST + 1), "longer than 1024"),
        (",".join(["info"] * (MOST + 1)), "more than 32"),
        (",".join(["a=info"] * MOST), "with info for all targets, these are more than 32"),
        ("x" * (LONGEST - 5) + "=info", "or 1024 characters"),
    ],
)
def test_what_is_no_filter_is_refused_in_one_printable_line(directives: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        LogFilter.parse(directives)
    assert str(refused.value).isprintable()


def test_a_filter_is_shown_as_it_could_be_given_again() -> None:
    shown = str(LogFilter.parse("relay::core=DEBUG, portal=off"))
    assert shown == "info,relay.core=debug,portal=off"
    assert LogFilter.parse(shown) == LogFilter.parse("info,relay.core=debug,portal=off")


@given(st.text(max_size=60) | st.text(alphabet="relaycoinfdbug=,.: ", max_size=60))
def test_any_text_is_a_filter_or_refused_in_a_short_printable_line(text: str) -> None:
    try:
        found = LogFilter.parse(text)
    except ValueError as error:
        said = str(error)
    else:
        said = str(found)
        assert LogFilter.parse(said) == found
        assert found.threshold(ALLOCATIONS) in Level
    assert said.isprintable()
    assert len(said) < 500
