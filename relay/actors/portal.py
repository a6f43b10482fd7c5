"""The portal actor: drives the portal's channel, and reports when the relay may answer clients.

The actor shares no lock and no queue with the packet path. Only the thread of a connection waits for names, sockets or the
portal; the actor never waits for a connection.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pykka

from relay.actors.actor import FailureListener, TimedActor
from relay.actors.messages import JoinPortal, LeavePortal, PortalEvent, Succeeded, Tick
from relay.core.portal import commands, events
from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.endpoint import PortalToken
from relay.logger import Logger
from relay.net.websocket import WebSocketLink
from relay.ops.clock import Clock

_log = Logger("relay.actors.portal")


class PortalActor(TimedActor):
    """The only thread that uses the portal's channel.

    Args:
        core: the channel.
        clock: stamps every input.
        new_token: returns the token of the next attempt, or None for the last token.
        news: receives these commands, each at most once, in the actor's thread.
        failed: is called after a failure of the actor.
        make_link: makes each connection, from the arguments of `WebSocketLink` after the dialer.
    """

    def __init__(
        self,
        core: PortalChannel,
        clock: Clock,
        new_token: Callable[[], PortalToken | None],
        news: Callable[[commands.Begin | commands.Left | commands.Fatal], None],
        failed: FailureListener,
        make_link: Callable[..., WebSocketLink],
    ) -> None:
        super().__init__("portal", failed)
        self.core = core
        self._clock = clock
        self._new_token = new_token
        self._make_link = make_link
        self._link: WebSocketLink | None = None
        """The connection or the attempt."""
        self._inputs: dict[type, Callable[[Any], None]] = {
            PortalEvent: self._handle_event,
            JoinPortal: lambda _: core.start(clock.now()),
            LeavePortal: lambda _: core.leave(clock.now()),
            Succeeded: lambda _: core.be_succeeded(),
            Tick: lambda _: core.handle_timeout(clock.now()),
        }
        self._outputs: dict[type, Callable[[Any], None]] = {
            commands.Connect: self._connect,
            commands.SendText: lambda command: self._open_link.send(command.text),
            commands.Close: lambda _: self._open_link.close(),
            commands.Abandon: lambda _: self._abandon(),
            commands.Note: _write_note,
            commands.Begin: news,
            commands.Left: news,
            commands.Fatal: news,
        }

    def on_start(self) -> None:
        """Start the channel."""
        self.actor_ref.tell(JoinPortal())

    def on_receive(self, message: object) -> None:
        """Handle a message, carry out the resulting commands, and set the wake-up time."""
        if self.core.state in {State.WAITING, State.OVER} and (token := self._new_token()) is not None:
            # Any message may find that it is time for the next attempt.
            self.core.use_token(token)
        self._inputs[type(message)](message)
        self._carry_out()

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - the values of sys.exc_info()
        """Notify the supervisor, and abandon the connection."""
        super().on_failure(*failure)
        self.on_stop()

    def on_stop(self) -> None:
        """Abandon the connection."""
        self._abandon()

    def _handle_event(self, message: PortalEvent) -> None:
        link, event = message
        if link is not self._link:
            return
        try:
            self.core.handle_event(event, self._clock.now())
        except Exception:  # noqa: BLE001 - see _note_fault
            self._note_fault()
        if isinstance(event, events.UpgradeRefused | events.ConnectionLost):
            self._link = None
        elif self._link is not None:
            self._link.acknowledge()

    def _note_fault(self) -> None:
        """Count a bug in the core, and reconnect. A bug must not let a portal end the sessions of all clients."""
        self.core.faults += 1
        if self.core.faults == 1:
            _log.exception("the core failed on what the portal sent: please report this; further ones are only counted")
        self._abandon()
        self.core.handle_event(events.ConnectionLost("this relay failed on what it sent"), self._clock.now())

    def _carry_out(self) -> None:
        outputs = self._outputs
        while drained := self.core.drain():
            for command in drained:
                outputs[type(command)](command)
        self._inbox.wake_at(self.core.poll_timeout(), self._clock)

    def _connect(self, command: commands.Connect) -> None:
        try:
            self._link = self._make_link(command.url, command.headers, command.timeout, self._report)
        except (OSError, RuntimeError) as error:
            # No descriptor or no thread is free. The channel retries later.
            self.core.handle_event(events.ConnectionLost(str(error)), self._clock.now())

    def _report(self, link: WebSocketLink, event: events.ConnectionEvent) -> None:
        """Pass an event from the thread of a connection on to this actor."""
        with contextlib.suppress(pykka.ActorDeadError):
            self.actor_ref.tell(PortalEvent(link, event))

    @property
    def _open_link(self) -> WebSocketLink:
        assert self._link is not None  # noqa: S101 - the core sends on a connection only
        return self._link

    def _abandon(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.abandon()


def _write_note(note: commands.Note) -> None:
    write = _log.warning if note.is_warning else _log.info
    write(note.event, **note.fields)
