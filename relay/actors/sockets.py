"""The sockets of allocations, each with its reader: opened, inherited and closed here only."""

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Self

import pykka

from relay.actors.messages import AllocationFailed
from relay.actors.readers import AllocationActor, RelayedSockets
from relay.core.addresses import AllocationId, Family, RelayedPort
from relay.core.overload import STALE_AFTER
from relay.net.receiver import Receiver
from relay.net.threads import Load
from relay.net.udp import UdpSocket

_ADDRESS_LENGTHS = {Family.IPV4: 2, Family.IPV6: 4}


class AllocationHandle(NamedTuple):
    """The actor and the sockets of one allocation."""

    actor: pykka.ActorRef[AllocationActor] | None
    """None while `InheritedReader` reads the sockets."""
    sockets: RelayedSockets
    receiver: Receiver
    to_peers: dict[int, UdpSocket]
    """The sockets by the length of the addresses that they send to."""

    @classmethod
    def of(cls, sockets: RelayedSockets) -> Self:
        """Return the handle of sockets that no actor reads yet."""
        receiver = Receiver(tuple(sockets.by_family.values()), stale_after=STALE_AFTER)
        return cls(None, sockets, receiver, by_address_length(sockets.by_family))


class AllocationSockets:
    """All handles. Only the server actor uses them.

    Args:
        server: receives the datagrams of all allocations.
        load: the load of this process.
        inherited: the allocations that a predecessor handed over, which another thread reads.
    """

    def __init__(self, server: pykka.ActorRef[Any], load: Load, inherited: Mapping[AllocationId, AllocationHandle]) -> None:
        self._server = server
        self._load = load
        self.by_id = dict(inherited)
        self._inherited = self.by_id.copy()
        """Allocations without a reader of their own."""
        self._closing: dict[RelayedPort, pykka.Future[bool]] = {}
        """Ports of ended allocations whose sockets may be open still."""

    @property
    def are_inherited(self) -> bool:
        """Whether another thread reads sockets of some allocations."""
        return bool(self._inherited)

    def add(self, id_: AllocationId, sockets: RelayedSockets) -> None:
        """Start the actor of an allocation.

        Raises:
            RuntimeError: a thread can't be started. The sockets are closed.
        """
        self.by_id[id_] = self._start_reader(id_, AllocationHandle.of(sockets))

    def start_readers(self, allocations: Collection[AllocationId]) -> Iterator[AllocationFailed]:
        """Start a reader for each of these inherited allocations, or close its sockets. Return the failures."""
        for id_ in allocations:
            handle = self._inherited.pop(id_)
            if id_ not in self.by_id:
                handle.sockets.close()
                continue
            try:
                self.by_id[id_] = self._start_reader(id_, handle)
            except RuntimeError as error:
                yield AllocationFailed(id_, error)

    def wait_for(self, port: RelayedPort, timeout: float) -> None:
        """Wait for some seconds until the former sockets of a port are closed."""
        closed = self._closing.get(port)
        if closed is not None and _is_closed(closed, timeout):
            del self._closing[port]

    def close(self, id_: AllocationId) -> None:
        """Close the sockets of an allocation, in the thread of its actor."""
        handle = self.by_id.pop(id_, None)
        if handle is None or handle.actor is None:
            # `start_readers` closes inherited sockets, which another thread reads.
            return
        # Old ports are closed by now, so only the ports of the last moments are kept.
        while self._closing and _is_closed(self._closing[oldest := next(iter(self._closing))], 0):
            del self._closing[oldest]
        self._closing[handle.sockets.port] = _stop(handle)

    def close_all(self, timeout: float) -> bool:
        """Close all sockets. Return whether they are closed within some seconds."""
        for inherited in self._inherited.values():
            inherited.sockets.close()
        waited_for = [*self._closing.values(), *(_stop(each) for each in self.by_id.values() if each.actor is not None)]
        self.by_id.clear()
        until = time.monotonic() + timeout
        return all(_is_closed(each, until - time.monotonic()) for each in waited_for)

    def _start_reader(self, id_: AllocationId, handle: AllocationHandle) -> AllocationHandle:
        def failed(_: str, error: BaseException) -> None:
            with contextlib.suppress(pykka.ActorDeadError):
                self._server.tell(AllocationFailed(id_, error))

        try:
            actor = AllocationActor.start(id_, handle.sockets, handle.receiver, self._server, self._load, failed)
        except BaseException:
            handle.sockets.close()
            raise
        return handle._replace(actor=actor)


def by_address_length(sockets: Mapping[Family, UdpSocket]) -> dict[int, UdpSocket]:
    """Return sockets by the length of their family's addresses: a look-up costs a packet no more than a len()."""
    return {_ADDRESS_LENGTHS[family]: each for family, each in sockets.items()}


def _stop(handle: AllocationHandle) -> pykka.Future[bool]:
    """Stop an allocation's actor, which closes the sockets; return a future of that."""
    assert handle.actor is not None  # noqa: S101 - inherited sockets are closed otherwise
    handle.receiver.stop()
    return handle.actor.stop(block=False)


def _is_closed(closed: pykka.Future[bool], timeout: float) -> bool:
    """Wait for some seconds until an allocation's sockets are closed; return whether they are."""
    try:
        closed.get(timeout=max(0.0, timeout))
    except pykka.Timeout:
        return False
    return True
