"""Liveness of the server actor, for supervisors that restart a hanging relay."""

import threading
from collections.abc import Callable
from typing import Any

import pykka

from relay.actors.messages import Ping


class Liveness:
    """Check of the server actor. Any thread may call `check` at any rate.

    Args:
        server: the server actor.
        missed: called after the first check that fails, and never again.
    """

    def __init__(self, server: pykka.ActorRef[Any], missed: Callable[[], None]) -> None:
        self._server = server
        self._missed = missed
        self._lock = threading.Lock()
        self._response: pykka.Future[Any] | None = None
        self._has_missed = False

    def check(self, timeout: float) -> bool:
        """Return whether the actor responds within the timeout, in seconds."""
        try:
            self._ask().get(timeout=timeout)
        except (pykka.Timeout, pykka.ActorDeadError):
            with self._lock:
                is_first, self._has_missed = not self._has_missed, True
            if is_first:
                self._missed()
            return False
        return True

    def _ask(self) -> pykka.Future[Any]:
        """Return the future of a pending question, or ask: a hanging actor has a single question in its mailbox."""
        with self._lock:
            if self._response is None or _is_resolved(self._response):
                self._response = self._server.ask(Ping(), block=False)
            return self._response


def _is_resolved(response: pykka.Future[Any]) -> bool:
    try:
        response.get(timeout=0)
    except pykka.Timeout:
        return False
    except pykka.ActorDeadError:
        pass
    return True
