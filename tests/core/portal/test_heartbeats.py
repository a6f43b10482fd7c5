import pytest

from relay.core.portal.channel import State
from relay.core.portal.commands import Abandon, Note, SendText
from tests.support.portal_channel import HOUR, TICK, UNMATCHED_TOPIC, Driver, deeds, of_kind, reply, said, the, well


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


def test_a_channel_with_answered_heartbeats_stays_open(driver: Driver) -> None:
    driver.portal = well
    driver.start()
    driver.pass_time(24 * HOUR)
    assert driver.channel.is_joined
    assert driver.channel.protocol_errors == 0


PORTALS_PATIENCE = 41
"""Seconds without a frame from the relay after which the portal closes a connection."""


def test_a_connection_without_replies_ends_when_the_fourth_heartbeat_is_due(joined: Driver) -> None:
    sent = joined.pass_time(40 - TICK)
    assert said(sent) == [heartbeat(1), heartbeat(2), heartbeat(3)]
    assert of_kind(Abandon, sent) == []
    assert joined.channel.is_joined
    over = joined.pass_time(TICK)
    assert deeds(over) == [Abandon()]
    assert the(Note, over).fields["reason"] == "it answered nothing for 40 s"
    assert joined.is_in(State.WAITING)


@pytest.mark.parametrize("arrived", [0, 1, 2, 7])
@pytest.mark.parametrize("is_answered", [False, True])
@pytest.mark.parametrize("late", [0, 0.25, 0.875, 25])
def test_a_dead_path_is_abandoned_a_second_before_the_portal_closes(
    joined: Driver,
    arrived: int,
    late: float,
    is_answered: bool,  # noqa: FBT001
) -> None:
    """On a busy machine every wake-up is late. The connection ends late too, but only once."""
    for number in range(1, arrived + 1):
        beat = joined.pass_time(10)
        if is_answered or number < arrived:
            joined.answer_heartbeat(beat)
    portal_closes_at = joined.elapsed + PORTALS_PATIENCE
    while joined.is_in(State.JOINED):
        joined.oversleep(joined.seconds_left + late)
        joined.wake()
    assert joined.elapsed <= portal_closes_at - 1 + late


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("answered", [1, 2, 3])
def test_a_reply_also_answers_earlier_heartbeats(
    joined: Driver,
    answered: int,
    as_text: bool,  # noqa: FBT001
) -> None:
    joined.pass_time(35)
    answer(joined, str(answered) if as_text else answered)
    assert len(joined.channel.connection.unanswered) == 3 - answered
    # The answered heartbeat was sent at 10 s times its number.
    assert of_kind(Abandon, joined.pass_time_to(10 * answered + 40 - TICK)) == []
    assert deeds(joined.pass_time(TICK)) == [Abandon()]


def test_a_second_reply_to_a_heartbeat_is_ignored(joined: Driver) -> None:
    joined.pass_time(10)
    answer(joined, 1)
    assert joined.channel.protocol_errors == 0
    answer(joined, 1)
    assert joined.channel.protocol_errors == 1


@pytest.mark.parametrize("ref", [None, 0, 5, -1, 1.0, True, "one", [1], {}])
def test_a_reply_with_an_unknown_ref_answers_no_heartbeat(joined: Driver, ref: object) -> None:
    joined.pass_time(35)
    answer(joined, ref)
    assert joined.channel.protocol_errors == 1
    assert deeds(joined.pass_time(5)) == [Abandon()]


@pytest.mark.parametrize("status", ["error", "", None, 1])
def test_a_reply_with_a_status_other_than_ok_answers_no_heartbeat(joined: Driver, status: object) -> None:
    joined.pass_time(35)
    joined.receive(reply(3, status, topic="phoenix"))
    assert joined.channel.protocol_errors == 1
    assert deeds(joined.pass_time(5)) == [Abandon()]


def test_a_reply_on_the_topic_of_the_channel_answers_no_heartbeat(joined: Driver) -> None:
    joined.pass_time(35)
    joined.receive(reply(3))
    assert deeds(joined.pass_time(5)) == [Abandon()]


def test_a_late_wake_up_sends_one_heartbeat_and_the_next_10_s_later(joined: Driver) -> None:
    joined.oversleep(25)
    assert said(joined.wake()) == [heartbeat(1)]
    assert joined.pass_time(10 - TICK) == []
    assert said(joined.pass_time(TICK)) == [heartbeat(2)]


def test_a_late_heartbeat_does_not_delay_the_end_of_a_silent_connection(joined: Driver) -> None:
    joined.oversleep(35)
    assert said(joined.wake()) == [heartbeat(1)]
    assert joined.pass_time(5 - TICK) == []
    assert deeds(joined.pass_time(TICK)) == [Abandon()]


def test_the_reply_to_a_late_heartbeat_keeps_the_connection(joined: Driver) -> None:
    joined.oversleep(35)
    joined.answer_heartbeat(joined.wake())
    assert said(joined.pass_time(5)) == [heartbeat(2)]
    assert of_kind(Abandon, joined.pass_time_to(75 - TICK)) == []
    assert deeds(joined.pass_time(TICK)) == [Abandon()]


def test_a_frame_does_not_delay_a_due_heartbeat(joined: Driver) -> None:
    joined.oversleep(10)
    assert said(joined.receive_other("ping")) == [heartbeat(1)]
    assert joined.wake() == []


def test_heartbeats_continue_while_the_channel_is_rejoined(joined: Driver) -> None:
    joined.pass_time(16)
    assert [frame["ref"] for frame in said(joined.receive(UNMATCHED_TOPIC))] == [2]
    assert said(joined.pass_time(4)) == [heartbeat(3)]
    joined.receive(reply(2))
    assert joined.channel.is_joined


def test_unanswered_heartbeats_of_a_lost_connection_do_not_count(joined: Driver) -> None:
    joined.pass_time(35)
    joined.report_lost()
    joined.join_again()
    sent = joined.pass_time(40 - TICK)
    assert said(sent) == [heartbeat(1), heartbeat(2), heartbeat(3)]
    assert deeds(joined.pass_time(TICK)) == [Abandon()]


def test_no_heartbeat_is_sent_without_a_connection(joined: Driver) -> None:
    joined.pass_time(9)
    joined.report_lost()
    # About two attempts of 15 s.
    assert of_kind(SendText, joined.pass_time(30)) == []
