"""Directives of the log's filter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.logger import Level
from relay.ops.logs.filter import MAX_DIRECTIVES, MAX_LENGTH, LogFilter

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
def test_the_longest_matching_directive_wins_and_the_last_of_equals(directives: str, target: str, threshold: Level) -> None:
    assert LogFilter.parse(directives).threshold(target) is threshold


@pytest.mark.parametrize(
    ("directives", "why"),
    [
        ("", "no directive"),
        (" , ", "no directive"),
        ("loud", "'loud' is not a level: use one of trace, debug, info, warn, error, off"),
        ("relay.core", "'relay.core' is not a level"),
        ("relay=", "'' is not a level"),
        ("relay=1", "'1' is not a level"),
        ("=info", "'' is not a target"),
        ("a=b=info", "'a=b' is not a target"),
        ("relay..core=info", "is not a target"),
        ("relay[span]=info", "is not a target"),
        ("relay/core=info", "is not a target"),
        ("relay\x1b[31m=info", r"relay\\x1b\[31m' is not a target"),
        ("info\nrelay=evil", r"'evil' is not a level"),
        ("ünfo", r"'\\xfcnfo' is not a level"),
        ("x" * 1000, "'" + "x" * 40 + r"\.\.\.' is not a level"),
        ("x" * (MAX_LENGTH + 1), "longer than 1024"),
        (",".join(["info"] * (MAX_DIRECTIVES + 1)), "more than 32"),
    ],
)
def test_the_error_for_an_invalid_filter_is_one_printable_line(directives: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        LogFilter.parse(directives)
    assert str(refused.value).isprintable()


def test_the_text_of_a_filter_is_a_filter() -> None:
    shown = str(LogFilter.parse("relay::core=DEBUG, portal=off"))
    assert shown == "relay.core=debug,portal=off"
    assert LogFilter.parse(shown) == LogFilter.parse("relay::core=DEBUG, portal=off")


@given(st.text(max_size=60) | st.text(alphabet="relaycoinfdbug=,.: ", max_size=60))
def test_any_text_is_a_filter_or_a_short_printable_error(text: str) -> None:
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
