"""Mailboxes: `TimedMailbox` is its actor's timer; `Mailbox`, for the server actor, runs packets in the calling thread."""

import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pykka

from relay.actors.messages import ClientDatagrams, Failed, PeerDatagrams, Tick
from relay.core.commands import cut
from relay.core.data import requests_only
from relay.core.overload import CORE_WAIT
from relay.net.threads import Load, yield_cpu
from relay.ops.clock import Clock

_YIELDS = 8
"""Times that a thread yields the CPU before it blocks for the core."""


class Envelope(Protocol):
    """Pykka's wrapper of a message."""

    message: Any
    reply_to: Any


class _OwnEnvelope:
    """The envelope of a message from the mailbox itself."""

    reply_to = None

    def __init__(self, message: object) -> None:
        self.message = message


_TICK = _OwnEnvelope(Tick())


class TimedMailbox:
    """A queue that returns a `Tick` when the deadline passes while no message waits.

    The thread that waits for messages is the timer too: there is no second thread to wake, and nothing polls. Messages need
    no Tick, because each input of a core first handles all passed deadlines.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
        self._clock: Clock | None = None
        self.deadline: float | None = None
        """Monotonic time at which `get` returns a Tick."""
        self._asleep_until = -math.inf
        """The deadline that `get` waits for."""
        self._since: deque[float] = deque()
        """Arrival times of the waiting messages and of the current message, in monotonic seconds. Packets are not
        included."""
        self._is_in_hand = False
        """Whether the actor handles a message, or waits to handle it."""

    def __len__(self) -> int:
        return self._queue.qsize()

    def age(self, now: float) -> float:
        """Return the age of the oldest unprocessed message in seconds, the current message included; 0 if there is none."""
        try:
            return max(0.0, now - self._since[0])
        except IndexError:
            return 0.0

    def wake_at(self, deadline: float | None, clock: Clock) -> None:
        """Set the time of the next Tick, in monotonic seconds of ``clock``. Any thread may call this, one at a time."""
        self._clock = clock
        self.deadline = deadline
        if deadline is not None and deadline < self._asleep_until:
            # The waiting thread has to wait for less: after any message, it looks at the deadline again.
            TimedMailbox.put(self, _TICK)

    def put(self, envelope: Envelope, /) -> None:
        """Add a message; never block."""
        self._since.append(time.monotonic())
        self._queue.put(envelope)

    def get(self) -> Envelope:
        """Wait for a message or for the deadline. The former message counts as processed."""
        if self._is_in_hand:
            self._is_in_hand = False
            self._since.popleft()
        envelope = self._get()
        if envelope is None:
            return _TICK
        self._is_in_hand = True
        return envelope

    def _get(self) -> Envelope | None:
        """Wait for a message; return None at the deadline."""
        # Before the look at the deadline: this thread or `wake_at` sees a change in between.
        self._asleep_until = math.inf
        deadline = self.deadline
        try:
            if deadline is None or self._clock is None:
                return self._queue.get()
            self._asleep_until = deadline
            return self._queue.get(timeout=max(0.0, deadline - self._clock.now().monotonic))
        except queue.Empty:
            return None
        finally:
            self._asleep_until = -math.inf

    def empty(self) -> bool:
        """Check whether no message waits."""
        return self._queue.empty()


class Mailbox(TimedMailbox):
    """The server actor's mailbox: it runs a message of packets at once, in the thread that tells it.

    A hand-over to another thread costs two switches, 8-13 µs, and a packet costs 5 µs. So the thread that has read packets
    takes `core_lock` and runs the actor's code: it is the actor meanwhile, and no other thread is. The actor still handles
    one message at a time, and the messages of each thread in their order.

    If another thread is in the actor, the telling thread waits: the queue holds one message of each reader, for `CORE_WAIT`
    at most. A reader that waits reads nothing, so excess packets stay in its socket, where the kernel drops them. All other
    messages wait for the actor's own thread, as with any actor.

    Args:
        packets: the handlers of messages of packets by type. The caller of a handler holds `core_lock`. A handler returns
            the rest of a message that takes too long, or None.
    """

    def __init__(self, packets: Mapping[type, Callable[[Any], Any]]) -> None:
        super().__init__()
        self._packets = packets
        self._is_closed = False
        self.core_lock = threading.Lock()
        """Held by the thread that is in the actor."""
        self.load = Load()
        """The load of this process, as its readers see it."""
        self.patience = CORE_WAIT
        """Seconds for which packets wait for the core."""
        self.dropped = 0
        """Datagrams that waited too long for the core."""

    def put(self, envelope: Envelope, /) -> None:
        """Run a message of packets, or queue any other message."""
        message = envelope.message
        if type(message) not in self._packets:
            super().put(envelope)
            return
        while True:
            if not self.core_lock.acquire(False) and not self._wait_for_core():  # noqa: FBT003 - by name it takes twice as long
                message = self._without_late(message)
                if not message.batch:
                    return
                self.core_lock.acquire()
            try:
                message = None if self._is_closed else self._packets[type(message)](message)
            except Exception as error:  # noqa: BLE001 - the actor failed, so it has to fail in its own thread too
                message, self._is_closed = None, True
                super().put(_OwnEnvelope(Failed(error)))
            finally:
                self.core_lock.release()
            if message is None:
                return
            # What is left of a long message waits behind the messages of other threads.
            self.load.give_way()

    def handle_by(self, packets: Mapping[type, Callable[[Any], Any]]) -> None:
        """Use other handlers of messages of packets. The caller holds `core_lock`."""
        self._packets = packets

    def close(self, timeout: float) -> None:
        """Drop packets from now on, and wait until no thread runs a message: for some seconds, since the thread may hang."""
        has_lock = self.core_lock.acquire(timeout=timeout)
        self._is_closed = True
        if has_lock:
            self.core_lock.release()

    def _wait_for_core(self) -> bool:
        """Wait for as long as packets may; return whether this thread has the core."""
        self.load.waiting.append(None)
        try:
            # The holder was preempted: yielding lets it finish, and saves a context switch compared to blocking.
            for _ in range(_YIELDS):
                yield_cpu()
                if self.core_lock.acquire(blocking=False):
                    return True
            return self.core_lock.acquire(timeout=self.patience)
        finally:
            self.load.waiting.pop()

    def _without_late(self, message: ClientDatagrams | PeerDatagrams) -> ClientDatagrams | PeerDatagrams:
        kept = requests_only(message.batch) if isinstance(message, ClientDatagrams) else []
        self.dropped += sum(len(cut(data, segment_size)) for data, _, segment_size, _ in message.batch) - len(kept)
        return message._replace(batch=kept)


def depths() -> dict[str, int]:
    """Return the number of messages in the mailboxes of all actors but allocations, by the name of the class."""
    found: Counter[str] = Counter()
    for ref in pykka.ActorRegistry.get_all():
        inbox: Any = ref.actor_inbox
        found[ref.actor_class.__name__] += len(inbox) if isinstance(inbox, TimedMailbox) else inbox.qsize()
    return found
