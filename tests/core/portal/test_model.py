"""The channel against a model of it: what there is, since when, and so what must come next and when.

The model follows the commands, and knows from the inputs and from its own numbers which of them may come, which must, and by
when the channel wants to be woken. It has no timers, no retries and no states to move through.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.core.portal.commands import Abandon, Begin, Close, Connect, Fatal, Left, Note, PortalCommand, SendText
from tests.core.portal.driver import (
    CONFIG,
    INIT,
    SECRET,
    TICK,
    TOKEN,
    TOKEN_EXPIRED,
    Driver,
    Said,
    reply,
    write,
)

ATTEMPT = 15
JOIN = 5
BEAT = 10
UNANSWERED = 4
"""Heartbeats with which a connection is over when the next one is due."""
FIRST_LIMIT = 15
LIMIT = 24 * 3600
SHORTEST_WAIT, LONGEST_WAIT = 0.5, 30
FIRST_WAIT = 1
LONGEST_ASKED = 3600
FLOOD = 100
LEAVE = CLOSE = 1
SOON = 1e-6
"""Less than a tick, and more than sums of seconds are wrong by."""

NONSENSE = [
    "{",
    "[]",
    "[" * 5000,
    "{}",
    '{"topic":"relay","event":"init","payload":[]}',
    write("relay", "new"),
    write("phoenix", "init"),
    write("relay:1", "phx_close"),
    write("relay", "disconnect", {"reason": "draining"}),
    reply(None, "error", {"reason": f"{TOKEN} {SECRET}"}),
    reply(10**30, "ok", topic="phoenix"),
    write(TOKEN, SECRET),
]
# Of the current connection more often than not.
whose = st.sampled_from(["current", "current", "current", "former", "none"])


class ChannelMachine(RuleBasedStateMachine):
    """Does to the channel what a portal, the network, the operator and time do."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.read = 0
        """Commands of the driver's log that the model has followed."""
        self.started = False
        self.late = False
        """Time has passed that the channel was not told of."""
        self.end: type[Fatal | Left] | None = None
        self.begun = False
        self.leaving_since: float | None = None
        self.has_joined = False
        # Of an outage.
        self.outage_since: float | None = None
        self.give_up_at = math.inf
        self.next_attempt = (0.0, 0.0)
        # Of the connection that there is.
        self.last = 0
        self.current: int | None = None
        self.since = 0.0
        self.connected = False
        self.closed_at: float | None = None
        self.sent: list[Said] = []
        self.join: tuple[float, int] | None = None
        """When the join was sent that is not answered yet, and its ref."""
        self.joined_at: float | None = None
        self.last_beat = 0.0
        self.beats: list[int] = []
        self.frames = 0
        # Of the input that is being given.
        self.told_over: int | None = None
        self.may_begin = self.may_join_again = self.may_end = self.may_abandon = False
        self.follow: dict[type, Callable[[float, Any], None]] = {
            Connect: self.follow_connect,
            SendText: self.follow_send,
            Close: self.follow_close,
            Abandon: self.follow_abandon,
            Begin: self.follow_begin,
            Fatal: self.follow_fatal,
            Left: self.follow_left,
            Note: lambda _, __: None,
        }

    # What holds in the model.

    @property
    def now(self) -> float:
        return self.driver.elapsed

    @property
    def is_open(self) -> bool:
        """Whether frames mean anything."""
        return self.current is not None and self.connected and self.closed_at is None

    @property
    def is_leaving(self) -> bool:
        return self.leaving_since is not None

    def due(self) -> list[float]:
        """Give the moments at which something is due while there is a connection."""
        if self.closed_at is not None:
            return [self.closed_at + CLOSE]
        if self.leaving_since is not None:
            return [self.leaving_since + LEAVE]
        moments = [self.give_up_at, self.last_beat + BEAT if self.connected else self.since + ATTEMPT]
        if self.join is not None:
            moments.append(self.join[0] + JOIN)
        return moments

    def earliest_and_latest_wake(self) -> tuple[float, float]:
        if not self.started or self.end is not None:
            return math.inf, math.inf
        if self.current is None:
            return min(self.next_attempt[0], self.give_up_at), min(self.next_attempt[1], self.give_up_at)
        at = min(self.due())
        # Until init has come, it is also woken to say that it is missing.
        return self.now if self.joined_at is not None and not self.begun else at, at

    def there_is_an_outage(self, at: float) -> None:
        if self.outage_since is None:
            self.outage_since = at
            self.give_up_at = at + (LIMIT if self.has_joined else FIRST_LIMIT)

    def the_connection_is_over(self, at: float) -> None:
        self.current = self.join = self.joined_at = None
        if not self.is_leaving:
            self.there_is_an_outage(at)
        self.next_attempt = (at + SHORTEST_WAIT, at + LONGEST_WAIT) if self.has_joined else (at + FIRST_WAIT,) * 2

    # What the channel does.

    def settle(self) -> list[PortalCommand]:
        """Follow what the channel did since the last time."""
        new = self.driver.log[self.read :]
        self.read = len(self.driver.log)
        for at, command in new:
            assert self.end is None, "there is nothing after the end"
            self.follow[type(command)](at, command)
        return [command for _, command in new]

    def follow_connect(self, at: float, command: Connect) -> None:
        assert self.started
        assert self.current is None, "one connection at a time"
        assert not self.is_leaving
        assert command.connection == self.last + 1
        assert (command.url, command.headers) == (CONFIG.request_url, CONFIG.request_headers)
        assert at >= self.next_attempt[0] - SOON
        assert at <= self.next_attempt[1] + SOON or self.late
        self.last = self.current = command.connection
        self.since, self.connected, self.closed_at = at, False, None
        self.sent, self.beats, self.frames = [], [], 0

    def follow_send(self, at: float, command: SendText) -> None:
        assert command.connection == self.current != self.told_over
        assert self.is_open
        frame = json.loads(command.text)
        assert sorted(frame) == ["event", "payload", "ref", "topic"]
        assert frame["ref"] == len(self.sent)
        if frame["event"] == "heartbeat":
            assert (frame["topic"], frame["payload"]) == ("phoenix", {})
            assert self.sent, "the join is the first frame"
            assert not self.is_leaving
            assert at >= self.last_beat + BEAT - SOON
            assert at <= self.last_beat + BEAT + SOON or self.late
            self.beats.append(frame["ref"])
            assert len(self.beats) <= UNANSWERED
            self.last_beat, self.frames = at, 0
        elif frame["event"] == "phx_join":
            assert (frame["topic"], frame["payload"]) == ("relay", {"stamp_secret": SECRET})
            assert not self.is_leaving
            if self.sent:
                assert self.may_join_again
                assert self.joined_at is not None
                assert at >= self.joined_at + BEAT - SOON
                self.there_is_an_outage(at)
            self.join, self.joined_at = (at, frame["ref"]), None
        else:
            assert (frame["topic"], frame["event"], frame["payload"]) == ("relay", "phx_leave", {})
            assert self.leaving_since == at
            self.join = self.joined_at = None
        self.sent.append(frame)

    def follow_close(self, at: float, command: Close) -> None:
        assert command.connection == self.current != self.told_over
        assert self.is_open
        assert self.is_leaving or self.may_end
        self.closed_at = at

    def follow_abandon(self, at: float, command: Abandon) -> None:
        assert command.connection == self.current
        reasons = [
            not self.connected and at >= self.since + ATTEMPT - SOON,
            self.join is not None and at >= self.join[0] + JOIN - SOON,
            self.connected and len(self.beats) == UNANSWERED and at >= self.last_beat + BEAT - SOON,
            self.closed_at is not None and at >= self.closed_at + CLOSE - SOON,
            at >= self.give_up_at - SOON,
            self.is_leaving and not self.connected,
            self.may_abandon,
        ]
        assert any(reasons)
        self.the_connection_is_over(at)

    def follow_begin(self, _: float, __: Begin) -> None:
        assert self.may_begin
        assert not self.begun
        assert self.is_open
        assert not self.is_leaving
        self.begun = True

    def follow_fatal(self, at: float, command: Fatal) -> None:
        assert self.may_end or at >= self.give_up_at - SOON
        self.follow_end(command)
        assert command.reason.isprintable()

    def follow_left(self, _: float, command: Left) -> None:
        assert self.is_leaving
        self.follow_end(command)

    def follow_end(self, command: Fatal | Left) -> None:
        assert self.current in {None, self.told_over} or self.closed_at is not None
        self.current = self.join = self.joined_at = None
        self.give_up_at = math.inf
        self.end = type(command)

    # Inputs.

    def id_of(self, whose: str) -> int:
        """Choose a connection; the current one may be over."""
        return {"current": self.last, "former": self.last - 1, "none": 10**9}[whose]

    def give(self, input_: Callable[..., object], *arguments: Any, whose: str, **may: bool) -> bool:  # noqa: ANN401
        """Give an input and follow what comes of it; tell whether it was about what there is."""
        id_ = self.id_of(whose)
        meant = id_ == self.current
        for name, value in may.items():
            setattr(self, name, value and meant)
        input_(*arguments, connection=id_)
        was_late, commands = self.late, self.settle()
        self.late = False
        self.may_begin = self.may_join_again = self.may_end = self.may_abandon = False
        if not meant and not was_late:
            assert commands == []
        # If not, it was too late for it.
        return meant and (id_ == self.current or (not was_late and self.told_over is None))

    def give_frame(self, text: str | None, whose: str, **may: bool) -> bool:
        """Give a frame, a ping if there is no text; tell whether it meant anything."""
        was_open = self.is_open
        may["may_abandon"] = may.get("may_abandon", False) or self.frames >= FLOOD
        if self.id_of(whose) == self.current and was_open:
            # The heartbeat that may be due comes first, and counts from 0.
            self.frames += 1
        else:
            may = {}
        before = len(self.beats)
        if text is None:
            meant = self.give(self.driver.receive_other, "ping", whose=whose, **may)
        else:
            meant = self.give(self.driver.receive, text, whose=whose, **may)
        if meant and was_open and len(self.beats) > before:
            self.frames = 1
        assert self.frames <= FLOOD or self.current is None or not was_open
        return meant and was_open

    @precondition(lambda self: not self.started and self.end is None)
    @rule()
    def start(self) -> None:
        self.started = True
        self.next_attempt = (self.now, self.now)
        self.there_is_an_outage(self.now)
        self.driver.start()
        self.settle()
        assert self.current == 1

    @precondition(lambda self: self.started)
    @rule(whose=whose)
    def upgrade_is_accepted(self, whose: str) -> None:
        id_ = self.id_of(whose)
        is_attempt = id_ == self.current and not self.connected
        # What is due comes first.
        is_too_late = is_attempt and self.now >= min(self.due()) - SOON
        if is_attempt and not is_too_late:
            self.connected, self.last_beat = True, self.now
        self.give(self.driver.report_connected, whose=whose)
        assert not is_too_late or self.current != id_
        assert not is_attempt or is_too_late or [frame["event"] for frame in self.sent] == ["phx_join"]

    @precondition(lambda self: self.started)
    @rule(
        whose=whose, status=st.sampled_from([401, 403, 429, 500, 503, 503]), seconds=st.sampled_from([None, 0, 1, 7, 9999])
    )
    def upgrade_is_refused(self, whose: str, status: int, seconds: int | None) -> None:
        was_connected, was_late = self.connected, self.late
        id_ = self.id_of(whose)
        self.told_over = id_ if id_ == self.current and not was_connected else None
        retry_after = None if seconds is None else str(seconds)

        def refuse(*, connection: int) -> None:
            self.driver.report_refused(status, retry_after, connection=connection)

        self.give(refuse, whose=whose, may_end=status == 401 and not was_connected)
        if self.told_over is not None and self.current == self.told_over:
            assert status != 401 or was_late
            self.the_connection_is_over(self.now)
            if status in {429, 503} and seconds is not None:
                wait = max(FIRST_WAIT, min(seconds, LONGEST_ASKED))
                self.next_attempt = (self.now + wait,) * 2
                assert self.outage_since is not None
                self.give_up_at = min(self.give_up_at + wait, self.outage_since + LIMIT)
        self.told_over = None

    @precondition(lambda self: self.started)
    @rule(whose=whose)
    def connection_is_lost(self, whose: str) -> None:
        id_ = self.id_of(whose)
        self.told_over = id_ if id_ == self.current else None
        was_leaving = self.is_leaving
        self.give(lambda *, connection: self.driver.report_lost(f"reset by {TOKEN}", connection=connection), whose=whose)
        if self.told_over is not None and self.current == self.told_over:
            self.the_connection_is_over(self.now)
        assert self.end is Left or not was_leaving or self.told_over is None
        self.told_over = None

    @precondition(lambda self: self.is_open)
    @rule(
        whose=whose,
        right=st.sampled_from([True, True, True, False]),
        status=st.sampled_from(["ok", "ok", "ok", "error", "?"]),
        as_text=st.booleans(),
    )
    def join_is_answered(self, whose: str, right: bool, status: str, as_text: bool) -> None:  # noqa: FBT001
        ref = self.join[1] if self.join is not None and right else 77
        was_late, awaited = self.late, self.join
        refused = awaited is not None and ref == awaited[1] and status == "error"
        answer = reply(str(ref) if as_text else ref, status, {"reason": "no"})
        if not self.give_frame(answer, whose, may_end=refused):
            return
        if refused:
            assert self.end is Fatal or was_late
        if status == "ok" and self.join is not None and self.join[1] == ref and self.current is not None:
            self.join, self.joined_at, self.has_joined = None, self.now, True
            self.outage_since, self.give_up_at = None, math.inf

    @precondition(lambda self: self.is_open)
    @rule(whose=whose)
    def portal_says_init(self, whose: str) -> None:
        leaving, was_late = self.is_leaving, self.late
        if self.give_frame(INIT, whose, may_begin=not self.begun) and not leaving and not was_late and self.frames:
            assert self.begun or self.current is None

    @precondition(lambda self: self.is_open and self.sent)
    @rule(whose=whose, data=st.data())
    def portal_answers_a_heartbeat(self, whose: str, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from([*self.beats, *self.beats, *self.beats, 0, 99]))
        if self.give_frame(reply(ref, topic="phoenix"), whose) and self.current is not None and ref in self.beats:
            del self.beats[: self.beats.index(ref) + 1]

    @precondition(lambda self: self.is_open)
    @rule(whose=whose, event=st.sampled_from(["phx_close", "phx_error"]))
    def channel_ends(self, whose: str, event: str) -> None:
        leaving, was_late = self.is_leaving, self.late
        if self.give_frame(write("relay", event), whose, may_abandon=not leaving):
            assert (self.closed_at is not None if leaving else self.current is None) or was_late

    @precondition(lambda self: self.is_open)
    @rule(whose=whose)
    def token_expires(self, whose: str) -> None:
        leaving, was_late = self.is_leaving, self.late
        if self.give_frame(TOKEN_EXPIRED, whose, may_end=not leaving) and not leaving and not was_late:
            assert self.end is Fatal or self.frames > FLOOD

    @precondition(lambda self: self.is_open)
    @rule(whose=whose)
    def portal_has_lost_the_channel(self, whose: str) -> None:
        joined_at, was_late = self.joined_at, self.late
        soon = joined_at is not None and self.now < joined_at + BEAT - SOON
        unmatched = reply(77, "error", {"reason": "unmatched topic"})
        if self.give_frame(unmatched, whose, may_join_again=True, may_abandon=soon) and joined_at is not None:
            assert self.joined_at is None or was_late

    @precondition(lambda self: self.leaving_since is not None and self.is_open)
    @rule(whose=whose, status=st.sampled_from(["ok", "error"]))
    def leave_is_answered(self, whose: str, status: str) -> None:
        was_late = self.late
        if self.give_frame(reply(len(self.sent) - 1, status), whose):
            assert self.closed_at is not None or was_late or self.frames > FLOOD

    @precondition(lambda self: self.started)
    @rule(whose=whose, text=st.sampled_from(NONSENSE))
    def portal_says_nonsense(self, whose: str, text: str) -> None:
        self.give_frame(text, whose)

    @precondition(lambda self: self.started)
    @rule(whose=whose, count=st.sampled_from([1, 1, 40, 101]))
    def portal_sends_pings(self, whose: str, count: int) -> None:
        for _ in range(count):
            self.give_frame(None, whose)

    @rule(
        seconds=st.sampled_from([TICK, 0.25, 1, 1, 4.5, 5, 10, 10, 15, 40, 3600]),
    )
    def time_passes(self, seconds: float) -> None:
        self.wake()
        self.driver.pass_time(seconds)
        self.settle()

    @precondition(lambda self: self.end is None)
    @rule(off=st.sampled_from([-TICK, 0, 0, TICK]))
    def time_passes_to_a_deadline(self, off: float) -> None:
        self.wake()
        seconds = self.driver.seconds_left + off
        if 0 < seconds < math.inf:
            self.driver.pass_time(seconds)
            self.settle()

    @precondition(lambda self: self.outage_since is not None and self.end is None)
    @rule(seconds=st.sampled_from([0.5, 20, 60]))
    def an_outage_is_almost_over(self, seconds: float) -> None:
        self.sleep_until(self.give_up_at - seconds)

    @precondition(lambda self: self.end is None)
    @rule(seconds=st.sampled_from([0.25, 5, 10, 20, 60]))
    def nobody_wakes(self, seconds: float) -> None:
        self.late = True
        self.driver.oversleep(seconds)

    def sleep_until(self, at: float) -> None:
        """Let the channel sleep through what would be thousands of attempts."""
        self.wake()
        if self.now < at < math.inf:
            self.late = True
            self.driver.oversleep(at - self.now)
            self.wake()

    def wake(self) -> None:
        """Tell the channel of the time that has passed."""
        self.driver.wake()
        self.settle()
        self.late = False
        assert self.driver.seconds_left > 0

    @precondition(lambda self: self.end is None)
    @rule()
    def all_goes_well(self) -> None:
        """Come to a joined channel: random inputs alone seldom come this far."""
        if not self.started:
            self.start()
        self.wake()
        while self.current is None and self.end is None:
            self.driver.pass_time(self.driver.seconds_left)
            self.settle()
        if not self.connected:
            self.upgrade_is_accepted("current")
        if self.is_open and self.join is not None:
            self.join_is_answered("current", right=True, status="ok", as_text=False)
        if self.is_open:
            self.portal_says_init("current")

    @precondition(lambda self: self.is_open and not self.is_leaving)
    @rule(count=st.integers(1, 6))
    def heartbeats_are_answered(self, count: int) -> None:
        self.wake()
        for _ in range(count):
            self.driver.pass_time(max(0, self.last_beat + BEAT - self.now))
            self.settle()
            if not self.is_open or self.join is not None:
                return
            assert self.give_frame(reply(self.beats[-1], topic="phoenix"), "current")
            self.beats.clear()

    @precondition(lambda self: self.driver.elapsed > 30)
    @rule()
    def leave(self) -> None:
        was_open, had_ended, was_leaving = self.is_open, self.end, self.is_leaving
        if not was_leaving and had_ended is None:
            self.leaving_since = self.now
            self.give_up_at = math.inf
        self.driver.leave()
        commands = self.settle()
        if was_leaving or had_ended:
            assert commands == []
        elif was_open:
            assert [type(command) for command in commands] == [SendText]
            self.late = False
        else:
            assert self.end is Left

    @initialize(well=st.booleans())
    def something_is_there_already(self, well: bool) -> None:  # noqa: FBT001
        if well:
            self.all_goes_well()

    # What holds after every step.

    @invariant()
    def it_is_joined_as_the_model_is(self) -> None:
        assert self.driver.channel.is_joined is (self.joined_at is not None and self.begun)
        assert self.driver.channel.has_begun is self.begun

    @invariant()
    def it_is_woken_when_something_is_due(self) -> None:
        if self.late:
            return
        earliest, latest = self.earliest_and_latest_wake()
        at = self.now + self.driver.seconds_left
        assert at > self.now
        assert at == math.inf if latest == math.inf else earliest - SOON <= at <= latest + SOON

    @invariant()
    def it_keeps_what_the_model_keeps(self) -> None:
        if self.current is not None:
            assert self.driver.channel._conversation.unanswered == len(self.beats)
        assert self.driver.channel.drain() == []

    def teardown(self) -> None:
        """Let it be: it ends by itself if it is not joined, and shows nothing that it should not."""
        self.wake()
        if self.started:
            # Heartbeats go unanswered, which is noticed within 50 s.
            self.time_passes(60)
            self.sleep_until(self.give_up_at - 60)
            self.time_passes(60)
            assert self.end is not None
        assert self.driver.pass_time(LIMIT) == []
        shown = repr(self.driver.log)
        assert TOKEN not in shown
        assert SECRET not in shown


TestChannel = ChannelMachine.TestCase
# A run takes seconds, but reducing a failure to its fewest steps may take minutes.
pytestmark = pytest.mark.timeout(600)
TestChannel.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
