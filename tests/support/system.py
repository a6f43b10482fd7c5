"""A relay in this process, on ephemeral ports, with a clock controlled by tests."""

import contextlib
import http.client
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import TypeAlias, cast

import pytest

from relay.actors.mailbox import Mailbox
from relay.actors.messages import Tick
from relay.config import Config
from relay.core.addresses import Family, SocketAddress
from relay.core.credentials import Credential, RelaySecret, mint
from relay.core.timestamp import Timestamp
from relay.net.endpoint import Endpoint
from relay.ops.clock import SystemClock
from relay.system.system import System
from tests.support.requirements import HAS_IPV6
from tests.support.turn_client import TIMEOUT, TurnClient
from tests.support.waiting import wait_until

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
    """The clocks of this machine. Tests can move each clock independently."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._wall_ahead = 0.0
        self._clock = SystemClock()

    def now(self) -> Timestamp:
        now = self._clock.now()
        return Timestamp(now.monotonic + self._ahead, now.unix + self._wall_ahead)

    def monotonic(self) -> float:
        return self.now().monotonic

    def jump(self, seconds: float) -> None:
        """Advance the monotonic clock."""
        self._ahead += seconds

    def step_wall_clock(self, seconds: float) -> None:
        """Step the wall clock."""
        self._wall_ahead += seconds


class Relay:
    """A running relay and its clients."""

    def __init__(self, system: System, clock: JumpingClock, stack: contextlib.ExitStack) -> None:
        self.system = system
        self.clock = clock
        self._stack = stack
        self._salt = 0

    def credential(self, ttl: int = 86400) -> Credential:
        """Return a new credential."""
        self._salt += 1
        return mint(SECRET, int(self.clock.now().unix) + ttl, f"salt{self._salt}")

    def client(self, family: Family = Family.IPV4, credential: Credential | None = None) -> TurnClient:
        at = self.system.address_of(family)
        return self._stack.enter_context(TurnClient((at.host, at.port), credential or self.credential()))


RelayMaker: TypeAlias = Callable[..., Relay]


@pytest.fixture
def make_relay() -> Iterator[RelayMaker]:
    """Start relays with changes of `CONFIG`."""
    with contextlib.ExitStack() as stack:

        def make(**settings: object) -> Relay:
            clock = JumpingClock()
            system = System(replace(CONFIG, **settings), clock)  # type: ignore[arg-type]
            return Relay(stack.enter_context(system), clock, stack)

        yield make


@pytest.fixture
def relay(make_relay: RelayMaker) -> Relay:
    return make_relay()


def mailbox_of(relay: Relay) -> Mailbox:
    """Return the mailbox of the server actor."""
    return cast(Mailbox, relay.system.server.actor_inbox)


@contextlib.contextmanager
def hanging(relay: Relay) -> Iterator[None]:
    """Hold the server actor's lock, like a thread that hangs in the core."""
    with mailbox_of(relay).core_lock:
        yield


def settle(relay: Relay) -> None:
    """Wait until the server actor has handled all earlier messages."""
    relay.system.server.ask(Tick(), timeout=TIMEOUT)


def wait_until_bindable(address: SocketAddress) -> None:
    """Wait until the actor of a freed allocation has closed its sockets asynchronously."""

    def is_bindable() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            try:
                opened.bind((address[0], address[1]))
            except OSError:
                return False
        return True

    wait_until(is_bindable)


def allocate_refused(client: TurnClient) -> int:
    with pytest.raises(AssertionError, match="was answered") as caught:
        client.allocate()
    return int(str(caught.value).splitlines()[0].rsplit(" ", 1)[-1])


def ask(at: Endpoint, path: str, method: str = "GET") -> tuple[int, str]:
    """Request a page; return the status and the body."""
    connection = http.client.HTTPConnection(at.host, at.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
