"""A core with clients and its status page, on a clock controlled by tests."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relay.config import Config
from relay.core.addresses import Family
from relay.core.portal.channel import PortalChannel
from relay.net.endpoint import Endpoint
from relay.offload.datapath import ChannelUsage, Datapath
from relay.offload.layout import Totals
from relay.ops.http.messages import Page
from relay.ops.totals import NO_TOTALS, NotReady, RelayState, ServerCounters, TrafficCounts
from relay.ops.yielder import Yielder
from relay.status.model import Status
from relay.status.page import StatusPage
from relay.status.scan import Scan
from relay.tools.control import read
from tests.support.core import HOSTS, Client, Relay

CONFIG = Config(public_ip4=IPv4Address(HOSTS[Family.IPV4]), public_ip6=IPv6Address(HOSTS[Family.IPV6]), max_allocations=50)


class Kernel:
    """Simulated data path in the kernel, with traffic set by a test."""

    def __init__(self) -> None:
        self.used: list[ChannelUsage] = []
        self.total = TrafficCounts()
        self.program = SimpleNamespace(totals=self._totals)
        self.devices = SimpleNamespace(modes={"eth0": "driver", "eth1": None}, failures={})
        self.channels = SimpleNamespace(installed={"one": 1}, refused=0)

    def usage(self) -> Iterator[list[ChannelUsage]]:
        for each in self.used:
            yield [each]

    def _totals(self) -> Totals:
        total = self.total
        packets = {"to_peer": total.to_peer_packets, "to_client": total.to_client_packets}
        return replace(
            NO_TOTALS, packets=packets, bytes={"to_peer": total.to_peer_bytes, "to_client": total.to_client_bytes}
        )


class Watched:
    """A relay with a status page. A test can run code during each pause of the page."""

    def __init__(self, *, config: Config = CONFIG, kernel: Kernel | None = None) -> None:
        self.relay = Relay()
        self.portal: PortalChannel | None = None
        self.ready = True
        self.pauses = 0
        self.meanwhile: Callable[[], object] = lambda: None
        carried_out = ServerCounters()
        self.udp = carried_out.udp
        self.state = RelayState(
            config=config,
            counters=self.relay.server.counters,
            tables=self.relay.server.allocations,
            history=self.relay.server.history,
            carried_out=carried_out,
            kernel_drops=lambda: 7,
            inbox=lambda: None,
            portal=lambda: self.portal,
            not_ready=lambda: () if self.ready else (NotReady.PORTAL,),
            datapath=cast(Datapath | None, kernel),
        )
        self.tables = self.state.tables
        # The clock of the yielder is always beyond its step, so each check pauses.
        self.page = StatusPage(
            self.state,
            {Family.IPV4: "0.0.0.0", Family.IPV6: "::"},
            clients=lambda: [Endpoint("0.0.0.0", 3478), Endpoint("::", 3478)],
            now=lambda: self.relay.now,
            yield_if_due=Yielder(lambda: float("inf"), self._pause),
        )
        self._clients = 0

    def scan(self) -> Scan:
        """Scan all allocations."""
        return Scan(self.state._replace(datapath=None), self.relay.now.monotonic, None, Yielder())

    def client(self) -> Client:
        """Return a new client."""
        self._clients += 1
        return Client(self.relay, ("203.0.113.5", 40000 + self._clients), salt=f"salt-{self._clients}-of-nobody-else")

    def ask(self, **query: object) -> Page:
        return self.page({name: str(value) for name, value in query.items()})

    def status(self, **query: object) -> Status:
        """Request the status, and check the response against the model."""
        page = self.ask(**query)
        assert isinstance(page.body, str)
        answer: Any = json.loads(page.body)
        assert page.status == 200, answer
        return read(Status, answer)

    def _pause(self, _: float) -> None:
        self.pauses += 1
        self.meanwhile()


@pytest.fixture
def watched() -> Watched:
    return Watched()
