"""Inboxes that wake their reader when the next deadline of a core comes; and that of the server actor, where packets go."""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from relay.actors.clock import Clock
from relay.actors.messages import Failed, FromClients, FromPeers, Tick
from relay.core.addresses import AllocationId
from relay.core.stun import is_stun
from relay.core.trains import Arrival
from relay.ops.threads import Load, yield_cpu

LONGEST_WAIT = 0.020
"""Seconds for which packets may wait until the server actor takes them. Packets that are late are worth little to whoever
they are for, and hold up those behind them."""


CLOSE_TIMEOUT = 1.0
"""Seconds to wait, at the end, for who works on packets: a batch takes some milliseconds."""


class Envelope(Protocol):
    """What pykka puts around a message."""

    message: Any
    reply_to: Any


class _Letter:
    """The envelope of a message that did not come by way of pykka."""

    reply_to = None

    def __init__(self, message: object) -> None:
        self.message = message


Packets: TypeAlias = FromClients | FromPeers
"""Messages that are about packets."""

_TRIES = 8
"""Times that a thread lets others have the CPU before it waits for its turn in the queue of a lock."""

_TICKED = _Letter(Tick())


class TimedInbox:
    """A queue that gives a `Tick` when the deadline passes while it is empty.

    So the thread that waits for messages is the timer too: there is no second one to wake, and nothing polls. While
    messages do come, no Tick is needed, since each input of a core does first what is due.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
        self._clock: Clock | None = None
        self.deadline: float | None = None
        """Monotonic time at which `get` gives a Tick."""
        self._asleep_until = -math.inf
        """The deadline that `get` knows of while it waits."""
        self._since: deque[float] = deque()
        """When each message that waits was added, in monotonic seconds, and that in hand. Packets are none of them."""
        self._is_in_hand = False
        """Whether a message was taken and may still be worked on, or wait for its turn."""

    def __len__(self) -> int:
        return self._queue.qsize()

    def age(self, now: float) -> float:
        """Give for how many seconds the oldest message is there, at ``now``; until it is done with. 0 if there is none."""
        try:
            return max(0.0, now - self._since[0])
        except IndexError:
            return 0.0

    def wake_at(self, deadline: float | None, clock: Clock) -> None:
        """Set when `get` is to give a Tick, in monotonic seconds of ``clock``; any thread may, one at a time."""
        self._clock = clock
        self.deadline = deadline
        if deadline is not None and deadline < self._asleep_until:
            # Whoever waits has to wait less long: it looks again after any message.
            TimedInbox.put(self, _TICKED)

    def put(self, envelope: Envelope, /) -> None:
        """Add a message; never waits."""
        self._since.append(time.monotonic())
        self._queue.put(envelope)

    def get(self) -> Envelope:
        """Wait for a message or for the deadline. Whoever asks for one is done with the last."""
        if self._is_in_hand:
            self._is_in_hand = False
            self._since.popleft()
        envelope = self._get()
        if envelope is None:
            return _TICKED
        self._is_in_hand = True
        return envelope

    def _get(self) -> Envelope | None:
        """Wait for a message; None at the deadline."""
        # First this, and then the look at the deadline: a change in between is seen by one side or the other.
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
        """Tell whether nothing waits."""
        return self._queue.empty()


class ServerInbox(TimedInbox):
    """The server actor's. A message about packets never waits in it: whoever tells it does the actor's work on it, at once.

    To hand a batch to another thread costs two switches, 8–13 µs: as much as to relay it. So a thread that has read packets
    takes the actor's turn: it is the actor while it works on its message, and nobody else is. What the actor does is the
    same, one message at a time, in the order in which each thread tells its own; only the thread it is done in is not.

    So no packets pile up here: each reader has one batch in hand, and what it has not read waits in its socket, where the
    kernel drops what there is no room for. All other messages wait for the actor's own thread, as with any actor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn = threading.Lock()
        """Held by the thread that is the actor at the moment."""
        self.work: Callable[[Packets], None] | None = None
        """What the actor does with a message about packets; set by the actor. None drops them."""
        self.forward_from_client: Callable[[Sequence[Arrival]], bool] = lambda _: False
        self.forward_from_peer: Callable[[AllocationId, Sequence[Arrival]], bool] = lambda _, __: False
        """Relay a batch at once, if nothing but that is to be done and it is nobody's turn; also set by the actor. False
        says that nothing was done, and that the batch is to be told as a message."""
        self.load = Load()
        """Of this process, as its readers see it."""
        self.dropped = 0
        """Datagrams and trains that had to wait too long for the turn. Requests are never dropped."""

    def put(self, envelope: Envelope, /) -> None:
        """Work on a message about packets, when it is this thread's turn; add any other message, without waiting."""
        if isinstance(envelope.message, FromPeers | FromClients):
            self.take(envelope.message)
        else:
            super().put(envelope)

    def take(self, message: Packets) -> None:
        """Work on a message about packets as soon as it is this thread's turn: as if it were told, but cheaper."""
        if not self.turn.acquire(blocking=False) and not self._wait_for_turn():
            message = self._without_late(message)
            if not message.arrivals:
                return
            self.turn.acquire()
        try:
            if self.work is not None:
                self.work(message)
        except Exception as error:  # noqa: BLE001 - the actor failed, so it has to fail in its own thread too
            self.work = None
            super().put(_Letter(Failed(error)))
        finally:
            self.turn.release()

    def close(self) -> None:
        """Let in no more packets, and wait until nobody works on any; not for long, since whoever does may hang."""
        has_turn = self.turn.acquire(timeout=CLOSE_TIMEOUT)
        self.work = None
        if has_turn:
            self.turn.release()

    def _wait_for_turn(self) -> bool:
        """Wait for as long as packets may; False if that was in vain."""
        # Whoever has it was interrupted: it goes on when this thread lets it. To wait in a queue would cost a switch more.
        for _ in range(_TRIES):
            yield_cpu()
            if self.turn.acquire(blocking=False):
                return True
        return self.turn.acquire(timeout=LONGEST_WAIT)

    def _without_late(self, message: Packets) -> Packets:
        kept = [arrival for arrival in message.arrivals if type(message) is FromClients and is_stun(arrival[0])]
        self.dropped += len(message.arrivals) - len(kept)
        return message._replace(arrivals=kept)
