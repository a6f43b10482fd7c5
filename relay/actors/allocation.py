"""Reads the sockets of one allocation, and closes them in the end."""

from typing import Any

import pykka

from relay.actors.actor import FailureListener
from relay.actors.inbox import ServerInbox
from relay.actors.messages import AllocationClosed, FromPeers
from relay.actors.receiving import ReceivingActor
from relay.core.addresses import AllocationId, Family, RelayedPort
from relay.core.trains import Arrival
from relay.net.receiver import Receiver
from relay.net.udp import UdpCounters, UdpSocket
from relay.ops.threads import start_light


class RelayedSockets:
    """The sockets of an allocation: one for each family, all on one port."""

    def __init__(self, hosts: dict[Family, str], port: RelayedPort, counters: UdpCounters) -> None:
        """Open and bind them, all or none.

        Raises:
            OSError: one of them can't be.
        """
        self.port = port
        self.by_family: dict[Family, UdpSocket] = {}
        try:
            for family, host in hosts.items():
                self.by_family[family] = UdpSocket(family, host, port, counters)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close them."""
        for each in self.by_family.values():
            each.close()


class AllocationActor(ReceivingActor):
    """Serves one allocation, from the moment its sockets are bound. It owns them: others may send from them."""

    def __init__(
        self,
        allocation: AllocationId,
        sockets: RelayedSockets,
        receiver: Receiver,
        server: pykka.ActorRef[Any],
        inbox: ServerInbox,
        failed: FailureListener,
    ) -> None:
        super().__init__(f"allocation-{allocation}-port-{sockets.port}", receiver, inbox, failed)
        self._allocation = allocation
        self._server = server
        self._sockets = sockets

    @classmethod
    def start(cls, *args: Any, **kwargs: Any) -> pykka.ActorRef["AllocationActor"]:  # noqa: ANN401 - as pykka has it
        """Start it without an entry in pykka's registry.

        The registry is a list that is searched for each actor that stops: with 16,384 of them that is most of what stopping
        one costs. The server actor, their supervisor, has a table of them.

        Raises:
            RuntimeError: the machine has no thread to give; the sockets are left to the caller.
        """
        actor = cls(*args, **kwargs)
        actor._start_actor_loop()
        return actor.actor_ref

    def _start_actor_loop(self) -> None:
        start_light(self._actor_loop, self.name)

    def tell(self, batch: list[Arrival]) -> None:
        """Tell the server actor of what peers sent."""
        if not self._inbox.forward_from_peer(self._allocation, batch):
            self._inbox.take(FromPeers(self._allocation, batch))

    def on_stop(self) -> None:
        """Close the sockets, and say so."""
        self._sockets.close()
        try:
            self._server.tell(AllocationClosed(self._allocation, self._sockets.port))
        except pykka.ActorDeadError:
            # Everything is being stopped.
            return
