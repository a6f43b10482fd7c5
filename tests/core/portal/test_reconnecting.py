"""Intervals between attempts, and the timeouts that end them."""

import math
from collections.abc import Callable
from email.utils import formatdate
from itertools import pairwise
from random import Random

import pytest

from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.commands import Abandon, Connect, Fatal, Left, Note
from tests.support.portal_channel import (
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
    write,
)

PORTALS_THAT_ARE_AWAY = pytest.mark.parametrize("away", [silent, unreachable, broken, mute, slow_and_mute])
"""Each outage differs, and each ends within a minute."""


class Loaded(Random):
    """A fake random source: intervals are as short or as long as possible."""

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
    """Return the times from losses to the next attempts at an unreachable portal."""
    waits = []
    driver.report_lost()
    for _ in range(count):
        waits.append(driver.seconds_left)
        assert [type(command) for command in driver.pass_time(driver.seconds_left)] == [Connect]
        driver.report_lost()
    return waits


def crash(driver: Driver) -> None:
    driver.receive(write("relay", "phx_error"))


def forget(driver: Driver) -> None:
    driver.receive(UNMATCHED_TOPIC)


# Before the first join.


def test_at_startup_attempts_are_1_s_apart(driver: Driver) -> None:
    driver.start()
    assert intervals(driver, 14) == [1.0] * 14


def test_at_startup_the_next_attempt_is_1_s_after_a_failure(driver: Driver) -> None:
    driver.start()
    driver.pass_time(6)
    driver.report_lost()
    assert driver.pass_time(1 - TICK) == []
    assert of_kind(Connect, driver.pass_time(TICK))


@PORTALS_THAT_ARE_AWAY
def test_a_portal_unreachable_for_15_s_at_startup_is_fatal(away: Portal) -> None:
    driver = Driver(away)
    driver.start()
    before = driver.pass_time_to(15 - TICK)
    assert of_kind(Fatal, before) == []
    driver.pass_time_to(15)
    assert driver.the_end()[0] == 15
    assert driver.is_in(State.OVER)
    assert driver.pass_time(2 * DAY) == []


def test_the_startup_timeout_interrupts_an_attempt(driver: Driver) -> None:
    driver.start()
    driver.report_lost()
    assert driver.pass_time_to(15 - TICK) == [Connect(CONFIG.request_url, CONFIG.request_headers, 15)]
    abandon, fatal = driver.pass_time(TICK)
    assert abandon == Abandon()
    assert isinstance(fatal, Fatal)


def test_the_startup_timeout_interrupts_a_join(driver: Driver) -> None:
    driver.start()
    driver.pass_time(12)
    driver.report_connected()
    abandon, fatal = driver.pass_time(3)
    assert abandon == Abandon()
    assert isinstance(fatal, Fatal)


def test_repeated_init_without_a_join_reply_is_fatal(driver: Driver) -> None:
    driver.open()
    driver.receive(INIT)
    assert of_kind(Fatal, driver.pass_time(15))


@pytest.mark.parametrize("away", [silent, unreachable, broken, mute])
@pytest.mark.parametrize("back", [0.5, 9, 13])
def test_a_portal_reachable_within_15_s_is_joined(away: Portal, back: float) -> None:
    driver = Driver(away)
    driver.start()
    driver.pass_time_to(back)
    if not driver.is_in(State.WAITING):
        driver.report_lost("the portal was started again")
    driver.portal = well
    driver.pass_time(MINUTE)
    assert driver.times_of(Fatal) == []
    assert driver.channel.is_joined


def test_a_join_reply_just_before_15_s_is_in_time(driver: Driver) -> None:
    driver.start()
    driver.pass_time(12)
    driver.report_connected()
    driver.pass_time_to(15 - TICK)
    driver.receive(reply(0))
    assert deeds(driver.pass_time(5)) == []
    assert driver.is_in(State.JOINED)


def test_a_join_reply_after_15_s_is_too_late_even_without_a_wake_up(driver: Driver) -> None:
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
def test_the_startup_error_describes_the_failed_attempts(away: Portal, told: str) -> None:
    driver = Driver(away)
    driver.start()
    driver.pass_time(15)
    _, reason = driver.the_end()
    assert told in reason
    assert "for 15 s" in reason
    assert CONFIG.url.host in reason
    assert "\n" not in reason


# After the first join.


LONGEST = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
"""The longest intervals after a lost portal, in order."""


def test_the_longest_intervals_double_from_an_eighth_of_a_second_up_to_30_s() -> None:
    driver = driver_that_draws(shortest=False).join()
    assert intervals(driver, 11) == pytest.approx(LONGEST)


def test_the_shortest_intervals_are_half_as_long() -> None:
    driver = driver_that_draws(shortest=True).join()
    assert intervals(driver, 11) == pytest.approx([interval / 2 for interval in LONGEST])


def test_intervals_differ_between_relays() -> None:
    waits = [intervals(Driver(seed=seed).join(), 11) for seed in range(20)]
    for longest, each in zip(LONGEST, zip(*waits, strict=True), strict=True):
        assert all(longest / 2 <= wait <= longest for wait in each)
        assert len(set(each)) > 10


def test_failures_before_the_first_join_do_not_lengthen_intervals() -> None:
    driver = driver_that_draws(shortest=False)
    driver.start()
    intervals(driver, 10)
    driver.join_again()
    assert intervals(driver, 2) == LONGEST[:2]


@pytest.mark.parametrize("lasts", [0, 0.125, 0.5 - TICK])
@pytest.mark.parametrize("end", [Driver.report_lost, crash, forget])
def test_a_join_that_lasts_less_than_half_a_second_is_a_failure(lasts: float, end: Callable[[Driver], object]) -> None:
    """Otherwise relays would join a portal that crashes on each join at the speed of the network."""
    driver = driver_that_draws(shortest=False).join()
    waits = []
    for _ in LONGEST:
        driver.pass_time(lasts)
        end(driver)
        waits.append(driver.seconds_left)
        driver.join_again()
    assert waits == LONGEST


@pytest.mark.parametrize("lasts", [0.5, 9, 39])
@pytest.mark.parametrize("end", [Driver.report_lost, crash])
def test_a_join_that_lasts_half_a_second_resets_intervals(lasts: float, end: Callable[[Driver], object]) -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 5)
    driver.join_again()
    for _ in range(3):
        driver.pass_time(lasts)
        end(driver)
        assert driver.seconds_left == LONGEST[0]
        driver.join_again()


def test_a_silent_portal_is_replaced_without_delay(joined: Driver) -> None:
    joined.pass_time(40)
    assert joined.is_in(State.WAITING)
    assert joined.seconds_left <= LONGEST[0]


def test_a_connection_without_a_join_does_not_reset_intervals() -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 3)
    driver.pass_time(driver.seconds_left)
    driver.report_connected()
    driver.pass_time(4)
    driver.report_lost()
    assert driver.seconds_left == LONGEST[4]


def test_a_channel_that_cannot_be_rejoined_is_reconnected_without_delay() -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 5)
    driver.join_again()
    driver.pass_time(1)
    driver.receive(UNMATCHED_TOPIC)
    driver.report_lost()
    assert driver.seconds_left == LONGEST[0]


def test_the_log_event_has_the_reason_and_the_next_attempt(joined: Driver) -> None:
    note = the(Note, joined.report_lost("connection reset"))
    assert note.fields["reason"] == "connection reset"
    assert note.fields["retry_in"] == pytest.approx(joined.seconds_left, abs=0.06)


# Outages of a day.


@PORTALS_THAT_ARE_AWAY
def test_a_portal_unreachable_for_a_day_is_fatal_once(away: Portal) -> None:
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
def test_a_portal_unreachable_for_a_minute_less_is_joined(away: Portal) -> None:
    # The minimum number of attempts.
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
def test_attempts_never_stop_and_are_never_frequent(away: Portal, shortest: bool) -> None:  # noqa: FBT001
    driver = driver_that_draws(shortest=shortest).join()
    driver.portal = away
    driver.report_lost()
    driver.pass_time(DAY - TICK)
    attempts = [at for at in driver.times_of(Connect) if at > MINUTE]
    gaps = [later - earlier for earlier, later in pairwise(attempts)]
    assert min(gaps) >= 15
    assert max(gaps) <= 50


def test_an_outage_counts_from_the_detected_loss(joined: Driver) -> None:
    # From now on the portal is silent, which the channel detects after 40 s.
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == 40 + DAY


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


def test_an_outage_counts_from_the_loss_of_the_channel(joined: Driver) -> None:
    joined.pass_time(10)
    joined.portal = unreachable
    joined.receive(UNMATCHED_TOPIC)
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == 10 + DAY


def test_a_channel_rejoined_at_once_is_no_outage(joined: Driver) -> None:
    joined.portal = well
    joined.pass_time(15)
    joined.receive(UNMATCHED_TOPIC)
    joined.pass_time(DAY)
    assert joined.channel.is_joined
    assert joined.channel.joins == 2


def test_the_wall_clock_does_not_affect_intervals(joined: Driver) -> None:
    joined.report_lost()
    timeout = joined.channel.poll_timeout()
    assert timeout is not None
    joined.now = joined.now._replace(unix=joined.now.unix + 10 * DAY)
    assert joined.wake() == []
    assert joined.channel.poll_timeout() == timeout


def test_leaving_during_an_outage_ends_at_once(joined: Driver) -> None:
    joined.portal = unreachable
    joined.report_lost()
    joined.pass_time(HOUR)
    assert joined.leave() == [Left()]
    assert joined.pass_time(2 * DAY) == []


# Retry-After.


def refused(status: int, retry_after: str | None, make: Callable[[], Driver] = lambda: Driver().join()) -> Driver:
    """Start the channel, and reject its first attempt."""
    driver = make()
    if driver.is_in(State.JOINED):
        driver.report_lost()
        driver.pass_time(driver.seconds_left)
    driver.report_refused(status, retry_after)
    assert driver.is_in(State.WAITING)
    return driver


def http_date(seconds: float) -> str:
    """Format the date some seconds after the initial wall clock time."""
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
        # A year is too long, and parsing of a very long number is too slow.
        ("3601", 3600),
        ("31536000", 3600),
        ("9" * 5000, 3600),
    ],
)
def test_retry_after_may_be_a_number_of_seconds(status: int, retry_after: str, wait: int) -> None:
    driver = refused(status, retry_after)
    assert driver.seconds_left == pytest.approx(wait, abs=1e-6)
    assert driver.pass_time(wait - TICK) == []
    assert of_kind(Connect, driver.pass_time(2 * TICK))


@pytest.mark.parametrize(
    ("seconds", "wait"), [(42, 42), (3600, 3600), (3601, 3600), (10 * DAY, 3600), (1, 1), (0, 1), (-1, 1), (-(10**8), 1)]
)
def test_retry_after_may_be_a_date(driver: Driver, seconds: int, wait: int) -> None:
    driver.start()
    driver.report_refused(503, http_date(seconds))
    assert driver.seconds_left == wait


def test_a_retry_after_date_is_compared_with_the_wall_clock(driver: Driver) -> None:
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
def test_without_retry_after_the_usual_interval_applies(retry_after: str | None) -> None:
    driver = driver_that_draws(shortest=False).join()
    intervals(driver, 2)
    driver.pass_time(driver.seconds_left)
    driver.report_refused(503, retry_after)
    assert driver.seconds_left == LONGEST[3]


@pytest.mark.parametrize("status", [200, 301, 400, 403, 404, 426, 500, 502, 504, 599])
def test_retry_after_counts_only_with_429_and_503(status: int) -> None:
    driver = driver_that_draws(shortest=False).join()
    driver.report_lost()
    driver.pass_time(driver.seconds_left)
    driver.report_refused(status, "42")
    assert driver.seconds_left == LONGEST[1]


@pytest.mark.parametrize("status", [301, 400, 403, 404, 429, 500, 502, 503])
def test_every_http_error_except_401_is_retried(driver: Driver, status: int) -> None:
    driver.start()
    told = driver.report_refused(status)
    assert deeds(told) == []
    assert str(status) in str(the(Note, told).fields["reason"])
    assert driver.seconds_left == 1


def test_a_retry_after_wait_does_not_lengthen_intervals() -> None:
    driver = driver_that_draws(shortest=False).join()
    driver.report_lost()
    driver.pass_time(driver.seconds_left)
    driver.report_refused(503, "42")
    driver.pass_time(42)
    assert intervals(driver, 1) == [LONGEST[1]]


def test_a_retry_after_wait_extends_the_startup_timeout(driver: Driver) -> None:
    driver.start()
    driver.pass_time(4)
    driver.report_refused(503, "20")
    driver.portal = unreachable
    assert of_kind(Fatal, driver.pass_time_to(35 - TICK)) == []
    driver.pass_time(MINUTE)
    at, reason = driver.the_end()
    assert at == 35
    assert "for 35 s" in reason


def test_several_retry_after_waits_extend_the_startup_timeout(driver: Driver) -> None:
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


def test_a_wait_without_retry_after_counts_toward_the_startup_timeout(driver: Driver) -> None:
    driver.portal = broken
    driver.start()
    driver.pass_time(MINUTE)
    assert driver.the_end()[0] == 15


@pytest.mark.parametrize("retry_after", ["50", "3600"])
def test_retry_after_waits_of_a_day_at_startup_are_fatal(retry_after: str) -> None:
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


def test_after_the_first_join_a_retry_after_wait_counts_as_outage(joined: Driver) -> None:
    def busy(driver: Driver, command: object) -> None:
        if isinstance(command, Connect):
            driver.report_refused(429, "3000")

    joined.portal = busy
    joined.report_lost()
    joined.pass_time(2 * DAY)
    assert joined.the_end()[0] == DAY


def test_a_long_retry_after_at_the_end_allows_a_last_attempt(joined: Driver) -> None:
    """Otherwise a portal that returns ten minutes before the timeout would not be joined."""
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


def test_the_end_of_a_retry_after_wait_does_not_reset_the_timeout(driver: Driver) -> None:
    driver.start()
    driver.report_refused(503, "9" * 400)
    assert driver.seconds_left < math.inf


def test_the_status_has_the_start_of_the_state_and_the_last_error() -> None:
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
