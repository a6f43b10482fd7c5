"""A relay in this process, on ports that the machine chooses, with a clock that tests can move."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import TypeAlias

import pytest

from relay.actors.clock import SystemClock
from relay.actors.system import System
from relay.config import Config, Endpoint
from relay.core.addresses import Family
from relay.core.credentials import Credential, RelaySecret, mint
from relay.core.instant import Instant
from tests.conftest import HAS_IPV6
from tests.turn_client import TurnClient

SECRET = RelaySecret("secret of the tests")
ANYWHERE = Endpoint("127.0.0.1", 0)
CONFIG = Config(
    public_ip4=IPv4Address("127.0.0.1"),
    public_ip6=IPv6Address("::1") if HAS_IPV6 else None,
    health=ANYWHERE,
    control=ANYWHERE,
    secret=SECRET,
    allow_peers=(ip_network("127.0.0.0/8"), ip_network("::1")),
    max_allocations=1000,
    service_port=0,
)


class JumpingClock:
    """The machine's clocks, which a test can put forward, each by itself."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._wall_ahead = 0.0
        self._clock = SystemClock()

    def now(self) -> Instant:
        now = self._clock.now()
        return Instant(now.monotonic + self._ahead, now.unix + self._wall_ahead)

    def monotonic(self) -> float:
        return self.now().monotonic

    def jump(self, seconds: float) -> None:
        """Let time pass, as far as deadlines can tell."""
        self._ahead += seconds

    def step_wall_clock(self, seconds: float) -> None:
        """Set the wall clock."""
        self._wall_ahead += seconds


class Relay:
    """A running relay, and clients for it."""

    def __init__(self, system: System, clock: JumpingClock, stack: contextlib.ExitStack) -> None:
        self.system = system
        self.clock = clock
        self._stack = stack
        self._salt = 0

    def credential(self, ttl: int = 86400) -> Credential:
        """A credential that no other client has."""
        self._salt += 1
        return mint(SECRET, int(self.clock.now().unix) + ttl, f"salt{self._salt}")

    def client(self, family: Family = Family.IPV4, credential: Credential | None = None) -> TurnClient:
        at = self.system.address_of(family)
        return self._stack.enter_context(TurnClient((at.host, at.port), credential or self.credential()))


RelayMaker: TypeAlias = Callable[..., Relay]


@pytest.fixture
def make_relay() -> Iterator[RelayMaker]:
    """Start relays whose settings differ from those of the tests as given."""
    with contextlib.ExitStack() as stack:

        def make(**settings: object) -> Relay:
            clock = JumpingClock()
            system = System(replace(CONFIG, **settings), clock)  # type: ignore[arg-type]
            return Relay(stack.enter_context(system), clock, stack)

        yield make


@pytest.fixture
def relay(make_relay: RelayMaker) -> Relay:
    return make_relay()
