"""The machine of a relay: its sockets, timer and kernel, and their faults."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

from relay.core.addresses import AllocationId, Family
from relay.core.commands import BindPort, Command, FreeAllocation, SendToClient, SendToPeer, cut
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret
from relay.core.data import Datagram
from relay.core.events import CORE_EVENTS
from relay.core.lifecycle import BindRefusal
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.core.timestamp import Timestamp
from relay.net.grouping import grouped
from tests.simulation.batches import FLOODS, ending_at_allocates, one_by_one, trains
from tests.simulation.clock import BrokenError, Scheduler
from tests.simulation.health import Health
from tests.simulation.holdings import Allocation, Channel
from tests.simulation.kernel import Entry, Kernel
from tests.simulation.network import Network, Relayed
from tests.simulation.parties import Post
from tests.simulation.referee import Referee, Rules
from tests.simulation.setting import Setting
from tests.simulation.trace import Trace
from tests.simulation.wire import Address, channel_data
from tests.support.core import Portion, begin_handover, hand_over, with_rest

HOSTS = {1: "192.0.2.1", 2: "2001:db8::1"}
UNIX_AT_ZERO = 1_700_000_000.0

SOCKET_BUFFER = 2000
"""Capacity of the receive buffers in datagrams."""

MIXED_SENDS = 128
"""Packets of a client's batches of several channels that are relayed at once."""

_MOST_TURNS = 10_000
"""Turns of the relay at one moment; a greedy client causes some ten."""


class Waiting(NamedTuple):
    """A received, unread datagram. Allocation 0 stands for the service socket."""

    allocation: int
    arrival: Datagram


class Machine:
    """Runs one relay from start to end."""

    def __init__(
        self, setting: Setting, seed: str, scheduler: Scheduler, network: Network, post: Post, trace: Trace
    ) -> None:
        self.setting = setting
        self.health = Health()
        self.random = Random(f"{seed} machine")
        secret = Random(f"{seed} secret").randbytes(32).hex()
        self.secret = secret
        hosts = {family: HOSTS[family] for family in setting.families}
        served = self.hosts = frozenset(hosts.values())
        self.own: frozenset[str] = frozenset()
        """Addresses of this machine besides the public addresses."""
        self.config = ServerConfig(
            secret=RelaySecret(secret),
            public_hosts={Family(family): host for family, host in hosts.items()},
            ports=setting.ports,
            peers=PeerPolicy(served, frozenset((3478,)), setting.ports, served),
            max_allocations=setting.quota,
            max_channels=setting.max_channels,
            max_allocations_per_address=setting.per_address,
            software="relay under simulation",
            offloads=setting.offloads,
            unauthenticated_rate=setting.rate,
            unauthenticated_burst=setting.burst,
        )
        # Of its own: everything else happens as without takeovers.
        self.random_of_handovers = Random(f"{seed} handovers")
        self.server = Server(self.config, Random(f"{seed} core"))
        self.referee = Referee(Rules(secret, hosts, setting, self._is_forbidden))
        self.kernel = Kernel()
        self.told: Counter[type] = Counter()
        """Number of commands and events by type."""
        if setting.tells:
            self.server.watch(frozenset(CORE_EVENTS))
        self.sockets: dict[int, int] = {}
        """Allocations by open port."""
        self.is_serving = False
        self.is_over = False
        self.relayed_by_kernel = 0
        self.overflown = 0
        self._ports: dict[int, int] = {}
        self._scheduler = scheduler
        self._network = network
        self._post = post
        self._trace = trace
        self.plan_probes: Callable[[Allocation, Channel], None] = lambda _, __: None
        """Called for each bound channel."""
        self._wake_at: float | None = None
        self._is_carrying_out = False
        self._waiting: list[Waiting] = []
        self._batching = 0.0

    @property
    def unix(self) -> float:
        """The wall clock of the machine."""
        return UNIX_AT_ZERO + self._scheduler.now + self.health.clock_error

    @property
    def now(self) -> float:
        return self._scheduler.now

    @property
    def relayed(self) -> int:
        """Number of packets relayed by the core or the kernel."""
        return self.referee.to_peer[0] + self.referee.to_client[0] + self.relayed_by_kernel

    def connect(self) -> None:
        """Connect the relay's addresses to the network."""
        self._network.relay = Relayed(self.hosts, self.from_client, self.from_peer)

    def owner_of(self, address: Address) -> int | None:
        """Return the owner of an address; for a relayed address, of its allocation."""
        if address[0] in self.hosts:
            held = self.referee.holdings.by_port.get(address[1])
            return None if held is None else self._network.owner_of(held.client)
        return self._network.owner_of(address)

    # Inputs.

    def from_client(self, data: bytes, source: Address, traffic_class: int) -> None:
        if not self.is_serving:
            return
        if 64 <= (data[0] if data else 0) < 128 and self._kernel_to_peer(data, source, traffic_class):
            return
        self._arrive(Waiting(0, (data, source, 0, traffic_class)))

    def from_peer(self, data: bytes, source: Address, traffic_class: int, relayed: Address) -> None:
        port = relayed[1]
        allocation = self.sockets.get(port)
        if allocation is not None and not self._kernel_to_client(data, source, traffic_class, port):
            self._arrive(Waiting(allocation, (data, source, 0, traffic_class)))

    def receive_at_once(self, datagrams: Iterable[Datagram]) -> None:
        """Receive datagrams, or GRO batches of several channels with empty packets, which the network does not make."""
        if self.is_serving and self.health.stopped_until <= self._scheduler.now and not self._waiting:
            for each in datagrams:
                # The channels of a batch in turn, until the share of the client is used up.
                self._handle(0, each, sorted(cut(each[0], each[2]), key=lambda piece: piece[:2])[:MIXED_SENDS])

    def fail_allocation(self) -> None:
        """Break the sockets of a random allocation, including pending allocations; or end it as an operator."""
        if self.referee.holdings.by_id:
            self._fail(AllocationId(self.random.choice(list(self.referee.holdings.by_id))))

    def report_oddly(self) -> None:
        """Report the result of a bind for an established, closed or unknown allocation."""
        known = self.referee.holdings.by_id
        id_ = AllocationId(self.random.choice([*(each for each in known if known[each].is_established), 1, 10**9]))
        draw = self.random.random()
        if id_ not in known and draw < 0.3:
            self._fail(id_)
        elif draw < 0.6:
            self.referee.take_bound(id_, self._scheduler.now)
            self.server.handle_bound(id_, self._now())
        else:
            refusal = self.random.choice(list(BindRefusal))
            self.referee.take_refused(id_, self._scheduler.now, only_port=refusal is BindRefusal.PORT)
            self.server.handle_bind_refused(id_, refusal, self._now())
        self._carry_out("odd", id_)

    def _fail(self, id_: AllocationId) -> None:
        is_kick = id_ % 2 == 0
        self.referee.take_failed(id_, self._scheduler.now, "kicked" if is_kick else "failed")
        if is_kick:
            self.server.handle_kick(id_, self._now())
        else:
            self.server.handle_allocation_failed(id_, self._now())
        self._carry_out("kicked" if is_kick else "failed", id_)

    def change_own_addresses(self, hosts: frozenset[str]) -> None:
        """Replace the addresses of this machine besides the public addresses."""
        if not self.is_over:
            self.own = hosts
            self.referee.lose_peers(self.own, self._scheduler.now)
            self.server.handle_own_addresses(self.hosts | hosts, self._now())
            self._carry_out("addresses", sorted(hosts))

    def begin_handover(self) -> list[Portion] | None:
        """Write a part of the state for a successor; None if the relay has ended."""
        most = self.random_of_handovers.choice((0, len(self.referee.holdings.by_id) // 2, None))
        return None if self.is_over else begin_handover(self.server, most)

    def end_handover(self, portions: list[Portion], *, succeeds: bool) -> None:
        """Continue in another process with an empty kernel, or in this process if the successor has failed."""
        if self.is_over:
            return
        if not succeeds:
            self.server.handover.end()
            return
        self.wake()
        former, self.server = self.server, Server(self.config, self.random_of_handovers)
        hand_over(former, portions, self.server)
        self.server.commands.watched = former.commands.watched
        self.kernel = Kernel()
        self.server.handle_own_addresses(self.hosts | self.own, self._now())
        self._carry_out("taken over", None)

    def drain(self) -> None:
        if not self.is_over:
            self.referee.pass_time(self._scheduler.now)
            self.referee.is_draining = True
            self.server.handle_drain(self._now())
            self._carry_out("drain", None)

    def wake(self) -> None:
        """Run expired timers."""
        self.referee.pass_time(self._scheduler.now)
        self.server.handle_timeout(self._now())
        self._carry_out("wake", None)

    def stop(self, seconds: float) -> None:
        """Stop the process temporarily, like SIGSTOP. Datagrams wait in the sockets."""
        self.health.stopped_until = self._scheduler.now + seconds

    def end(self) -> None:
        """End the relay immediately, without any cleanup."""
        self.is_over, self.is_serving = True, False
        self._network.relay = None

    def batch_for(self, seconds: float) -> None:
        """Read datagrams in batches, like a busy relay."""
        self._batching = seconds

    # Received datagrams.

    def _arrive(self, waiting: Waiting) -> None:
        late = self.health.stopped_until - self._scheduler.now
        if late <= 0 and not self._waiting and (not self._batching or self.random.random() < 0.3):
            self._take(waiting.allocation, [waiting.arrival])
        elif len(self._waiting) >= SOCKET_BUFFER:
            self.overflown += 1
        else:
            self._waiting.append(waiting)
            if len(self._waiting) == 1:
                self._scheduler.after(max(late, self._batching * self.random.random()), self._read)

    def _read(self) -> None:
        late = self.health.stopped_until - self._scheduler.now
        if late > 0:
            self._scheduler.after(late, self._read)
            return
        waiting, self._waiting = self._waiting, []
        if self.is_over:
            return
        by_socket: dict[int, list[Datagram]] = {}
        for allocation, arrival in waiting:
            by_socket.setdefault(allocation, []).append(arrival)
        for allocation, arrivals in by_socket.items():
            for batch in ending_at_allocates(arrivals):
                self._take(allocation, batch)

    def _take(self, of: int, batch: Sequence[Datagram]) -> None:
        """Pass a batch to the core like the actors, with or without grouping and GRO."""
        is_flood = of == 0 and len(batch) > 1 and self.random.random() < FLOODS
        if len(batch) > 1 and self.random.random() < 0.5:
            batch = trains(batch)
        if self.random.random() < 0.8:
            batch = grouped(batch)
        if is_flood:
            kept = self.server.shed(batch)
            self.referee.check_shed(one_by_one(batch), one_by_one(kept))
            batch = kept
        for datagram in batch:
            self._handle(of, datagram, cut(datagram[0], datagram[2]))

    def _handle(self, of: int, datagram: Datagram, pieces: Iterable[bytes]) -> None:
        """Pass a datagram or a GRO batch to the core, and its datagrams to the referee."""
        _, source, _, traffic_class = datagram
        for each in pieces:
            self._trace.note(self._scheduler.now, "in", (of, source), each)
            if of == 0:
                self.referee.take_from_client(each, source, traffic_class, self._scheduler.now, self.unix)
            else:
                self.referee.take_from_peer(of, each, source, traffic_class, self._scheduler.now)
        if of == 0:
            relayed: Command | None = self.server.handle_client_datagram(datagram, self._now())
        else:
            relayed = self.server.handle_peer_datagram(datagram, self._scheduler.now, AllocationId(of))
        self._carry_out("taken", None, () if relayed is None else (relayed,))

    def _kernel_to_peer(self, data: bytes, source: Address, traffic_class: int) -> bool:
        """Relay ChannelData in the kernel, with some probability, because the kernel leaves some packets to the sockets."""
        if not self.setting.offloads or len(data) < 4 or self.random.random() < 0.2:
            return False
        now = self._scheduler.now
        entry = self.kernel.to_peer(source, data[0] << 8 | data[1], now)
        owed = self.referee.relayed_to_peer(data, source, now)
        if owed is None or entry is None:
            self._undo_drop("short" if 4 + (data[2] << 8 | data[3]) > len(data) else "unbound channel", owed is None)
            if (owed is None) != (entry is None) and 4 + (data[2] << 8 | data[3]) <= len(data):
                raise BrokenError(f"the kernel's {entry} for ChannelData of {source}, where {owed} is right")
            return False
        allocation, peer, payload = owed
        if (allocation.ports[-1], peer) != (entry.port, entry.peer):
            raise BrokenError(f"the kernel relays {source}'s packet to {entry}, not to {peer}")
        if entry.inside is not self.referee.is_inside(peer):
            raise BrokenError(f"the kernel takes {entry} for a channel of the wrong kind")
        if entry.inside:
            return self._kernel_inside(entry, payload, traffic_class)
        self.relayed_by_kernel += 1
        self._send_to_peer(entry.port, peer, payload, traffic_class)
        return True

    def _kernel_inside(self, entry: Entry, payload: bytes, traffic_class: int) -> bool:
        """Relay a packet to another client of the relay, or leave the packet to the sockets."""
        held = self.referee.holdings.by_port.get(entry.peer[1])
        source = (entry.peer[0], entry.port, *entry.peer[2:])
        if (
            held is None
            or not held.is_established
            or not self._kernel_to_client(payload, source, traffic_class, held.ports[-1])
        ):
            return False
        self.relayed_by_kernel += 1
        return True

    def _kernel_to_client(self, data: bytes, source: Address, traffic_class: int, port: int) -> bool:
        if not self.setting.offloads or self.random.random() < 0.2:
            return False
        now = self._scheduler.now
        entry = self.kernel.to_client(port, source, now)
        owed = self.referee.relayed_to_client(self.sockets[port], source, now)
        if (entry is None) != (owed is None) or (entry is not None and (entry.client, entry.number) != owed):
            raise BrokenError(f"the kernel has {entry} for a packet of {source} to port {port}, where {owed} is right")
        if entry is None:
            self._undo_drop("unbound peer", counted=True)
            return False
        self.relayed_by_kernel += 1
        self._send_to_client(channel_data(entry.number, data), entry.client, traffic_class)
        return True

    def _undo_drop(self, reason: str, counted: bool) -> None:  # noqa: FBT001 - read as a sentence
        """Undo a drop of the referee, because the datagram still reaches a socket."""
        if counted:
            self.referee.drops[reason] -= 1

    # Outputs.

    def _carry_out(self, what: str, about: object, returned: Sequence[Command] = ()) -> None:
        self._trace.note(self._scheduler.now, what, about)
        if self._is_carrying_out:
            # A report on sockets arrived during the loop below, which also handles its commands.
            return
        self._is_carrying_out = True
        while commands := self._drain(returned):
            returned = ()
            self.told.update(map(type, commands))
            self.kernel.take(commands)
            self._settle(commands)
        self._is_carrying_out = False
        for bound in self.referee.bound:
            self.plan_probes(*bound)
        self.referee.bound.clear()
        self._set_timer()

    def _drain(self, returned: Sequence[Command]) -> list[Command]:
        """Return all commands until nothing is left for another turn."""
        commands = with_rest(self.server, [*returned, *self.server.drain()], self._now())
        for _ in range(_MOST_TURNS):
            at = self.server.poll_timeout()
            if at is None or at > self._scheduler.now:
                return commands
            self.server.handle_timeout(self._now())
            commands += self.server.drain()
        raise BrokenError("the relay never finishes the work that is due")

    def _settle(self, commands: list[Command]) -> None:
        now = self._scheduler.now
        for command in commands:
            data = command.data if isinstance(command, SendToClient | SendToPeer) else repr(command).encode()
            self._trace.note(now, "out", command, data)
        self.referee.settle(commands, now)
        for command in commands:
            match command:
                case SendToClient(data, client, segment, traffic_class):
                    for datagram in cut(data, segment):
                        self._send_to_client(datagram, client, traffic_class)
                case SendToPeer(allocation, data, peer, segment, traffic_class):
                    if allocation not in self._ports:
                        raise BrokenError(f"sent from allocation {allocation}, which has no socket")
                    for datagram in cut(data, segment):
                        self._send_to_peer(self._ports[allocation], peer, datagram, traffic_class)
                case BindPort():
                    self._bind(command)
                case FreeAllocation(allocation):
                    self.sockets.pop(self._ports.pop(allocation, 0), None)
                case _:
                    pass

    def _send_to_client(self, data: bytes, client: Address, traffic_class: int) -> None:
        if data[0] >= 64:
            self._post.note_receiver(data[4:], self._network.owner_of(client))
        self._network.send(data, (HOSTS[2 if ":" in client[0] else 1], 3478), client, traffic_class)

    def _send_to_peer(self, port: int, peer: Address, data: bytes, traffic_class: int) -> None:
        self._post.note_receiver(data, self.owner_of(peer))
        source: Address = (HOSTS[2], port, 0, 0) if ":" in peer[0] else (HOSTS[1], port)
        self._network.send(data, source, peer, traffic_class)

    def _bind(self, command: BindPort) -> None:
        draw = self.random.random()
        if draw >= self.health.slow_binds:
            self._report(command)
        elif draw < self.health.slow_binds / 2:
            self._scheduler.after(6 * self.random.random(), self._report, command)

    def _report(self, command: BindPort) -> None:
        if self.is_over:
            return
        now, id_, port = self._scheduler.now, command.allocation, command.port
        if self.health.is_exhausted or port in self.health.foreign_ports:
            refusal = BindRefusal.MACHINE if self.health.is_exhausted else BindRefusal.PORT
            self.referee.take_refused(id_, now, only_port=refusal is BindRefusal.PORT)
            self.server.handle_bind_refused(id_, refusal, self._now())
            self._carry_out("refused", (id_, port, str(refusal)))
            return
        held = self.referee.holdings.by_id.get(id_)
        self.referee.take_bound(id_, now)
        if held is not None and held.is_established and not held.is_free:
            # Sockets for an allocation that has ended are closed immediately.
            self.sockets[port], self._ports[id_] = id_, port
        self.server.handle_bound(id_, self._now())
        self._carry_out("bound", (id_, port))

    def _set_timer(self) -> None:
        """Schedule the next timeout of the core, with some delay."""
        at = self.server.poll_timeout()
        if self.referee.holdings.earliest_end() < (at or 0):
            raise BrokenError(f"the relay wants to be woken at {at}, when an allocation is over already")
        if at is not None and at != self._wake_at:
            self._wake_at = at
            self._scheduler.at(at + self.health.lateness * self.random.random(), self._ring, at)

    def _ring(self, at: float) -> None:
        if at == self._wake_at and not self.is_over:
            late = self.health.stopped_until - self._scheduler.now
            if late > 0:
                self._scheduler.after(late, self._ring, at)
            else:
                self._wake_at = None
                self.wake()

    def _now(self) -> Timestamp:
        return Timestamp(self._scheduler.now, self.unix)

    def _is_forbidden(self, peer: Address) -> bool:
        if peer[0] in self.hosts:
            return peer[1] not in self.setting.ports
        return peer[0] in self.own or peer[0].startswith("127.") or peer[0] == "::1"
