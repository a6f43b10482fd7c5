"""An actor whose thread reads sockets."""

from relay.actors.actor import Actor, FailureListener
from relay.actors.inbox import ServerInbox
from relay.core.trains import Arrival
from relay.net.receiver import Receiver
from relay.ops.threads import LOOK_EVERY, yield_cpu, yield_to_others

STALE_AFTER = 1.0
"""Seconds after which packets that wait in a socket are not relayed any more. An overload has them wait for some 10 ms
(`relay.net.backlog`); so nobody has run for that long: the process was stopped, or its machine. What was sent then has been
sent again or given up, and to relay megabytes of it would have everything new find no room."""


class ReceivingActor(Actor):
    """Reads sockets from its start until it is stopped, and tells the server actor of what arrives.

    Its thread is in the read, not in the inbox: so stop the receiver first, and then the actor.
    """

    is_urgent = False
    """Whether its thread may take the CPU from those that relay."""

    def __init__(self, name: str, receiver: Receiver, inbox: ServerInbox, failed: FailureListener) -> None:
        super().__init__(name, failed)
        self._receiver = receiver
        self._inbox = inbox

    def on_start(self) -> None:
        """Read until stopped. Pykka would log an error here and tell nobody, so it is told here."""
        if not self.is_urgent:
            yield_to_others()
        receiver, tell, load = self._receiver, self.tell, self._inbox.load
        try:
            while batch := receiver.receive():
                tell(batch)
                # What a batch took is for the next one: else each read would use memory that is not in the cache.
                del batch
                load.work += 1
                if not load.work % LOOK_EVERY:
                    load.look()
                elif load.is_high or receiver.is_behind:
                    # Others go first. When it is this thread's turn again there is something to read, most often: then it
                    # need not be put to sleep and woken up. With 500 busy allocations that saves a seventh of the CPU.
                    yield_cpu()
        except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor decides
            self._failed(self.name, error)

    def tell(self, batch: list[Arrival]) -> None:
        """Tell the server actor of what arrived."""
        raise NotImplementedError
