"""Faults at random times: of the network, the machine and the portal, and by strangers."""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tests.simulation.greedy import EVERY, Greedy
from tests.simulation.network import Link
from tests.simulation.parameters import DAY
from tests.simulation.strangers import Strangers

if TYPE_CHECKING:
    from tests.simulation.world import World

_OF_MACHINES = (
    "ports refused", "no descriptors", "slow binds", "late timers", "stopped", "clock stepped", "odd reports",
    "sockets failed", "addresses",
)  # fmt: skip
_OF_PORTALS = ("portal restarted", "portal out of reach", "channel forgotten", "connection closed")
KINDS = frozenset(
    (
        *_OF_MACHINES,
        *_OF_PORTALS,
        "greedy",
        "bad_weather",
        "partition",
        "rebind",
        "machine_trouble",
        "portal_trouble",
        "restart",
        "handover",
        "failed handover",
    )
)
"""Kinds of troubles."""


class Troubles:
    """Starts and ends troubles."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._scheduler = world.scheduler
        self._random = Random(f"{world.seed} troubles")
        self._round = 0
        self._decks: dict[tuple[str, ...], list[str]] = {}
        # Of its own: other troubles come at the same times without greedy clients.
        self._random_of_greedy = Random(f"{world.seed} greedy")
        self._random_of_handovers = Random(f"{world.seed} handovers")

    def begin(self) -> None:
        """Start random troubles."""
        self._round += 1
        parameters = self._world.parameters
        for seconds, trouble in (
            (parameters.weather, self._bad_weather),
            (parameters.partitions, self._partition),
            (parameters.rebinds, self._rebind),
            (parameters.machine, self._machine_trouble),
            (parameters.portal, self._portal_trouble),
            (parameters.restarts, self._restart),
            (parameters.noise, Strangers(self._world, self._random).appear),
            (20.0, self._world.replace_if_over),
        ):
            if seconds:
                self._plan(seconds, trouble, self._round)
        if parameters.noise:
            self._plan_greedy(self._round)
        if parameters.handovers:
            self._plan_handover(parameters.handovers, self._round)

    def end(self) -> None:
        """Start no further troubles."""
        self._round += 1

    def _plan(self, seconds: float, trouble: Callable[[], None], of_round: int) -> None:
        self._scheduler.after(self._random.expovariate(1 / seconds), self._strike, seconds, trouble, of_round)

    def _strike(self, seconds: float, trouble: Callable[[], None], of_round: int) -> None:
        if of_round == self._round:
            self._note(trouble.__name__.strip("_"))
            trouble()
            self._plan(seconds, trouble, of_round)

    def _plan_greedy(self, of_round: int) -> None:
        self._scheduler.after(self._random_of_greedy.expovariate(1 / EVERY), self._send_greedy, of_round)

    def _send_greedy(self, of_round: int) -> None:
        if of_round == self._round:
            self._note("greedy")
            for _ in range(self._random_of_greedy.choice((1, 1, 1, 1, 3))):
                Greedy(self._world, self._random_of_greedy).appear()
            self._plan_greedy(of_round)

    def _plan_handover(self, seconds: float, of_round: int) -> None:
        self._scheduler.after(self._random_of_handovers.expovariate(1 / seconds), self._hand_over, seconds, of_round)

    def _hand_over(self, seconds: float, of_round: int) -> None:
        """Let another process take the relay over, after a time in which everything may change; some of them fail."""
        machine, random = self._world.machine, self._random_of_handovers
        portions = machine.begin_handover() if of_round == self._round else None
        if portions is not None:
            succeeds = random.random() < 0.7
            self._note("handover" if succeeds else "failed handover")
            self._scheduler.after(
                random.choice((0.0, 0.05, 5.0)), partial(machine.end_handover, portions, succeeds=succeeds)
            )
        if of_round == self._round:
            self._plan_handover(seconds, of_round)

    def _note(self, trouble: str) -> None:
        self._world.note("trouble", trouble)
        self._world.happened["trouble", trouble] += 1

    def _draw(self, kinds: tuple[str, ...]) -> str:
        """Choose a kind of trouble; each kind occurs once before any kind repeats."""
        deck = self._decks.setdefault(kinds, [])
        if not deck:
            deck.extend(self._random.sample(kinds, len(kinds)))
        return deck.pop()

    # The network.

    def _some_links(self) -> list[Link]:
        links = [*(client.link for client in self._world.clients), *(peer.link for peer in self._world.peers)]
        return self._random.sample(links, max(1, int(len(links) * self._random.choice((0.02, 0.1, 0.5, 1.0)))))

    def _bad_weather(self) -> None:
        random = self._random
        loss, double, detour = random.choice((0.02, 0.1, 0.4)), random.choice((0.0, 0.1, 0.3)), random.choice((0.0, 0.05))
        jitter = random.choice((0.02, 0.3, 1.5))
        links = self._some_links()
        for link in links:
            link.loss, link.double, link.detour, link.jitter = loss, double, detour, jitter
            # Earlier datagrams may have been sent in worse weather.
            link.calm_since = self._scheduler.now
        self._scheduler.after(random.expovariate(1 / 120), self._clear_up, links)

    def _clear_up(self, links: list[Link]) -> None:
        for link in links:
            link.loss, link.double, link.detour, link.jitter = 0.0, 0.0, 0.0, 0.02
            link.calm_since = self._scheduler.now

    def _partition(self) -> None:
        links = self._some_links()
        for link in links:
            link.is_cut = True
        self._scheduler.after(self._random.choice((3, 20, 100, 700)), self._join, links)

    def _join(self, links: list[Link]) -> None:
        for link in links:
            link.is_cut = False
            link.calm_since = self._scheduler.now

    def _rebind(self) -> None:
        client = self._random.choice(self._world.clients)
        client.move()
        client.link.calm_since = self._scheduler.now

    # The machine.

    def _machine_trouble(self) -> None:
        machine, random = self._world.machine, self._random
        health = machine.health
        self._note(trouble := self._draw(_OF_MACHINES))
        match trouble:
            case "ports refused":
                ports = machine.setting.ports
                # With many ports, retries take a while.
                share = random.choice((0.1, 0.5, 1.0 if len(ports) < 50 else 0.8))
                health.foreign_ports = frozenset(random.sample(ports, int(len(ports) * share)))
            case "no descriptors":
                health.is_exhausted = True
            case "slow binds":
                health.slow_binds = 0.5
            case "late timers":
                health.lateness = random.choice((0.1, 5.0))
            case "stopped":
                machine.stop(random.choice((0.2, 3.0, 30.0)))
            case "clock stepped":
                health.clock_error = random.choice((-DAY, -300.0, 300.0, DAY))
            case "odd reports":
                for _ in range(5):
                    machine.report_oddly()
            case "addresses":
                peers = random.sample(self._world.peers, min(3, len(self._world.peers)))
                machine.change_own_addresses(frozenset(peer.address[0] for peer in peers))
                self._scheduler.after(random.choice((1, 60, 700)), machine.change_own_addresses, frozenset())
            case _:
                machine.fail_allocation()
        self._disturb(random.choice((5, 60)))

    def _disturb(self, seconds: float) -> None:
        machine = self._world.machine
        self._scheduler.after(seconds, machine.health.recover)
        for client in self._world.clients:
            # A pending request may be lost with its retransmissions.
            client.asking.be_disturbed(max(machine.health.stopped_until, self._scheduler.now + seconds))

    def _restart(self) -> None:
        self._world.restart(politely=self._random.random() < 0.5)

    # The portal.

    def _portal_trouble(self) -> None:
        portal, random = self._world.portal, self._random
        self._note(trouble := self._draw(_OF_PORTALS))
        match trouble:
            case "portal restarted":
                portal.crash(random.choice((0.5, 20, 300)))
            case "portal out of reach":
                portal.cut_off(random.choice((10, 45, 300)))
            case "channel forgotten":
                portal.forget_channel()
            case _:
                portal.close_channel()
