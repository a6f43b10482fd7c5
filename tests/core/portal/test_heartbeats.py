import pytest

from relay.core.portal.channel import State
from relay.core.portal.commands import Abandon, ConnectionId, Note, SendText
from tests.core.portal.driver import HOUR, TICK, UNMATCHED_TOPIC, Driver, deeds, of_kind, reply, said, the, well

FIRST = ConnectionId(1)


def heartbeat(ref: int) -> dict[str, object]:
    return {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": ref}


def answer(driver: Driver, ref: object) -> None:
    driver.receive(reply(ref, topic="phoenix"))


def test_the_first_heartbeat_is_sent_10_s_after_the_upgrade(driver: Driver) -> None:
    driver.open()
    driver.pass_time(3)
    driver.receive(reply(0))
    assert driver.pass_time(7 - TICK) == []
    assert said(driver.pass_time(TICK)) == [heartbeat(1)]


def test_a_heartbeat_is_sent_every_10_s(joined: Driver) -> None:
    for ref in range(1, 100):
        assert joined.pass_time(10 - TICK) == []
        beat = joined.pass_time(TICK)
        assert said(beat) == [heartbeat(ref)]
        assert joined.answer_heartbeat(beat) == []


def test_a_channel_with_answers_lasts(driver: Driver) -> None:
    driver.portal = well
    driver.start()
    driver.pass_time(24 * HOUR)
    assert driver.connection == FIRST
    assert driver.channel.is_joined
    assert driver.channel.oddities == 0


def test_with_four_heartbeats_unanswered_there_is_no_fifth(joined: Driver) -> None:
    sent = joined.pass_time(50 - TICK)
    assert said(sent) == [heartbeat(1), heartbeat(2), heartbeat(3), heartbeat(4)]
    assert of_kind(Abandon, sent) == []
    assert joined.channel.is_joined
    over = joined.pass_time(TICK)
    assert deeds(over) == [Abandon(FIRST)]
    assert the(Note, over).fields["reason"] == "it left 4 heartbeats unanswered"
    assert joined.is_in(State.WAITING)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(("answered", "more"), [(1, 0), (2, 1), (3, 2), (4, 3)])
def test_an_answer_counts_for_the_heartbeats_before_it_too(
    joined: Driver,
    answered: int,
    more: int,
    as_text: bool,  # noqa: FBT001
) -> None:
    joined.pass_time(45)
    answer(joined, str(answered) if as_text else answered)
    joined.pass_time(5)
    # Four wait again once as many as were answered are sent.
    assert joined.is_in(State.JOINED)
    assert deeds(joined.pass_time(10 * more + 10 - TICK))[more:] == []
    assert deeds(joined.pass_time(TICK)) == [Abandon(FIRST)]


def test_a_heartbeat_is_answered_once(joined: Driver) -> None:
    joined.pass_time(10)
    answer(joined, 1)
    assert joined.channel.oddities == 0
    answer(joined, 1)
    assert joined.channel.oddities == 1


@pytest.mark.parametrize("ref", [None, 0, 5, -1, 1.0, True, "one", [1], {}])
def test_an_answer_to_no_heartbeat_answers_none(joined: Driver, ref: object) -> None:
    joined.pass_time(45)
    answer(joined, ref)
    assert joined.channel.oddities == 1
    assert deeds(joined.pass_time(5)) == [Abandon(FIRST)]


@pytest.mark.parametrize("status", ["error", "", None, 1])
def test_an_answer_that_is_not_ok_answers_no_heartbeat(joined: Driver, status: object) -> None:
    joined.pass_time(45)
    joined.receive(reply(4, status, topic="phoenix"))
    assert joined.channel.oddities == 1
    assert deeds(joined.pass_time(5)) == [Abandon(FIRST)]


def test_an_answer_on_the_channels_topic_answers_no_heartbeat(joined: Driver) -> None:
    joined.pass_time(45)
    joined.receive(reply(4))
    assert deeds(joined.pass_time(5)) == [Abandon(FIRST)]


def test_a_late_wake_up_sends_one_heartbeat_and_the_next_10_s_later(joined: Driver) -> None:
    joined.oversleep(35)
    assert said(joined.wake()) == [heartbeat(1)]
    assert joined.pass_time(10 - TICK) == []
    assert said(joined.pass_time(TICK)) == [heartbeat(2)]


def test_a_frame_that_comes_when_a_heartbeat_is_due_does_not_put_it_off(joined: Driver) -> None:
    joined.oversleep(10)
    assert said(joined.receive_other("ping")) == [heartbeat(1)]
    assert joined.wake() == []


def test_heartbeats_go_on_while_the_channel_is_joined_again(joined: Driver) -> None:
    joined.pass_time(16)
    assert [frame["ref"] for frame in said(joined.receive(UNMATCHED_TOPIC))] == [2]
    assert said(joined.pass_time(4)) == [heartbeat(3)]
    joined.receive(reply(2))
    assert joined.channel.is_joined


def test_heartbeats_of_a_lost_connection_wait_for_nothing(joined: Driver) -> None:
    joined.pass_time(40)
    joined.report_lost()
    joined.join_again()
    sent = joined.pass_time(50 - TICK)
    assert said(sent) == [heartbeat(1), heartbeat(2), heartbeat(3), heartbeat(4)]
    assert deeds(joined.pass_time(TICK)) == [Abandon(ConnectionId(2))]


def test_no_heartbeat_is_sent_without_a_connection(joined: Driver) -> None:
    joined.pass_time(9)
    joined.report_lost()
    # Two attempts of 15 s, or nearly.
    assert of_kind(SendText, joined.pass_time(30)) == []
