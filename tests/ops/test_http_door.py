"""However many connect, what that costs is bounded, and one source does not use up what all have."""

from relay.ops.http.door import REFUSED, Door

LOOPBACK = ("127.0.0.1", 40000)


def source(number: int) -> tuple[str, int]:
    return (f"198.51.{number // 250}.{number % 250 + 1}", 40000 + number)


def test_one_source_has_its_rate_and_others_have_theirs() -> None:
    door = Door(rate=1000, source_rate=10, burst=2)
    assert [door.lets_in(source(1), 5.0) for _ in range(25)] == [True] * 20 + [False] * 5
    assert door.lets_in(source(2), 5.0)
    assert door.lets_in(source(1), 5.11)
    assert not door.lets_in(source(1), 5.11)


def test_addresses_of_one_network_are_one_source() -> None:
    door = Door(rate=1000, source_rate=1, burst=1)
    assert door.lets_in(("2001:db8::1", 1, 0, 0), 0.0)
    assert not door.lets_in(("2001:db8::2", 1, 0, 0), 0.0)
    assert door.lets_in(("2001:db8:1::1", 1, 0, 0), 0.0)


def test_programs_of_this_machine_are_always_let_in() -> None:
    door = Door(rate=1000, source_rate=1, burst=1)
    assert all(door.lets_in(each, 0.0) for each in (LOOPBACK, ("::1", 1, 0, 0)) * 50)


def test_all_together_are_looked_at_as_fast_as_the_rate_says() -> None:
    door, now, let_in = Door(rate=100, source_rate=100, burst=2), 0.0, 0
    while now < 10:
        let_in += door.lets_in(source(let_in), now)
        now += door.pause(now) or 0.0001
    assert 10 * 100 <= let_in <= 12 * 100 + 1


def test_to_turn_many_away_costs_no_more_than_to_let_some_in() -> None:
    door, now, seen = Door(rate=100, source_rate=1, burst=1), 0.0, 0
    while now < 10:
        door.lets_in(source(1), now)
        seen += 1
        now += door.pause(now) or 0.0001
    assert seen * REFUSED <= 11 * 100 + 10


def test_after_a_rest_nobody_waits() -> None:
    door = Door(rate=100, source_rate=100, burst=1)
    for _ in range(300):
        door.lets_in(LOOPBACK, 0.0)
    assert door.pause(0.0) > 1
    assert door.pause(3.0) == 0
