"""The relay's membership in a Firezone network: a Phoenix channel that is held while the relay runs.

How it works
============

There is at most one connection or attempt at a time. Its events end with `ConnectionLost`, `UpgradeRefused` or the command
`Abandon`. After each input, drain the commands and call `poll_timeout` for the time of the next input.

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
JOINING                    error reply, token_expired         Abandon, Fatal; OVER
JOINING                    error reply, other reason          Abandon, Fatal; OVER (after an earlier join: Abandon; WAITING)
JOINING                    5 s pass                           Abandon; WAITING
JOINED                     "unmatched topic"                  join sent; JOINING (within 0.5 s of a join: WAITING)
JOINING, JOINED            init                               the first time: Begin
JOINING, JOINED            disconnect: token_expired          Abandon, Fatal; OVER
JOINING, JOINED            phx_close, phx_error               Abandon; WAITING
JOINING, JOINED            lost                               WAITING
JOINING, JOINED            40 s without an answer             Abandon; WAITING
JOINING, JOINED            > 100 frames in 10 s               Abandon; WAITING
JOINING, JOINED            leave                              phx_leave sent; LEAVING
LEAVING                    its reply, phx_close, 1 s          Close; CLOSING
LEAVING, CLOSING           lost                               Left; OVER
CLOSING                    1 s passes                         Abandon, Left; OVER
IDLE, CONNECTING, WAITING  leave                              Abandon, Left; OVER
JOINING, JOINED            succeeded                          no more WAITING: instead Left; OVER
IDLE, CONNECTING, WAITING  succeeded                          Abandon, Left; OVER
IDLE to JOINING            15 s (first join) or 24 h pass     Abandon, Fatal; OVER
OVER                       start                              Connect; CONNECTING
=========================  =================================  ==========================================================

A lost portal changes nothing for clients: `Begin` comes once and is never revoked. `retry` has the lengths of WAITING: an
eighth of a second after a join that lasted for 0.5 s, and longer after each failure.
"""

import dataclasses
import math
from collections.abc import Callable
from enum import Enum
from typing import Any

from relay.core.portal import commands, events, frames, limits, reasons
from relay.core.portal.commands import PortalCommand
from relay.core.portal.connection import ConnectionState
from relay.core.portal.endpoint import PortalConfig, PortalToken
from relay.core.portal.events import ConnectionEvent
from relay.core.portal.frames import EXPIRY, PHOENIX, RELAY, Frame, Ref, UnreadableFrameError
from relay.core.portal.retry import Retry
from relay.core.randomness import RandomSource
from relay.core.timestamp import Timestamp


class State(Enum):
    """The state of the relay's membership."""

    IDLE = "idle"
    WAITING = "waiting"
    CONNECTING = "connecting"
    JOINING = "joining"
    JOINED = "joined"
    LEAVING = "leaving"
    CLOSING = "closing"
    OVER = "over"


_OPEN = frozenset((State.JOINING, State.JOINED, State.LEAVING))
"""The states in which frames are exchanged."""

_CONNECTED = _OPEN | {State.CONNECTING, State.CLOSING}
"""The states with a connection or an attempt."""


class PortalChannel:
    """The relay's side of the channel. The random source spreads reconnects."""

    def __init__(self, config: PortalConfig, random: RandomSource) -> None:
        self.state = State.IDLE
        self.has_begun = False
        """Whether the portal has sent `init` at least once."""
        self.joins = 0
        """Successful joins."""
        self.protocol_errors = 0
        """Unexpected or invalid frames."""
        self.faults = 0
        """Events that raised an exception, counted by the actor. Each is a bug."""
        self.entered_at: float | None = None
        """Monotonic time of the last change of state. None before the start."""
        self.last_failure: str | None = None
        """The reason of the last failed or lost connection."""
        self._config = config
        self._retry = Retry(random)
        self._commands: list[PortalCommand] = []
        self._redact = reasons.redactor(config.token, config.secret)
        self.connection = ConnectionState()
        """The current or last connection."""
        self._deadline = math.inf
        self._heartbeat_at = math.inf
        self._awaited: Ref | None = None
        self._is_succeeded = False
        self._event_handlers: dict[type[ConnectionEvent], Callable[[Any, Timestamp], None]] = {
            events.Connected: self._handle_connected,
            events.UpgradeRefused: self._handle_refusal,
            events.TextReceived: self._handle_text,
            events.OtherReceived: self._handle_other,
            events.ConnectionLost: lambda event, now: self._retry_later(self._redact(event.reason), now),
        }
        self._frame_handlers: dict[tuple[str, str], Callable[[Frame, Timestamp], None]] = {
            (RELAY, "phx_reply"): self._handle_relay_reply,
            (RELAY, "init"): self._handle_init,
            (RELAY, "phx_close"): self._handle_end,
            (RELAY, "phx_error"): self._handle_end,
            (RELAY, "disconnect"): self._handle_disconnect,
            (PHOENIX, "disconnect"): self._handle_disconnect,
            (PHOENIX, "phx_reply"): self._handle_heartbeat_reply,
        }

    @property
    def is_joined(self) -> bool:
        """Return whether the portal offers this relay to clients."""
        return self.state is State.JOINED and self.has_begun

    def drain(self) -> list[PortalCommand]:
        """Return and clear the pending commands, in order of execution."""
        drained, self._commands = self._commands, []
        return drained

    def use_token(self, token: PortalToken) -> None:
        """Use another token from the next attempt on."""
        self._config = dataclasses.replace(self._config, token=token)
        self._redact = reasons.redactor(token, self._config.secret)

    def poll_timeout(self) -> float | None:
        """Return the monotonic time of the next `handle_timeout`, or None without a deadline."""
        at = min(self._deadline, self._heartbeat_at, self._retry.give_up_at)
        return None if at == math.inf else at

    def start(self, now: Timestamp) -> None:
        """Start to connect, the first time or after the end, unless another process joins."""
        if self.state in {State.IDLE, State.OVER} and not self._is_succeeded:
            self._retry.note_outage(now.monotonic, restarts=True)
            self._connect(now)

    def leave(self, now: Timestamp) -> None:
        """Leave the channel, so that the portal stops offering this relay. `Left` reports the end."""
        if self.state in {State.JOINING, State.JOINED}:
            self._retry.cease()
            self._heartbeat_at = math.inf
            self._enter(State.LEAVING, now, limits.LEAVE_TIMEOUT)
            self._awaited = self._send(RELAY, "phx_leave")
        elif self.state not in {State.LEAVING, State.CLOSING, State.OVER}:
            self._end_now(commands.Left())

    def be_succeeded(self) -> None:
        """Stay until the portal ends the connection, and never join again: another process joins with the same secret."""
        self._is_succeeded = True
        self._retry.cease()
        if self.state not in _OPEN:
            self._end_now(commands.Left())

    def handle_timeout(self, now: Timestamp) -> None:
        """Handle all deadlines that have passed."""
        if now.monotonic >= self._deadline and self.state is not State.WAITING:
            # Before giving up: the fatal error reports the last failure.
            self._handle_deadline(now)
        if now.monotonic >= self._retry.give_up_at:
            reason = reasons.retries_spent(self._config.url.host, self._retry.patience, self.last_failure)
            self._end_now(commands.Fatal(reason))
        if now.monotonic >= self._heartbeat_at:
            self._send_heartbeat(now)
        if now.monotonic >= self._deadline and self.state is State.WAITING:
            self._connect(now)

    def handle_event(self, event: ConnectionEvent, now: Timestamp) -> None:
        """Handle an event of the connection. Ignore an event without a connection."""
        # Before the timers: an event does not concern a connection that begins now.
        is_expected = self.state in _CONNECTED
        # Nothing can be sent or closed on a lost connection.
        is_lost = isinstance(event, events.ConnectionLost)
        if not is_lost:
            self.handle_timeout(now)
        if is_expected and self.state in _CONNECTED:
            self._event_handlers[type(event)](event, now)
        if is_lost:
            self.handle_timeout(now)

    def _handle_connected(self, _: events.Connected, now: Timestamp) -> None:
        if self.state is State.CONNECTING:
            self.connection.answered_at = now.monotonic
            self._heartbeat_at = now.monotonic + limits.HEARTBEAT_INTERVAL
            self._join(now)

    def _handle_refusal(self, refusal: events.UpgradeRefused, now: Timestamp) -> None:
        if self.state is not State.CONNECTING:
            return
        fatal = reasons.fatal_reason(refusal, self._redact)
        if fatal is not None:
            self._end(commands.Fatal(fatal))
            return
        wait = reasons.wait_asked_for(refusal, now.unix)
        if wait is not None:
            wait = self._retry.grant_wait(max(wait, limits.FIRST_RETRY_INTERVAL), now.monotonic)
        self._retry_later(reasons.shown(refusal, self._redact), now, wait)

    def _handle_other(self, event: events.OtherReceived, now: Timestamp) -> None:
        # A ping or a pong only counts as a frame.
        if self._count_frame(now) and event.is_binary:
            self._log_protocol_error("the portal sent a binary frame")

    def _handle_text(self, event: events.TextReceived, now: Timestamp) -> None:
        if not self._count_frame(now):
            return
        try:
            frame = frames.decode(event.text)
        except UnreadableFrameError as error:
            self._log_protocol_error("the portal sent what is no frame", why=str(error))
            return
        if frame.unknown_keys:
            self._log_protocol_error("the portal sent unknown keys", keys=self._redact(", ".join(frame.unknown_keys)))
        handler = self._frame_handlers.get((frame.topic, frame.event))
        if handler is None:
            self._log_protocol_error(
                "the portal sent an unknown event", topic=self._redact(frame.topic), portal_event=self._redact(frame.event)
            )
        else:
            handler(frame, now)

    def _handle_relay_reply(self, frame: Frame, now: Timestamp) -> None:
        if frame.ref is not None and frame.ref == self._awaited:
            if self.state is State.LEAVING:
                self._close(now)
            else:
                self._handle_join_reply(frame, now)
        elif frame.status == "error" and frame.reason == "unmatched topic" and self.state is State.JOINED:
            self._join_again(now)
        elif frame.status != "ok":
            self._log_protocol_error("the portal sent an error", reason=self._redact(frame.reason))

    def _handle_join_reply(self, frame: Frame, now: Timestamp) -> None:
        if frame.status == "ok":
            self._enter(State.JOINED, now, math.inf if self.has_begun else limits.INIT_TIMEOUT)
            self._retry.note_joined()
            self.joins += 1
            self._commands.append(commands.Note("joined the portal", {"url": self._config.url.text}, is_warning=False))
        elif frame.status == "error":
            if frame.reason == EXPIRY:
                self._end_now(commands.Fatal(reasons.EXPIRED))
            elif self.joins:
                # The portal has accepted this relay before, so the fault may be the portal's ("join crashed").
                self._drop(f"it refused the join ({self._redact(frame.reason)})", now)
            else:
                self._end_now(commands.Fatal(reasons.join_refused(self._redact(frame.reason))))
        else:
            self._log_protocol_error("the portal sent a reply that is neither ok nor error")

    def _handle_init(self, _: Frame, __: Timestamp) -> None:
        if not self.has_begun and self.state is not State.LEAVING:
            self.has_begun = True
            if self.state is State.JOINED:
                self._deadline = math.inf
            self._commands.append(commands.Begin())

    def _handle_end(self, frame: Frame, now: Timestamp) -> None:
        if self.state is State.LEAVING:
            self._close(now)
        else:
            self._drop(f"it sent {frame.event}", now)

    def _handle_disconnect(self, frame: Frame, _: Timestamp) -> None:
        if frame.reason == EXPIRY and self.state is not State.LEAVING:
            self._end_now(commands.Fatal(reasons.EXPIRED))
        else:
            self._log_protocol_error("the portal asked to disconnect", reason=self._redact(frame.reason))

    def _handle_heartbeat_reply(self, frame: Frame, _: Timestamp) -> None:
        if frame.status != "ok":
            self._log_protocol_error("the portal sent an error", reason=self._redact(frame.reason))
        elif not self.connection.heartbeat_answered(frame.ref):
            self._log_protocol_error("the portal answered a heartbeat that was not sent")

    def _connect(self, now: Timestamp) -> None:
        self.connection = ConnectionState()
        self._enter(State.CONNECTING, now, limits.ATTEMPT_TIMEOUT)
        self._commands.append(
            commands.Connect(self._config.request_url, self._config.request_headers, limits.ATTEMPT_TIMEOUT)
        )

    def _join(self, now: Timestamp) -> None:
        self._enter(State.JOINING, now, limits.JOIN_TIMEOUT)
        # The portal derives credentials from the secret.
        self._awaited = self._send(RELAY, "phx_join", stamp_secret=self._config.secret.expose())

    def _join_again(self, now: Timestamp) -> None:
        if self._join_lasted(now):
            self._warn("the portal has lost the channel: joining again")
            self._retry.note_outage(now.monotonic, restarts=True)
            self._join(now)
        else:
            # Otherwise joins would repeat endlessly, at the speed of the network.
            self._drop("it lost the channel right after the join", now)

    def _send_heartbeat(self, now: Timestamp) -> None:
        following = self.connection.next_heartbeat(now.monotonic)
        if following is None:
            self._drop(f"it answered nothing for {limits.SILENCE_LIMIT} s", now)
        else:
            self.connection.heartbeat_sent(self._send(PHOENIX, "heartbeat"), now.monotonic)
            self._heartbeat_at = following

    def _handle_deadline(self, now: Timestamp) -> None:
        if self.state is State.LEAVING:
            self._close(now)
        elif self.state is State.CLOSING:
            self._end_now(commands.Left())
        elif self.state is State.JOINED:
            self._deadline = math.inf
            self._warn("joined, but the portal does not say init: clients are not answered until it does")
        elif self.state is State.JOINING:
            self._drop(f"the join was not answered within {limits.JOIN_TIMEOUT} s", now)
        else:
            self._drop(f"the attempt was not answered within {limits.ATTEMPT_TIMEOUT} s", now)

    def _close(self, now: Timestamp) -> None:
        self._commands.append(commands.Close())
        self._enter(State.CLOSING, now, limits.CLOSE_TIMEOUT)

    def _drop(self, reason: str, now: Timestamp) -> None:
        """Abandon the connection or the attempt, and retry later."""
        self._abandon()
        self._retry_later(reason, now)

    def _retry_later(self, reason: str, now: Timestamp, wait: float | None = None) -> None:
        """Wait before the next attempt. Without a next attempt, the relay has left."""
        if self._is_succeeded or self.state in {State.LEAVING, State.CLOSING}:
            self._end(commands.Left())
            return
        self.last_failure = reason
        self._retry.note_outage(now.monotonic, restarts=self._join_lasted(now))
        seconds = self._retry.next_wait() if wait is None else wait
        self._warn("no connection to the portal", reason=reason, retry_in=round(seconds, 2))
        self._heartbeat_at = math.inf
        self._enter(State.WAITING, now, seconds)

    def _join_lasted(self, now: Timestamp) -> bool:
        """Return whether the channel is joined, and has been for long enough to be no failure."""
        assert self.entered_at is not None  # noqa: S101 - the channel is started
        return self.state is State.JOINED and now.monotonic >= self.entered_at + limits.LASTING_JOIN

    def _count_frame(self, now: Timestamp) -> bool:
        """Return whether to handle a frame. Abandon the connection after too many frames."""
        if self.state not in _OPEN:
            return False
        if self.connection.count_frame():
            return True
        self._drop(f"it sent more than {limits.FRAMES_PER_HEARTBEAT} frames in {limits.HEARTBEAT_INTERVAL} s", now)
        return False

    def _send(self, topic: str, event: str, **payload: str) -> Ref:
        ref = self.connection.take_ref()
        self._commands.append(commands.SendText(frames.encode(topic, event, payload, ref)))
        return ref

    def _enter(self, state: State, now: Timestamp, seconds: float) -> None:
        self.state = state
        self.entered_at = now.monotonic
        self._awaited = None
        self._deadline = now.monotonic + seconds

    def _abandon(self) -> None:
        if self.state in _CONNECTED:
            self._commands.append(commands.Abandon())

    def _end_now(self, command: commands.Fatal | commands.Left) -> None:
        """Abandon the connection or the attempt, and end."""
        self._abandon()
        self._end(command)

    def _end(self, command: commands.Fatal | commands.Left) -> None:
        self.state = State.OVER
        self._deadline = self._heartbeat_at = math.inf
        self._retry.cease()
        self._commands.append(command)

    def _log_protocol_error(self, event: str, **fields: object) -> None:
        self.protocol_errors += 1
        left = self.connection.allow_log()
        if left:
            self._warn(event, **fields)
        if left == 1:
            self._warn("the portal sent many odd frames; further ones on this connection are only counted")

    def _warn(self, event: str, **fields: object) -> None:
        self._commands.append(commands.Note(event, fields))
