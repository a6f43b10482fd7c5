"""Owns the core: puts to it what the other actors tell, and carries out what it commands."""

import contextlib
import errno
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    Failed,
    FromClients,
    FromPeers,
    Tick,
)
from relay.actors.receiving import STALE_AFTER
from relay.core.addresses import AllocationId, Family, RelayedPort
from relay.core.commands import (
    OFFLOAD_COMMANDS,
    BindPort,
    Command,
    Drained,
    FreeAllocation,
    SendToClient,
    SendToPeer,
)
from relay.core.events import CORE_EVENTS, CoreEvent
from relay.core.instant import Instant
from relay.core.lifecycle import BindRefusal
from relay.core.server import Server
from relay.core.trains import Arrival
from relay.net.receiver import Receiver
from relay.net.udp import UdpCounters, UdpSocket, is_broken, name_of
from relay.ops.logs.lines import exception_words

STOP_TIMEOUT = 1.5
"""Seconds in which all allocations have to be closed at the end; the process ends without those that are not."""

CLOSE_TIMEOUT = 0.5
"""Seconds to wait for a port that is being closed and is wanted again. It takes 0.3 ms, if nothing is wrong."""

_log = structlog.get_logger("relay.actors.server")

_ADDRESS_LENGTHS = {Family.IPV4: 2, Family.IPV6: 4}

# Not EACCES and EPERM: what forbids one port of the range forbids them all, and trying each would hold everybody up.
_PORT_REFUSALS = frozenset((errno.EADDRINUSE,))


@dataclass(slots=True)
class ServerCounters:
    """What carrying out commands came to, beside what the core counts; plain integers that anyone may read at any time."""

    bind_errors: Counter[str] = field(default_factory=Counter)
    """Allocations for which sockets or a thread could not be had, by the name of the error."""
    late_sends: int = 0
    """Datagrams and trains for an allocation whose sockets were closed in the meantime."""
    udp: UdpCounters = field(default_factory=UdpCounters)
    """What the sockets themselves count."""
    faults: int = 0
    """Datagrams that the core failed on: each is a bug."""


class DataPaths(NamedTuple):
    """What relays: sockets that are open from the start, where to open more, and the kernel by itself."""

    listening: dict[Family, UdpSocket]
    """Of the port that clients talk to, by family; lent to the server actor, which does not close them."""
    bind_hosts: dict[Family, str]
    """Where the sockets of allocations are bound, by family."""
    offload: Callable[[list[Command]], None] | None = None
    """Does those of some commands that are about what the kernel relays; None if it relays nothing."""


class Serving(NamedTuple):
    """What serves one allocation."""

    actor: pykka.ActorRef[AllocationActor]
    sockets: RelayedSockets
    receiver: Receiver
    to_peers: dict[int, UdpSocket]
    """The sockets by the length of the addresses that they send to."""


class Closing(NamedTuple):
    """An allocation that is free, but whose port is not yet."""

    allocation: AllocationId
    closed: pykka.Future[bool]


class ServerActor(Actor):
    """The one place in which the core runs, and from which everything is sent; its inbox says in which thread.

    Args:
        core: the relay.
        paths: what it sends by.
        clock: stamps every input.
        counters: what it counts in.
        failed: hears of its failure.
        news: hears what matters to others.
    """

    def __init__(
        self,
        core: Server,
        paths: DataPaths,
        clock: Clock,
        counters: ServerCounters,
        failed: FailureListener,
        news: Callable[[Drained | CoreEvent], None],
    ) -> None:
        super().__init__("server", failed)
        self.core = core
        self.counters = counters
        self.inbox = cast(ServerInbox, self.actor_inbox)
        self.serving: dict[AllocationId, Serving] = {}
        self._closing: dict[RelayedPort, Closing] = {}
        self.inbox.work = self._work
        self.inbox.forward_from_client = self._forward_from_client
        self.inbox.forward_from_peer = self._forward_from_peer
        self._to_clients = by_address_length(paths.listening)
        self._bind_hosts = paths.bind_hosts
        self._offload = paths.offload
        self._clock = clock
        self._monotonic = clock.monotonic
        self._forward_to_peer = core.forward_to_peer
        self._forward_to_client = core.forward_to_client
        self._inputs: dict[type, Callable[[Any], None]] = {
            FromClients: self._take_from_clients,
            FromPeers: self._take_from_peers,
            Failed: _raise,
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
            **dict.fromkeys(CORE_EVENTS, news),
            # Done before all others of their batch.
            **dict.fromkeys(OFFLOAD_COMMANDS, lambda _: None),
        }

    @staticmethod
    def _create_actor_inbox() -> Any:  # noqa: ANN401 - pykka's protocol for it is private
        return ServerInbox()

    def on_receive(self, message: object) -> None:
        """Take one message, when no other thread is this actor."""
        with self.inbox.turn:
            self._work(message)

    def _work(self, message: object) -> None:
        """Take one message, carry out what follows from it, and set the time to be woken."""
        self._inputs[type(message)](message)
        self._carry_out()
        deadline = self.core.poll_timeout()
        if deadline != self.inbox.deadline:
            self.inbox.wake_at(deadline, self._clock)

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - what sys.exc_info() gives
        """Tell the supervisor, and leave no allocation behind."""
        super().on_failure(*failure)
        self.on_stop()

    def on_stop(self) -> None:
        """Close all allocations, within a bounded time."""
        self.inbox.close()
        waited_for = [self._close(serving) for serving in self.serving.values()]
        self.serving.clear()
        until = time.monotonic() + STOP_TIMEOUT
        for closed in (*waited_for, *(closing.closed for closing in self._closing.values())):
            try:
                closed.get(timeout=max(0.0, until - time.monotonic()))
            except pykka.Timeout:
                _log.warning("allocations not closed in time", seconds=STOP_TIMEOUT)
                return

    def _forward_from_client(self, batch: Sequence[Arrival]) -> bool:
        """Relay what arrived from one client, if that is all there is to do, and nobody is this actor at the moment.

        False says that nothing was done: it is to be told as a message. Any thread may call this.
        """
        inbox = self.inbox
        if not inbox.turn.acquire(False):  # noqa: FBT003 - by name it takes twice as long
            return False
        try:
            forwarded = None if inbox.work is None else self._forward_to_peer(batch, self._monotonic())
            if forwarded is None:
                return False
            allocation, payload, peer, segment, traffic_class = forwarded
            error = self.serving[allocation].to_peers[len(peer)].transmit(payload, peer, segment, traffic_class)
            if error is not None and is_broken(error):
                self._work(AllocationFailed(allocation, error))
        except Exception:  # noqa: BLE001 - see _note_fault
            self._note_fault()
        finally:
            inbox.turn.release()
        return True

    def _forward_from_peer(self, allocation: AllocationId, batch: Sequence[Arrival]) -> bool:
        """Relay what arrived from one peer, as `_forward_from_client` does."""
        inbox = self.inbox
        if not inbox.turn.acquire(False):  # noqa: FBT003 - by name it takes twice as long
            return False
        try:
            forwarded = None if inbox.work is None else self._forward_to_client(batch, self._monotonic(), allocation)
            if forwarded is None:
                return False
            frames, client, segment, traffic_class = forwarded
            self._to_clients[len(client)].transmit(frames, client, segment, traffic_class)
        except Exception:  # noqa: BLE001 - see _note_fault
            self._note_fault()
        finally:
            inbox.turn.release()
        return True

    def _take_from_clients(self, message: FromClients) -> None:
        arrivals, is_flood = message
        if len(arrivals) == 1:
            try:
                self.core.handle_client_arrival(arrivals[0], self._clock.now())
            except Exception:  # noqa: BLE001 - see _note_fault
                self._note_fault()
        else:
            self._take_batch(arrivals, functools.partial(self.core.handle_client_arrivals, is_flood=is_flood))

    def _take_from_peers(self, message: FromPeers) -> None:
        allocation, arrivals = message
        if len(arrivals) == 1:
            try:
                self.core.handle_peer_arrival(allocation, arrivals[0], self._clock.now())
            except Exception:  # noqa: BLE001 - see _note_fault
                self._note_fault()
        else:
            self._take_batch(arrivals, functools.partial(self.core.handle_peer_arrivals, allocation))

    def _take_batch(self, arrivals: Sequence[Arrival], handle: Callable[[Iterator[Arrival], Instant], None]) -> None:
        """Have the core take a batch, or what is left of it if it fails on something in it."""
        now = self._clock.now()
        rest = iter(arrivals)
        for _ in range(len(arrivals) + 1):
            try:
                handle(rest, now)
            except Exception:  # noqa: BLE001 - see _note_fault
                self._note_fault()
            else:
                return

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
            _log.error("allocation failed", allocation=message.allocation, error=exception_words(message.error))
        self.core.handle_allocation_failed(message.allocation, self._clock.now())

    def _forget_closed(self, message: AllocationClosed) -> None:
        closing = self._closing.get(message.port)
        if closing is not None and closing.allocation == message.allocation:
            del self._closing[message.port]

    def _carry_out(self) -> None:
        """Carry out commands until none is left; some of them are answered by an input, which may leave more."""
        outputs = self._outputs
        while commands := self.core.drain():
            if self._offload is not None:
                # First: whoever is told that a channel has ended shall find that it has.
                self._offload(commands)
            for command in commands:
                outputs[type(command)](command)

    def _send_to_client(self, command: SendToClient) -> None:
        data, client, segment, traffic_class = command
        self._to_clients[len(client)].transmit(data, client, segment, traffic_class)

    def _send_to_peer(self, command: SendToPeer) -> None:
        allocation, data, peer, segment, traffic_class = command
        serving = self.serving.get(allocation)
        if serving is None:
            self.counters.late_sends += 1
            return
        error = serving.to_peers[len(peer)].transmit(data, peer, segment, traffic_class)
        if error is not None and is_broken(error):
            self._take_failure(AllocationFailed(allocation, error))

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
        sockets = RelayedSockets(
            {family: self._bind_hosts[family] for family in command.families}, command.port, self.counters.udp
        )
        receiver = Receiver(tuple(sockets.by_family.values()), stale_after=STALE_AFTER)

        def failed(_: str, error: BaseException) -> None:
            with contextlib.suppress(pykka.ActorDeadError):
                self.actor_ref.tell(AllocationFailed(command.allocation, error))

        try:
            actor = AllocationActor.start(command.allocation, sockets, receiver, self.actor_ref, self.inbox, failed)
        except BaseException:
            sockets.close()
            raise
        return Serving(actor, sockets, receiver, by_address_length(sockets.by_family))

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


def by_address_length(sockets: Mapping[Family, UdpSocket]) -> dict[int, UdpSocket]:
    """Give sockets by the length of the addresses of their family: a packet's tells which one, for the price of a len()."""
    return {_ADDRESS_LENGTHS[family]: each for family, each in sockets.items()}


def _name(error: OSError | RuntimeError) -> str:
    return name_of(error) if isinstance(error, OSError) else type(error).__name__


def _raise(message: Failed) -> None:
    """Fail in the actor's own thread of what it failed of in another one: so pykka and the supervisor hear of it."""
    raise message.error
