"""What all actors here have in common."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

import pykka

FailureListener: TypeAlias = Callable[[str, BaseException], None]
"""Is told the name of an actor that failed, and what it failed of; in the thread of that actor."""


class Actor(pykka.ThreadingActor):
    """An actor whose thread bears its name, and whose failure its supervisor hears of.

    Its thread does not keep the process alive: when the system has decided to end, nothing lingers.
    """

    use_daemon_thread = True

    def __init__(self, name: str, failed: FailureListener) -> None:
        super().__init__()
        self.name = name
        self._failed = failed

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def _create_actor_inbox() -> Any:  # noqa: ANN401 - pykka's protocol for it is private
        # Half the cost of queue.Queue for each message (0.7 µs instead of 1.9 µs to tell and receive one).
        return queue.SimpleQueue()

    def _start_actor_loop(self) -> None:
        threading.Thread(target=self._actor_loop, name=self.name, daemon=self.use_daemon_thread).start()

    def on_failure(
        self,
        _exception_type: type[BaseException] | None,
        exception_value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Tell the supervisor."""
        self._failed(self.name, exception_value or RuntimeError("failed without an exception"))
