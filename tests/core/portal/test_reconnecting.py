"""When the next attempt is made, and when there is none any more."""

import math
from collections.abc import Callable
from email.utils import formatdate
from itertools import pairwise
from random import Random

import pytest

from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.commands import Abandon, Connect, ConnectionId, Fatal, Left, Note
from tests.core.portal.driver import (
    CONFIG,
    DAY,
    HOUR,
    INIT,
    MINUTE,
    START,
    TICK,
    UNMATCHED_TOPIC,
    Driver,
    Portal,
    broken,
    deeds,
    mute,
    of_kind,
    reply,
    silent,
    slow_and_mute,
    the,
    unreachable,
    well,
)

FIRST, SECOND = ConnectionId(1), ConnectionId(2)

PORTALS_THAT_ARE_AWAY = pytest.mark.parametrize("away", [silent, unreachable, broken, mute, slow_and_mute])
"""Each in another way, and each found again within a minute."""


class Loaded(Random):
    """A source that is not random: intervals are as short or as long as they get."""

    def __init__(self, *, shortest: bool) -> None:
        super().__init__(1)
        self._shortest = shortest

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        assert (stop, step) == (None, 1)
        return start - 1 if self._shortest else 0


def driver_that_draws(*, shortest: bool) -> Driver:
    driver = Driver()
    driver.channel = PortalChannel(CONFIG, Loaded(shortest=shortest))
    return driver


def intervals(driver: Driver, count: int) -> list[float]:
    """Give the times between losses and the attempts after them, at a portal that is unreachable from now on."""
    waits = []
    driver.report_lost()
    for _ in range(count):
        waits.append(driver.seconds_left)
        assert [type(command) for command in driver.pass_time(driver.seconds_left)] == [Connect]
        driver.report_lost()
    return waits


# Before the first join.


def test_at_the_start_attempts_are_made_1_s_apart(driver: Driver) -> None:
    driver.start()
    assert intervals(driver, 14) == [1.0] * 14


def test_at_the_start_an_attempt_is_made_1_s_after_the_last_one_failed(driver: Driver) -> None:
    driver.start()
    driver.pass_time(6)
    driver.report_lost()
    assert driver.pass_time(1 - TICK) == []
    assert of_kind(Connect, driver.pass_time(TICK))


@PORTALS_THAT_ARE_AWAY
def test_a_portal_that_is_away_for_15_s_at_the_start_is_fatal(away: Portal) -> None:
    driver = Driver(away)
    driver.start()
    before = driver.pass_time_to(15 - TICK)
    assert of_kind(Fatal, before) == []
    driver.pass_time_to(15)
    assert driver.the_end()[0] == 15
    assert driver.is_in(State.OVER)
    assert driver.pass_time(2 * DAY) == []


def test_the_end_comes_in_the_middle_of_an_attempt(driver: Driver) -> None:
    driver.start()
    driver.report_lost()
    assert driver.pass_time_to(15 - TICK) == [Connect(SECOND, CONFIG.request_url, CONFIG.request_headers, 15)]
    abandon, fatal = driver.pass_time(TICK)
    assert abandon == Abandon(SECOND)
    assert isinstance(fatal, Fatal)


def test_the_end_comes_in_the_middle_of_a_join(driver: Driver) -> None:
    driver.start()
    driver.pass_time(12)
    driver.report_connected()
    abandon, fatal = driver.pass_time(3)
    assert abandon == Abandon(FIRST)
    assert isinstance(fatal, Fatal)


def test_a_portal_that_keeps_saying_init_but_does_not_answer_the_join_is_fatal_too(driver: Driver) -> None:
    driver.open()
    driver.receive(INIT)
    assert of_kind(Fatal, driver.pass_time(15))


@pytest.mark.parametrize("away", [silent, unreachable, broken, mute])
@pytest.mark.parametrize("back", [0.5, 9, 13])
def test_a_portal_that_is_there_within_15_s_is_found(away: Portal, back: float) -> None:
    driver = Driver(away)
    driver.start()
    driver.pass_time_to(back)
    if not driver.is_in(State.WAITING):
        driver.report_lost("the portal was started again")
    driver.portal = well
    driver.pass_time(MINUTE)
    assert driver.times_of(Fatal) == []
    assert driver.channel.is_joined


def test_a_join_that_is_answered_just_before_15_s_is_in_time(driver: Driver) -> None:
    driver.start()
    driver.pass_time(12)
    driver.report_connected()
    driver.pass_time_to(15 - TICK)
    driver.receive(reply(0))
    assert deeds(driver.pass_time(5)) == []
    assert driver.is_in(State.JOINED)


def test_a_join_that_is_answered_after_15_s_is_too_late_even_if_nobody_woke(driver: Driver) -> None:
    driver.start()
    driver.pass_time(12)
    driver.report_connected()
    driver.oversleep(3)
    assert of_kind(Fatal, driver.receive(reply(0)))


@pytest.mark.parametrize(
    ("away", "told"),
    [
        (silent, "not answered within"),
        (unreachable, "connection refused"),
        (broken, "502"),
        (mute, "the join was not answered"),
    ],
)
def test_the_end_at_the_start_tells_what_was_tried(away: Portal, told: str) -> None:
    driver = Driver(away)
    driver.start()
    driver.pass_time(15)
    _, reason = driver.the_end()
    assert told in reason
    assert "for 15 s" in reason
    assert CONFIG.url.host in reason
    assert "\n" not in reason


# After it.


def test_the_longest_intervals_double_up_to_half_a_minute() -> None:
    driver = driver_that_draws(shortest=False).join()
    assert intervals(driver, 9) == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30, 30])


def test_the_shortest_intervals_are_half_as_long() -> None:
    driver = driver_that_draws(shortest=True).join()
    assert intervals(driver, 9) == pytest.approx([0.5, 1, 2, 4, 8, 15, 15, 15, 15])


def test_each_relay_waits_for_another_time() -> None:
    waits = [intervals(Driver(seed=seed).join(), 8) for seed in range(20)]
    for longest, each in zip([1, 2, 4, 8, 16, 30, 30, 30], zip(*waits, strict=True), strict=True):
        assert all(longest / 2 <= wait <= longest for wait in each)
        assert len(set(each)) > 10


def test_failures_before_the_first_join_do_not_lengthen_intervals() -> None:
    driver = driver_that_draws(shortest=False)
    driver.start()
    intervals(driver, 10)
    driver.join_again()
    assert intervals(driver, 2) == [1, 2]


def test_a_join_alone_does_not_shorten_intervals() -> None:
    driver = driver_that_draws(shortest=False).join()
    waits = []
    for _ in range(7):
        driver.report_lost()
        waits.append(driver.seconds_left)
        driver.join_again()
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_a_heartbeat_that_is_answered_on_a_joined_channel_shortens_intervals() -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 5)
    driver.join_again()
    driver.answer_heartbeat(driver.pass_time(10))
    assert intervals(driver, 2) == [1, 2]


@pytest.mark.parametrize(("ref", "status"), [(0, "ok"), (2, "ok"), (1, "error")])
def test_no_other_answer_shortens_intervals(ref: int, status: str) -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 3)
    driver.join_again()
    driver.pass_time(10)
    driver.receive(reply(ref, status, topic="phoenix"))
    assert intervals(driver, 1) == [16]


def test_a_heartbeat_that_is_answered_on_a_lost_channel_does_not_shorten_intervals() -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 3)
    driver.join_again()
    driver.pass_time(10)
    driver.receive(UNMATCHED_TOPIC)
    driver.receive(reply(1, topic="phoenix"))
    assert intervals(driver, 1) == [16]


def test_a_note_tells_why_and_when_next(joined: Driver) -> None:
    note = the(Note, joined.report_lost("connection reset"))
    assert note.fields["reason"] == "connection reset"
    assert note.fields["retry_in"] == pytest.approx(joined.seconds_left, abs=0.06)


# A day.


@PORTALS_THAT_ARE_AWAY
def test_a_portal_that_is_away_for_a_day_is_fatal_once(away: Portal) -> None:
    driver = Driver().join()
    driver.pass_time(5)
    driver.portal = away
    lost_at = driver.elapsed
    driver.report_lost()
    driver.pass_time_to(lost_at + DAY - TICK)
    assert driver.times_of(Fatal) == []
    assert not driver.is_in(State.OVER)
    driver.pass_time_to(lost_at + 3 * DAY)
    at, reason = driver.the_end()
    assert at == lost_at + DAY
    assert "24 hours" in reason
    assert "\n" not in reason
    assert driver.log[-1] == (at, Fatal(reason))
    assert driver.channel.poll_timeout() is None


@PORTALS_THAT_ARE_AWAY
def test_a_portal_that_is_back_after_one_minute_less_is_found(away: Portal) -> None:
    # The fewest attempts that there may be.
    driver = driver_that_draws(shortest=False).join()
    driver.portal = away
    lost_at = driver.elapsed
    driver.report_lost()
    driver.pass_time_to(lost_at + DAY - MINUTE)
    driver.portal = well
    driver.pass_time_to(lost_at + DAY)
    assert driver.channel.is_joined
    driver.pass_time(HOUR)
    assert driver.channel.is_joined
    assert driver.times_of(Fatal) == []


@pytest.mark.parametrize(("away", "shortest"), [(unreachable, True), (slow_and_mute, False)])
def test_there_are_always_attempts_and_never_many(away: Portal, shortest: bool) -> None:  # noqa: FBT001
    driver = driver_that_draws(shortest=shortest).join()
    driver.portal = away
    driver.report_lost()
    driver.pass_time(DAY - TICK)
    attempts = [at for at in driver.times_of(Connect) if at > MINUTE]
    gaps = [later - earlier for earlier, later in pairwise(attempts)]
    assert min(gaps) >= 15
    assert max(gaps) <= 50


def test_an_outage_counts_from_the_loss_that_was_noticed(joined: Driver) -> None:
    # The portal is silent from now on, which takes five heartbeats to be noticed.
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == 50 + DAY


def test_each_join_ends_an_outage(joined: Driver) -> None:
    joined.portal = unreachable
    joined.report_lost()
    joined.pass_time(DAY - HOUR)
    joined.portal = silent
    joined.join_again()
    assert joined.times_of(Fatal) == []
    joined.portal = unreachable
    joined.report_lost()
    lost_at = joined.elapsed
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == lost_at + DAY


def test_a_channel_that_is_not_joined_again_is_an_outage_from_when_it_was_lost(joined: Driver) -> None:
    joined.pass_time(10)
    joined.portal = unreachable
    joined.receive(UNMATCHED_TOPIC)
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == 10 + DAY


def test_a_channel_that_is_joined_again_at_once_is_no_outage(joined: Driver) -> None:
    joined.portal = well
    joined.pass_time(15)
    joined.receive(UNMATCHED_TOPIC)
    joined.pass_time(DAY)
    assert joined.channel.is_joined
    assert joined.channel.joins == 2


def test_the_wall_clock_means_nothing_to_intervals(joined: Driver) -> None:
    joined.report_lost()
    timeout = joined.channel.poll_timeout()
    assert timeout is not None
    joined.now = joined.now._replace(unix=joined.now.unix + 10 * DAY)
    assert joined.wake() == []
    assert joined.channel.poll_timeout() == timeout


def test_whoever_leaves_during_an_outage_has_left(joined: Driver) -> None:
    joined.portal = unreachable
    joined.report_lost()
    joined.pass_time(HOUR)
    assert joined.leave() == [Left()]
    assert joined.pass_time(2 * DAY) == []


# Retry-After.


def refused(status: int, retry_after: str | None, make: Callable[[], Driver] = lambda: Driver().join()) -> Driver:
    """Come as far as an attempt that was refused just now."""
    driver = make()
    if driver.is_in(State.JOINED):
        driver.report_lost()
        driver.pass_time(driver.seconds_left)
    driver.report_refused(status, retry_after)
    assert driver.is_in(State.WAITING)
    return driver


def http_date(seconds: float) -> str:
    """Write the date so many seconds after what the wall clock is at the start."""
    return formatdate(START.unix + seconds, usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [
        ("1", 1),
        ("2", 2),
        ("42", 42),
        (" 42 ", 42),
        ("0042", 42),
        ("3600", 3600),
        # No busy loop.
        ("0", 1),
        ("000", 1),
        # A year is too long, and so is a number that takes as long to read.
        ("3601", 3600),
        ("31536000", 3600),
        ("9" * 5000, 3600),
    ],
)
def test_a_portal_may_say_how_many_seconds_to_wait(status: int, retry_after: str, wait: int) -> None:
    driver = refused(status, retry_after)
    assert driver.seconds_left == pytest.approx(wait, abs=1e-6)
    assert driver.pass_time(wait - TICK) == []
    assert of_kind(Connect, driver.pass_time(2 * TICK))


@pytest.mark.parametrize(
    ("seconds", "wait"), [(42, 42), (3600, 3600), (3601, 3600), (10 * DAY, 3600), (1, 1), (0, 1), (-1, 1), (-(10**8), 1)]
)
def test_a_portal_may_say_until_when_to_wait(driver: Driver, seconds: int, wait: int) -> None:
    driver.start()
    driver.report_refused(503, http_date(seconds))
    assert driver.seconds_left == wait


def test_a_date_is_held_against_the_wall_clock(driver: Driver) -> None:
    driver.start()
    driver.now = driver.now._replace(unix=START.unix + 1000)
    driver.report_refused(503, http_date(1042))
    assert driver.seconds_left == 42


GARBAGE = [
    None,
    "",
    " ",
    "-5",
    "+5",
    "5.5",
    "1e3",
    "0x10",
    "٣",
    "²",
    "soon",
    "Mon, 99 Foo 2023 00:00:00 GMT",
    "Tue, 14 Nov 99999 22:13:20 GMT",
    "Tue, 14 Nov 2023 22:13:20 +999999999",
    "12 seconds",
    "\x00",
    ",",
]


@pytest.mark.parametrize("retry_after", GARBAGE)
def test_a_portal_that_does_not_say_how_long_is_asked_again_as_usual(retry_after: str | None) -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 2)
    driver.pass_time(driver.seconds_left)
    driver.report_refused(503, retry_after)
    assert driver.seconds_left == 8


@pytest.mark.parametrize("status", [200, 301, 400, 403, 404, 426, 500, 502, 504, 599])
def test_only_429_and_503_say_how_long_to_wait(status: int) -> None:
    driver = driver_that_draws(shortest=False).join()
    driver.report_lost()
    driver.pass_time(driver.seconds_left)
    driver.report_refused(status, "42")
    assert driver.seconds_left == 2


@pytest.mark.parametrize("status", [301, 400, 403, 404, 429, 500, 502, 503])
def test_every_refusal_but_401_is_tried_again(driver: Driver, status: int) -> None:
    driver.start()
    told = driver.report_refused(status)
    assert deeds(told) == []
    assert str(status) in str(the(Note, told).fields["reason"])
    assert driver.seconds_left == 1


def test_a_wait_that_was_asked_for_does_not_lengthen_intervals() -> None:
    driver = driver_that_draws(shortest=False).join()
    driver.report_lost()
    driver.pass_time(driver.seconds_left)
    driver.report_refused(503, "42")
    driver.pass_time(42)
    assert intervals(driver, 1) == [2]


def test_at_the_start_a_wait_that_was_asked_for_does_not_count(driver: Driver) -> None:
    driver.start()
    driver.pass_time(4)
    driver.report_refused(503, "20")
    driver.portal = unreachable
    assert of_kind(Fatal, driver.pass_time_to(35 - TICK)) == []
    driver.pass_time(MINUTE)
    at, reason = driver.the_end()
    assert at == 35
    assert "for 35 s" in reason


def test_at_the_start_several_waits_that_were_asked_for_do_not_count(driver: Driver) -> None:
    driver.start()
    for wait in ("3600", "0", "7"):
        driver.report_refused(503, wait)
        driver.pass_time(driver.seconds_left)
    driver.portal = unreachable
    driver.report_lost()
    driver.pass_time(DAY)
    at, reason = driver.the_end()
    assert at == 15 + 3600 + 1 + 7
    assert "for 60 minutes" in reason


def test_at_the_start_a_wait_that_nobody_asked_for_counts(driver: Driver) -> None:
    driver.portal = broken
    driver.start()
    driver.pass_time(MINUTE)
    assert driver.the_end()[0] == 15


@pytest.mark.parametrize("retry_after", ["50", "3600"])
def test_a_portal_that_asks_to_wait_for_a_day_at_the_start_is_fatal_too(retry_after: str) -> None:
    def busy(driver: Driver, command: object) -> None:
        if isinstance(command, Connect):
            driver.report_refused(503, retry_after)

    driver = Driver(busy)
    driver.start()
    assert of_kind(Fatal, driver.pass_time(DAY - TICK)) == []
    driver.pass_time(DAY)
    at, reason = driver.the_end()
    assert at == DAY
    assert "24 hours" in reason


def test_after_the_first_join_a_wait_that_was_asked_for_counts(joined: Driver) -> None:
    def busy(driver: Driver, command: object) -> None:
        if isinstance(command, Connect):
            driver.report_refused(429, "3000")

    joined.portal = busy
    joined.report_lost()
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == DAY


def test_a_long_wait_that_is_asked_for_at_the_end_leaves_time_for_a_last_attempt(joined: Driver) -> None:
    """Or a portal that is back ten minutes before the day is over would not be found."""
    attempts: list[float] = []

    def back_in_time(driver: Driver, command: object) -> None:
        if isinstance(command, Connect):
            attempts.append(driver.elapsed)
            driver.report_refused(503, "3600")

    joined.portal = back_in_time
    joined.report_lost()
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == DAY
    assert DAY - 60 <= attempts[-1] < DAY, "the last attempt is in the last minute"
    assert len(attempts) < 30, "and the waits are kept to until then"


def test_the_end_of_a_wait_is_no_time_without_a_limit(driver: Driver) -> None:
    driver.start()
    driver.report_refused(503, "9" * 400)
    assert driver.seconds_left < math.inf


def test_since_when_a_state_lasts_and_what_failed_last_can_be_seen() -> None:
    driver = Driver()
    assert (driver.channel.entered_at, driver.channel.last_failure) == (None, None)
    driver.join()
    joined_at = driver.now.monotonic
    driver.pass_time(5)
    assert (driver.channel.entered_at, driver.channel.last_failure) == (joined_at, None)
    driver.report_lost("connection reset")
    assert (driver.channel.entered_at, driver.channel.last_failure) == (joined_at + 5, "connection reset")
    driver.join_again()
    assert driver.channel.entered_at == driver.now.monotonic > joined_at + 5
    assert driver.channel.last_failure == "connection reset"
