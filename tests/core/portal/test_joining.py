"""From the start to a joined channel, and the portal's frames on this channel."""

import json
from collections.abc import Callable

import pytest

from relay.core.portal.channel import State
from relay.core.portal.commands import Abandon, Begin, Connect, Fatal, Left, Note, PortalCommand
from tests.support.portal_channel import (
    CONFIG,
    HOUR,
    INIT,
    SECRET,
    TICK,
    TOKEN_EXPIRED,
    UNMATCHED_TOPIC,
    Driver,
    deeds,
    of_kind,
    reply,
    said,
    the,
    well,
    write,
)

# Connecting.


def test_no_command_is_returned_before_the_start(driver: Driver) -> None:
    assert driver.channel.poll_timeout() is None
    assert driver.wake() == []
    assert driver.is_in(State.IDLE)
    assert not driver.channel.is_joined


def test_the_start_opens_a_connection(driver: Driver) -> None:
    assert driver.start() == [Connect(CONFIG.request_url, CONFIG.request_headers, 15)]
    assert driver.is_in(State.CONNECTING)


def test_an_attempt_times_out_after_15_s(joined: Driver) -> None:
    joined.report_lost()
    connect = the(Connect, joined.pass_time(joined.seconds_left))
    assert connect.timeout == 15
    assert joined.pass_time(15 - TICK) == []
    over = joined.pass_time(TICK)
    assert deeds(over) == [Abandon()]
    assert the(Note, over).fields["reason"] == "the attempt was not answered within 15 s"
    assert joined.is_in(State.WAITING)


def test_an_upgrade_just_before_15_s_is_accepted(joined: Driver) -> None:
    joined.report_lost()
    joined.pass_time(joined.seconds_left)
    joined.pass_time(15 - TICK)
    assert [frame["event"] for frame in said(joined.report_connected())] == ["phx_join"]


# The join.


def test_the_join_contains_the_secret(driver: Driver) -> None:
    driver.start()
    assert said(driver.report_connected()) == [
        {"topic": "relay", "event": "phx_join", "payload": {"stamp_secret": SECRET}, "ref": 0}
    ]
    assert driver.is_in(State.JOINING)
    assert not driver.channel.is_joined


def test_a_connection_sends_a_single_join(driver: Driver) -> None:
    driver.open()
    assert driver.report_connected() == []


@pytest.mark.parametrize("ref", [0, "0"])
def test_the_ref_of_a_join_reply_is_a_number_or_a_string(driver: Driver, ref: object) -> None:
    driver.open()
    assert deeds(driver.receive(reply(ref))) == []
    assert driver.is_in(State.JOINED)
    assert driver.channel.joins == 1


@pytest.mark.parametrize("ref", [None, 1, "1", -1, "-0", 0.0, False, "", " 0", "٠", "0" * 19, [], [0], {}, 10**400])
@pytest.mark.parametrize("status", ["ok", "error"])
def test_a_reply_with_another_ref_does_not_answer_the_join(driver: Driver, ref: object, status: str) -> None:
    driver.open()
    assert deeds(driver.receive(reply(ref, status))) == []
    assert driver.is_in(State.JOINING)


def test_a_reply_on_another_topic_does_not_answer_the_join(driver: Driver) -> None:
    driver.open()
    assert deeds(driver.receive(reply(0, topic="phoenix"))) == []
    assert deeds(driver.receive(reply(0, topic="relay:1"))) == []
    assert driver.is_in(State.JOINING)


def test_a_join_times_out_after_5_s(driver: Driver) -> None:
    driver.open()
    assert driver.pass_time(5 - TICK) == []
    over = driver.pass_time(TICK)
    assert deeds(over) == [Abandon()]
    assert the(Note, over).fields["reason"] == "the join was not answered within 5 s"
    assert driver.is_in(State.WAITING)


def test_a_join_reply_just_before_5_s_is_accepted(driver: Driver) -> None:
    driver.open()
    driver.pass_time(5 - TICK)
    driver.receive(reply(0))
    assert driver.is_in(State.JOINED)
    assert deeds(driver.pass_time(2)) == []


def test_a_join_reply_after_5_s_is_late_even_without_a_wake_up(driver: Driver) -> None:
    driver.open()
    driver.oversleep(5)
    assert deeds(driver.receive(reply(0))) == [Abandon()]
    assert driver.is_in(State.WAITING)


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ({"reason": "invalid ipv4"}, "(invalid ipv4)"),
        ("no room", "(no room)"),
        ({"ipv4": ["is invalid"]}, '({"ipv4": ["is invalid"]})'),
        ({"reason": ["a", 1]}, '({"reason": ["a", 1]})'),
        (None, "({})"),
    ],
)
def test_a_rejected_join_is_fatal_and_shows_the_reason(driver: Driver, response: object, shown: str) -> None:
    driver.open()
    abandon, fatal = driver.receive(reply(0, "error", response))
    assert abandon == Abandon()
    assert isinstance(fatal, Fatal)
    assert shown in fatal.reason
    assert driver.is_in(State.OVER)


@pytest.mark.parametrize("status", ["", "OK", "timeout", None, 0, [], {}, ["ok"]])
def test_a_join_reply_with_an_unknown_status_is_ignored(driver: Driver, status: object) -> None:
    driver.open()
    assert deeds(driver.receive(write("relay", "phx_reply", {"status": status}, 0))) == []
    assert driver.is_in(State.JOINING)
    assert driver.channel.protocol_errors == 1
    driver.receive(reply(0))
    assert driver.is_in(State.JOINED)


# init.


def test_the_first_init_starts_relaying(driver: Driver) -> None:
    driver.open()
    driver.receive(reply(0))
    assert not driver.channel.has_begun
    assert driver.receive(INIT) == [Begin()]
    assert driver.channel.has_begun


def test_an_init_before_the_join_reply_starts_relaying(driver: Driver) -> None:
    driver.open()
    assert driver.receive(INIT) == [Begin()]
    assert not driver.channel.is_joined
    driver.receive(reply(0))
    assert driver.channel.is_joined


def test_an_init_does_not_replace_the_join_reply(driver: Driver) -> None:
    driver.open()
    driver.pass_time(2)
    driver.receive(INIT)
    assert driver.pass_time(3 - TICK) == []
    assert deeds(driver.pass_time(TICK)) == [Abandon()]


def test_a_join_reply_alone_does_not_start_relaying(driver: Driver) -> None:
    driver.open()
    assert deeds(driver.receive(reply(0))) == []
    assert not driver.channel.is_joined


def test_only_the_first_init_starts_relaying(joined: Driver) -> None:
    assert joined.receive(INIT) == []
    joined.report_lost()
    joined.join_again()
    assert joined.receive(INIT) == []
    assert len(of_kind(Begin, [command for _, command in joined.log])) == 1


def test_a_rejoined_channel_needs_no_init(joined: Driver) -> None:
    joined.report_lost()
    joined.join_again()
    assert joined.channel.is_joined


def test_an_init_missing_for_30_s_is_logged_once(driver: Driver) -> None:
    driver.open()
    driver.pass_time(2)
    driver.receive(reply(0))
    driver.portal = well
    assert of_kind(Note, driver.pass_time(30 - TICK)) == []
    assert "init" in the(Note, driver.pass_time(TICK)).event
    assert of_kind(Note, driver.pass_time(HOUR)) == []
    assert driver.is_in(State.JOINED)
    assert driver.receive(INIT) == [Begin()]


@pytest.mark.parametrize("seconds", [0, 29])
def test_an_init_within_30_s_is_not_logged_as_missing(driver: Driver, seconds: int) -> None:
    driver.open()
    driver.receive(reply(0))
    driver.portal = well
    driver.pass_time(seconds)
    driver.receive(INIT)
    assert of_kind(Note, driver.pass_time(HOUR)) == []


def test_a_missing_init_is_not_logged_on_later_connections(joined: Driver) -> None:
    joined.report_lost()
    joined.join_again()
    joined.portal = well
    assert of_kind(Note, joined.pass_time(HOUR)) == []


# Ends of a connection, and fatal errors.

OPEN: dict[str, Callable[[], Driver]] = {"joining": lambda: Driver().open(), "joined": lambda: Driver().join()}
open_in_each_state = pytest.mark.parametrize("make", OPEN.values(), ids=OPEN.keys())


@open_in_each_state
@pytest.mark.parametrize("event", ["phx_close", "phx_error"])
def test_the_end_of_the_channel_closes_the_connection(make: Callable[[], Driver], event: str) -> None:
    driver = make()
    assert deeds(driver.receive(write("relay", event))) == [Abandon()]
    assert driver.is_in(State.WAITING)


@pytest.mark.parametrize("topic", ["phoenix", "relay:2", "", "RELAY"])
@pytest.mark.parametrize("event", ["phx_close", "phx_error"])
def test_the_end_of_another_channel_is_ignored(joined: Driver, topic: str, event: str) -> None:
    assert deeds(joined.receive(write(topic, event))) == []
    assert joined.channel.is_joined


@open_in_each_state
def test_a_lost_connection_is_reopened(make: Callable[[], Driver]) -> None:
    driver = make()
    lost = driver.report_lost("close frame 1001")
    assert deeds(lost) == []
    assert the(Note, lost).fields["reason"] == "close frame 1001"
    assert driver.is_in(State.WAITING)
    assert not driver.channel.is_joined
    assert of_kind(Connect, driver.pass_time(1)) == [Connect(CONFIG.request_url, CONFIG.request_headers, 15)]


def test_each_connection_counts_refs_from_0_and_keeps_the_secret(joined: Driver) -> None:
    joined.pass_time(10)
    joined.report_lost()
    joined.pass_time(1)
    assert said(joined.report_connected()) == [
        {"topic": "relay", "event": "phx_join", "payload": {"stamp_secret": SECRET}, "ref": 0}
    ]


@open_in_each_state
@pytest.mark.parametrize("topic", ["relay", "phoenix"])
def test_an_expired_token_is_fatal(make: Callable[[], Driver], topic: str) -> None:
    driver = make()
    abandon, fatal = driver.receive(write(topic, "disconnect", {"reason": "token_expired"}))
    assert abandon == Abandon()
    assert isinstance(fatal, Fatal)
    assert "expired" in fatal.reason
    assert driver.is_in(State.OVER)


@pytest.mark.parametrize(
    "payload", [None, {}, {"reason": "draining"}, {"reason": None}, {"reason": ["token_expired"]}, {"x": "token_expired"}]
)
def test_a_disconnect_with_any_other_reason_is_only_logged(joined: Driver, payload: object) -> None:
    told = joined.receive(write("relay", "disconnect", payload))
    assert deeds(told) == []
    assert len(told) == 1
    assert joined.channel.is_joined


# A channel lost by the portal on an open connection.


def test_a_channel_lost_by_the_portal_is_rejoined(joined: Driver) -> None:
    joined.answer_heartbeat(joined.pass_time(10))
    again = joined.receive(UNMATCHED_TOPIC)
    assert said(again) == [{"topic": "relay", "event": "phx_join", "payload": {"stamp_secret": SECRET}, "ref": 2}]
    assert of_kind(Abandon, again) == []
    assert joined.is_in(State.JOINING)
    assert deeds(joined.receive(reply(2))) == []
    assert joined.channel.is_joined
    assert joined.channel.joins == 2


def test_the_reply_to_the_first_join_does_not_answer_the_second(joined: Driver) -> None:
    joined.pass_time(10)
    joined.receive(UNMATCHED_TOPIC)
    joined.receive(reply(0))
    assert joined.is_in(State.JOINING)


def test_a_second_join_times_out_after_5_s(joined: Driver) -> None:
    joined.pass_time(11)
    joined.receive(UNMATCHED_TOPIC)
    assert joined.pass_time(5 - TICK) == []
    assert deeds(joined.pass_time(TICK)) == [Abandon()]


@pytest.mark.parametrize("reason", ["join crashed", "no", "unmatched topic"])
def test_a_rejected_later_join_is_retried(joined: Driver, reason: str) -> None:
    """The portal has accepted this relay before, so the portal may be at fault."""
    joined.pass_time(10)
    joined.receive(UNMATCHED_TOPIC)
    told = joined.receive(reply(2, "error", {"reason": reason}))
    assert deeds(told) == [Abandon()]
    assert the(Note, told).fields["reason"] == f"it refused the join ({reason})"
    joined.pass_time(1)
    joined.report_connected()
    joined.receive(reply(0, "error", {"reason": reason}))
    assert joined.is_in(State.WAITING)
    joined.join_again()


@pytest.mark.parametrize("ref", [0, 2])
def test_a_join_rejected_for_an_expired_token_is_fatal(joined: Driver, ref: int) -> None:
    joined.pass_time(10)
    if ref:
        joined.receive(UNMATCHED_TOPIC)
    else:
        joined.report_lost()
        joined.pass_time(1)
        joined.report_connected()
    abandon, fatal = joined.receive(reply(ref, "error", {"reason": "token_expired"}))
    assert isinstance(abandon, Abandon)
    assert "the token has expired" in the(Fatal, [fatal]).reason


def test_several_replies_about_a_lost_channel_cause_a_single_rejoin(joined: Driver) -> None:
    joined.pass_time(10)
    joined.receive(UNMATCHED_TOPIC)
    assert deeds(joined.receive(UNMATCHED_TOPIC)) == []
    assert joined.is_in(State.JOINING)


def test_a_channel_lost_within_half_a_second_of_its_join_closes_the_connection(driver: Driver) -> None:
    driver.open()
    driver.pass_time(3)
    driver.receive(reply(0))
    driver.pass_time(0.5 - TICK)
    assert deeds(driver.receive(UNMATCHED_TOPIC)) == [Abandon()]
    assert driver.is_in(State.WAITING)


def test_a_channel_lost_half_a_second_after_its_join_is_rejoined(driver: Driver) -> None:
    driver.open()
    driver.pass_time(3)
    driver.receive(reply(0))
    driver.pass_time(0.5)
    assert [frame["event"] for frame in said(driver.receive(UNMATCHED_TOPIC))] == ["phx_join"]


def test_the_half_second_counts_from_the_latest_join(joined: Driver) -> None:
    joined.pass_time(10)
    joined.receive(UNMATCHED_TOPIC)
    joined.receive(reply(2))
    joined.pass_time(0.5 - TICK)
    assert deeds(joined.receive(UNMATCHED_TOPIC)) == [Abandon()]


@pytest.mark.parametrize(
    "text",
    [
        reply(0, "error", {"reason": "unmatched"}),
        reply(0, "error"),
        reply(0, "ok", {"reason": "unmatched topic"}),
        reply(0, "error", {"reason": "unmatched topic"}, topic="phoenix"),
        reply(0, "error", {"reason": "unmatched topic"}, topic="relay:2"),
    ],
)
def test_no_other_reply_means_a_lost_channel(joined: Driver, text: str) -> None:
    joined.pass_time(10)
    assert deeds(joined.receive(text)) == []
    assert joined.channel.is_joined


# Reports without an open connection.


REPORTS: dict[str, Callable[[Driver], list[PortalCommand]]] = {
    "connected": Driver.report_connected,
    "refused": lambda driver: driver.report_refused(401),
    "lost": Driver.report_lost,
    "text": lambda driver: driver.receive(TOKEN_EXPIRED),
    "nonsense": lambda driver: driver.receive("{"),
    "binary": lambda driver: driver.receive_other("binary"),
}


def second_attempt() -> Driver:
    driver = Driver()
    driver.start()
    driver.report_lost()
    driver.pass_time(1)
    return driver


def second_connection() -> Driver:
    driver = second_attempt()
    driver.report_connected()
    return driver


def second_channel() -> Driver:
    driver = second_connection()
    driver.receive(reply(0))
    driver.receive(INIT)
    return driver


@pytest.mark.parametrize("report", [report for report in REPORTS if report != "lost"])
def test_a_report_also_runs_due_timers(joined: Driver, report: str) -> None:
    joined.oversleep(10)
    REPORTS[report](joined)
    assert [frame["event"] for frame in said(command for _, command in joined.log)] == ["phx_join", "heartbeat"]
    assert joined.wake() == []


@pytest.mark.parametrize("report", REPORTS)
def test_reports_before_the_start_are_ignored(driver: Driver, report: str) -> None:
    assert REPORTS[report](driver) == []
    assert driver.is_in(State.IDLE)
    assert driver.channel.poll_timeout() is None


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("abandoned", [True, False])
def test_reports_on_a_closed_connection_are_ignored(driver: Driver, report: str, abandoned: bool) -> None:  # noqa: FBT001
    driver.open()
    if abandoned:
        driver.pass_time(5)
    else:
        driver.report_lost()
    assert driver.is_in(State.WAITING)
    timeout = driver.channel.poll_timeout()
    assert REPORTS[report](driver) == []
    assert driver.is_in(State.WAITING)
    assert driver.channel.poll_timeout() == timeout


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("end", [TOKEN_EXPIRED, reply(0, "error")])
def test_no_command_follows_a_fatal_error(driver: Driver, end: str, report: str) -> None:
    driver.open()
    assert of_kind(Fatal, driver.receive(end))
    assert REPORTS[report](driver) == []
    assert driver.leave() == []
    assert driver.channel.poll_timeout() is None
    assert driver.pass_time(48 * HOUR) == []


def test_frames_before_the_upgrade_are_ignored(driver: Driver) -> None:
    driver.start()
    assert driver.receive(INIT) == []
    assert driver.receive(TOKEN_EXPIRED) == []
    assert driver.receive("{") == []
    assert driver.channel.protocol_errors == 0


@pytest.mark.parametrize("make", [second_connection, second_channel])
def test_an_http_error_after_the_upgrade_is_ignored(make: Callable[[], Driver]) -> None:
    driver = make()
    assert driver.report_refused(401) == []
    assert driver.is_in(State.JOINING, State.JOINED)


def test_a_due_heartbeat_is_not_sent_on_a_lost_connection(joined: Driver) -> None:
    joined.oversleep(10)
    assert deeds(joined.report_lost()) == []


def test_a_due_close_is_not_sent_on_a_lost_connection(joined: Driver) -> None:
    joined.leave()
    joined.oversleep(1)
    assert deeds(joined.report_lost()) == [Left()]


# The public state.


def test_is_joined_is_true_only_in_the_state_joined() -> None:
    driver = Driver()
    seen = {driver.channel.state: driver.channel.is_joined}

    def look(driver: Driver, _: object) -> None:
        seen[driver.channel.state] = driver.channel.is_joined

    driver.portal = look
    driver.join()
    look(driver, None)
    driver.report_lost()
    driver.join_again()
    driver.leave()
    driver.pass_time(1)
    driver.report_lost()
    look(driver, None)
    assert seen == {state: state is State.JOINED for state in State}


def test_commands_are_returned_once(driver: Driver) -> None:
    driver.start()
    assert driver.channel.drain() == []


def test_the_log_event_of_a_join_names_the_portal(driver: Driver) -> None:
    driver.open()
    note = the(Note, driver.receive(reply(0)))
    assert json.loads(json.dumps(note.fields)) == {"url": CONFIG.url.text}
