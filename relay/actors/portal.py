"""The portal actor: keeps the relay in its Firezone network, and says when it may begin.

It shares no lock and no queue with what relays packets. Whatever waits (for names, connections, the portal) waits in the
thread of a connection, never in this one.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import pykka
import structlog

from relay.actors.actor import Actor, FailureListener
from relay.actors.clock import Clock
from relay.actors.inbox import TimedInbox
from relay.actors.messages import (
    LeavePortal,
    PortalConnected,
    PortalLost,
    PortalRefused,
    PortalSaid,
    PortalSentOther,
    Tick,
)
from relay.core.portal.channel import PortalChannel
from relay.core.portal.commands import (
    Abandon,
    Begin,
    Close,
    Connect,
    ConnectionId,
    Fatal,
    Left,
    Note,
    SendText,
    Severity,
)
from relay.core.portal.refusal import Refusal
from relay.net.dial import Dialer
from relay.net.link import WebSocketLink

PortalNews: TypeAlias = Begin | Left | Fatal
"""What whoever started the actor hears of; each at most once."""

_Report: TypeAlias = PortalConnected | PortalRefused | PortalSaid | PortalSentOther | PortalLost

_log = structlog.get_logger("relay.actors.portal")


class PortalActor(Actor):
    """The one thread in which the portal's channel is thought about.

    Args:
        core: the channel.
        dialer: connects to the portal.
        clock: stamps every input.
        news: is told what matters to others, in this actor's thread.
        failed: hears of its failure.
    """

    def __init__(
        self,
        core: PortalChannel,
        dialer: Dialer,
        clock: Clock,
        news: Callable[[PortalNews], None],
        failed: FailureListener,
    ) -> None:
        super().__init__("portal", failed)
        self.core = core
        self._dialer = dialer
        self._clock = clock
        self._news = news
        self._links: dict[ConnectionId, WebSocketLink] = {}
        self._inbox = cast(TimedInbox, self.actor_inbox)
        self._inputs: dict[type, Callable[[Any], None]] = {
            PortalConnected: lambda told: core.handle_connected(told.connection, clock.now()),
            PortalRefused: lambda told: core.handle_refused(told.connection, told.refusal, clock.now()),
            PortalSaid: lambda told: core.handle_text(told.connection, told.text, clock.now()),
            PortalSentOther: lambda told: core.handle_other_frame(told.connection, told.kind, clock.now()),
            PortalLost: lambda told: core.handle_lost(told.connection, told.reason, clock.now()),
            LeavePortal: lambda _: core.leave(clock.now()),
            Tick: lambda _: core.handle_timeout(clock.now()),
        }
        self._outputs: dict[type, Callable[[Any], None]] = {
            Connect: self._connect,
            SendText: lambda command: self._links[command.connection].send(command.text),
            Close: lambda command: self._links[command.connection].close(),
            Abandon: self._abandon,
            Note: _write_note,
            Begin: news,
            Left: news,
            Fatal: news,
        }

    @staticmethod
    def _create_actor_inbox() -> Any:  # noqa: ANN401 - pykka's protocol for it is private
        return TimedInbox()

    def on_start(self) -> None:
        """Begin to connect."""
        try:
            self.core.start(self._clock.now())
            self._carry_out()
        except Exception:
            # Pykka calls that for a message only.
            self.on_failure(*sys.exc_info())
            raise

    def on_receive(self, message: object) -> None:
        """Take one message, carry out what follows from it, and set the time to be woken."""
        try:
            self._inputs[type(message)](message)
        except Exception:
            if not isinstance(message, _Report):
                raise
            self._survive(message)
        if isinstance(message, PortalSaid | PortalSentOther):
            link = self._links.get(message.connection)
            if link is not None:
                link.take()
        elif isinstance(message, PortalRefused | PortalLost):
            self._links.pop(message.connection, None)
        self._carry_out()

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - what sys.exc_info() gives
        """Tell the supervisor, and leave no connection behind."""
        super().on_failure(*failure)
        self.on_stop()

    def on_stop(self) -> None:
        """Let go of the connection."""
        for link in self._links.values():
            link.abandon()
        self._links.clear()

    def _survive(self, report: _Report) -> None:
        """Survive a report that the core failed on.

        It is a bug, and a reason to fix it; but no reason to let a portal end everybody's sessions.
        """
        self.core.faults += 1
        if self.core.faults == 1:
            _log.exception("the core failed on what the portal sent: please report this; further ones are only counted")
        self._abandon(Abandon(report.connection))
        self.core.handle_lost(report.connection, "this relay failed on what it sent", self._clock.now())

    def _carry_out(self) -> None:
        outputs = self._outputs
        while commands := self.core.drain():
            for command in commands:
                outputs[type(command)](command)
        self._inbox.wake_at(self.core.poll_timeout(), self._clock)

    def _connect(self, command: Connect) -> None:
        reports = _Reports(command.connection, self.actor_ref)
        try:
            link = WebSocketLink(self._dialer, command.url, command.headers, command.timeout, reports)
            link.start()
        except (OSError, RuntimeError) as error:
            # No descriptor or no thread left: a bad moment for a connection, and no reason to end.
            reports.lost(str(error))
            return
        self._links[command.connection] = link

    def _abandon(self, command: Abandon) -> None:
        link = self._links.pop(command.connection, None)
        if link is not None:
            link.abandon()


class _Reports:
    """Tells the actor what its connection hears."""

    def __init__(self, connection: ConnectionId, actor: pykka.ActorRef[PortalActor]) -> None:
        self._connection = connection
        self._actor = actor

    def connected(self) -> None:
        self._tell(PortalConnected(self._connection))

    def refused(self, refusal: Refusal) -> None:
        self._tell(PortalRefused(self._connection, refusal))

    def text(self, text: str) -> None:
        self._tell(PortalSaid(self._connection, text))

    def other(self, kind: str) -> None:
        self._tell(PortalSentOther(self._connection, kind))

    def lost(self, reason: str) -> None:
        self._tell(PortalLost(self._connection, reason))

    def _tell(self, report: _Report) -> None:
        with contextlib.suppress(pykka.ActorDeadError):
            self._actor.tell(report)


def _write_note(note: Note) -> None:
    write = _log.warning if note.severity is Severity.WARNING else _log.info
    write(note.event, **note.fields)
