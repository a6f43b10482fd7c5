"""An actor whose thread reads sockets."""

from typing import Any, NamedTuple

import pykka

from relay.actors.actor import Actor, FailureListener
from relay.actors.inbox import ServerInbox
from relay.net.udp import Datagram, Receiver


class ReceivingActor(Actor):
    """Reads sockets from its start until it is stopped, and tells the server actor of what arrives.

    Its thread is in the read, not in the inbox: so stop the receiver first, and then the actor.
    """

    def __init__(
        self, name: str, receiver: Receiver, server: pykka.ActorRef[Any], inbox: ServerInbox, failed: FailureListener
    ) -> None:
        super().__init__(name, failed)
        self._receiver = receiver
        self._server = server
        self._inbox = inbox

    def on_start(self) -> None:
        """Read until stopped. Pykka would log an error here and tell nobody, so it is told here."""
        try:
            while batch := self._receiver.receive():
                self._hand_over(batch)
        except pykka.ActorDeadError:
            # The server actor is gone; whoever stopped it stops this one.
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor decides
            self._failed(self.name, error)

    def message(self, batch: list[Datagram]) -> NamedTuple:
        """Put what arrived into a message to the server actor."""
        raise NotImplementedError

    def _hand_over(self, batch: list[Datagram]) -> None:
        if self._inbox.admit(batch):
            self._server.tell(self.message(batch))
