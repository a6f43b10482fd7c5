"""A line in the log, now and then, that says what is relayed; and none while nothing is."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import structlog

from relay.offload.layout import DIRECTIONS
from relay.ops.metrics.sources import NOTHING_RELAYED, Sources

PERIOD = 10.0
"""Seconds from one line to the next."""

MANY_DROPS = 100
"""Datagrams dropped in a period that are worth a line by themselves: a port on the Internet gets a few from everywhere."""

STOP_TIMEOUT = 1.0
"""Seconds to wait for the thread at the end; it may be reading counters."""

_MEGABIT = 1e6

_log = structlog.get_logger("relay.ops.stats")


class Flow(NamedTuple):
    """What flowed since the start, and through how much."""

    to_peer_packets: int
    to_peer_bytes: int
    to_client_packets: int
    to_client_bytes: int
    kernel_packets: int
    """Relayed by the kernel by itself; they are among those before."""
    drops: int
    allocations: int
    """At the moment, and so are channels."""
    channels: int

    @property
    def packets(self) -> int:
        """Relayed, both ways."""
        return self.to_peer_packets + self.to_client_packets

    @property
    def bytes(self) -> int:
        """Of payload, relayed both ways."""
        return self.to_peer_bytes + self.to_client_bytes


def flow_in(sources: Sources) -> Flow:
    """Read what flowed, without asking any actor."""
    counters, tables, datapath = sources.counters, sources.tables, sources.datapath
    kernel = NOTHING_RELAYED if datapath is None else datapath.program.totals()
    to_peer, to_client = DIRECTIONS
    return Flow(
        counters.to_peer_packets + kernel.packets[to_peer],
        counters.to_peer_bytes + kernel.bytes[to_peer],
        counters.to_client_packets + kernel.packets[to_client],
        counters.to_client_bytes + kernel.bytes[to_client],
        sum(kernel.packets.values()),
        sum(counters.drops.copy().values()) + sources.kernel_drops() + sources.dropped_late(),
        len(tables.by_id),
        len(tables.live_channels),
    )


def report(before: Flow, after: Flow, seconds: float) -> Mapping[str, object] | None:
    """Give the fields of a line about some seconds; None if nothing is to be said."""
    packets, drops = after.packets - before.packets, after.drops - before.drops
    if packets <= 0 and drops < MANY_DROPS:
        return None
    kernel = after.kernel_packets - before.kernel_packets
    return {
        "seconds": round(seconds, 1),
        "packets_per_second": round(packets / seconds),
        "megabits_per_second": round(8 * (after.bytes - before.bytes) / seconds / _MEGABIT, 2),
        "to_peer_packets": after.to_peer_packets - before.to_peer_packets,
        "to_peer_bytes": after.to_peer_bytes - before.to_peer_bytes,
        "to_client_packets": after.to_client_packets - before.to_client_packets,
        "to_client_bytes": after.to_client_bytes - before.to_client_bytes,
        **({"kernel_packets": kernel} if after.kernel_packets else {}),
        "drops": drops,
        "allocations": after.allocations,
        "channels": after.channels,
    }


class StatsLine:
    """Writes the line, in a thread of its own, from `start` to `stop`.

    Args:
        read: gives what flowed.
        also: is called each period as well, whether anything flowed or not.
        clock: gives monotonic seconds.
        wait: waits for some seconds, and tells whether it is time to stop; in a test, it does not wait.
    """

    def __init__(
        self,
        read: Callable[[], Flow],
        also: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._read = read
        self._also = also
        self._clock = clock
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self.faults = 0
        """Times that it could not be read: each is a bug."""
        self._before = read()
        self._at = clock()
        self._thread = threading.Thread(target=self._run, name="stats", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, without a last line."""
        self._stopped.set()
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while not self._wait(PERIOD):
            self._look()

    def _look(self) -> None:
        try:
            self._also()
            after, at = self._read(), self._clock()
            fields = report(self._before, after, at - self._at)
        except Exception:  # noqa: BLE001 - a line less is no reason to have none any more
            self.faults += 1
            if self.faults == 1:
                _log.exception("what flows can't be read: please report this; further times are only counted")
            return
        if fields is not None:
            _log.info("relayed", **fields)
        self._before, self._at = after, at
