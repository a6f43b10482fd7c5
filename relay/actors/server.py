"""Owns the core: passes the messages of other actors to it, and carries out its commands."""

import errno
import gc
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from relay.actors.actor import Actor, FailureListener
from relay.actors.handover import FrozenRelay
from relay.actors.mailbox import Mailbox
from relay.actors.messages import (
    AllocationFailed,
    ClientDatagrams,
    Drain,
    Execute,
    Failed,
    Kick,
    OwnAddresses,
    PeerDatagrams,
    Ping,
    Resume,
    Tick,
)
from relay.actors.readers import RelayedSockets
from relay.actors.sockets import AllocationHandle, AllocationSockets, by_address_length
from relay.config import Timeouts
from relay.core.addresses import AllocationId, Family
from relay.core.commands import (
    OFFLOAD_COMMANDS,
    BindPort,
    Command,
    Drained,
    FreeAllocation,
    HandIn,
    SendToClient,
    SendToPeer,
)
from relay.core.data import Datagram
from relay.core.events import CORE_EVENTS, CoreEvent
from relay.core.lifecycle import BindRefusal
from relay.core.overload import CORE_WAIT, HANDOVER_WAIT, TURN
from relay.core.server import Server
from relay.logger import Logger
from relay.net.threads import yield_cpu
from relay.net.udp import UdpSocket, is_broken, name_of
from relay.ops.clock import Clock
from relay.ops.logs.render import exception_words
from relay.ops.totals import ServerCounters

STOP_TIMEOUT = 1.5
"""Seconds in which all allocations have to be closed at the end; then the process ends anyway."""

FREEZE_EVERY = 4096
_CHANNELS_OF_ALLOCATION = 16
"""Channels, or a sixteenth as many allocations, after which the garbage collector need not look at what is in memory any
more. With 250,000 channels a full collection would stop everything for 60 ms, and neither channels nor allocations leave
reference cycles."""

_log = Logger("relay.actors.server")

# Not EACCES and EPERM: a rule that forbids one port forbids them all, and trying each port would delay all clients.
_PORT_REFUSALS = frozenset((errno.EADDRINUSE,))


class DataPaths(NamedTuple):
    """The sockets for clients, the hosts for sockets of allocations, and the kernel's data path."""

    listening: dict[Family, UdpSocket]
    """The sockets of the port for clients, by family. The server actor does not close them."""
    bind_hosts: Mapping[Family, str]
    """The hosts to which sockets of allocations are bound, by family."""
    offload: Callable[[list[Command]], None] | None = None
    """Carries out the commands for the kernel's data path; None without offload."""
    timeouts: Timeouts = Timeouts()
    inherited: Mapping[AllocationId, AllocationHandle] = MappingProxyType({})
    """The allocations that a predecessor handed over."""


class ServerActor(Actor):
    """The only place in which the core runs and from which everything is sent; `Mailbox` decides in which thread.

    The function ``news`` gets the commands that are for other parts of the relay.
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
        self._mailbox = cast(Mailbox, self.actor_inbox)
        self._sockets = AllocationSockets(self.actor_ref, self._mailbox.load, paths.inherited)
        self.allocations = self._sockets.by_id
        if paths.inherited:
            self._mailbox.patience = HANDOVER_WAIT
        self._frozen: FrozenRelay | None = None
        """Set from the last look of a successor until the outcome of the handover."""
        self._is_retired = False
        self._listening = paths.listening
        self._to_clients = by_address_length(paths.listening)
        self._bind_hosts = paths.bind_hosts
        self._offload = paths.offload
        self._timeouts = paths.timeouts
        self._clock = clock
        # Bound once, because each packet would pay for the look-ups.
        self._relay_to_peer = core.relay_to_peer
        self._handle_peer_datagram = core.handle_peer_datagram
        self._commands = core.commands
        self._monotonic = clock.monotonic
        self._rest: list[Datagram] = []
        """Datagrams of the current message that are left for the next turn."""
        self._freeze_at = FREEZE_EVERY
        self._inputs: dict[type, Callable[[Any], object]] = {
            Failed: _raise,
            Tick: lambda _: core.handle_timeout(clock.now()),
            AllocationFailed: self._fail_allocation,
            Kick: lambda kick: core.handle_kick(kick.allocation, clock.now()),
            OwnAddresses: self._follow_addresses,
            Drain: lambda _: core.handle_drain(clock.now()),
            Execute: lambda message: message.function(self),
            Resume: lambda _: core.handle_resume(clock.now()),
            Ping: lambda _: None,
        }
        self._outputs: dict[type, Callable[[Any], None]] = {
            SendToClient: self._send_to_client,
            SendToPeer: self._send_to_peer,
            BindPort: self._bind_port,
            FreeAllocation: lambda command: self._sockets.close(command.allocation),
            Drained: news,
            HandIn: self._hand_in,
            **dict.fromkeys(CORE_EVENTS, news),
            # Carried out before all other commands.
            **dict.fromkeys(OFFLOAD_COMMANDS, lambda _: None),
        }

    def _create_actor_inbox(self) -> Any:  # type: ignore[override]  # noqa: ANN401 - static in Pykka, whose type is private
        self._packets: dict[type, Callable[[Any], Any]] = {
            ClientDatagrams: self._handle_client_datagrams,
            PeerDatagrams: self._handle_peer_datagrams,
        }
        return Mailbox(self._packets)

    def on_receive(self, message: object) -> object:
        """Handle any message but packets, when no other thread is in the actor; return the reply."""
        with self._mailbox.core_lock:
            if self._frozen is not None and not isinstance(message, Execute | Ping | Failed):
                self._frozen.messages.append(message)
                self._mailbox.wake_at(None, self._clock)
                return None
            result = self._inputs[type(message)](message)
            if self._frozen is None:
                self._carry_out()
        if isinstance(message, Tick):
            # The next Tick may be due at once, and other threads wait for the core.
            yield_cpu()
        return result

    def brace(self) -> None:
        """Let packets survive the start of a successor, which takes CPU. Call this in an `Execute`."""
        self._mailbox.patience = HANDOVER_WAIT
        self._mailbox.load.set_preempts(preempts=True)

    def freeze(self) -> None:
        """Relay packets of established channels only, and hold all other input. Call this in an `Execute`."""
        self._carry_out()
        self._frozen = FrozenRelay(self.core, self._monotonic, self._send)
        self._mailbox.handle_by(self._frozen.handlers)
        self._mailbox.wake_at(None, self._clock)

    def thaw(self) -> None:
        """Go on after `brace` or `freeze`, with all that was held. Call this in an `Execute`."""
        self._mailbox.patience = CORE_WAIT
        frozen, self._frozen = self._frozen, None
        if frozen is None:
            return
        self._mailbox.handle_by(self._packets)
        if self._offload is not None:
            self._offload(frozen.commands)
        for command in frozen.commands:
            self._outputs[type(command)](command)
        rest: ClientDatagrams | None = ClientDatagrams(frozen.requests)
        while rest is not None:
            rest = self._handle_client_datagrams(rest)
        for message in frozen.messages:
            self.actor_ref.tell(message)

    def retire(self, forward: Callable[[ClientDatagrams | PeerDatagrams], None]) -> None:
        """Pass all packets on to a successor, the held ones first. Call this in an `Execute`."""
        assert self._frozen is not None  # noqa: S101 - the relay is frozen before
        self._is_retired = True
        if self._frozen.requests:
            forward(ClientDatagrams(self._frozen.requests))
        self._mailbox.handle_by({ClientDatagrams: forward, PeerDatagrams: forward})

    def start_readers(self, allocations: Collection[AllocationId]) -> None:
        """Start a reader for each of these inherited allocations, or close its sockets. Call this in an `Execute`."""
        for failure in self._sockets.start_readers(allocations):
            self._fail_allocation(failure)
        # As in `_carry_out`: with 16,384 allocations a collection stops everything for a second.
        gc.freeze()
        if not self._sockets.are_inherited:
            self._mailbox.patience = CORE_WAIT

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - what sys.exc_info() gives
        """Report the failure to the supervisor, and leave no allocation behind."""
        super().on_failure(*failure)
        self.on_stop()

    def on_stop(self) -> None:
        """Close all allocations, within a bounded time."""
        self._mailbox.close(self._timeouts.release_core)
        # The sockets are a successor's, and the process ends: 16,384 threads would take seconds to stop.
        if not self._is_retired and not self._sockets.close_all(STOP_TIMEOUT):
            _log.warning("allocations not closed in time", seconds=STOP_TIMEOUT)

    def _handle_client_datagrams(self, message: ClientDatagrams) -> ClientDatagrams | None:
        """Handle datagrams until the turn is over; return the rest."""
        batch, is_flood = message
        now = self._monotonic()
        relay, commands, rest = self._relay_to_peer, self._commands, self._rest
        left = iter(self.core.shed(batch) if is_flood else batch)
        for datagram in left:
            try:
                command = relay(datagram, now)
                if command is None:
                    # Only what is not relayed at once pays for the wall clock, and may take long.
                    stamp = self._clock.now()
                    command = self.core.handle_client_datagram(datagram, stamp)
                    if stamp.monotonic > now + TURN:
                        rest += left
            except Exception:  # noqa: BLE001 - see _note_fault
                self._note_fault()
            else:
                if command is not None:
                    self._send_to_peer(command)
                elif not commands and self.core.poll_timeout() != self._mailbox.deadline:
                    # The datagram is held, with a deadline.
                    self._carry_out()
            if commands:
                self._carry_out()
                if rest:
                    rest += left
        return ClientDatagrams(self._take_rest()) if rest else None

    def _take_rest(self) -> list[Datagram]:
        rest = self._rest.copy()
        self._rest.clear()
        return rest

    def _handle_peer_datagrams(self, message: PeerDatagrams) -> None:
        batch, allocation = message
        now = self._monotonic()
        handle, commands = self._handle_peer_datagram, self._commands
        for datagram in batch:
            try:
                command = handle(datagram, now, allocation)
            except Exception:  # noqa: BLE001 - see _note_fault
                self._note_fault()
            else:
                if command is not None:
                    self._send_to_client(command)
            if commands:
                self._carry_out()

    def _note_fault(self) -> None:
        """Log and count a datagram on which the core failed.

        The failure is a bug, but must not end the sessions of all clients. The log has the stack of the first failure, the
        counter has all failures.
        """
        self.counters.faults += 1
        if self.counters.faults == 1:
            _log.exception("the core failed on a datagram: please report this; further ones are only counted")

    def _follow_addresses(self, message: OwnAddresses) -> None:
        self._bind_hosts = message.hosts
        for family, each in self._listening.items():
            each.asked.is_needed = family in message.several
        self.core.handle_own_addresses(message.addresses, self._clock.now())

    def _fail_allocation(self, message: AllocationFailed) -> None:
        if message.allocation in self.allocations:
            _log.error("allocation failed", allocation=message.allocation, error=exception_words(message.error))
        self.core.handle_allocation_failed(message.allocation, self._clock.now())

    def _carry_out(self) -> None:
        """Carry out commands until none is left, and set the time of the next Tick.

        A command may lead to a report, and a report to more commands. Packets without commands need no new time: they change
        no deadline, except that a passed deadline is replaced, and then a Tick comes anyway.
        """
        outputs = self._outputs
        while commands := self.core.drain():
            if self._offload is not None:
                # First the packets, which the kernel must not overtake on a channel that it relays from now on. Then the
                # kernel's commands: a client that is told of the end of a channel must find the channel ended.
                for packet in commands:
                    if isinstance(packet, SendToPeer):
                        self._send_to_peer(packet)
                self._offload(commands)
                commands = [each for each in commands if not isinstance(each, SendToPeer)]
            for command in commands:
                outputs[type(command)](command)
        made = self.core.counters.channels_bound + _CHANNELS_OF_ALLOCATION * self.core.counters.allocations_made
        if made >= self._freeze_at:
            self._freeze_at = made + FREEZE_EVERY
            gc.collect(1)
            gc.freeze()
        deadline = self.core.poll_timeout()
        if deadline != self._mailbox.deadline:
            self._mailbox.wake_at(deadline, self._clock)

    def _send(self, command: SendToClient | SendToPeer) -> None:
        self._outputs[type(command)](command)

    def _send_to_client(self, command: SendToClient) -> None:
        data, client, segment_size, traffic_class = command
        self._to_clients[len(client)].transmit(data, client, segment_size, traffic_class)

    def _send_to_peer(self, command: SendToPeer) -> None:
        allocation, data, peer, segment_size, traffic_class = command
        handle = self.allocations.get(allocation)
        if handle is None:
            self.counters.late_sends += 1
            return
        error = handle.to_peers[len(peer)].transmit(data, peer, segment_size, traffic_class)
        if error is not None and is_broken(error):
            self._fail_allocation(AllocationFailed(allocation, error))

    def _hand_in(self, command: HandIn) -> None:
        # They precede the rest of the message.
        self._rest[:0] = command.datagrams

    def _bind_port(self, command: BindPort) -> None:
        # If it takes longer, the bind fails because the port is in use, and the core tries another port. No packet is
        # relayed during the wait, so the server actor waits only for the last port.
        self._sockets.wait_for(command.port, 0 if self.core.free_port_count else self._timeouts.close_port)
        try:
            hosts = {family: self._bind_hosts[family] for family in command.families}
            self._sockets.add(command.allocation, RelayedSockets.open(hosts, command.port, self.counters.udp))
        except (OSError, RuntimeError) as error:
            self._report_refusal(command, error)
        else:
            self.core.handle_bound(command.allocation, self._clock.now())

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


def _name(error: OSError | RuntimeError) -> str:
    return name_of(error) if isinstance(error, OSError) else type(error).__name__


def _raise(message: Failed) -> None:
    """Raise a failure from another thread in the actor's own thread, so that Pykka and the supervisor notice it."""
    raise message.error
