import heapq
import math
from random import Random
from typing import Any
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from relay.core import deadlines as deadlines_module
from relay.core.deadlines import Deadlines

keys = st.integers(0, 9)
moments = st.integers(0, 20).map(float)
steps = st.lists(
    st.tuples(st.just("set"), keys, moments)
    | st.tuples(st.just("discard"), keys, moments)
    | st.tuples(st.just("pop"), keys, moments),
    max_size=200,
)


@given(steps, st.sampled_from([1, 2, 1024]))
def test_deadlines_behave_like_a_dict(steps: list[tuple[str, int, float]], most_popped: int) -> None:
    with patch.object(deadlines_module, "STALE_DEADLINES", most_popped):
        compare_with_dict(steps)


def compare_with_dict(steps: list[tuple[str, int, float]]) -> None:
    deadlines: Any = Deadlines()
    # Keys in insertion order.
    model: dict[int, float] = {}
    for what, key, at in steps:
        if what == "set":
            deadlines.set(key, at)
            model.pop(key, None)
            model[key] = at
        elif what == "discard":
            deadlines.discard(key)
            model.pop(key, None)
        else:
            due = sorted(((moment, each) for each, moment in model.items() if moment <= at), key=lambda pair: pair[0])
            assert list(deadlines.pop_due(at)) == due
            model = {each: moment for each, moment in model.items() if moment > at}
        assert deadlines.earliest == min(model.values(), default=math.inf)
        assert len(deadlines) == len(model)
        assert all(deadlines.get(key) == model.get(key) for key in range(10))


def test_thousands_of_entries_that_go_stale_together_are_not_removed_one_by_one() -> None:
    deadlines: Any = Deadlines()
    for at in (600.0, 900.0):
        for key in range(1, 10_000):
            deadlines.set(key, at)
        deadlines.set(0, 500.0)
    with patch.object(heapq, "heappop", wraps=heapq.heappop) as heappop:
        deadlines.discard(0)
    assert heappop.call_count <= 1024
    assert (deadlines.earliest, deadlines.entries) == (900.0, 9999)


def test_no_key_is_due_before_its_deadline() -> None:
    deadlines: Any = Deadlines()
    deadlines.set("a", 10)
    assert list(deadlines.pop_due(9.999)) == []
    assert list(deadlines.pop_due(10)) == [(10, "a")]
    assert list(deadlines.pop_due(10)) == []
    assert deadlines.earliest == math.inf


def test_equal_deadlines_are_popped_in_insertion_order() -> None:
    deadlines: Any = Deadlines()
    for key in "dacb":
        deadlines.set(key, 1)
    deadlines.set("d", 1)
    assert [key for _, key in deadlines.pop_due(1)] == ["a", "c", "b", "d"]


def test_deadlines_can_be_set_and_discarded_while_popping() -> None:
    deadlines: Any = Deadlines()
    for moment, key in enumerate("abcd"):
        deadlines.set(key, moment)
    popped = []
    for at, key in deadlines.pop_due(10):
        popped.append((at, key))
        if len(popped) == 1:
            deadlines.discard("b")
            deadlines.set("c", 50)
            deadlines.set("e", 2.5)
            deadlines.set("a", 10)
    assert popped == [(0, "a"), (2.5, "e"), (3, "d"), (10, "a")]
    assert deadlines.earliest == 50


def test_keys_need_not_be_comparable() -> None:
    deadlines: Any = Deadlines()
    keys = [object(), None, "text", (1, None), (1, 2)]
    for key in keys:
        deadlines.set(key, 1)
    assert [key for _, key in deadlines.pop_due(1)] == keys


def test_the_heap_stays_small_when_deadlines_move_often() -> None:
    random = Random(1)
    deadlines: Any = Deadlines()
    model = {key: float(key) for key in range(100)}
    for key, at in model.items():
        deadlines.set(key, at)
    for _ in range(20_000):
        key = random.randrange(100)
        # Always later, to keep stale entries below the top of the heap.
        model[key] += random.random() + 1000
        deadlines.set(key, model[key])
        assert deadlines.entries <= 2 * len(deadlines) + 64
    assert deadlines.earliest == min(model.values())
    for key in range(99):
        deadlines.discard(key)
        assert deadlines.entries <= 2 * len(deadlines) + 64
    assert list(deadlines.pop_due(1e12)) == [(model[99], 99)]
    assert deadlines.entries == 0
