"""The whole world: relay, portal, clients, peers and troubles."""

import math
import traceback
from collections import Counter
from collections.abc import Callable
from random import Random

from tests.simulation.clients import Client
from tests.simulation.clock import BrokenError, Scheduler
from tests.simulation.machine import HOSTS, Machine
from tests.simulation.network import Network
from tests.simulation.parameters import DAY, HOUR, Parameters
from tests.simulation.parties import Post
from tests.simulation.peers import Peer
from tests.simulation.portal import Credential, Portal, PortalLink
from tests.simulation.probes import Probes
from tests.simulation.profiles import profile_of
from tests.simulation.properties import check_counters, check_quiet, check_tables
from tests.simulation.trace import Trace
from tests.simulation.troubles import Troubles
from tests.simulation.wire import Address

QUIET = 3600.0 + 900 + 60
"""Seconds after which all allocations and channels have expired."""


class World:
    """A run of the simulation."""

    def __init__(self, seed: int, parameters: Parameters) -> None:
        self.seed = seed
        self.parameters = parameters
        self.scheduler = Scheduler(1000.0)
        self.trace = Trace()
        self.random = Random(f"{seed} world")
        self.post = Post()
        self.network = Network(self.scheduler, Random(f"{seed} network"))
        self.portal = Portal(str(seed), self.scheduler)
        self.machines = 0
        self.happened: Counter[tuple[object, ...]] = Counter()
        """Counts of outcomes: troubles, and responses, ends and drops of stopped relays."""
        self._answers = 0
        self._relayed = 0
        self._addresses = 0
        self.machine, self.link = self._start_machine()
        self.peers = [self._make_peer(n) for n in range(parameters.peers)]
        self.clients = [self._make_client(n) for n in range(parameters.clients)]
        self.troubles = Troubles(self)

    # Runs.

    def run(self, on_day: "Callable[[World, int], None] | None" = None) -> None:
        """Run until the world is quiet again.

        Args:
            on_day: called at the end of each day, after a quiet hour.
        """
        left, day = self.parameters.hours * HOUR, 0
        while left > 0:
            self.run_for(min(left, DAY - QUIET))
            left -= DAY
            if left <= 0 and self.seed % 2:
                # The relay waits for the end of the last allocation.
                self.machine.drain()
            self.quieten()
            day += 1
            if on_day is not None:
                on_day(self, day)
        # The relay has no allocations; a single check is sufficient.
        self.machine.drain()
        self.machine.drain()
        self._take_stock()
        for client in self.clients:
            self.happened.update({("recovered from", code): n for code, n in client.recovered.items()})
        self.happened.update({("network", "lost"): self.network.lost, ("network", "doubled"): self.network.doubled})

    def run_for(self, seconds: float) -> None:
        """Start and stop clients at random."""
        self.troubles.begin()
        for client in self.clients:
            self.scheduler.after(30 + 120 * self.random.random(), client.begin)
        until = self.scheduler.now + seconds
        while self.scheduler.now < until:
            self.scheduler.run(min(until, self.scheduler.now + 300))
            self.check()

    def quieten(self) -> None:
        """Stop all clients, wait, and check that no state is left.

        Raises:
            BrokenError: state is left.
        """
        self.troubles.end()
        for client in self.clients:
            client.stop()
        self.scheduler.run(self.scheduler.now + QUIET)
        self.check()
        check_quiet(self)

    def check(self) -> None:
        """Check all invariants.

        Raises:
            BrokenError: an invariant is violated.
        """
        self.machine.wake()
        check_tables(self.machine)
        check_counters(self.machine)
        self.link.check()
        for client in self.clients:
            client.check()

    # The relay.

    def restart(self, *, politely: bool) -> None:
        """Stop the relay, at once or after draining, and start a new relay."""
        if self.machine.is_over or self.machine.referee.is_draining:
            return
        for client in self.clients:
            client.asking.disturbed_at = math.inf
        if politely:
            self.link.leave()
            self.machine.drain()
        self.scheduler.after(self.random.choice((10, 1000)) if politely else 0, self._end_machine)

    def replace_if_over(self) -> None:
        """Restart the relay if it has given up on its portal."""
        if self.link.fatal is not None:
            self.restart(politely=False)

    def _end_machine(self) -> None:
        self._answers, self._relayed = self.answers, self.relayed
        self._take_stock()
        self.machine.end()
        self.scheduler.after(1 + 9 * self.random.random(), self._start_again)

    def _start_again(self) -> None:
        self.machine, self.link = self._start_machine()
        self.scheduler.after(1, self._tell_of_relay)

    def _tell_of_relay(self) -> None:
        """Notify clients of a new relay once joined; until then the portal may know the previous relay."""
        if not self.machine.is_serving:
            self.scheduler.after(5, self._tell_of_relay)
            return
        for client in self.clients:
            client.asking.disturbed_at = self.scheduler.now + 20
            self.scheduler.after(20 * self.random.random(), client.hear_of_relay)

    def _start_machine(self) -> tuple[Machine, PortalLink]:
        self.machines += 1
        seed = f"{self.seed} {self.machines}"
        machine = Machine(self.parameters.setting, seed, self.scheduler, self.network, self.post, self.trace)
        machine.batch_for(self.parameters.batching)
        machine.plan_probes = Probes(machine, self.scheduler, self.network, self.post, seed).plan
        machine.connect()
        return machine, PortalLink(machine, self.machines, self.portal, self.scheduler)

    def _take_stock(self) -> None:
        """Add a relay's outcomes to the counts."""
        referee = self.machine.referee
        for what, counted in (("answered", referee.answers), ("withheld", referee.withheld)):
            self.happened.update({(what, *about): n for about, n in counted.items()})
        self.happened.update({("early", what): n for what, n in zip(("held", "relayed"), referee.early_counts, strict=True)})
        self.happened.update({("inside", what): n for what, n in referee.inside.items()})
        self.happened.update({("dropped", reason): n for reason, n in referee.drops.items()})
        self.happened.update({("freed", reason): n for reason, n in referee.frees.items()})

    @property
    def answers(self) -> int:
        """Responses of all relays."""
        return self._answers + sum(self.machine.referee.answers.values())

    @property
    def relayed(self) -> int:
        """Packets relayed by all relays."""
        return self._relayed + self.machine.relayed

    # Clients and peers.

    def _make_peer(self, n: int) -> Peer:
        address: Address = (f"2001:db8:9::{n + 1:x}", 5000, 0, 0) if n % 3 == 2 else (f"198.51.100.{n + 1}", 5000 + n)
        return Peer(1_000_000 + n, address, str(self.seed), self.scheduler, self.network, self.post)

    def _make_client(self, n: int) -> Client:
        profile = profile_of(self.random, self.parameters.pace)
        families = self.parameters.setting.families
        if len(families) == 1:
            profile = profile._replace(is_ipv6=families == (2,))
        return Client(n, profile, self)

    def credential(self, seconds: float) -> Credential | None:
        return self.portal.mint(seconds)

    def is_outdated(self, credential: Credential) -> bool:
        return credential.relay != self.machines

    def is_withheld(self, transaction: bytes) -> bool:
        return transaction in self.machine.referee.withheld_of

    @property
    def patience(self) -> float:
        return self.parameters.patience

    def new_address(self, *, is_ipv6: bool) -> Address:
        # Several clients behind each NAT.
        self._addresses += 1
        host, port = self.random.randrange(1, self.parameters.nats + 1), 1024 + self._addresses % 60000
        # With IPv6, each client has its own address in a shared network.
        return (f"2001:db8:5:{host:x}::{1 + port % 7}", port, 0, 0) if is_ipv6 else (f"203.0.113.{host}", port)

    def choose_peer(self, client: Client, family: int) -> Address | None:
        draw = self.random.random()
        if draw < 0.02:
            return ("127.0.0.1", 5000) if family == 1 else (HOSTS[2], 3478, 0, 0)
        if draw < 0.4:
            # Some clients behind the same NAT talk through the relay.
            neighbour = self.clients[client.id ^ 1] if client.id ^ 1 < len(self.clients) else client
            return neighbour.relayed.get(family) if neighbour is not client else None
        peers = [peer.address for peer in self.peers if (":" in peer.address[0]) == (family == 2)]
        return self.random.choice(peers) if peers else None

    def call(self, client: Client, peer: Address) -> None:
        neighbour = self.clients[client.id ^ 1] if client.id ^ 1 < len(self.clients) else client
        family = 2 if ":" in peer[0] else 1
        if neighbour.relayed.get(family) == peer and family in client.relayed:
            neighbour.bind_back(client.relayed[family])

    def owner_of(self, address: Address) -> int | None:
        return self.machine.owner_of(address)

    def note(self, what: str, about: object) -> None:
        self.trace.note(self.scheduler.now, what, about)

    def account_of(self, error: Exception) -> str:
        """Return the trace before a failure."""
        where = "" if isinstance(error, BrokenError) else "\n" + "".join(traceback.format_exception(error))
        return f"{self.trace}\n{self.scheduler.now:14.6f}  BROKEN    {error!r}{where}"
