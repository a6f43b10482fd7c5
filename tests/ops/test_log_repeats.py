"""What repeats is written now and then, and what was left out is counted."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.ops.logs.filter import Level
from relay.ops.logs.repeats import ASKED_FOR, MOST_KINDS, USUAL, Kind, Rate, Repeats

KIND, OTHER = Kind("relay.core.requests", "peer refused"), Kind("relay.core.requests", "request refused")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("level", "rate"), [(Level.DEBUG, ASKED_FOR), (Level.INFO, USUAL), (Level.WARN, USUAL), (Level.ERROR, USUAL)]
)
def test_a_kind_has_a_burst_and_then_so_many_a_second(level: Level, rate: Rate) -> None:
    clock = Clock()
    repeats = Repeats(clock)
    assert [repeats.admit(KIND, level) for _ in range(rate.burst + 7)] == [0] * rate.burst + [None] * 7
    clock.now += 1 / rate.per_second
    assert [repeats.admit(KIND, level) for _ in range(2)] == [7, None]
    clock.now += 2.001 / rate.per_second
    assert [repeats.admit(KIND, level) for _ in range(3)] == [1, 0, None]
    clock.now += 1e6
    assert [repeats.admit(KIND, level) for _ in range(rate.burst + 1)] == [1] + [0] * (rate.burst - 1) + [None]


def test_who_asks_first_whether_an_event_is_left_out_has_it_counted_once() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    for _ in range(USUAL.burst):
        assert not repeats.leaves_out(KIND, Level.INFO)
        assert not repeats.leaves_out(KIND, Level.INFO), "to ask takes nothing"
        assert repeats.admit(KIND, Level.INFO) == 0
    assert [repeats.leaves_out(KIND, Level.INFO) for _ in range(7)] == [True] * 7
    assert not repeats.leaves_out(KIND, Level.CRITICAL)
    clock.now += 1 / USUAL.per_second
    assert not repeats.leaves_out(KIND, Level.INFO)
    assert repeats.admit(KIND, Level.INFO) == 7


def test_one_kind_does_not_silence_another() -> None:
    repeats = Repeats(Clock())
    for _ in range(1000):
        repeats.admit(KIND, Level.INFO)
    assert repeats.admit(OTHER, Level.INFO) == 0


def test_last_words_are_never_left_out() -> None:
    repeats = Repeats(Clock())
    assert None not in [repeats.admit(KIND, Level.CRITICAL) for _ in range(1000)]


def test_what_was_left_out_can_be_asked_for_once() -> None:
    repeats = Repeats(Clock())
    for _ in range(USUAL.burst + 3):
        repeats.admit(KIND, Level.INFO)
    repeats.admit(OTHER, Level.INFO)
    assert repeats.take_left_out() == {KIND: 3}
    assert repeats.take_left_out() == {}


def test_memory_is_bounded_by_the_number_of_kinds_even_if_there_is_no_end_of_them() -> None:
    repeats = Repeats(Clock())
    outcomes = [repeats.admit(Kind("relay", f"event {number}"), Level.INFO) for number in range(3 * MOST_KINDS)]
    assert len(repeats._buckets) <= MOST_KINDS + 1
    assert outcomes.count(0) == MOST_KINDS + USUAL.burst
    assert sum(repeats.take_left_out().values()) == outcomes.count(None)


@given(st.lists(st.tuples(st.sampled_from((KIND, OTHER)), st.floats(0, 3), st.booleans()), max_size=300))
def test_every_event_is_either_written_or_counted_as_left_out_once(events: list[tuple[Kind, float, bool]]) -> None:
    clock = Clock()
    repeats = Repeats(clock)
    written = told = 0
    for kind, pause, takes in events * 3:
        clock.now += pause / 10
        outcome = repeats.admit(kind, Level.INFO)
        written += outcome is not None
        told += outcome or 0
        if takes:
            told += sum(repeats.take_left_out().values())
    told += sum(repeats.take_left_out().values())
    assert written + told == 3 * len(events)


def test_threads_at_once_lose_no_count() -> None:
    repeats = Repeats(Clock())
    outcomes: list[int | None] = []

    def work() -> None:
        outcomes.extend(repeats.admit(KIND, Level.INFO) for _ in range(2000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(None) == sum(repeats.take_left_out().values()) == 8000 - USUAL.burst
