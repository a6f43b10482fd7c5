"""All that metrics are read from, as it is in a running relay, but that nothing runs."""

from dataclasses import dataclass, field
from random import Random

import pytest

from relay.actors.inbox import ServerInbox
from relay.actors.server import ServerCounters
from relay.core.portal.channel import PortalChannel
from relay.ops.metrics.sources import Sources
from tests.core.driver import Relay
from tests.core.portal.driver import CONFIG


@dataclass
class Measured:
    """A relay's state, which a test may change."""

    relay: Relay = field(default_factory=Relay)
    carried_out: ServerCounters = field(default_factory=ServerCounters)
    inbox: ServerInbox = field(default_factory=ServerInbox)
    portal: PortalChannel = field(default_factory=lambda: PortalChannel(CONFIG, Random(1)))
    kernel_drops: int = 0
    ready: bool = True
    joins_a_portal: bool = True

    @property
    def sources(self) -> Sources:
        return Sources(
            counters=self.relay.counters,
            tables=self.relay.server.allocations,
            carried_out=self.carried_out,
            kernel_drops=lambda: self.kernel_drops,
            inbox=lambda: self.inbox,
            portal=lambda: self.portal if self.joins_a_portal else None,
            is_ready=lambda: self.ready,
            datapath=None,
        )


@pytest.fixture
def measured() -> Measured:
    return Measured()
