"""Where metrics come from: counters and tables that others keep, read from another thread without asking any actor."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from relay.core.allocations import Allocations
from relay.core.counters import Counters
from relay.core.portal.channel import PortalChannel
from relay.net.udp import UdpCounters
from relay.offload.datapath import Datapath
from relay.offload.layout import DIRECTIONS, SIZES, PassReason
from relay.offload.program import Totals
from relay.ops.metrics.process import ProcessFigures, read_process


class CarriedOut(Protocol):
    """What carrying out the core's commands came to."""

    @property
    def bind_errors(self) -> Mapping[str, int]:
        """Allocations for which sockets or a thread could not be had, by the name of the error."""

    @property
    def late_sends(self) -> int:
        """What was to be sent for an allocation that was gone."""

    @property
    def faults(self) -> int:
        """Datagrams that the core failed on."""

    @property
    def udp(self) -> UdpCounters:
        """What sockets count."""


class Inbox(Protocol):
    """Where messages wait for the server actor."""

    @property
    def dropped(self) -> int:
        """What had to wait for too long."""

    def __len__(self) -> int:
        """How many wait."""

    def age(self, now: float, /) -> float:
        """For how many seconds the oldest one has waited."""


class Sources(NamedTuple):
    """All that metrics are read from. What begins to exist later than they is asked for each time."""

    counters: Counters
    tables: Allocations
    carried_out: CarriedOut
    kernel_drops: Callable[[], int]
    """Datagrams that found the buffer of a socket full."""
    inbox: Callable[[], Inbox | None]
    portal: Callable[[], PortalChannel | None]
    """None for a relay that stands alone."""
    is_ready: Callable[[], bool]
    datapath: Datapath | None
    """What has the kernel relay, if it does."""
    lines_lost: Callable[[], int] = int
    """Lines of the log that were not written."""
    clocks_apart: float = time.time() - time.monotonic()
    """Seconds between the wall clock and the one that nobody sets, at the start."""

    def dropped_late(self) -> int:
        """Give how many datagrams and trains were thrown away since they had waited too long: in a socket, or for a turn."""
        inbox = self.inbox()
        return self.carried_out.udp.dropped_stale + (0 if inbox is None else inbox.dropped)


NOTHING_RELAYED = Totals(
    dict.fromkeys(DIRECTIONS, 0),
    dict.fromkeys(DIRECTIONS, 0),
    dict.fromkeys(DIRECTIONS, (0,) * SIZES),
    dict.fromkeys(PassReason, 0),
)


class Look:
    """One look at all of it: what takes a system call is read once, and only if it is asked for."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    @functools.cached_property
    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    @property
    def wall_clock_moved(self) -> float:
        """Seconds by which the wall clock was set since the start."""
        return time.time() - self.now - self.sources.clocks_apart

    @functools.cached_property
    def xdp(self) -> Totals:
        """What the kernel relayed."""
        datapath = self.sources.datapath
        return NOTHING_RELAYED if datapath is None else datapath.program.totals()

    @functools.cached_property
    def process(self) -> ProcessFigures:
        """What the process takes of its machine."""
        return read_process()
