"""Reads the port that clients talk to."""

from relay.actors.messages import FromClients
from relay.actors.receiving import ReceivingActor
from relay.core.trains import Arrival


class ListenerActor(ReceivingActor):
    """Reads one socket of the port that clients talk to. The socket outlives it: the server actor sends from it."""

    def tell(self, batch: list[Arrival]) -> None:
        """Tell the server actor of what clients sent."""
        if not self._inbox.forward_from_client(batch):
            self._inbox.take(FromClients(batch, self._receiver.is_flooded))


class RequestListenerActor(ListenerActor):
    """Reads a socket that gets requests only. They are few, and others wait for what they bring about."""

    is_urgent = True

    def tell(self, batch: list[Arrival]) -> None:
        """Tell the server actor of what clients ask."""
        self._inbox.take(FromClients(batch, self._receiver.is_flooded))
