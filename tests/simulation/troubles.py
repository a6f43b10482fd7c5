"""What goes wrong, at random moments: with the network, the machine, the portal, and by strangers."""

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from tests.simulation.network import Link
from tests.simulation.parameters import DAY
from tests.simulation.strangers import Strangers

if TYPE_CHECKING:
    from tests.simulation.world import World

_OF_MACHINES = (
    "ports refused", "no descriptors", "slow binds", "late timers", "stopped", "clock stepped", "odd reports",
    "sockets failed",
)  # fmt: skip
_OF_PORTALS = ("portal restarted", "portal out of reach", "channel forgotten", "connection closed")
KINDS = frozenset(
    (*_OF_MACHINES, *_OF_PORTALS, "bad_weather", "partition", "rebind", "machine_trouble", "portal_trouble", "restart")
)
"""What troubles there are."""


class Troubles:
    """Begins troubles, and ends each."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._scheduler = world.scheduler
        self._random = Random(f"{world.seed} troubles")
        self._round = 0
        self._decks: dict[tuple[str, ...], list[str]] = {}

    def begin(self) -> None:
        """Let troubles come from now on."""
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

    def end(self) -> None:
        """Let no trouble begin any more."""
        self._round += 1

    def _plan(self, seconds: float, trouble: Callable[[], None], of_round: int) -> None:
        self._scheduler.after(self._random.expovariate(1 / seconds), self._strike, seconds, trouble, of_round)

    def _strike(self, seconds: float, trouble: Callable[[], None], of_round: int) -> None:
        if of_round == self._round:
            self._note(trouble.__name__.strip("_"))
            trouble()
            self._plan(seconds, trouble, of_round)

    def _note(self, trouble: str) -> None:
        self._world.note("trouble", trouble)
        self._world.happened["trouble", trouble] += 1

    def _draw(self, kinds: tuple[str, ...]) -> str:
        """Choose a kind of trouble; none comes again before all others have."""
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
            # What was sent before was in worse weather, perhaps.
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
                # Where there are many, trying them all takes its time.
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
            case _:
                machine.fail_allocation()
        self._disturb(random.choice((5, 60)))

    def _disturb(self, seconds: float) -> None:
        machine = self._world.machine
        self._scheduler.after(seconds, machine.health.recover)
        for client in self._world.clients:
            # A request that waited for its answer then may be lost with its repetitions.
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
