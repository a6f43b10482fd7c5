"""Owns the core: puts to it what the other actors tell, and carries out what it commands."""

import contextlib
import errno
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import pykka
import structlog

from relay.actors.actor import Actor, FailureListener
from relay.actors.allocation import AllocationActor, RelayedSockets
from relay.actors.clock import Clock
from relay.actors.inbox import ServerInbox
from relay.actors.messages import (
    AllocationClosed,
    AllocationFailed,
    AreYouThere,
    Drain,
    FromClients,
    FromPeers,
    Tick,
)
from relay.core.addresses import AllocationId, ClientAddress, Family, PeerAddress, RelayedPort, family_of
from relay.core.commands import BindPort, Drained, FreeAllocation, SendToClient, SendToPeer
from relay.core.lifecycle import BindRefusal
from relay.core.server import Server
from relay.net.udp import Receiver, is_broken, send

STOP_TIMEOUT = 1.5
"""Seconds in which all allocations have to be closed at the end; the process ends without those that are not."""

CLOSE_TIMEOUT = 0.5
"""Seconds to wait for a port that is being closed and is wanted again. It takes 0.3 ms, if nothing is wrong."""

_log = structlog.get_logger("relay.actors.server")

# Not EACCES and EPERM: what forbids one port of the range forbids them all, and trying each would hold everybody up.
_PORT_REFUSALS = frozenset((errno.EADDRINUSE,))


@dataclass(slots=True)
class SocketCounters:
    """What sockets did, beside what the core counts; plain integers that anyone may read at any time."""

    send_errors: Counter[str] = field(default_factory=Counter)
    """Datagrams that the kernel refused to send, by the name of the error."""
    bind_errors: Counter[str] = field(default_factory=Counter)
    """Allocations for which sockets or a thread could not be had, by the name of the error."""
    late_sends: int = 0
    """Datagrams for an allocation whose sockets were closed in the meantime."""
    faults: int = 0
    """Datagrams that the core failed on: each is a bug."""


class ServiceSockets(NamedTuple):
    """What is open from the start, and where to open more."""

    listening: dict[Family, socket.socket]
    """Of the port that clients talk to, by family; lent to the server actor, which does not close them."""
    bind_hosts: dict[Family, str]
    """Where the sockets of allocations are bound, by family."""


class Serving(NamedTuple):
    """What serves one allocation."""

    actor: pykka.ActorRef[AllocationActor]
    sockets: RelayedSockets
    receiver: Receiver


class Closing(NamedTuple):
    """An allocation that is free, but whose port is not yet."""

    allocation: AllocationId
    closed: pykka.Future[bool]


class ServerActor(Actor):
    """The one thread in which the core runs, and from which everything is sent.

    Args:
        core: the relay.
        sockets: what it sends from.
        clock: stamps every input.
        counters: what it counts in.
        failed: hears of its failure.
        news: hears what matters to others.
    """

    def __init__(
        self,
        core: Server,
        sockets: ServiceSockets,
        clock: Clock,
        counters: SocketCounters,
        failed: FailureListener,
        news: Callable[[Drained], None],
    ) -> None:
        super().__init__("server", failed)
        self.core = core
        self.counters = counters
        self.inbox = cast(ServerInbox, self.actor_inbox)
        self.serving: dict[AllocationId, Serving] = {}
        self._closing: dict[RelayedPort, Closing] = {}
        self._listening = sockets.listening
        self._bind_hosts = sockets.bind_hosts
        self._clock = clock
        self._inputs: dict[type, Callable[[Any], None]] = {
            FromClients: self._take_from_clients,
            FromPeers: self._take_from_peers,
            Tick: self._tick,
            AllocationFailed: self._take_failure,
            AllocationClosed: self._forget_closed,
            Drain: lambda _: core.handle_drain(clock.now()),
            # That the message is worked off is the answer.
            AreYouThere: lambda _: None,
        }
        self._outputs: dict[type, Callable[[Any], None]] = {
            SendToClient: self._send_to_client,
            SendToPeer: self._send_to_peer,
            BindPort: self._bind_port,
            FreeAllocation: self._free_allocation,
            Drained: news,
        }

    @staticmethod
    def _create_actor_inbox() -> Any:  # noqa: ANN401 - pykka's protocol for it is private
        return ServerInbox()

    def on_receive(self, message: object) -> None:
        """Take one message, carry out what follows from it, and set the time to be woken."""
        self._inputs[type(message)](message)
        self._carry_out()
        self.inbox.wake_at(self.core.poll_timeout(), self._clock)

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - what sys.exc_info() gives
        """Tell the supervisor, and leave no allocation behind."""
        super().on_failure(*failure)
        self.on_stop()

    def on_stop(self) -> None:
        """Close all allocations, within a bounded time."""
        waited_for = [self._close(serving) for serving in self.serving.values()]
        self.serving.clear()
        until = time.monotonic() + STOP_TIMEOUT
        for closed in (*waited_for, *(closing.closed for closing in self._closing.values())):
            try:
                closed.get(timeout=max(0.0, until - time.monotonic()))
            except pykka.Timeout:
                _log.warning("allocations not closed in time", seconds=STOP_TIMEOUT)
                return

    def _take_from_clients(self, message: FromClients) -> None:
        self.inbox.release(message.datagrams)
        now = self._clock.now()
        take = self.core.handle_client_datagram
        for data, client in message.datagrams:
            try:
                take(data, ClientAddress(client), now)
            except Exception:  # noqa: BLE001 - see _note_fault
                self._note_fault()

    def _take_from_peers(self, message: FromPeers) -> None:
        self.inbox.release(message.datagrams)
        now = self._clock.now()
        take = self.core.handle_peer_datagram
        for data, peer in message.datagrams:
            try:
                take(message.allocation, data, PeerAddress(peer), now)
            except Exception:  # noqa: BLE001 - see _note_fault
                self._note_fault()

    def _note_fault(self) -> None:
        """Survive a datagram that the core failed on.

        It is a bug, and a reason to fix it; but no reason to let whoever found it end everybody's sessions. The log has the
        first one with its stack, the counter has all.
        """
        self.counters.faults += 1
        if self.counters.faults == 1:
            _log.exception("the core failed on a datagram: please report this; further ones are only counted")

    def _tick(self, _: Tick) -> None:
        self.core.handle_timeout(self._clock.now())

    def _take_failure(self, message: AllocationFailed) -> None:
        if message.allocation in self.serving:
            _log.error("allocation failed", allocation=message.allocation, error=str(message.error))
        self.core.handle_allocation_failed(message.allocation, self._clock.now())

    def _forget_closed(self, message: AllocationClosed) -> None:
        closing = self._closing.get(message.port)
        if closing is not None and closing.allocation == message.allocation:
            del self._closing[message.port]

    def _carry_out(self) -> None:
        """Carry out commands until none is left; some of them are answered by an input, which may leave more."""
        outputs = self._outputs
        while commands := self.core.drain():
            for command in commands:
                outputs[type(command)](command)

    def _send_to_client(self, command: SendToClient) -> None:
        error = send(self._listening[family_of(command.client)], command.data, command.client)
        if error is not None:
            self.counters.send_errors[_name(error)] += 1

    def _send_to_peer(self, command: SendToPeer) -> None:
        serving = self.serving.get(command.allocation)
        if serving is None:
            self.counters.late_sends += 1
            return
        error = send(serving.sockets.by_family[family_of(command.peer)], command.data, command.peer)
        if error is not None:
            self.counters.send_errors[_name(error)] += 1
            if is_broken(error):
                self._take_failure(AllocationFailed(command.allocation, error))

    def _bind_port(self, command: BindPort) -> None:
        closing = self._closing.get(command.port)
        if closing is not None:
            self._wait_for(closing.closed)
        try:
            self.serving[command.allocation] = self._serve(command)
        except (OSError, RuntimeError) as error:
            self._report_refusal(command, error)
        else:
            self.core.handle_bound(command.allocation, self._clock.now())

    def _serve(self, command: BindPort) -> Serving:
        """Bind the sockets of an allocation and start its actor.

        Raises:
            OSError: a socket can't be opened or bound.
            RuntimeError: a thread can't be started.
        """
        sockets = RelayedSockets({family: self._bind_hosts[family] for family in command.families}, command.port)
        receiver = Receiver(tuple(sockets.by_family.values()))

        def failed(_: str, error: BaseException) -> None:
            with contextlib.suppress(pykka.ActorDeadError):
                self.actor_ref.tell(AllocationFailed(command.allocation, error))

        try:
            actor = AllocationActor.start(command.allocation, sockets, receiver, self.actor_ref, self.inbox, failed)
        except BaseException:
            sockets.close()
            raise
        return Serving(actor, sockets, receiver)

    def _report_refusal(self, command: BindPort, error: OSError | RuntimeError) -> None:
        self.counters.bind_errors[_name(error)] += 1
        port_refused = isinstance(error, OSError) and error.errno in _PORT_REFUSALS
        if port_refused:
            _log.debug("port refused", port=command.port, error=str(error))
        elif self.counters.bind_errors[_name(error)] == 1:
            _log.error("no sockets for allocations; further failures are only counted", error=str(error))
        self.core.handle_bind_refused(
            command.allocation, BindRefusal.PORT if port_refused else BindRefusal.MACHINE, self._clock.now()
        )

    def _free_allocation(self, command: FreeAllocation) -> None:
        serving = self.serving.pop(command.allocation, None)
        if serving is None:
            return
        self._closing[serving.sockets.port] = Closing(command.allocation, self._close(serving))
        _log.debug("allocation freed", allocation=command.allocation, reason=command.reason)

    def _close(self, serving: Serving) -> pykka.Future[bool]:
        """Let an allocation's actor close its sockets; give what to wait for."""
        serving.receiver.stop()
        return serving.actor.stop(block=False)

    def _wait_for(self, closed: pykka.Future[bool]) -> None:
        try:
            closed.get(timeout=CLOSE_TIMEOUT)
        except pykka.Timeout:
            # The bind will say that the port is in use, and another one is tried.
            return


def _name(error: OSError | RuntimeError) -> str:
    """Give the name of an error for counting: one of errno's few."""
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, "unknown")
    return type(error).__name__
