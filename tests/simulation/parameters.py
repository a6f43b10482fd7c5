"""What a seed stands for: how large the world is, and what goes wrong in it."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from tests.simulation.setting import Setting

HOUR, DAY = 3600.0, 86400.0

_LIMITS = (((500, 5000), 49), ((500, 5000), 49), ((0, 1), 49), ((10, 20), 4), ((2, 3), 2), ((1, 1), 2))
"""Rate and burst of answers to whoever has proven nothing, and the NATs that all clients are behind."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """The whole of a run, but for its seed."""

    hours: float
    """For which clients come and go, before all is quiet."""
    clients: int
    peers: int
    setting: Setting
    pace: float = 1.0
    """By which packets come less often, and sessions last longer."""
    weather: float = 600.0
    """Seconds, on average, between two times of bad weather; 0 for none, as in the next ones."""
    partitions: float = 900.0
    rebinds: float = 60.0
    """Of a NAT, somewhere."""
    machine: float = 400.0
    """In which ports, descriptors or the time of the machine are not to be had."""
    portal: float = 700.0
    restarts: float = 4000.0
    noise: float = 5.0
    batching: float = 0.0
    """Seconds for which arrivals wait to be read together."""
    nats: int = 49
    """Behind which all clients are, of each family."""

    TROUBLES: ClassVar[tuple[str, ...]] = (
        "weather", "partitions", "rebinds", "machine", "portal", "restarts", "noise", "batching",
    )  # fmt: skip

    @classmethod
    def of(cls, seed: int) -> "Parameters":
        """Give what a seed stands for."""
        random = Random(f"{seed} parameters")
        clients = random.choice((20, 60, 120, 240))
        hours = random.choice((0.4, 0.7, 1.3))
        # Where ports are short, they are used again soon.
        first = random.choice((49152, 50001))
        count = clients * 3 if random.random() < 0.6 else clients // 2
        limits = Random(f"{seed} limits")
        (rate, burst), nats = limits.choice(_LIMITS)
        return cls(
            # Nonces live for an hour.
            hours=hours,
            clients=clients,
            pace=max(1.0, clients / 60) * (2 if hours > 1 else 1),
            peers=random.choice((3, 20, 60)),
            setting=Setting(
                ports=range(first, first + count),
                quota=clients * 2 if random.random() < 0.8 else clients // 3,
                offloads=random.random() < 0.5,
                max_channels=2 if random.random() < 0.2 else 4096,
                tells=random.random() < 0.5,
                per_address=max(2, clients // 40) if random.random() < 0.2 else None,
                families=limits.choice(((1, 2), (1, 2), (1,), (2,))),
                rate=rate,
                burst=burst,
            ),
            batching=random.choice((0.0, 0.005, 0.05)),
            nats=nats,
        )

    @property
    def patience(self) -> float:
        """Seconds within which a client has an allocation if nothing stands against it.

        One request that times out, and the few that follow. Where answers are limited, all clients behind a NAT may want
        one at once, and each of them more than one: copies are answered as well.
        """
        rate = self.setting.rate
        return 100.0 + (3.0 * self.clients / self.nats / rate if rate else 0.0)

    def without(self, troubles: Iterable[str]) -> "Parameters":
        """Give the same world without some of its troubles."""
        nothing: dict[str, Any] = dict.fromkeys(troubles, 0.0)
        return dataclasses.replace(self, **nothing)

    def for_days(self, days: float) -> "Parameters":
        """Give the same world for longer, with fewer events an hour: so that a month can be waited for."""
        return dataclasses.replace(
            self, hours=days * 24, pace=24.0, weather=1800, partitions=2400, rebinds=300, machine=1200, portal=7200,
            restarts=40000, noise=60,
        )  # fmt: skip
