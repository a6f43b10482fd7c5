"""The graceful shutdown: leave the portal, and drain the allocations."""

import contextlib
import datetime as dt
from collections.abc import Callable
from typing import Any

import pykka

from relay.actors.messages import Drain, JoinPortal, LeavePortal, Resume
from relay.actors.server import ServerActor
from relay.config import Timeouts
from relay.core.commands import Drained
from relay.core.portal import limits
from relay.core.portal.commands import Left
from relay.logger import Logger
from relay.ops.clock import Clock
from relay.ops.systemd import Systemd

_TIMEOUTS = Timeouts()

LEAVE_TIMEOUT = limits.LEAVE_TIMEOUT + limits.CLOSE_TIMEOUT + 1.0
"""Maximum seconds for leaving the portal. The portal's channel has shorter limits, so this allows for a slow machine."""

STOP_TIMEOUT = LEAVE_TIMEOUT + _TIMEOUTS.stop_portal + _TIMEOUTS.stop_server + 5.0
"""Maximum seconds for the whole shutdown without draining, as reported to systemd."""

IDLE_LIMIT = 5.0
"""Seconds without a relayed packet that end a drain. Clients are told that the relay has left and move to another relay, but
never delete their allocations. Their connectivity checks are more frequent."""

_IDLE_CHECK = 1.0
"""Seconds between two looks at the relayed packets."""

ANSWERING = "answering clients"
"""The status for systemd of a relay that is not draining."""

_log = Logger("relay.actors.system")


class Shutdown:
    """The state of the graceful shutdown. Methods return the exit code as soon as the relay can stop, and None before.

    The shutdown begins with SIGTERM, a rejection by the portal, or an operator's request to drain. Only a requested drain
    can be cancelled, and only before SIGTERM.

    Args:
        systemd: is told how long the shutdown may take, and how many allocations are left.
        clock: measures the time limits.
        relayed: returns the totals of relayed packets.
    """

    def __init__(self, systemd: Systemd, clock: Clock, relayed: Callable[[], object]) -> None:
        self._systemd = systemd
        self._clock = clock
        self._relayed = relayed
        self._last_relayed: object = None
        self._idle_since = 0.0
        self._exit_code = 0
        self._is_final = False
        """Whether the shutdown can't be cancelled."""
        self._deadlines: dict[type[Left | Drained], float] | None = None
        """The monotonic deadline of each pending event. None before the shutdown begins."""
        self._portal: pykka.ActorRef[Any] | None = None
        """The portal to join again, after a cancelled drain."""

    @property
    def has_begun(self) -> bool:
        """Whether the shutdown has begun."""
        return self._deadlines is not None

    @property
    def is_draining(self) -> bool:
        """Whether the relay waits for the end of allocations."""
        return Drained in (self._deadlines or {})

    @property
    def ends(self) -> float | None:
        """The monotonic time at which the relay ends at the latest. None before the shutdown. Any thread may read this."""
        deadlines = self._deadlines
        return None if deadlines is None else max(tuple(deadlines.values()), default=self._clock.monotonic())

    def timeout(self) -> float | None:
        """Return the seconds until the next deadline. Return None without a deadline."""
        if not self._deadlines:
            return None
        left = max(0.0, min(self._deadlines.values()) - self._clock.monotonic())
        return min(left, _IDLE_CHECK) if Drained in self._deadlines else left

    def begin(
        self,
        portal: pykka.ActorRef[Any] | None,
        server: pykka.ActorRef[ServerActor],
        drain_seconds: float,
        allocations: int,
        exit_code: int,
    ) -> int | None:
        """Leave the portal and drain the server, also instead of a requested drain. On a second call, stop at once.

        After a rejection by the portal, `portal` is None, and the exit code is not 0.
        """
        if exit_code and self.has_begun:
            # The portal rejected the relay before it could leave.
            return self.complete(Left())
        if self._is_final:
            _log.info("asked to end for the second time: ending at once")
            return self._exit_code
        self._is_final, self._exit_code = True, exit_code
        return self.drain(portal, server, drain_seconds, allocations)

    def drain(
        self,
        portal: pykka.ActorRef[Any] | None,
        server: pykka.ActorRef[ServerActor],
        seconds: float,
        allocations: int,
    ) -> int | None:
        """Leave the portal and drain the server, or change the time of the current drain. 0 seconds end the drain."""
        is_new = self._deadlines is None
        # If an actor is dead, its failure is in the event queue.
        with contextlib.suppress(pykka.ActorDeadError):
            if self._deadlines is None:
                self._deadlines = {}
                if portal is not None:
                    self._deadlines[Left] = self._clock.monotonic() + LEAVE_TIMEOUT
                    portal.tell(LeavePortal())
            if not seconds:
                self._deadlines.pop(Drained, None)
            elif is_new or Drained in self._deadlines:
                self._deadlines[Drained] = self._clock.monotonic() + seconds
                self._last_relayed, self._idle_since = self._relayed(), self._clock.monotonic()
                _log.info("draining: no new allocations", seconds=seconds, allocations=allocations)
                server.tell(Drain())
        if self._is_final:
            self._systemd.stopping("draining" if self.is_draining else "stopping", seconds + STOP_TIMEOUT)
        self._show(allocations)
        return self._code()

    def cancel(self, portal: pykka.ActorRef[Any] | None, server: pykka.ActorRef[ServerActor]) -> str | None:
        """End a requested drain, and join the portal again. Return the reason if this is impossible."""
        if self._deadlines is None:
            return "the relay is not draining"
        if self._is_final:
            return "the relay is stopping, after SIGTERM or a rejection by the portal"
        self._deadlines, self._portal = None, portal
        with contextlib.suppress(pykka.ActorDeadError):
            server.tell(Resume())
        _log.info("drain cancelled: new allocations are accepted")
        self._systemd.status(ANSWERING)
        self._join_again()
        return None

    def complete(self, event: Left | Drained, allocations: int = 0) -> int | None:
        """Handle the end of the portal session, or of the last allocation.

        If there are `allocations`, the event is that of an earlier drain, which was cancelled.
        """
        if isinstance(event, Drained) and allocations:
            return None
        if self._deadlines is None:
            if isinstance(event, Left):
                self._join_again()
            return None
        if self._deadlines.pop(type(event), None) is None:
            return None
        if isinstance(event, Left):
            _log.info("left the portal")
        else:
            _log.info("no allocation is left")
        return self._code()

    def expire(self, allocations: int) -> int | None:
        """Drop pending events whose deadline has passed, and end an idle drain."""
        assert self._deadlines is not None  # noqa: S101 - without a shutdown there is no deadline
        now = self._clock.monotonic()
        if Drained in self._deadlines and self._is_idle(now):
            del self._deadlines[Drained]
            _log.info("nothing is relayed: not draining any longer", seconds=IDLE_LIMIT, allocations=allocations)
        for overdue in [event for event, deadline in self._deadlines.items() if now >= deadline]:
            del self._deadlines[overdue]
            _log.warning(
                "not waiting any longer",
                what="for the portal" if overdue is Left else "for allocations to end",
                allocations=allocations,
            )
        self._show(allocations)
        return self._code()

    def _show(self, allocations: int) -> None:
        """Show the drain in systemd's status."""
        if self.is_draining and self.ends is not None:
            now = self._clock.now()
            until = dt.datetime.fromtimestamp(now.unix + self.ends - now.monotonic, dt.UTC)
            self._systemd.status(f"draining until {until:%Y-%m-%d %H:%M:%S} UTC, allocations left: {allocations}")

    def _join_again(self) -> None:
        """Join the portal after a cancelled drain. The portal actor ignores this until it has left."""
        if self._portal is not None:
            with contextlib.suppress(pykka.ActorDeadError):
                self._portal.tell(JoinPortal())

    def _is_idle(self, now: float) -> bool:
        """Return whether no packet was relayed for some time, on either data path."""
        relayed = self._relayed()
        if relayed != self._last_relayed:
            self._last_relayed, self._idle_since = relayed, now
        return now - self._idle_since >= IDLE_LIMIT

    def _code(self) -> int | None:
        return None if self._deadlines else self._exit_code
