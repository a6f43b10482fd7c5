"""Parameters of a seed: the size and the faults of its world."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from tests.simulation.setting import Setting

HOUR, DAY = 3600.0, 86400.0

_LIMITS = (((500, 5000), 49), ((500, 5000), 49), ((0, 1), 49), ((10, 20), 4), ((2, 3), 2), ((1, 1), 2))
"""Rate and burst of unauthenticated responses, and the number of NATs."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """All parameters of a run except its seed."""

    hours: float
    """Hours with active clients, before the quiet end."""
    clients: int
    peers: int
    setting: Setting
    pace: float = 1.0
    """Factor of longer intervals between packets and longer sessions."""
    weather: float = 600.0
    """Average seconds between two times of bad weather; 0 disables them. The next fields are similar."""
    partitions: float = 900.0
    rebinds: float = 60.0
    """Rebinding of a NAT."""
    machine: float = 400.0
    """Faults of the machine: a lack of ports or descriptors, or pauses."""
    portal: float = 700.0
    restarts: float = 4000.0
    handovers: float = 300.0
    noise: float = 5.0
    batching: float = 0.0
    """Seconds for which datagrams wait to be read in a batch."""
    nats: int = 49
    """Number of NATs per family; all clients are behind a NAT."""

    TROUBLES: ClassVar[tuple[str, ...]] = (
        "weather", "partitions", "rebinds", "machine", "portal", "restarts", "handovers", "noise", "batching",
    )  # fmt: skip

    @classmethod
    def of(cls, seed: int) -> "Parameters":
        """Return the parameters of a seed."""
        random = Random(f"{seed} parameters")
        clients = random.choice((20, 60, 120, 240))
        hours = random.choice((0.4, 0.7, 1.3))
        # Scarce ports are reused soon.
        first = random.choice((49152, 50001))
        count = clients * 3 if random.random() < 0.6 else clients // 2
        limits = Random(f"{seed} limits")
        (rate, burst), nats = limits.choice(_LIMITS)
        return cls(
            # Nonces are valid for an hour.
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
        """Maximum seconds until a client has an allocation under good conditions.

        The time of a request that times out, and of a few further requests. With a rate limit, all clients behind a NAT may
        need responses at once, including responses to retransmissions.
        """
        rate = self.setting.rate
        return 100.0 + (3.0 * self.clients / self.nats / rate if rate else 0.0)

    def without(self, troubles: Iterable[str]) -> "Parameters":
        """Return the same world without some of its troubles."""
        nothing: dict[str, Any] = dict.fromkeys(troubles, 0.0)
        return dataclasses.replace(self, **nothing)

    def for_days(self, days: float) -> "Parameters":
        """Return the same world with a longer duration and fewer events per hour, to make a month feasible."""
        return dataclasses.replace(
            self, hours=days * 24, pace=24.0, weather=1800, partitions=2400, rebinds=300, machine=1200, portal=7200,
            restarts=40000, handovers=7200, noise=60,
        )  # fmt: skip
