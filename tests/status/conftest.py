"""A core with clients, and what is shown of it, at a time that stands still until a test moves it."""

import json
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from relay.config import Config, Endpoint
from relay.core.addresses import Family
from relay.core.portal.channel import PortalChannel
from relay.net.udp import UdpCounters
from relay.offload.datapath import ChannelUsage
from relay.ops.http.endpoint import Page
from relay.status.answer import Sources, StatusPage
from relay.status.kernel import Tally
from relay.status.model import Status, Xdp
from relay.status.pace import Pace
from relay.top.reading import read
from tests.core.driver import HOSTS, Client, Relay

CONFIG = Config(public_ip4=IPv4Address(HOSTS[Family.IPV4]), public_ip6=IPv6Address(HOSTS[Family.IPV6]), max_allocations=50)


class Kernel:
    """What a kernel says that relays channels, as a test has it."""

    def __init__(self) -> None:
        self.used: list[ChannelUsage] = []
        self.total = Tally()

    def usage(self) -> Iterator[list[ChannelUsage]]:
        for each in self.used:
            yield [each]

    def relayed(self) -> Tally:
        return self.total

    def shown(self) -> Xdp:
        return {"interfaces": {"eth0": "driver", "eth1": None}, "failures": {}, "channels": 1, "channels_refused": 0}


class Watched:
    """A relay whose status is asked for; what happens while it is made, a test may say."""

    def __init__(self, *, config: Config = CONFIG, kernel: Kernel | None = None) -> None:
        self.relay = Relay()
        self.udp = UdpCounters()
        self.portal: PortalChannel | None = None
        self.ready = True
        self.rests = 0
        self.meanwhile: Callable[[], object] = lambda: None
        sources = Sources(
            config=config,
            bind_hosts={Family.IPV4: "0.0.0.0", Family.IPV6: "::"},
            tables=self.relay.server.allocations,
            counters=self.relay.server.counters,
            udp=self.udp,
            kernel=kernel,
            now=lambda: self.relay.now,
            is_ready=lambda: self.ready,
            portal=lambda: self.portal,
            clients=lambda: [Endpoint("0.0.0.0", 3478), Endpoint("::", 3478)],
            kernel_drops=lambda: 7,
        )
        # No time passes while it is made, so that a rest is always due.
        self.page = StatusPage(sources, lambda: Pace(lambda: float("inf"), self._rest))
        self._clients = 0

    def client(self) -> Client:
        """A client that no other is."""
        self._clients += 1
        return Client(self.relay, ("203.0.113.5", 40000 + self._clients), salt=f"salt-{self._clients}-of-nobody-else")

    def ask(self, **query: object) -> Page:
        return self.page({name: str(value) for name, value in query.items()})

    def status(self, **query: object) -> Status:
        """Ask, and see to it that the answer is what it is said to be."""
        page = self.ask(**query)
        assert isinstance(page.body, str)
        answer: Any = json.loads(page.body)
        assert page.status == 200, answer
        return read(Status, answer)

    def _rest(self, _: float) -> None:
        self.rests += 1
        self.meanwhile()


@pytest.fixture
def watched() -> Watched:
    return Watched()
