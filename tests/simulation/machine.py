"""The machine that a relay runs on: its sockets, its timer, its kernel; and what goes wrong with each."""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from relay.core.addresses import AllocationId, Family
from relay.core.commands import BindPort, Command, FreeAllocation, SendToClient, SendToPeer
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret
from relay.core.events import CORE_EVENTS
from relay.core.instant import Instant
from relay.core.lifecycle import BindRefusal
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.core.trains import Arrival, cut
from tests.simulation.batches import FLOODS, ending_at_allocates, trains
from tests.simulation.clock import BrokenError, Scheduler
from tests.simulation.health import Health
from tests.simulation.holdings import Allocation, Channel
from tests.simulation.kernel import Kernel
from tests.simulation.network import Network, Relayed
from tests.simulation.parties import Post
from tests.simulation.referee import Referee, Rules
from tests.simulation.setting import Setting
from tests.simulation.trace import Trace
from tests.simulation.wire import Address, channel_data

HOSTS = {1: "192.0.2.1", 2: "2001:db8::1"}
UNIX_AT_ZERO = 1_700_000_000.0

SOCKET_BUFFER = 2000
"""Datagrams that wait while nobody reads."""


class Waiting(NamedTuple):
    """What has arrived and was not read yet: of clients if the allocation is 0."""

    allocation: int
    arrival: Arrival


class Machine:
    """Runs one relay, from its start to its end."""

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
        self.server = Server(self.config, Random(f"{seed} core"))
        self.referee = Referee(Rules(secret, hosts, setting, self._is_forbidden))
        self.kernel = Kernel()
        self.told: Counter[type] = Counter()
        """How often it told of each kind of event, if it tells of any."""
        if setting.tells:
            self.server.watch(frozenset(CORE_EVENTS))
        self.sockets: dict[int, int] = {}
        """Allocations by the port that is open for them."""
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
        """Hears of each channel that is bound."""
        self._wake_at: float | None = None
        self._is_carrying_out = False
        self._waiting: list[Waiting] = []
        self._batching = 0.0

    @property
    def unix(self) -> float:
        """What its wall clock shows."""
        return UNIX_AT_ZERO + self._scheduler.now + self.health.clock_error

    @property
    def now(self) -> float:
        return self._scheduler.now

    @property
    def relayed(self) -> int:
        """Packets, by whatever way."""
        return self.referee.to_peer[0] + self.referee.to_client[0] + self.relayed_by_kernel

    def connect(self) -> None:
        """Be where the relay's addresses lead."""
        self._network.relay = Relayed(self.hosts, self.from_client, self.from_peer)

    def owner_of(self, address: Address) -> int | None:
        """Tell who is at an address, or behind it if it is a relayed one."""
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

    def fail_allocation(self) -> None:
        """Let the sockets of one allocation break, if there is any; also such as are just being bound."""
        if self.referee.holdings.by_id:
            self._fail(AllocationId(self.random.choice(list(self.referee.holdings.by_id))))

    def report_oddly(self) -> None:
        """Report on sockets that were reported on before, that are closed, or that nobody asked for."""
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
        self.referee.take_failed(id_, self._scheduler.now)
        self.server.handle_allocation_failed(id_, self._now())
        self._carry_out("failed", id_)

    def drain(self) -> None:
        if not self.is_over:
            self.referee.pass_time(self._scheduler.now)
            self.referee.is_draining = True
            self.server.handle_drain(self._now())
            self._carry_out("drain", None)

    def wake(self) -> None:
        """Let it do what is due."""
        self.referee.pass_time(self._scheduler.now)
        self.server.handle_timeout(self._now())
        self._carry_out("wake", None)

    def stop(self, seconds: float) -> None:
        """Run nothing for a while, as SIGSTOP does; what arrives waits in its sockets."""
        self.health.stopped_until = self._scheduler.now + seconds

    def end(self) -> None:
        """End at once: all is forgotten."""
        self.is_over, self.is_serving = True, False
        self._network.relay = None

    def batch_for(self, seconds: float) -> None:
        """Read what arrives in batches, as a busy relay does."""
        self._batching = seconds

    # What arrives.

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
        by_socket: dict[int, list[Arrival]] = {}
        for allocation, arrival in waiting:
            by_socket.setdefault(allocation, []).append(arrival)
        for allocation, arrivals in by_socket.items():
            for batch in ending_at_allocates(arrivals):
                self._take(allocation, batch)

    def _take(self, of: int, arrivals: Sequence[Arrival]) -> None:
        """Give the core a batch, by one of the ways in which its driver may."""
        now = self._scheduler.now
        referee = self.referee
        allocation = AllocationId(of)
        is_flood = of == 0 and len(arrivals) > 1 and self.random.random() < FLOODS
        referee.begin_batch(is_flood=is_flood)
        for data, source, _, traffic_class in arrivals:
            self._trace.note(now, "in", (of, source), data)
            if of == 0:
                referee.take_from_client(data, source, traffic_class, now, self.unix)
            else:
                referee.take_from_peer(allocation, data, source, traffic_class, now)
        if len(arrivals) > 1 and self.random.random() < 0.5:
            arrivals = trains(arrivals)
        if self._forward(allocation, arrivals):
            return
        instant = self._now()
        if of == 0:
            if len(arrivals) == 1 and not is_flood:
                self.server.handle_client_arrival(arrivals[0], instant)
            else:
                self.server.handle_client_arrivals(iter(arrivals), instant, is_flood=is_flood)
        elif len(arrivals) == 1:
            self.server.handle_peer_arrival(allocation, arrivals[0], instant)
        else:
            self.server.handle_peer_arrivals(allocation, iter(arrivals), instant)
        self._carry_out("taken", None)

    def _forward(self, allocation: AllocationId, arrivals: Sequence[Arrival]) -> bool:
        """Try the shortest way, which takes packets only; tell whether it did."""
        now = self._scheduler.now
        if allocation == 0:
            to_peer = self.server.forward_to_peer(arrivals, now)
            if to_peer is None:
                return False
            id_, data, peer, segment, traffic_class = to_peer
            self._settle([SendToPeer(id_, data, peer, segment, traffic_class)])
        else:
            to_client = self.server.forward_to_client(arrivals, now, allocation)
            if to_client is None:
                return False
            self._settle([SendToClient(*to_client)])
        return True

    def _kernel_to_peer(self, data: bytes, source: Address, traffic_class: int) -> bool:
        """Relay ChannelData in the kernel, if it does; most often, for it leaves to the sockets what it is not sure of."""
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
        self.relayed_by_kernel += 1
        self._send_to_peer(entry.port, peer, payload, traffic_class)
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
        """Forget a drop that the referee has counted: the sockets will have it, too."""
        if counted:
            self.referee.drops[reason] -= 1

    # Outputs.

    def _carry_out(self, what: str, about: object) -> None:
        self._trace.note(self._scheduler.now, what, about)
        if self._is_carrying_out:
            # What follows from a report on sockets comes after what else was asked for.
            return
        self._is_carrying_out = True
        while commands := self.server.drain():
            self.told.update(map(type, commands))
            self.kernel.take(commands)
            self._settle(commands)
        self._is_carrying_out = False
        for bound in self.referee.bound:
            self.plan_probes(*bound)
        self.referee.bound.clear()
        self._set_timer()

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
            # What is bound for an allocation that is over by now is closed at once.
            self.sockets[port], self._ports[id_] = id_, port
        self.server.handle_bound(id_, self._now())
        self._carry_out("bound", (id_, port))

    def _set_timer(self) -> None:
        """Be woken when the core wants to be, or a little later."""
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

    def _now(self) -> Instant:
        return Instant(self._scheduler.now, self.unix)

    def _is_forbidden(self, peer: Address) -> bool:
        if peer[0] in self.hosts:
            return peer[1] not in self.setting.ports
        return peer[0].startswith("127.") or peer[0] == "::1"
