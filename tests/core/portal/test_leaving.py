import pytest

from relay.core.portal.channel import State
from relay.core.portal.commands import Abandon, Begin, Close, ConnectionId, Left, PortalCommand
from tests.core.portal.driver import (
    INIT,
    TICK,
    TOKEN_EXPIRED,
    UNMATCHED_TOPIC,
    Driver,
    deeds,
    reply,
    said,
    well,
    write,
)

FIRST = ConnectionId(1)
LEAVE_REF = 1


@pytest.fixture
def leaving(joined: Driver) -> Driver:
    joined.leave()
    return joined


@pytest.fixture
def closing(leaving: Driver) -> Driver:
    leaving.pass_time(1)
    assert leaving.is_in(State.CLOSING)
    return leaving


def test_a_relay_with_a_good_portal_leaves_at_once(joined: Driver) -> None:
    joined.portal = well
    leave, close, left = joined.leave()
    assert said([leave]) == [{"topic": "relay", "event": "phx_leave", "payload": {}, "ref": LEAVE_REF}]
    assert [close, left] == [Close(FIRST), Left()]
    assert joined.is_in(State.OVER)


def test_whoever_leaves_is_not_joined(joined: Driver) -> None:
    assert [frame["event"] for frame in said(joined.leave())] == ["phx_leave"]
    assert joined.is_in(State.LEAVING)
    assert not joined.channel.is_joined


def test_an_unanswered_join_is_left_too(driver: Driver) -> None:
    driver.open()
    assert [frame["event"] for frame in said(driver.leave())] == ["phx_leave"]
    assert driver.receive(reply(0)) == []
    assert driver.is_in(State.LEAVING)
    assert driver.receive(reply(LEAVE_REF)) == [Close(FIRST)]


def test_a_join_that_is_refused_while_leaving_is_not_fatal(driver: Driver) -> None:
    driver.open()
    driver.leave()
    assert deeds(driver.receive(reply(0, "error", {"reason": "no"}))) == []
    assert driver.is_in(State.LEAVING)


@pytest.mark.parametrize(
    "text",
    [
        reply(LEAVE_REF),
        reply(str(LEAVE_REF)),
        reply(LEAVE_REF, "error", {"reason": "unmatched topic"}),
        write("relay", "phx_close"),
        write("relay", "phx_error"),
    ],
)
def test_the_answer_to_a_leave_closes_the_connection(leaving: Driver, text: str) -> None:
    leaving.pass_time(1 - TICK)
    assert leaving.receive(text) == [Close(FIRST)]
    assert leaving.is_in(State.CLOSING)


@pytest.mark.parametrize(
    "text", [reply(0), reply(2), reply(None), INIT, TOKEN_EXPIRED, UNMATCHED_TOPIC, "{", write("relay", "new event")]
)
def test_nothing_else_is_the_answer_to_a_leave(leaving: Driver, text: str) -> None:
    assert deeds(leaving.receive(text)) == []
    assert leaving.is_in(State.LEAVING)


def test_a_leave_is_waited_for_at_most_1_s(leaving: Driver) -> None:
    assert leaving.pass_time(1 - TICK) == []
    assert leaving.pass_time(TICK) == [Close(FIRST)]
    assert leaving.is_in(State.CLOSING)


def test_the_others_close_is_waited_for_at_most_1_s(closing: Driver) -> None:
    assert closing.pass_time(1 - TICK) == []
    assert closing.pass_time(TICK) == [Abandon(FIRST), Left()]
    assert closing.is_in(State.OVER)


def test_a_close_that_comes_soon_is_waited_for_a_second_from_then_on(leaving: Driver) -> None:
    leaving.pass_time(0.5)
    leaving.receive(reply(LEAVE_REF))
    assert leaving.pass_time(1 - TICK) == []
    assert leaving.pass_time(TICK) == [Abandon(FIRST), Left()]


def test_a_connection_that_is_lost_while_leaving_is_left(leaving: Driver) -> None:
    assert leaving.report_lost() == [Left()]
    assert leaving.is_in(State.OVER)


def test_a_connection_that_both_have_closed_is_left(closing: Driver) -> None:
    closing.pass_time(1 - TICK)
    assert closing.report_lost() == [Left()]
    assert closing.is_in(State.OVER)


def test_frames_after_the_close_mean_nothing(closing: Driver) -> None:
    for text in (reply(LEAVE_REF), INIT, TOKEN_EXPIRED, UNMATCHED_TOPIC, write("relay", "phx_close"), "{"):
        assert closing.receive(text) == []
    assert closing.receive_other("binary") == []
    assert closing.channel.oddities == 0


def test_an_init_while_leaving_does_not_begin(driver: Driver) -> None:
    driver.open()
    driver.receive(reply(0))
    driver.leave()
    assert Begin() not in driver.receive(INIT)
    assert not driver.channel.has_begun


def test_a_flood_while_leaving_is_left_at_once(leaving: Driver) -> None:
    out: list[PortalCommand] = []
    for _ in range(101):
        out += leaving.receive_other("ping")
    assert out == [Abandon(FIRST), Left()]


def test_no_heartbeat_is_sent_while_leaving(joined: Driver) -> None:
    joined.pass_time(9.5)
    joined.leave()
    assert joined.pass_time(10) == [Close(FIRST), Abandon(FIRST), Left()]


def test_what_is_left_unanswered_at_the_start_is_not_fatal_while_leaving(driver: Driver) -> None:
    driver.start()
    driver.pass_time(14)
    driver.report_connected()
    driver.leave()
    driver.oversleep(1)
    assert driver.wake() == [Close(FIRST)]


@pytest.mark.parametrize("again", [1, 5])
def test_a_leave_is_said_once(joined: Driver, again: int) -> None:
    joined.leave()
    for _ in range(again):
        assert joined.leave() == []
    assert joined.pass_time(1) == [Close(FIRST)]
    assert joined.leave() == []
    assert joined.pass_time(1) == [Abandon(FIRST), Left()]
    assert joined.leave() == []


def test_a_relay_that_never_started_is_left(driver: Driver) -> None:
    assert driver.leave() == [Left()]
    assert driver.channel.poll_timeout() is None


def test_an_attempt_is_abandoned(driver: Driver) -> None:
    driver.start()
    assert driver.leave() == [Abandon(FIRST), Left()]
    assert driver.report_connected() == []
    assert driver.channel.poll_timeout() is None


def test_nothing_has_to_be_abandoned_between_attempts(driver: Driver) -> None:
    driver.start()
    driver.report_lost()
    assert driver.leave() == [Left()]
    assert driver.pass_time(60) == []


def test_nothing_follows_the_leave(closing: Driver) -> None:
    closing.report_lost()
    assert closing.receive(INIT) == []
    assert closing.report_lost() == []
    assert closing.channel.poll_timeout() is None
    assert closing.pass_time(60) == []
