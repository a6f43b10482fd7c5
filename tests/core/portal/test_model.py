"""The portal channel matches a model for random inputs.

The model derives from the inputs and from its own constants which commands are allowed or required, and the time of the next
wake-up. The model has no timers, no retries and no state machine.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.core.portal.commands import Abandon, Begin, Close, Connect, Fatal, Left, Note, PortalCommand, SendText
from tests.support.examples import examples
from tests.support.portal_channel import (
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
SILENCE = 40
"""Seconds since the upgrade or the last answered heartbeat after which a connection is closed."""
FIRST_LIMIT = 15
LIMIT = 24 * 3600
PROMPT_WAIT, LONGEST_WAIT = 0.125, 30
"""The longest interval at first, which doubles with each failure, and the longest of all. Jitter halves an interval."""
LASTING = 0.5
"""Seconds after which the loss of a join is no failure."""
FIRST_WAIT = 1
LONGEST_ASKED = 3600
FLOOD = 100
LEAVE = CLOSE = 1
SOON = 1e-6
"""Less than a tick, and more than rounding errors of sums of seconds."""

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


class ChannelMachine(RuleBasedStateMachine):
    """Sends the channel the inputs of a portal, the network, the operator and the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.read = 0
        """Number of commands in the driver's log already checked by the model."""
        self.started = False
        self.late = False
        """Time has passed without an input to the channel."""
        self.end: type[Fatal | Left] | None = None
        self.begun = False
        self.leaving_since: float | None = None
        self.has_joined = False
        # State of an outage.
        self.outage_since: float | None = None
        self.give_up_at = math.inf
        self.next_attempt = (0.0, 0.0)
        self.failures = 0
        """Failed attempts since a join that lasted."""
        # State of the current connection.
        self.attempts = 0
        self.current: int | None = None
        """The number of the connection or the attempt."""
        self.since = 0.0
        self.connected = False
        self.closed_at: float | None = None
        self.sent: list[Said] = []
        self.join: tuple[float, int] | None = None
        """Time and ref of the unanswered join."""
        self.joined_at: float | None = None
        self.next_beat = 0.0
        self.answered_at = 0.0
        """Time of the upgrade, or of the last answered heartbeat."""
        self.beats: dict[int, float] = {}
        """The time of each unanswered heartbeat, by its ref."""
        self.frames = 0
        # State of the current input.
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

    # State derived by the model.

    @property
    def now(self) -> float:
        return self.driver.elapsed

    @property
    def is_open(self) -> bool:
        """Whether frames are processed."""
        return self.current is not None and self.connected and self.closed_at is None

    @property
    def is_leaving(self) -> bool:
        return self.leaving_since is not None

    def due(self) -> list[float]:
        """Return the deadlines of the open connection."""
        if self.closed_at is not None:
            return [self.closed_at + CLOSE]
        if self.leaving_since is not None:
            return [self.leaving_since + LEAVE]
        moments = [self.give_up_at, self.next_beat if self.connected else self.since + ATTEMPT]
        if self.join is not None:
            moments.append(self.join[0] + JOIN)
        return moments

    def earliest_and_latest_wake(self) -> tuple[float, float]:
        if not self.started or self.end is not None:
            return math.inf, math.inf
        if self.current is None:
            return min(self.next_attempt[0], self.give_up_at), min(self.next_attempt[1], self.give_up_at)
        at = min(self.due())
        # Until init arrives, the channel also wakes to log the missing init.
        return self.now if self.joined_at is not None and not self.begun else at, at

    def schedule_beat(self, at: float) -> None:
        self.next_beat = min(at + BEAT, self.answered_at + SILENCE)

    def there_is_an_outage(self, at: float) -> None:
        if self.outage_since is None:
            self.outage_since = at
            self.give_up_at = at + (LIMIT if self.has_joined else FIRST_LIMIT)

    def note_lasting_join(self, at: float) -> None:
        if self.joined_at is not None and at >= self.joined_at + LASTING - SOON:
            self.failures = 0

    def the_connection_is_over(self, at: float) -> None:
        self.note_lasting_join(at)
        self.current = self.join = self.joined_at = None
        if not self.is_leaving:
            self.there_is_an_outage(at)
        if self.has_joined:
            longest = min(PROMPT_WAIT * 2**self.failures, LONGEST_WAIT)
            self.next_attempt = at + longest / 2, at + longest
            self.failures += 1
        else:
            self.next_attempt = (at + FIRST_WAIT,) * 2

    # Commands of the channel.

    def settle(self) -> list[PortalCommand]:
        """Check the channel's commands since the last call."""
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
        assert (command.url, command.headers) == (CONFIG.request_url, CONFIG.request_headers)
        assert at >= self.next_attempt[0] - SOON
        assert at <= self.next_attempt[1] + SOON or self.late
        self.attempts += 1
        self.current = self.attempts
        self.since, self.connected, self.closed_at = at, False, None
        self.sent, self.beats, self.frames = [], {}, 0

    def follow_send(self, at: float, command: SendText) -> None:
        assert self.current not in {None, self.told_over}
        assert self.is_open
        frame = json.loads(command.text)
        assert sorted(frame) == ["event", "payload", "ref", "topic"]
        assert frame["ref"] == len(self.sent)
        if frame["event"] == "heartbeat":
            assert (frame["topic"], frame["payload"]) == ("phoenix", {})
            assert self.sent, "the join is the first frame"
            assert not self.is_leaving
            assert at >= self.next_beat - SOON
            assert at <= self.next_beat + SOON or self.late
            assert at < self.answered_at + SILENCE
            self.beats[frame["ref"]] = at
            self.schedule_beat(at)
            self.frames = 0
        elif frame["event"] == "phx_join":
            assert (frame["topic"], frame["payload"]) == ("relay", {"stamp_secret": SECRET})
            assert not self.is_leaving
            if self.sent:
                assert self.may_join_again
                assert self.joined_at is not None
                assert at >= self.joined_at + LASTING - SOON
                self.failures = 0
                self.there_is_an_outage(at)
            self.join, self.joined_at = (at, frame["ref"]), None
        else:
            assert (frame["topic"], frame["event"], frame["payload"]) == ("relay", "phx_leave", {})
            assert self.leaving_since == at
            self.join = self.joined_at = None
        self.sent.append(frame)

    def follow_close(self, at: float, _: Close) -> None:
        assert self.current not in {None, self.told_over}
        assert self.is_open
        assert self.is_leaving
        self.closed_at = at

    def follow_abandon(self, at: float, _: Abandon) -> None:
        assert self.current is not None
        reasons = [
            not self.connected and at >= self.since + ATTEMPT - SOON,
            self.join is not None and at >= self.join[0] + JOIN - SOON,
            self.connected and at >= self.answered_at + SILENCE - SOON,
            self.closed_at is not None and at >= self.closed_at + CLOSE - SOON,
            at >= self.give_up_at - SOON,
            self.is_leaving and not self.connected,
            self.may_abandon,
            self.may_end,
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

    def give(self, input_: Callable[..., object], *arguments: Any, **may: bool) -> bool:  # noqa: ANN401
        """Apply an input and check its commands; return whether there was a connection and still is."""
        before = self.current
        meant = before is not None
        for name, value in may.items():
            setattr(self, name, value and meant)
        input_(*arguments)
        was_late, commands = self.late, self.settle()
        self.late = False
        self.may_begin = self.may_join_again = self.may_end = self.may_abandon = False
        if not meant and not was_late:
            assert commands == []
        # Otherwise the input was too late.
        return meant and (before == self.current or (not was_late and self.told_over is None))

    def give_frame(self, text: str | None, **may: bool) -> bool:
        """Deliver a frame, or a ping without a text; return whether the channel processed the frame."""
        was_open = self.is_open
        may["may_abandon"] = may.get("may_abandon", False) or self.frames >= FLOOD
        if was_open:
            # A due heartbeat comes first and resets the count to 0.
            self.frames += 1
        else:
            may = {}
        before = len(self.beats)
        if text is None:
            meant = self.give(self.driver.receive_other, "ping", **may)
        else:
            meant = self.give(self.driver.receive, text, **may)
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
    @rule()
    def upgrade_is_accepted(self) -> None:
        before = self.current
        is_attempt = before is not None and not self.connected
        # Due timers run first.
        is_too_late = is_attempt and self.now >= min(self.due()) - SOON
        if is_attempt and not is_too_late:
            self.connected, self.answered_at = True, self.now
            self.schedule_beat(self.now)
        self.give(self.driver.report_connected)
        assert not is_too_late or self.current != before
        assert not is_attempt or is_too_late or [frame["event"] for frame in self.sent] == ["phx_join"]

    @precondition(lambda self: self.started)
    @rule(status=st.sampled_from([401, 403, 429, 500, 503, 503]), seconds=st.sampled_from([None, 0, 1, 7, 9999]))
    def upgrade_is_refused(self, status: int, seconds: int | None) -> None:
        was_connected, was_late = self.connected, self.late
        self.told_over = None if was_connected else self.current
        retry_after = None if seconds is None else str(seconds)

        self.give(self.driver.report_refused, status, retry_after, may_end=status == 401 and not was_connected)
        if self.told_over is not None and self.current == self.told_over:
            assert status != 401 or was_late
            self.the_connection_is_over(self.now)
            if status in {429, 503} and seconds is not None:
                wait: float = max(FIRST_WAIT, min(seconds, LONGEST_ASKED))
                assert self.outage_since is not None
                self.give_up_at = min(self.give_up_at + wait, self.outage_since + LIMIT)
                left = self.give_up_at - self.now
                if wait >= left:
                    # The wait is truncated to allow a last attempt, with an ordinary interval before or after the attempt.
                    wait = max(left - LONGEST_WAIT, LONGEST_WAIT)
                self.next_attempt = (self.now + wait,) * 2
                # A requested wait does not lengthen later intervals.
                self.failures -= self.has_joined
        self.told_over = None

    @precondition(lambda self: self.started)
    @rule()
    def connection_is_lost(self) -> None:
        self.told_over = self.current
        was_leaving = self.is_leaving
        self.give(self.driver.report_lost, f"reset by {TOKEN}")
        if self.told_over is not None and self.current == self.told_over:
            self.the_connection_is_over(self.now)
        assert self.end is Left or not was_leaving or self.told_over is None
        self.told_over = None

    @precondition(lambda self: self.is_open)
    @rule(
        right=st.sampled_from([True, True, True, False]),
        status=st.sampled_from(["ok", "ok", "ok", "error", "?"]),
        reason=st.sampled_from(["no", "join crashed", "token_expired"]),
        as_text=st.booleans(),
    )
    def join_is_answered(self, right: bool, status: str, reason: str, as_text: bool) -> None:  # noqa: FBT001
        ref = self.join[1] if self.join is not None and right else 77
        was_late, awaited = self.late, self.join
        refused = awaited is not None and ref == awaited[1] and status == "error"
        is_final = not self.has_joined or reason == "token_expired"
        answer = reply(str(ref) if as_text else ref, status, {"reason": reason})
        if not self.give_frame(answer, may_end=refused and is_final, may_abandon=refused and not is_final):
            return
        if refused:
            assert was_late or (self.end is Fatal if is_final else self.current is None)
        if status == "ok" and self.join is not None and self.join[1] == ref and self.current is not None:
            self.join, self.joined_at, self.has_joined = None, self.now, True
            self.outage_since, self.give_up_at = None, math.inf

    @precondition(lambda self: self.is_open)
    @rule()
    def portal_says_init(self) -> None:
        leaving, was_late = self.is_leaving, self.late
        if self.give_frame(INIT, may_begin=not self.begun) and not leaving and not was_late and self.frames:
            assert self.begun or self.current is None

    @precondition(lambda self: self.is_open and self.sent)
    @rule(data=st.data())
    def portal_answers_a_heartbeat(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from([*self.beats, *self.beats, *self.beats, 0, 99]))
        self.answer_heartbeat(ref)

    def answer_heartbeat(self, ref: int) -> None:
        # An overdue close comes first. The channel ignores a later reply.
        if self.give_frame(reply(ref, topic="phoenix")) and self.is_open and ref in self.beats:
            self.answered_at = self.beats[ref]
            self.beats = {later: at for later, at in self.beats.items() if later > ref}

    @precondition(lambda self: self.is_open)
    @rule(event=st.sampled_from(["phx_close", "phx_error"]))
    def channel_ends(self, event: str) -> None:
        leaving, was_late = self.is_leaving, self.late
        if self.give_frame(write("relay", event), may_abandon=not leaving):
            assert (self.closed_at is not None if leaving else self.current is None) or was_late

    @precondition(lambda self: self.is_open)
    @rule()
    def token_expires(self) -> None:
        leaving, was_late = self.is_leaving, self.late
        if self.give_frame(TOKEN_EXPIRED, may_end=not leaving) and not leaving and not was_late:
            assert self.end is Fatal or self.frames > FLOOD

    @precondition(lambda self: self.is_open)
    @rule()
    def portal_has_lost_the_channel(self) -> None:
        joined_at, was_late = self.joined_at, self.late
        soon = joined_at is not None and self.now < joined_at + LASTING - SOON
        unmatched = reply(77, "error", {"reason": "unmatched topic"})
        if self.give_frame(unmatched, may_join_again=True, may_abandon=soon) and joined_at is not None:
            assert self.joined_at is None or was_late

    @precondition(lambda self: self.leaving_since is not None and self.is_open)
    @rule(status=st.sampled_from(["ok", "error"]))
    def leave_is_answered(self, status: str) -> None:
        was_late = self.late
        if self.give_frame(reply(len(self.sent) - 1, status)):
            assert self.closed_at is not None or was_late or self.frames > FLOOD

    @precondition(lambda self: self.started)
    @rule(text=st.sampled_from(NONSENSE))
    def portal_says_nonsense(self, text: str) -> None:
        self.give_frame(text)

    @precondition(lambda self: self.started)
    @rule(count=st.sampled_from([1, 1, 40, 101]))
    def portal_sends_pings(self, count: int) -> None:
        for _ in range(count):
            self.give_frame(None)

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
        """Let the channel sleep during the time of thousands of attempts."""
        self.wake()
        if self.now < at < math.inf:
            self.late = True
            self.driver.oversleep(at - self.now)
            self.wake()

    def wake(self) -> None:
        """Wake the channel after time has passed."""
        self.driver.wake()
        self.settle()
        self.late = False
        assert self.driver.seconds_left > 0

    @precondition(lambda self: self.end is None)
    @rule()
    def all_goes_well(self) -> None:
        """Join the channel, because random inputs alone rarely join."""
        if not self.started:
            self.start()
        self.wake()
        while self.current is None and self.end is None:
            self.driver.pass_time(self.driver.seconds_left)
            self.settle()
        if not self.connected:
            self.upgrade_is_accepted()
        if self.is_open and self.join is not None:
            self.join_is_answered(right=True, status="ok", reason="", as_text=False)
        if self.is_open:
            self.portal_says_init()

    @precondition(lambda self: self.is_open and not self.is_leaving)
    @rule(count=st.integers(1, 6))
    def heartbeats_are_answered(self, count: int) -> None:
        self.wake()
        for _ in range(count):
            self.driver.pass_time(max(0, self.next_beat - self.now))
            self.settle()
            if not self.is_open or self.join is not None:
                return
            self.answer_heartbeat(max(self.beats))
            assert not self.beats

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

    @precondition(lambda self: self.end is Left and self.started)
    @rule()
    def join_again(self) -> None:
        """The operator has cancelled a drain."""
        self.end = self.leaving_since = None
        self.late, self.failures = False, 0
        self.next_attempt = (self.now, self.now)
        self.outage_since = None
        self.there_is_an_outage(self.now)
        attempts = self.attempts
        self.driver.start()
        self.settle()
        assert self.current == attempts + 1

    @initialize(well=st.booleans())
    def something_is_there_already(self, well: bool) -> None:  # noqa: FBT001
        if well:
            self.all_goes_well()

    # Invariants after every step.

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
            assert len(self.driver.channel.connection.unanswered) == len(self.beats)
        assert self.driver.channel.drain() == []

    def teardown(self) -> None:
        """Send no more inputs: the channel ends by itself unless joined, and shows no secrets."""
        self.wake()
        if self.started:
            # Heartbeats stay unanswered, which the channel detects within 40 s.
            self.time_passes(60)
            self.sleep_until(self.give_up_at - 60)
            self.time_passes(60)
            assert self.end is not None
        assert self.driver.pass_time(LIMIT) == []
        shown = repr(self.driver.log)
        assert TOKEN not in shown
        assert SECRET not in shown


def replay(*steps: Callable[[ChannelMachine], object]) -> None:
    """Replay steps, and check the invariants after each step."""
    machine = ChannelMachine()
    for step in steps:
        step(machine)
        machine.it_is_joined_as_the_model_is()
        machine.it_is_woken_when_something_is_due()
        machine.it_keeps_what_the_model_keeps()
    machine.teardown()


def test_a_heartbeat_reply_after_an_overdue_leave_is_ignored() -> None:
    def answer(machine: ChannelMachine) -> None:
        (ref,) = machine.beats
        machine.answer_heartbeat(ref)
        assert machine.closed_at == machine.now
        assert list(machine.beats) == [ref]

    replay(
        lambda machine: machine.something_is_there_already(well=True),
        lambda machine: machine.heartbeats_are_answered(3),
        lambda machine: machine.time_passes(10),
        lambda machine: machine.leave(),
        lambda machine: machine.nobody_wakes(5),
        answer,
    )


@pytest.mark.parametrize("seconds_left", [LONGEST_WAIT + FIRST_WAIT, 59, 60, 61, 90, 3599, 3600])
def test_a_retry_after_at_the_end_of_an_outage_allows_a_last_attempt(seconds_left: int) -> None:
    def refuse(machine: ChannelMachine) -> None:
        attempts = machine.attempts
        machine.upgrade_is_refused(503, 9999)
        end = machine.give_up_at
        assert end - machine.now == seconds_left
        assert machine.now < machine.next_attempt[0] == machine.next_attempt[1] < end
        machine.sleep_until(machine.next_attempt[0])
        assert machine.current == attempts + 1

    replay(
        lambda machine: machine.something_is_there_already(well=True),
        lambda machine: machine.connection_is_lost(),
        lambda machine: machine.an_outage_is_almost_over(seconds_left),
        refuse,
    )


TestChannel = ChannelMachine.TestCase
# A run takes seconds, but shrinking a failure may take minutes.
pytestmark = pytest.mark.timeout(600)
TestChannel.settings = examples(60, stateful_step_count=40, report_multiple_bugs=False)
