"""Both ends of a handover at the server actor: the last moments of a relay, and the first moments of its successor."""

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import pykka

from relay.actors.actor import Actor, FailureListener
from relay.actors.messages import ClientDatagrams, PeerDatagrams
from relay.core.addresses import AllocationId
from relay.core.commands import Command, SendToClient, SendToPeer
from relay.core.data import CHANNEL_DATA_FIRST_BYTES, Datagram
from relay.core.server import Server
from relay.net.grouping import grouped
from relay.net.many import ManyReceiver
from relay.net.threads import Load

MOST_HELD: Final = 4096
"""Datagrams that wait for the outcome of a handover: requests of half a second."""

_LOOK: Final = 0.05
"""Seconds between two looks at whether the predecessor has left."""

_PORTION: Final = 64
"""Allocations that get a thread at once: 4 ms."""


class FrozenRelay:
    """Relays packets of established channels by tables without a future, and holds all further input.

    The successor has the same tables and handles the same deadlines. So the effect of deadlines on these tables has no
    consequence, and their commands wait: they are carried out only if this relay goes on.

    Args:
        core: the tables.
        clock: returns monotonic seconds.
        send: sends packets of channels.
    """

    def __init__(self, core: Server, clock: Callable[[], float], send: Callable[[SendToClient | SendToPeer], None]) -> None:
        self._core = core
        self._clock = clock
        self._send = send
        self.requests: list[Datagram] = []
        """Requests, and data without a channel."""
        self.messages: list[object] = []
        """Messages of actors."""
        self.commands: list[Command] = []
        """Commands of deadlines."""
        self.handlers: Mapping[type, Callable[[Any], None]] = {
            ClientDatagrams: self._relay_to_peers,
            PeerDatagrams: self._relay_to_clients,
        }

    def _relay_to_peers(self, message: ClientDatagrams) -> None:
        now = self._clock()
        for datagram in message.batch:
            if not self._core.relay(datagram, now) and len(self.requests) < MOST_HELD:
                self.requests.append(datagram)
            self._carry_out()

    def _relay_to_clients(self, message: PeerDatagrams) -> None:
        now = self._clock()
        for datagram in message.batch:
            command = self._core.handle_peer_datagram(datagram, now, message.allocation)
            if command is not None:
                self._send(command)
            self._carry_out()

    def _carry_out(self) -> None:
        for command in self._core.drain():
            if isinstance(command, SendToPeer) or (
                isinstance(command, SendToClient) and command.data[0] in CHANNEL_DATA_FIRST_BYTES
            ):
                self._send(command)
            else:
                self.commands.append(command)


class InheritedReader(Actor):
    """Reads all sockets that a predecessor handed over, until each socket has a thread of its own.

    Thousands of threads take seconds to start, and must not start before the threads of the predecessor have left.

    Args:
        receiver: the sockets of each allocation, and of the port for clients (None).
        server: receives all datagrams.
        load: the load of this process.
        failed: is told of a failure.
        leave: is called with allocations that are no longer read here, then with None for the port for clients.
    """

    def __init__(
        self,
        receiver: ManyReceiver[AllocationId | None],
        server: pykka.ActorRef[Any],
        load: Load,
        failed: FailureListener,
        leave: Callable[[Collection[AllocationId] | None], None],
    ) -> None:
        super().__init__("inherited sockets", failed)
        self._receiver = receiver
        self._server = server
        self._load = load
        self._leave = leave
        self._may_leave = threading.Event()

    def begin(self) -> None:
        """Start the thread."""
        self._start_actor_loop()

    def predecessor_left(self) -> None:
        """Give each socket a thread of its own from now on. Any thread may call this."""
        self._may_leave.set()

    def on_start(self) -> None:
        """Read until all sockets have left."""
        receiver, tell = self._receiver, self._server.tell
        self._load.join()
        try:
            while len(receiver):
                may_leave = self._may_leave.is_set()
                for id_, batch in receiver.receive(0 if may_leave else _LOOK):
                    arrived = grouped(batch)
                    tell(ClientDatagrams(arrived) if id_ is None else PeerDatagrams(arrived, id_))
                if may_leave:
                    self._pass_on()
        except pykka.ActorDeadError:
            return
        except Exception as error:  # noqa: BLE001 - the supervisor decides
            self._failed(self.name, error)
        finally:
            self._load.leave()
            receiver.close()

    def _pass_on(self) -> None:
        """Let some allocations leave, and the port for clients as the last."""
        some = [each for each in self._receiver.some(_PORTION + 1) if each is not None]
        for id_ in some or (None,):
            self._receiver.remove(id_)
        self._leave(some or None)
