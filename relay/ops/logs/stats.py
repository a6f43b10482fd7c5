"""Log the relayed traffic every ten seconds, unless nothing is relayed."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from relay.logger import Fields, Logger
from relay.ops.totals import RelayState, RelayTotals

PERIOD = 10.0
"""Seconds from one line to the next."""

MANY_DROPS = 100
"""Drops in a period that are logged even if nothing was relayed. A port on the Internet gets a few stray datagrams."""

STOP_TIMEOUT = 1.0
"""Seconds to wait for the thread at the end; the thread may be reading counters."""

_MEGABIT = 1e6
_PRESENT = ("allocations", "channels")

Flow: TypeAlias = Mapping[str, int]
"""The traffic relayed since the start, and the present allocations and channels, by their names in the line."""

_log = Logger("relay.ops.stats")


def flow_in(state: RelayState) -> Flow:
    """Read the totals, without a message to any actor."""
    totals = RelayTotals(state)
    kernel = totals.by_kernel
    return {
        **totals.by_sockets.plus(kernel)._asdict(),
        # Included in the packets above.
        "kernel_packets": kernel.to_peer_packets + kernel.to_client_packets,
        "drops": sum(totals.drops.values()) + totals.kernel_drops + totals.dropped_late,
        "allocations": totals.allocations,
        "channels": totals.channels,
    }


def report(before: Flow, after: Flow, seconds: float) -> Fields | None:
    """Return the fields of a line about a period; None if there is nothing to report."""
    rise = {name: after[name] - before[name] for name in after if after[name] or name != "kernel_packets"}
    packets = rise["to_peer_packets"] + rise["to_client_packets"]
    if packets <= 0 and rise["drops"] < MANY_DROPS:
        return None
    return {
        "seconds": round(seconds, 1),
        "packets_per_second": round(packets / seconds),
        "megabits_per_second": round(8 * (rise["to_peer_bytes"] + rise["to_client_bytes"]) / seconds / _MEGABIT, 2),
        **rise,
        **{name: after[name] for name in _PRESENT},
    }


class StatsLine:
    """A thread that logs the traffic of each period.

    Args:
        read: reads the traffic.
        also: is called each period as well.
    """

    def __init__(self, read: Callable[[], Flow], also: Callable[[], None]) -> None:
        self._read = read
        self._also = also
        self._before, self._at = read(), time.monotonic()
        self._has_failed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stats", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, without a last line."""
        self._stopped.set()
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while not self._stopped.wait(PERIOD):
            self.end_period(time.monotonic())

    def end_period(self, now: float) -> None:
        """Log the traffic since the last period, at a monotonic time. The thread calls this every `PERIOD`."""
        try:
            self._also()
            after = self._read()
            fields = report(self._before, after, now - self._at)
        except Exception:  # noqa: BLE001 - the next period may succeed
            if not self._has_failed:
                _log.exception("the traffic can't be read: please report this; further failures are not logged")
            self._has_failed = True
            return
        if fields is not None:
            _log.info("relayed", **fields)
        self._before, self._at = after, now
