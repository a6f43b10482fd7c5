"""Whether the server actor still works off its messages: for whoever ends a relay that hangs."""

import threading
from collections.abc import Callable
from typing import Any

import pykka

from relay.actors.messages import AreYouThere


class Pulse:
    """Asks the server actor whether it is there. Any thread may want to know, as often as it likes.

    Args:
        server: who is asked.
        missed: is called the first time that there is no answer in time, and never again: the time to see why.
    """

    def __init__(self, server: pykka.ActorRef[Any], missed: Callable[[], None]) -> None:
        self._server = server
        self._missed = missed
        self._lock = threading.Lock()
        self._answer: pykka.Future[Any] | None = None
        self._was_missed = False

    def beats(self, timeout: float) -> bool:
        """Tell whether it answers within some seconds."""
        try:
            self._ask().get(timeout=timeout)
        except (pykka.Timeout, pykka.ActorDeadError):
            with self._lock:
                is_first, self._was_missed = not self._was_missed, True
            if is_first:
                self._missed()
            return False
        return True

    def _ask(self) -> pykka.Future[Any]:
        """Ask, unless a question waits already: however many want to know, there is one in the inbox of who hangs."""
        with self._lock:
            if self._answer is None or _has_come(self._answer):
                self._answer = self._server.ask(AreYouThere(), block=False)
            return self._answer


def _has_come(answer: pykka.Future[Any]) -> bool:
    try:
        answer.get(timeout=0)
    except pykka.Timeout:
        return False
    except pykka.ActorDeadError:
        return True
    return True
