"""Inboxes that wake their reader when the next deadline of a core comes; that of the server actor is bounded, too."""

import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from relay.actors.clock import Clock
from relay.actors.messages import FromClients, FromPeers, Tick
from relay.net.udp import Datagram

CAPACITY = 4 * 1024 * 1024
"""Bytes of datagrams that may wait before what arrives is dropped. Queues only add delay: of small packets, at 30 µs each,
this is a fifth of a second."""

OVERHEAD = 512
"""Bytes that a datagram takes beside its own, about."""


class Envelope(Protocol):
    """What pykka puts around a message."""

    message: Any
    reply_to: Any


class _Ticked:
    """The envelope of a Tick that nobody sent."""

    message = Tick()
    reply_to = None


_TICKED = _Ticked()
_DATAGRAMS = (FromClients, FromPeers)


def size_of(batch: Sequence[Datagram]) -> int:
    """Give the bytes that a batch takes while it waits."""
    return sum(len(data) for data, _ in batch) + OVERHEAD * len(batch)


class TimedInbox:
    """A queue that gives a `Tick` when the deadline passes while it is empty.

    So the thread that waits for messages is the timer too: there is no second one to wake, and nothing polls. While
    messages do come, no Tick is needed, since each input of a core does first what is due.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
        self._clock: Clock | None = None
        self._deadline: float | None = None

    def __len__(self) -> int:
        return self._queue.qsize()

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


class ServerInbox(TimedInbox):
    """The server actor's: datagrams that wait in it are bounded, all else is not, since only the relay itself tells that."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._waiting = 0
        self._closing = False
        self.dropped = 0
        """Datagrams dropped because it was full."""

    def admit(self, batch: Sequence[Datagram]) -> bool:
        """Make room for a batch that is to be told; False if there is none, and the batch is counted as dropped."""
        size = size_of(batch)
        # Many threads come here: an addition to an attribute is no single step.
        with self._lock:
            if self._closing or self._waiting + size > CAPACITY:
                self.dropped += len(batch)
                return False
            self._waiting += size
        return True

    def release(self, batch: Sequence[Datagram]) -> None:
        """Give back the room of a batch that was taken out."""
        with self._lock:
            self._waiting -= size_of(batch)

    def close(self) -> None:
        """Let in no more datagrams, and drop those that wait, so that whoever says stop need not wait for them."""
        with self._lock:
            self._closing = True

    def get(self) -> Envelope:
        """Wait for a message or for the deadline."""
        while True:
            envelope = super().get()
            if not (self._closing and isinstance(envelope.message, _DATAGRAMS)):
                return envelope
