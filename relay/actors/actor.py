"""The base classes of all actors of the relay."""

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import pykka

from relay.actors.mailbox import TimedMailbox
from relay.actors.messages import Tick

FailureListener: TypeAlias = Callable[[str, BaseException], None]
"""Called with the name of a failed actor and its exception, in the thread of that actor."""


class Actor(pykka.ThreadingActor):
    """An actor whose thread has its name, and whose failure is reported to the supervisor.

    The thread does not keep the process alive after the end of the system.
    """

    use_daemon_thread = True

    def __init__(self, name: str, failed: FailureListener) -> None:
        super().__init__()
        self.name = name
        self._failed = failed

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def _create_actor_inbox() -> Any:  # noqa: ANN401 - pykka's type of an inbox is private
        # Half the cost of queue.Queue: 0.7 µs instead of 1.9 µs to send and receive a message.
        return queue.SimpleQueue()

    def _start_actor_loop(self) -> None:
        threading.Thread(target=self._actor_loop, name=self.name, daemon=self.use_daemon_thread).start()

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - the values of sys.exc_info()
        """Report the failure to the supervisor."""
        self._failed(self.name, failure[1])


class TimedActor(Actor):
    """An actor whose mailbox is its timer. Its first message is a `Tick`."""

    def __init__(self, name: str, failed: FailureListener) -> None:
        super().__init__(name, failed)
        self._inbox = cast(TimedMailbox, self.actor_inbox)

    @staticmethod
    def _create_actor_inbox() -> Any:  # noqa: ANN401 - pykka's type of an inbox is private
        return TimedMailbox()

    def on_start(self) -> None:
        """Begin in `on_receive`, because Pykka calls `on_failure` only for a failed message."""
        self.actor_ref.tell(Tick())
