"""The relay's membership in a Firezone network: a Phoenix channel, held for as long as the relay runs.

How it works
============

There is at most one connection, or attempt at one, at a time; each has a number, and reports on any but the current one are
void. Each input is taken whole, then the commands are drained, and `poll_timeout` says by when the next input is wanted.

=========================  =================================  ==========================================================
state                      input                              what follows
=========================  =================================  ==========================================================
IDLE                       start                              Connect; CONNECTING
CONNECTING                 connected                          join sent; JOINING
CONNECTING                 refused: 401                       Fatal; OVER
CONNECTING                 refused: 429, 503                  WAITING, for as long as Retry-After says
CONNECTING                 refused otherwise, lost, 15 s      WAITING
WAITING                    interval passes                    Connect; CONNECTING
JOINING                    ok reply                           JOINED
JOINING                    error reply                        Fatal; OVER
JOINING                    5 s pass                           Abandon; WAITING
JOINED                     "unmatched topic"                  join sent; JOINING (within 10 s of a join: WAITING)
JOINING, JOINED            init                               the first time: Begin
JOINING, JOINED            disconnect: token_expired          Fatal; OVER
JOINING, JOINED            phx_close, phx_error               Abandon; WAITING
JOINING, JOINED            lost                               WAITING
JOINING, JOINED            > 3 heartbeats unanswered          Abandon; WAITING
JOINING, JOINED            > 100 frames in 10 s               Abandon; WAITING
JOINING, JOINED            leave                              phx_leave sent; LEAVING
LEAVING                    its reply, phx_close, 1 s          Close; CLOSING
LEAVING, CLOSING           lost                               Left; OVER
CLOSING                    1 s passes                         Abandon, Left; OVER
IDLE, CONNECTING, WAITING  leave                              Abandon, Left; OVER
IDLE to JOINING            15 s (first join) or 24 h pass     Abandon, Fatal; OVER
=========================  =================================  ==========================================================

A lost portal changes nothing for clients: `Begin` comes once and is never taken back.
"""

import math
from collections.abc import Callable
from enum import Enum

from relay.core.instant import Instant
from relay.core.portal import frames, limits, reasons
from relay.core.portal.commands import (
    Abandon,
    Begin,
    Close,
    Connect,
    ConnectionId,
    Fatal,
    Left,
    Note,
    PortalCommand,
    SendText,
    Severity,
)
from relay.core.portal.conversation import Conversation
from relay.core.portal.endpoint import PortalConfig
from relay.core.portal.frames import PHOENIX, RELAY, Frame, Ref, UnreadableFrameError
from relay.core.portal.quoting import quoting
from relay.core.portal.refusal import Refusal, fatal_reason, wait_asked_for
from relay.core.portal.retry import Retry
from relay.core.randomness import RandomSource


class State(Enum):
    """How far the relay is with its portal."""

    IDLE = "idle"
    WAITING = "waiting"
    CONNECTING = "connecting"
    JOINING = "joining"
    JOINED = "joined"
    LEAVING = "leaving"
    CLOSING = "closing"
    OVER = "over"


_OPEN = frozenset((State.JOINING, State.JOINED, State.LEAVING))
"""There is a connection on which frames are exchanged."""


class PortalChannel:
    """The relay's side of the channel.

    Args:
        config: where the portal is, and what it is told.
        random: spreads reconnects.
    """

    def __init__(self, config: PortalConfig, random: RandomSource) -> None:
        self.state = State.IDLE
        self.has_begun = False
        """Whether the portal said `init` at least once."""
        self.joins = 0
        """Joins that were answered."""
        self.oddities = 0
        """Frames that could not be made sense of."""
        self.faults = 0
        """Reports that this failed on, as counted by whoever drives it: each is a bug."""
        self.entered_at: float | None = None
        """Monotonic time at which it came into its state; None before the start."""
        self.last_failure: str | None = None
        """Why there was no connection, or none any more, the last time."""
        self._config = config
        self._retry = Retry(random)
        self._commands: list[PortalCommand] = []
        self._quote = quoting(config.token, config.secret)
        self._conversation = Conversation(ConnectionId(0))
        self._deadline = math.inf
        self._heartbeat_at = math.inf
        self._awaited: Ref | None = None
        self._joined_at = -math.inf
        self._events: dict[tuple[str, str], Callable[[Frame, Instant], None]] = {
            (RELAY, "phx_reply"): self._take_relay_reply,
            (RELAY, "init"): self._take_init,
            (RELAY, "phx_close"): self._take_end,
            (RELAY, "phx_error"): self._take_end,
            (RELAY, "disconnect"): self._take_disconnect,
            (PHOENIX, "disconnect"): self._take_disconnect,
            (PHOENIX, "phx_reply"): self._take_heartbeat_reply,
        }

    @property
    def is_joined(self) -> bool:
        """Whether the portal hands this relay out to clients."""
        return self.state is State.JOINED and self.has_begun

    def drain(self) -> list[PortalCommand]:
        """Take the commands that inputs have left, in the order in which they are to be carried out."""
        commands = self._commands.copy()
        self._commands.clear()
        return commands

    def poll_timeout(self) -> float | None:
        """Give the monotonic time by which `handle_timeout` wants to be called; None if nothing is waited for."""
        at = min(self._deadline, self._heartbeat_at, self._retry.give_up_at)
        return None if at == math.inf else at

    def start(self, now: Instant) -> None:
        """Begin to connect."""
        self._retry.note_outage(now.monotonic)
        self._connect(now)

    def leave(self, now: Instant) -> None:
        """Leave the channel politely, so that the portal stops handing this relay out; `Left` says when that is done."""
        if self.state in {State.JOINING, State.JOINED}:
            self._retry.cease()
            self._heartbeat_at = math.inf
            self._enter(State.LEAVING, now, limits.LEAVE_TIMEOUT)
            self._awaited = self._send(frames.leave)
        elif self.state not in {State.LEAVING, State.CLOSING, State.OVER}:
            self._abandon()
            self._end(Left())

    def handle_timeout(self, now: Instant) -> None:
        """Do what is due."""
        if now.monotonic >= self._deadline and self.state is not State.WAITING:
            # Before giving up, which tells what failed last.
            self._handle_deadline(now)
        if now.monotonic >= self._retry.give_up_at:
            self._give_up()
        if now.monotonic >= self._heartbeat_at:
            self._beat(now)
        if now.monotonic >= self._deadline and self.state is State.WAITING:
            self._connect(now)

    def handle_connected(self, connection: ConnectionId, now: Instant) -> None:
        """Take the report that the upgrade was answered with 101."""
        if self._is_current(connection, now) and self.state is State.CONNECTING:
            self._heartbeat_at = now.monotonic + limits.HEARTBEAT_INTERVAL
            self._join(now)

    def handle_refused(self, connection: ConnectionId, refusal: Refusal, now: Instant) -> None:
        """Take the report that the upgrade was answered with something else."""
        if not self._is_current(connection, now) or self.state is not State.CONNECTING:
            return
        fatal = fatal_reason(refusal, self._quote)
        if fatal is not None:
            self._end(Fatal(fatal))
            return
        wait = wait_asked_for(refusal, now.unix)
        if wait is not None:
            wait = self._retry.grant_wait(max(wait, limits.FIRST_RETRY_INTERVAL), now.monotonic)
        self._retry_later(f"it answered {refusal.status} to the upgrade", now, wait)

    def handle_lost(self, connection: ConnectionId, reason: str, now: Instant) -> None:
        """Take the report that there is no connection, or none any more; in words, of whoever it is told by."""
        # What is due comes second here: nothing can be sent or closed on a connection that is lost.
        if self._is_about_current(connection):
            if self.state in {State.LEAVING, State.CLOSING}:
                self._end(Left())
            else:
                self._retry_later(self._quote(reason), now)
        self.handle_timeout(now)

    def handle_text(self, connection: ConnectionId, text: str, now: Instant) -> None:
        """Take a text frame."""
        if not self._is_current(connection, now) or not self._count_frame(now):
            return
        try:
            frame = frames.decode(text)
        except UnreadableFrameError as error:
            self._note_oddity("the portal sent what is no frame", why=str(error))
            return
        if frame.unknown_keys:
            self._note_oddity("the portal sent unknown keys", keys=self._quote(", ".join(frame.unknown_keys)))
        handler = self._events.get((frame.topic, frame.event))
        if handler is None:
            self._note_oddity(
                "the portal sent an unknown event", topic=self._quote(frame.topic), portal_event=self._quote(frame.event)
            )
        else:
            handler(frame, now)

    def handle_other_frame(self, connection: ConnectionId, kind: str, now: Instant) -> None:
        """Take word of a frame that is not text: ``binary`` is an oddity; a ping or pong only counts as a frame."""
        if self._is_current(connection, now) and self._count_frame(now) and kind == "binary":
            self._note_oddity("the portal sent a binary frame")

    def _take_relay_reply(self, frame: Frame, now: Instant) -> None:
        if frame.ref is not None and frame.ref == self._awaited:
            if self.state is State.LEAVING:
                self._close(now)
                return
            if self.state is State.JOINING:
                self._take_join_reply(frame, now)
                return
        if frame.status == "error" and frame.reason == "unmatched topic" and self.state is State.JOINED:
            self._join_again(now)
        elif frame.status != "ok":
            self._note_oddity("the portal sent an error", reason=self._quote(frame.reason))

    def _take_join_reply(self, frame: Frame, now: Instant) -> None:
        if frame.status == "ok":
            self._enter(State.JOINED, now, math.inf if self.has_begun else limits.INIT_PATIENCE)
            self._joined_at = now.monotonic
            self._retry.note_joined()
            self.joins += 1
            self._note(Severity.INFO, "joined the portal", url=self._config.url.text)
        elif frame.status == "error":
            self._fail(reasons.join_refused(self._quote(frame.reason)))
        else:
            self._note_oddity("the portal sent a reply that is neither ok nor error")

    def _take_init(self, _: Frame, __: Instant) -> None:
        if not self.has_begun and self.state is not State.LEAVING:
            self.has_begun = True
            if self.state is State.JOINED:
                self._deadline = math.inf
            self._commands.append(Begin())

    def _take_end(self, frame: Frame, now: Instant) -> None:
        if self.state is State.LEAVING:
            self._close(now)
        else:
            self._drop(f"it sent {frame.event}", now)

    def _take_disconnect(self, frame: Frame, _: Instant) -> None:
        if frame.reason == "token_expired" and self.state is not State.LEAVING:
            self._fail(reasons.EXPIRED)
        else:
            self._note_oddity("the portal asked to disconnect", reason=self._quote(frame.reason))

    def _take_heartbeat_reply(self, frame: Frame, _: Instant) -> None:
        if frame.status != "ok":
            self._note_oddity("the portal sent an error", reason=self._quote(frame.reason))
        elif not self._conversation.answer_beat(frame.ref):
            self._note_oddity("the portal answered a heartbeat that was not sent")
        elif self.state is State.JOINED:
            self._retry.note_stable()

    def _connect(self, now: Instant) -> None:
        connection = ConnectionId(self._conversation.connection + 1)
        self._conversation = Conversation(connection)
        self._enter(State.CONNECTING, now, limits.ATTEMPT_TIMEOUT)
        self._commands.append(
            Connect(connection, self._config.request_url, self._config.request_headers, limits.ATTEMPT_TIMEOUT)
        )

    def _join(self, now: Instant) -> None:
        self._enter(State.JOINING, now, limits.JOIN_TIMEOUT)
        self._awaited = self._send(lambda ref: frames.join(self._config.secret, ref))

    def _join_again(self, now: Instant) -> None:
        if now.monotonic - self._joined_at < limits.HEARTBEAT_INTERVAL:
            # It would be joined without end, at the pace of the network.
            self._drop("it lost the channel right after the join", now)
            return
        self._note(Severity.WARNING, "the portal has lost the channel: joining again")
        self._retry.note_outage(now.monotonic)
        self._join(now)

    def _beat(self, now: Instant) -> None:
        if self._conversation.is_dead:
            self._drop(f"it left {self._conversation.unanswered} heartbeats unanswered", now)
            return
        self._conversation.note_beat(self._send(frames.heartbeat))
        self._heartbeat_at = now.monotonic + limits.HEARTBEAT_INTERVAL

    def _handle_deadline(self, now: Instant) -> None:
        if self.state is State.LEAVING:
            self._close(now)
        elif self.state is State.CLOSING:
            self._abandon()
            self._end(Left())
        elif self.state is State.JOINED:
            self._deadline = math.inf
            self._note(Severity.WARNING, "joined, but the portal does not say init: clients are not answered until it does")
        else:
            what, limit = (
                ("join", limits.JOIN_TIMEOUT) if self.state is State.JOINING else ("attempt", limits.ATTEMPT_TIMEOUT)
            )
            self._drop(f"the {what} was not answered within {limit} s", now)

    def _close(self, now: Instant) -> None:
        self._commands.append(Close(self._conversation.connection))
        self._enter(State.CLOSING, now, limits.CLOSE_TIMEOUT)

    def _give_up(self) -> None:
        self._abandon()
        self._end(Fatal(reasons.retries_spent(self._config.url.host, self._retry.patience, self.last_failure)))

    def _drop(self, reason: str, now: Instant) -> None:
        """Give the connection, or the attempt, up, and try another one later."""
        self._abandon()
        self._retry_later(reason, now)

    def _retry_later(self, reason: str, now: Instant, wait: float | None = None) -> None:
        """Be without a connection for a while."""
        self.last_failure = reason
        self._retry.note_outage(now.monotonic)
        seconds = self._retry.next_wait() if wait is None else wait
        self._note(Severity.WARNING, "no connection to the portal", reason=reason, retry_in=round(seconds, 1))
        self._heartbeat_at = math.inf
        self._enter(State.WAITING, now, seconds)

    def _count_frame(self, now: Instant) -> bool:
        """Tell whether a frame may be looked at; where it may not, the connection is given up or has been."""
        if self.state not in _OPEN:
            return False
        if self._conversation.count_frame():
            return True
        if self.state is State.LEAVING:
            self._abandon()
            self._end(Left())
        else:
            self._drop(f"it sent more than {limits.FRAMES_PER_HEARTBEAT} frames in {limits.HEARTBEAT_INTERVAL} s", now)
        return False

    def _send(self, make: Callable[[Ref], str]) -> Ref:
        ref = self._conversation.take_ref()
        self._commands.append(SendText(self._conversation.connection, make(ref)))
        return ref

    def _is_current(self, connection: ConnectionId, now: Instant) -> bool:
        """Do what is due, then tell whether a report is about the connection there is."""
        self.handle_timeout(now)
        return self._is_about_current(connection)

    def _is_about_current(self, connection: ConnectionId) -> bool:
        return connection == self._conversation.connection and self.state not in {State.IDLE, State.WAITING, State.OVER}

    def _enter(self, state: State, now: Instant, seconds: float = math.inf) -> None:
        self.state = state
        self.entered_at = now.monotonic
        self._awaited = None
        self._deadline = now.monotonic + seconds

    def _abandon(self) -> None:
        if self.state not in {State.IDLE, State.WAITING, State.OVER}:
            self._commands.append(Abandon(self._conversation.connection))

    def _fail(self, reason: str) -> None:
        """End for good. The connection is closed without waiting for the other side: the process is about to end."""
        self._commands.append(Close(self._conversation.connection))
        self._end(Fatal(reason))

    def _end(self, command: Fatal | Left) -> None:
        self.state = State.OVER
        self._deadline = self._heartbeat_at = math.inf
        self._retry.cease()
        self._commands.append(command)

    def _note_oddity(self, event: str, **fields: object) -> None:
        self.oddities += 1
        left = self._conversation.take_note()
        if left:
            self._note(Severity.WARNING, event, **fields)
        if left == 1:
            self._note(Severity.WARNING, "the portal sent many odd frames; further ones on this connection are only counted")

    def _note(self, severity: Severity, event: str, **fields: object) -> None:
        self._commands.append(Note(severity, event, fields))
