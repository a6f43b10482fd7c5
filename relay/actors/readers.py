"""Actors that read sockets: of the port for clients, and of the relayed addresses of an allocation."""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import pykka

from relay.actors.actor import Actor, FailureListener
from relay.actors.messages import ClientDatagrams, PeerDatagrams
from relay.core.addresses import AllocationId, Family, RelayedPort
from relay.core.data import Datagram
from relay.core.overload import LOAD_CHECK_INTERVAL
from relay.net.grouping import grouped
from relay.net.receiver import Receiver
from relay.net.threads import Load, start_light, yield_cpu
from relay.net.udp import UdpCounters, UdpSocket

# Half the cost of calling a named tuple's class, which is a function in Python.
_make = tuple.__new__


class ReaderActor(Actor):
    """Reads sockets from its start until it is stopped, and tells the server actor of all datagrams.

    Its thread is in the read, not in the mailbox: stop the receiver first, and then the actor.
    """

    is_urgent = False
    """Whether its thread always may preempt the threads that relay."""

    def __init__(
        self, name: str, receiver: Receiver, server: pykka.ActorRef[Any], load: Load, failed: FailureListener
    ) -> None:
        super().__init__(name, failed)
        self._receiver = receiver
        self._server = server
        self._load = load

    def on_start(self) -> None:
        """Read until stopped. Report a failure: Pykka would only log an exception here."""
        receiver, tell, message, load = self._receiver, self._server.tell, self._message, self._load
        # Requests go first, one batch at a time: without yielding, an eager client's would keep the CPU from packets.
        is_urgent = self.is_urgent
        receiver.thread = threading.get_native_id()
        try:
            if not is_urgent:
                load.join()
            while batch := receiver.receive():
                tell(message(grouped(batch)))
                # Free the batch, or the next read would use memory that is not in the cache.
                del batch
                load.work += 1
                if not load.work % LOAD_CHECK_INTERVAL:
                    load.check()
                elif is_urgent:
                    load.give_way()
                elif load.is_high or receiver.is_behind:
                    # Let other readers go first. There is probably something to read when this thread goes on, and so it
                    # need not be put to sleep and woken up. With 500 busy allocations this saves a seventh of the CPU.
                    yield_cpu()
        except pykka.ActorDeadError:
            # The relay is being stopped.
            return
        except Exception as error:  # noqa: BLE001 - the supervisor decides
            self._failed(self.name, error)
        finally:
            receiver.thread = 0
            load.leave()

    def _message(self, batch: Sequence[Datagram]) -> ClientDatagrams | PeerDatagrams:
        raise NotImplementedError


class ListenerActor(ReaderActor):
    """Reads one socket of the port for clients. The socket outlives the actor: the server actor sends from it."""

    def _message(self, batch: Sequence[Datagram]) -> ClientDatagrams:
        return _make(ClientDatagrams, (batch, self._receiver.is_flooded))


class RequestListenerActor(ListenerActor):
    """Reads a socket for requests only. Requests are few, and users wait for their effect."""

    is_urgent = True


class RelayedSockets(NamedTuple):
    """The sockets of an allocation: one for each family, all on one port."""

    port: RelayedPort
    by_family: dict[Family, UdpSocket]

    @classmethod
    def open(cls, hosts: dict[Family, str], port: RelayedPort, counters: UdpCounters) -> Self:
        """Open and bind all sockets, or none.

        Raises:
            OSError: a socket can't be opened or bound.
        """
        with contextlib.ExitStack() as stack:
            opened = {each: stack.enter_context(UdpSocket(each, host, port, counters)) for each, host in hosts.items()}
            stack.pop_all()
        return cls(port, opened)

    def close(self) -> None:
        """Close all sockets."""
        for each in self.by_family.values():
            each.close()


class AllocationActor(ReaderActor):
    """Reads the sockets of one allocation. It owns them and closes them at its end; the server actor sends from them."""

    def __init__(
        self,
        allocation: AllocationId,
        sockets: RelayedSockets,
        receiver: Receiver,
        server: pykka.ActorRef[Any],
        load: Load,
        failed: FailureListener,
    ) -> None:
        super().__init__(f"allocation-{allocation}-port-{sockets.port}", receiver, server, load, failed)
        self._allocation = allocation
        self._sockets = sockets

    @classmethod
    def start(cls, *args: Any, **kwargs: Any) -> pykka.ActorRef["AllocationActor"]:  # noqa: ANN401 - as pykka has it
        """Start the actor without an entry in Pykka's registry.

        The registry is a list, and each actor that stops is searched for in it: with 16,384 actors, the search is most of
        the cost of a stop. The server actor, their supervisor, has a table of them.

        Raises:
            RuntimeError: the machine has no thread left; the sockets stay the caller's.
        """
        actor = cls(*args, **kwargs)
        actor._start_actor_loop()
        return actor.actor_ref

    def _start_actor_loop(self) -> None:
        start_light(self._actor_loop, self.name)

    def _message(self, batch: Sequence[Datagram]) -> PeerDatagrams:
        return _make(PeerDatagrams, (batch, self._allocation))

    def on_stop(self) -> None:
        """Close the sockets."""
        self._sockets.close()
