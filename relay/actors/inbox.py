"""The inbox of the server actor: it wakes its reader when the core's next deadline comes, and is bounded."""

import queue
import threading
from typing import Any, Protocol

from relay.actors.clock import Clock
from relay.actors.messages import Tick

CAPACITY = 1024
"""Messages that may wait before what arrives is dropped. Queues only add delay: at 10 µs a packet and 32 packets a message,
this is a third of a second."""


class Envelope(Protocol):
    """What pykka puts around a message."""

    message: Any
    reply_to: Any


class _Ticked:
    """The envelope of a Tick that nobody sent."""

    message = Tick()
    reply_to = None


_TICKED = _Ticked()


class ServerInbox:
    """A queue that gives a `Tick` when the deadline passes while it is empty.

    So the thread that waits for messages is the timer too: there is no second one to wake, and nothing polls. While
    messages do come, no Tick is needed, since each input of the core does first what is due.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
        self._clock: Clock | None = None
        self._deadline: float | None = None
        self._drop_lock = threading.Lock()
        self.dropped = 0
        """Datagrams dropped because it was full."""

    def __len__(self) -> int:
        return self._queue.qsize()

    def is_full(self) -> bool:
        """Tell whether what arrives should be dropped."""
        return self._queue.qsize() >= CAPACITY

    def count_dropped(self, datagrams: int) -> None:
        """Count datagrams that were dropped. Many threads may, and only under overload: so a lock keeps the count exact."""
        with self._drop_lock:
            self.dropped += datagrams

    def wake_at(self, deadline: float | None, clock: Clock) -> None:
        """Set when `get` is to give a Tick, in monotonic seconds of ``clock``; only for the thread that gets."""
        self._deadline = deadline
        self._clock = clock

    def put(self, envelope: Envelope, /) -> None:
        """Add a message; never waits."""
        self._queue.put(envelope)

    def get(self) -> Envelope:
        """Wait for a message or for the deadline."""
        if self._deadline is None or self._clock is None:
            return self._queue.get()
        try:
            return self._queue.get(timeout=max(0.0, self._deadline - self._clock.now().monotonic))
        except queue.Empty:
            return _TICKED

    def empty(self) -> bool:
        """Tell whether nothing waits."""
        return self._queue.empty()
