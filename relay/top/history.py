"""What has been seen so far: from one answer to the next, totals become rates."""

from collections import deque
from typing import NamedTuple

from relay.status.model import Flow, Status

KEPT = 600
"""Rates: of more columns than a terminal has."""


class Rates(NamedTuple):
    """What happened in a second, between two answers."""

    to_peer_bytes: float
    to_peer_packets: float
    to_client_bytes: float
    to_client_packets: float
    drops: float


class History:
    """The latest answer, and the rates up to it.

    Args:
        interval: seconds of the relay's time between answers, at least, that rates are taken from: whoever presses keys has
            more answers than that.
    """

    def __init__(self, interval: float = 0.0) -> None:
        self.latest: Status | None = None
        self.rates: Rates | None = None
        """None until there are two answers of one run of the relay."""
        self.to_peer: deque[float | None] = deque(maxlen=KEPT)
        """Bytes a second, oldest first; None for the time in which the relay could not be reached."""
        self.to_client: deque[float | None] = deque(maxlen=KEPT)
        self._interval = interval
        self._before: Status | None = None

    def add(self, status: Status) -> None:
        """Take an answer."""
        self.latest, before = status, self._before
        if before is None or not _goes_on(before, status):
            # The first one, or of another run of the relay, whose counts began at 0.
            self.rates, self._before = None, status
            return
        seconds = status["uptime"] - before["uptime"]
        if seconds > 0 and seconds >= self._interval:
            self.rates, self._before = _rates(before, status, seconds), status
            self.to_peer.append(self.rates.to_peer_bytes)
            self.to_client.append(self.rates.to_client_bytes)

    def miss(self) -> None:
        """Take note that there was no answer."""
        self.rates = self._before = None
        if self.to_peer:
            self.to_peer.append(None)
            self.to_client.append(None)


def _rates(before: Status, status: Status, seconds: float) -> Rates:
    now, then = status["totals"], before["totals"]
    to_peer, to_client = _more(now["to_peer"], then["to_peer"]), _more(now["to_client"], then["to_client"])
    return Rates(
        to_peer[0] / seconds,
        to_peer[1] / seconds,
        to_client[0] / seconds,
        to_client[1] / seconds,
        max(0, sum(now["drops"].values()) - sum(then["drops"].values())) / seconds,
    )


def _more(now: Flow, then: Flow) -> tuple[int, int]:
    return now["bytes"] - then["bytes"], now["packets"] - then["packets"]


def _goes_on(before: Status, status: Status) -> bool:
    now, then = status["totals"], before["totals"]
    if status["uptime"] < before["uptime"]:
        return False
    more = (*_more(now["to_peer"], then["to_peer"]), *_more(now["to_client"], then["to_client"]))
    return min(more) >= 0
