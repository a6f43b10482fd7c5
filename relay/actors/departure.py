"""How a relay takes its leave: of the portal, and of the clients that it relays for."""

import contextlib
import time
from typing import NamedTuple, TypeAlias

import pykka
import structlog

from relay.actors.messages import Drain, LeavePortal
from relay.actors.portal import PortalActor
from relay.actors.server import ServerActor
from relay.core.commands import Drained
from relay.core.portal import limits
from relay.core.portal.commands import Left
from relay.ops.systemd import Systemd

PORTAL_STOP_TIMEOUT = 1.0
"""Seconds. The portal actor waits for nothing, so this is for a machine that is slow."""

SERVER_STOP_TIMEOUT = 2.0
"""Seconds, in which the server actor finishes its message and closes the allocations; datagrams that wait are dropped."""

LEAVE_TIMEOUT = limits.LEAVE_TIMEOUT + limits.CLOSE_TIMEOUT + 1.0
"""Seconds until the portal is left at the latest; it takes care of that itself, so this is for a machine that is slow."""

STOP_TIMEOUT = LEAVE_TIMEOUT + PORTAL_STOP_TIMEOUT + SERVER_STOP_TIMEOUT + 5.0
"""Seconds for all of it, and what else may take its time, as told to systemd."""

_log = structlog.get_logger("relay.actors.system")


Awaited: TypeAlias = dict[type[Left | Drained], float]
"""What is still waited for before the end, and the monotonic time at which it no longer is."""


class Departing(NamedTuple):
    """Who has to be told, if it was started; and how many allocations there are."""

    portal: pykka.ActorRef[PortalActor] | None
    server: pykka.ActorRef[ServerActor] | None
    allocations: int


class Departure:
    """Leaving, from the wish to do so until nothing is waited for any more.

    What its methods give is the exit code as soon as the end has come, None before.

    Args:
        systemd: is told that it takes a while.
    """

    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd
        self._awaited: Awaited | None = None
        """None until it is asked to leave."""

    @property
    def has_begun(self) -> bool:
        """Whether it was asked to leave."""
        return self._awaited is not None

    def patience(self) -> float | None:
        """Give the seconds for which news may be waited for; None for any time."""
        return max(0.0, min(self._awaited.values()) - time.monotonic()) if self._awaited else None

    def leave(self, departing: Departing, drain_seconds: float) -> int | None:
        """Leave the portal, and let allocations live on for a while, if that is wanted; asked twice, end at once."""
        if self._awaited is not None:
            _log.info("asked to end for the second time: ending at once")
            return 0
        self._awaited = {}
        # Who is dead already can't be told; that it is, is news that waits to be heard.
        with contextlib.suppress(pykka.ActorDeadError):
            if departing.portal is not None:
                self._awaited[Left] = time.monotonic() + LEAVE_TIMEOUT
                departing.portal.tell(LeavePortal())
            if drain_seconds and departing.server is not None:
                self._awaited[Drained] = time.monotonic() + drain_seconds
                _log.info("draining: no new allocations", seconds=drain_seconds, allocations=departing.allocations)
                departing.server.tell(Drain())
        self._systemd.stopping("draining" if drain_seconds else "stopping", drain_seconds + STOP_TIMEOUT)
        return self._code()

    def note_done(self, event: Left | Drained) -> int | None:
        """Take that one of the two has happened."""
        if self._awaited is None or self._awaited.pop(type(event), None) is None:
            return None
        if isinstance(event, Left):
            _log.info("left the portal")
        else:
            _log.info("no allocation is left")
        return self._code()

    def stop_waiting(self, allocations: int) -> int | None:
        """Wait no longer for what is overdue."""
        assert self._awaited is not None  # noqa: S101 - it is waited for nothing with a time limit but the end
        for overdue in [each for each, until in self._awaited.items() if time.monotonic() >= until]:
            del self._awaited[overdue]
            _log.warning(
                "not waiting any longer",
                what="for the portal" if overdue is Left else "for allocations to end",
                allocations=allocations,
            )
        return self._code()

    def _code(self) -> int | None:
        return None if self._awaited else 0
