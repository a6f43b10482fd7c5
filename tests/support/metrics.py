"""The counters and tables of a relay without threads."""

from dataclasses import dataclass, field
from ipaddress import IPv4Address
from random import Random

import pytest

from relay.actors.mailbox import Mailbox
from relay.config import Config
from relay.core.portal.channel import PortalChannel
from relay.ops.metrics.table import read_table
from relay.ops.totals import NotReady, RelayState, ServerCounters
from tests.support.core import Relay
from tests.support.portal_channel import CONFIG


@dataclass
class Measured:
    """The mutable state of a relay."""

    relay: Relay = field(default_factory=Relay)
    carried_out: ServerCounters = field(default_factory=ServerCounters)
    inbox: Mailbox = field(default_factory=lambda: Mailbox({}))
    portal: PortalChannel = field(default_factory=lambda: PortalChannel(CONFIG, Random(1)))
    kernel_drops: int = 0
    ready: bool = True
    joins_a_portal: bool = True

    @property
    def sources(self) -> RelayState:
        return RelayState(
            config=Config(public_ip4=IPv4Address("192.0.2.1")),
            counters=self.relay.counters,
            tables=self.relay.server.allocations,
            history=self.relay.server.history,
            carried_out=self.carried_out,
            kernel_drops=lambda: self.kernel_drops,
            inbox=lambda: self.inbox,
            portal=lambda: self.portal if self.joins_a_portal else None,
            not_ready=lambda: () if self.ready else (NotReady.PORTAL,),
            datapath=None,
        )


TABLE = list(read_table(Measured().sources))
"""All metrics of a relay without clients."""


@pytest.fixture
def measured() -> Measured:
    return Measured()
