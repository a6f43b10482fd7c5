"""Reads the port that clients talk to."""

from typing import NamedTuple

from relay.actors.messages import FromClients
from relay.actors.receiving import ReceivingActor
from relay.net.udp import Datagram


class ListenerActor(ReceivingActor):
    """Reads one socket of the port that clients talk to. The socket outlives it: the server actor sends from it."""

    def message(self, batch: list[Datagram]) -> NamedTuple:
        """Put what clients sent into a message."""
        return FromClients(batch)
