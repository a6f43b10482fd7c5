import pytest

from relay.core.portal.channel import State
from relay.core.portal.commands import Abandon, Begin, Close, Connect, Left, PortalCommand
from tests.support.portal_channel import (
    INIT,
    TICK,
    TOKEN_EXPIRED,
    UNMATCHED_TOPIC,
    Driver,
    deeds,
    reply,
    said,
    unreachable,
    well,
    write,
)

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


def test_a_joined_relay_leaves_at_once(joined: Driver) -> None:
    joined.portal = well
    leave, close, left = joined.leave()
    assert said([leave]) == [{"topic": "relay", "event": "phx_leave", "payload": {}, "ref": LEAVE_REF}]
    assert [close, left] == [Close(), Left()]
    assert joined.is_in(State.OVER)


def test_a_leaving_relay_is_not_joined(joined: Driver) -> None:
    assert [frame["event"] for frame in said(joined.leave())] == ["phx_leave"]
    assert joined.is_in(State.LEAVING)
    assert not joined.channel.is_joined


def test_a_leave_is_sent_before_the_join_reply(driver: Driver) -> None:
    driver.open()
    assert [frame["event"] for frame in said(driver.leave())] == ["phx_leave"]
    assert driver.receive(reply(0)) == []
    assert driver.is_in(State.LEAVING)
    assert driver.receive(reply(LEAVE_REF)) == [Close()]


def test_a_rejected_join_while_leaving_is_not_fatal(driver: Driver) -> None:
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
def test_the_leave_reply_closes_the_connection(leaving: Driver, text: str) -> None:
    leaving.pass_time(1 - TICK)
    assert leaving.receive(text) == [Close()]
    assert leaving.is_in(State.CLOSING)


@pytest.mark.parametrize(
    "text", [reply(0), reply(2), reply(None), INIT, TOKEN_EXPIRED, UNMATCHED_TOPIC, "{", write("relay", "new event")]
)
def test_no_other_frame_is_a_leave_reply(leaving: Driver, text: str) -> None:
    assert deeds(leaving.receive(text)) == []
    assert leaving.is_in(State.LEAVING)


def test_a_leave_times_out_after_1_s(leaving: Driver) -> None:
    assert leaving.pass_time(1 - TICK) == []
    assert leaving.pass_time(TICK) == [Close()]
    assert leaving.is_in(State.CLOSING)


def test_the_close_of_the_portal_times_out_after_1_s(closing: Driver) -> None:
    assert closing.pass_time(1 - TICK) == []
    assert closing.pass_time(TICK) == [Abandon(), Left()]
    assert closing.is_in(State.OVER)


def test_the_close_timeout_counts_from_the_leave_reply(leaving: Driver) -> None:
    leaving.pass_time(0.5)
    leaving.receive(reply(LEAVE_REF))
    assert leaving.pass_time(1 - TICK) == []
    assert leaving.pass_time(TICK) == [Abandon(), Left()]


def test_a_connection_lost_while_leaving_ends_the_leave(leaving: Driver) -> None:
    assert leaving.report_lost() == [Left()]
    assert leaving.is_in(State.OVER)


def test_a_connection_closed_by_both_sides_ends_the_leave(closing: Driver) -> None:
    closing.pass_time(1 - TICK)
    assert closing.report_lost() == [Left()]
    assert closing.is_in(State.OVER)


def test_frames_after_the_close_are_ignored(closing: Driver) -> None:
    for text in (reply(LEAVE_REF), INIT, TOKEN_EXPIRED, UNMATCHED_TOPIC, write("relay", "phx_close"), "{"):
        assert closing.receive(text) == []
    assert closing.receive_other("binary") == []
    assert closing.channel.protocol_errors == 0


def test_an_init_while_leaving_does_not_start_relaying(driver: Driver) -> None:
    driver.open()
    driver.receive(reply(0))
    driver.leave()
    assert Begin() not in driver.receive(INIT)
    assert not driver.channel.has_begun


def test_a_flood_while_leaving_ends_the_leave_at_once(leaving: Driver) -> None:
    out: list[PortalCommand] = []
    for _ in range(101):
        out += leaving.receive_other("ping")
    assert out == [Abandon(), Left()]


def test_no_heartbeat_is_sent_while_leaving(joined: Driver) -> None:
    joined.pass_time(9.5)
    joined.leave()
    assert joined.pass_time(10) == [Close(), Abandon(), Left()]


def test_the_startup_timeout_is_not_fatal_while_leaving(driver: Driver) -> None:
    driver.start()
    driver.pass_time(14)
    driver.report_connected()
    driver.leave()
    driver.oversleep(1)
    assert driver.wake() == [Close()]


@pytest.mark.parametrize("again", [1, 5])
def test_a_leave_is_sent_once(joined: Driver, again: int) -> None:
    joined.leave()
    for _ in range(again):
        assert joined.leave() == []
    assert joined.pass_time(1) == [Close()]
    assert joined.leave() == []
    assert joined.pass_time(1) == [Abandon(), Left()]
    assert joined.leave() == []


def test_leaving_before_the_start_ends_at_once(driver: Driver) -> None:
    assert driver.leave() == [Left()]
    assert driver.channel.poll_timeout() is None


def test_leaving_abandons_an_attempt(driver: Driver) -> None:
    driver.start()
    assert driver.leave() == [Abandon(), Left()]
    assert driver.report_connected() == []
    assert driver.channel.poll_timeout() is None


def test_leaving_between_attempts_abandons_no_connection(driver: Driver) -> None:
    driver.start()
    driver.report_lost()
    assert driver.leave() == [Left()]
    assert driver.pass_time(60) == []


def test_no_command_follows_the_leave(closing: Driver) -> None:
    closing.report_lost()
    assert closing.receive(INIT) == []
    assert closing.report_lost() == []
    assert closing.channel.poll_timeout() is None
    assert closing.pass_time(60) == []


def test_a_relay_that_has_left_joins_again_on_request(closing: Driver) -> None:
    closing.report_lost()
    (connect,) = closing.start()
    assert isinstance(connect, Connect)
    closing.report_connected()
    assert closing.receive(reply(0)) != []
    assert closing.channel.is_joined
    # The relay answers clients already.
    assert Begin() not in closing.receive(INIT)
    assert closing.leave() != []


def test_a_relay_that_is_still_leaving_does_not_join(leaving: Driver) -> None:
    assert leaving.start() == []
    assert leaving.is_in(State.LEAVING)


def test_a_second_membership_is_retried_like_any_later_join(closing: Driver) -> None:
    closing.report_lost()
    closing.start()
    closing.portal = unreachable
    closing.report_lost()
    closing.pass_time(3600)
    assert not closing.is_in(State.OVER)
    closing.pass_time(24 * 3600)
    assert closing.is_in(State.OVER)


def test_a_relay_that_was_succeeded_does_not_join_again(joined: Driver) -> None:
    """A drain was cancelled before another process took the relay over."""
    joined.channel.be_succeeded()
    joined.report_lost()
    assert joined.is_in(State.OVER)
    assert joined.start() == []
