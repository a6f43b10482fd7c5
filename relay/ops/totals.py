"""Totals of the relay: the one place where counters of the sockets and of the kernel are added up.

Metrics, the status page, the stats line and the dump all read a `RelayTotals`. Other threads write the counters and tables.
No actor gets a message.
"""

import functools
import operator
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from relay.config import Config
from relay.core.allocation import Allocation, ChannelBinding
from relay.core.allocations import Allocations
from relay.core.counters import Counters
from relay.core.history import History
from relay.core.portal.channel import PortalChannel
from relay.net.udp import UdpCounters
from relay.offload.layout import DIRECTIONS, SIZES, PassReason, Totals
from relay.ops.process import ProcessFigures, read_process

if TYPE_CHECKING:
    # Imported only by relays with offload.
    from relay.offload.datapath import Datapath


class NotReady(StrEnum):
    """A reason why new clients should not be sent to this relay."""

    STARTING = "starting"
    """The relay does not respond to clients yet. With a portal, it waits for the first `init`."""
    DRAINING = "draining"
    """The relay rejects new allocations until the last allocation ends, and then stops."""
    STOPPING = "stopping"
    """The relay is about to exit."""
    PORTAL = "portal"
    """The relay is not joined to the portal."""
    NO_IPV4_ADDRESS = "no_ipv4_address"
    """This machine does not have the address of the relay's sockets."""
    NO_IPV6_ADDRESS = "no_ipv6_address"
    NO_IPV4_ROUTE = "no_ipv4_route"
    """This machine has no route to clients on the internet."""
    NO_IPV6_ROUTE = "no_ipv6_route"


@dataclass(slots=True)
class ServerCounters:
    """Counters of carried out commands: plain integers that any thread may read at any time."""

    bind_errors: Counter[str] = field(default_factory=Counter)
    """Allocations without sockets or a thread, by the name of the error."""
    late_sends: int = 0
    """Datagrams and GSO batches for an allocation whose sockets are closed already."""
    udp: UdpCounters = field(default_factory=UdpCounters)
    """The counters of all sockets."""
    faults: int = 0
    """Datagrams on which the core failed: each is a bug."""


class Inbox(Protocol):
    """Mailbox of the server actor."""

    @property
    def dropped(self) -> int:
        """Batches dropped after too long a wait."""

    def __len__(self) -> int:
        """Number of queued messages."""

    def age(self, now: float, /) -> float:
        """Seconds for which the oldest message has waited."""


class Handovers(NamedTuple):
    """Takeovers of this relay since the first process."""

    number: int = 0
    requests_waited: float = 0.0
    """Seconds for which requests waited in the last handover."""


class RelayState(NamedTuple):
    """References to all counters and tables of a relay. Functions return objects created after the start."""

    config: Config
    counters: Counters
    tables: Allocations
    history: History
    carried_out: ServerCounters
    kernel_drops: Callable[[], int]
    """Datagrams dropped because a socket's receive buffer was full."""
    inbox: Callable[[], Inbox | None]
    portal: Callable[[], PortalChannel | None]
    """None for a standalone relay."""
    not_ready: Callable[[], Collection[NotReady]]
    """The reasons why the relay is not ready; empty if it is ready."""
    datapath: "Datapath | None"
    """None without offload."""
    free_ports: Callable[[], int] = int
    ends: Callable[[], float | None] = lambda: None
    """The monotonic time at which the relay ends at the latest; None unless it drains or stops."""
    handovers: Callable[[], Handovers] = Handovers
    lines_lost: Callable[[], int] = int
    """Lost lines of the log."""
    clocks_apart: float = time.time() - time.monotonic()
    """Seconds between the wall clock and the monotonic clock at the start."""


class TrafficCounts(NamedTuple):
    """Relayed packets and payload bytes, by direction."""

    to_peer_packets: int = 0
    to_peer_bytes: int = 0
    to_client_packets: int = 0
    to_client_bytes: int = 0

    def plus(self, other: Sequence[int]) -> "TrafficCounts":
        """Return the sum of two counts."""
        return TrafficCounts(*map(operator.add, self, other))


counts_in: Callable[[Counters | Allocation | ChannelBinding], tuple[int, ...]]
counts_in = operator.attrgetter(*TrafficCounts._fields)
"""Returns the traffic that the sockets counted: the fields of `TrafficCounts`."""


class Drain(NamedTuple):
    """A shutdown of the relay, with or without time for allocations to end."""

    until: float
    """Unix time at which the relay ends, at the latest."""
    time_left: float
    """Seconds."""
    allocations: int
    """Allocations that are left."""


NO_TOTALS = Totals(
    dict.fromkeys(DIRECTIONS, 0),
    dict.fromkeys(DIRECTIONS, 0),
    dict.fromkeys(DIRECTIONS, (0,) * SIZES),
    dict.fromkeys(PassReason, 0),
)
"""Totals without offload."""


class RelayTotals:
    """Snapshot of all totals. Each system call is made once, when its result is first read."""

    def __init__(self, state: RelayState) -> None:
        self.state = state

    @functools.cached_property
    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    @property
    def wall_clock_moved(self) -> float:
        """Seconds by which the wall clock was set since the start."""
        return time.time() - self.now - self.state.clocks_apart

    @functools.cached_property
    def process(self) -> ProcessFigures:
        """Resources of the process."""
        return read_process()

    @functools.cached_property
    def xdp(self) -> Totals:
        """Totals of the kernel's program."""
        datapath = self.state.datapath
        return NO_TOTALS if datapath is None else datapath.program.totals()

    @property
    def by_sockets(self) -> TrafficCounts:
        """Traffic relayed by the sockets."""
        return TrafficCounts._make(counts_in(self.state.counters))

    @property
    def by_kernel(self) -> TrafficCounts:
        """Traffic relayed by the kernel."""
        (to_peer, to_client), packets, sizes = DIRECTIONS, self.xdp.packets, self.xdp.bytes
        return TrafficCounts(packets[to_peer], sizes[to_peer], packets[to_client], sizes[to_client])

    @property
    def traffic(self) -> TrafficCounts:
        """Traffic relayed on both data paths."""
        return self.by_sockets.plus(self.by_kernel)

    @functools.cached_property
    def kernel_drops(self) -> int:
        """Datagrams dropped because a socket's receive buffer was full."""
        return self.state.kernel_drops()

    @property
    def dropped_late(self) -> int:
        """Datagrams and GSO batches dropped after too long a wait in a socket or the mailbox."""
        inbox = self.state.inbox()
        return self.state.carried_out.udp.dropped_stale + (0 if inbox is None else inbox.dropped)

    @property
    def drops(self) -> dict[str, int]:
        """Datagrams dropped by the core, by reason."""
        return {reason.value: count for reason, count in self.state.counters.drops.copy().items()}

    @property
    def drain(self) -> Drain | None:
        """The drain; None unless the relay drains or stops."""
        ends = self.state.ends()
        if ends is None:
            return None
        left = round(max(0.0, ends - self.now), 1)
        return Drain(round(time.time() + left, 1), left, self.allocations)

    @property
    def allocations(self) -> int:
        """Current allocations."""
        return len(self.state.tables.by_id)

    @property
    def channels(self) -> int:
        """Current live channels."""
        return self.state.tables.channels - self.state.tables.expired
