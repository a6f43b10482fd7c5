"""Repeated events are written at a limited rate, and suppressed events are counted."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.logger import Level
from relay.ops.logs.rate_limiter import EQUAL, USUAL, VERBOSE, Kind, Rate, RateLimiter

KIND, OTHER = ("relay.core.requests", "peer refused"), ("relay.core.requests", "request refused")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("level", "rate"), [(Level.DEBUG, VERBOSE), (Level.INFO, USUAL), (Level.WARN, USUAL), (Level.ERROR, USUAL)]
)
def test_a_kind_has_a_burst_and_then_a_rate(level: Level, rate: Rate) -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert [limiter.admit(KIND, level) for _ in range(rate.burst + 7)] == [0] * rate.burst + [None] * 7
    clock.now += 1 / rate.per_second
    assert [limiter.admit(KIND, level) for _ in range(2)] == [7, None]
    clock.now += 2.001 / rate.per_second
    assert [limiter.admit(KIND, level) for _ in range(3)] == [1, 0, None]
    clock.now += 1e6
    assert [limiter.admit(KIND, level) for _ in range(rate.burst + 1)] == [1] + [0] * (rate.burst - 1) + [None]


def test_one_kind_does_not_silence_another() -> None:
    limiter = RateLimiter(Clock())
    for _ in range(1000):
        limiter.admit(KIND, Level.INFO)
    assert limiter.admit(OTHER, Level.INFO) == 0


def test_critical_events_are_never_suppressed() -> None:
    limiter = RateLimiter(Clock())
    assert None not in [limiter.admit(KIND, Level.CRITICAL) for _ in range(1000)]


def test_equal_events_are_counted_for_a_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert [limiter.admit(KIND, Level.WARN, {"limit": "quota"}) for _ in range(15)] == [0] + [None] * 14
    assert limiter.take_suppressed() == {KIND: 14}
    assert [limiter.admit(KIND, Level.WARN, {"limit": each}) for each in ("ports", "ports", "quota")] == [0, None, 1]
    clock.now += EQUAL
    assert limiter.admit(KIND, Level.WARN, {"limit": "quota"}) == 0


def test_suppressed_events_are_returned_once() -> None:
    limiter = RateLimiter(Clock())
    for _ in range(USUAL.burst + 3):
        limiter.admit(KIND, Level.INFO)
    limiter.admit(OTHER, Level.INFO)
    assert limiter.take_suppressed() == {KIND: 3}
    assert limiter.take_suppressed() == {}


@given(st.lists(st.tuples(st.sampled_from((KIND, OTHER)), st.floats(0, 3), st.booleans()), max_size=300))
def test_every_event_is_written_or_counted_as_suppressed_once(events: list[tuple[Kind, float, bool]]) -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    written = told = 0
    for kind, pause, takes in events * 3:
        clock.now += pause / 10
        outcome = limiter.admit(kind, Level.INFO)
        written += outcome is not None
        told += outcome or 0
        if takes:
            told += sum(limiter.take_suppressed().values())
    told += sum(limiter.take_suppressed().values())
    assert written + told == 3 * len(events)


def test_concurrent_threads_lose_no_count() -> None:
    limiter = RateLimiter(Clock())
    outcomes: list[int | None] = []

    def work() -> None:
        outcomes.extend(limiter.admit(KIND, Level.INFO) for _ in range(2000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(None) == sum(limiter.take_suppressed().values()) == 8000 - USUAL.burst
