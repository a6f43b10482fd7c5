"""Log the relayed traffic every ten seconds, unless nothing is relayed."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from relay.logger import Logger
from relay.ops.totals import RelayState, RelayTotals

PERIOD = 10.0
"""Seconds from one line to the next."""

MANY_DROPS = 100
"""Drops in a period that are logged even if nothing was relayed. A port on the Internet gets a few stray datagrams."""

STOP_TIMEOUT = 1.0
"""Seconds to wait for the thread at the end; the thread may be reading counters."""

_MEGABIT = 1e6

_log = Logger("relay.ops.stats")


class Flow(NamedTuple):
    """The traffic relayed since the start, and the present allocations and channels."""

    to_peer_packets: int
    to_peer_bytes: int
    to_client_packets: int
    to_client_bytes: int
    kernel_packets: int
    """Packets relayed by the kernel; included in the packets above."""
    drops: int
    allocations: int
    channels: int


def flow_in(state: RelayState) -> Flow:
    """Read the totals, without a message to any actor."""
    totals = RelayTotals(state)
    kernel = totals.by_kernel
    return Flow(
        *totals.by_sockets.plus(kernel),
        kernel.to_peer_packets + kernel.to_client_packets,
        sum(totals.drops.values()) + totals.kernel_drops + totals.dropped_late,
        totals.allocations,
        totals.channels,
    )


def report(before: Flow, after: Flow, seconds: float) -> Mapping[str, object] | None:
    """Return the fields of a line about a period; None if there is nothing to report."""
    rise = Flow(*(new - old for new, old in zip(after, before, strict=True)))
    packets = rise.to_peer_packets + rise.to_client_packets
    if packets <= 0 and rise.drops < MANY_DROPS:
        return None
    return {
        "seconds": round(seconds, 1),
        "packets_per_second": round(packets / seconds),
        "megabits_per_second": round(8 * (rise.to_peer_bytes + rise.to_client_bytes) / seconds / _MEGABIT, 2),
        "to_peer_packets": rise.to_peer_packets,
        "to_peer_bytes": rise.to_peer_bytes,
        "to_client_packets": rise.to_client_packets,
        "to_client_bytes": rise.to_client_bytes,
        **({"kernel_packets": rise.kernel_packets} if after.kernel_packets else {}),
        "drops": rise.drops,
        "allocations": after.allocations,
        "channels": after.channels,
    }


class StatsLine:
    """A thread that logs the traffic of each period.

    Args:
        read: reads the traffic.
        also: is called each period as well.
        clock: returns monotonic seconds.
        wait: waits for some seconds, and returns whether to stop; in a test, it does not wait.
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
        self.bugs = 0
        """Periods of which the traffic could not be read: each is a bug."""
        self._before = read()
        self._at = clock()
        self._thread = threading.Thread(target=self._run, name="stats", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, without a last line."""
        self._stopped.set()
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while not self._wait(PERIOD):
            self._log_period()

    def _log_period(self) -> None:
        try:
            self._also()
            after, at = self._read(), self._clock()
            fields = report(self._before, after, at - self._at)
        except Exception:  # noqa: BLE001 - the next period may succeed
            self.bugs += 1
            if self.bugs == 1:
                _log.exception("what flows can't be read: please report this; further times are only counted")
            return
        if fields is not None:
            _log.info("relayed", **fields)
        self._before, self._at = after, at
