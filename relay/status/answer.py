"""``GET /status``: what the relay is and does, as `relay.status.model` has it.

How it works
============

Whoever asks is answered in the thread that takes the request, from tables that another thread goes on writing. All of it is
done in portions of less than a millisecond, with rests between them, so that no packet waits for longer. Requests are
answered one after another, and all allocations looked at once a second at most: others have what was found then. What a
request costs beyond that is what it lists: a page, whose size is limited.
"""

import json
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from relay import __version__
from relay.config import Config, Endpoint
from relay.core.addresses import AllocationId, Family
from relay.core.allocations import Allocations
from relay.core.counters import Counters
from relay.core.instant import Instant
from relay.core.portal.channel import PortalChannel
from relay.net.udp import UdpCounters
from relay.ops.http.endpoint import Page, Query
from relay.status import model
from relay.status.census import Census, Findings
from relay.status.kernel import Kernel
from relay.status.pace import Pace
from relay.status.parameters import Parameters, parse
from relay.status.ranking import SORTS, Ranking
from relay.status.rows import Rows
from relay.status.shown import config_of, flows_of, portal_of, rates_of


class Sources(NamedTuple):
    """What the status is made of. It is read from other threads, without asking any actor."""

    config: Config
    bind_hosts: Mapping[Family, str]
    tables: Allocations
    counters: Counters
    udp: UdpCounters
    kernel: Kernel | None
    """None if it relays nothing."""
    now: Callable[[], Instant]
    """The clock of what is in the tables."""
    is_ready: Callable[[], bool]
    portal: Callable[[], PortalChannel | None]
    """None for a relay that stands alone."""
    clients: Callable[[], list[Endpoint]]
    """Where they are answered."""
    kernel_drops: Callable[[], int]
    """Datagrams that found a socket full."""


class StatusPage:
    """Answers requests for the status, of as many threads as there are.

    Args:
        sources: what it is made of.
        new_pace: gives what makes one answer rest between portions of work.
    """

    def __init__(self, sources: Sources, new_pace: Callable[[], Pace] = Pace) -> None:
        self._sources = sources
        self._new_pace = new_pace
        self._started_at = self._clock()
        self._census = Census(sources.tables, sources.counters, sources.kernel, self._clock)
        self._rows = Rows(sources.tables, sources.config.public_hosts, self._clock)
        self._ranking: tuple[tuple[str, bool], Ranking] | None = None
        # One request at a time: so many of them take no more of the interpreter than one.
        self._lock = threading.Lock()

    def __call__(self, query: Query) -> Page:
        """Answer a request."""
        try:
            asked = parse(query)
        except ValueError as error:
            return Page(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        pace = self._new_pace()
        with self._lock:
            findings, listed = self._look(asked, pace)
            rows = ",\n".join(self._rows.write(listed, findings, asked.channels, pace))
            head = json.dumps(self._head(asked, findings))
        # They are the last field.
        return Page(HTTPStatus.OK, f"{head[:-2]}\n{rows}\n]}}\n")

    def _clock(self) -> float:
        return self._sources.now().monotonic

    def _look(self, asked: Parameters, pace: Pace) -> tuple[Findings, list[AllocationId]]:
        findings = self._census.findings(pace)
        order = (asked.sort, asked.descending)
        if self._ranking is None or self._ranking[0] != order or self._ranking[1].findings is not findings:
            ranking = Ranking(self._sources.tables, findings, SORTS[asked.sort], pace, descending=asked.descending)
            if self._ranking is not None:
                self._ranking[1].clear(pace)
            self._ranking = (order, ranking)
        return findings, self._ranking[1].slice(asked.offset, asked.limit, pace)

    def _head(self, asked: Parameters, findings: Findings) -> model.Status:
        """Give all but the allocations."""
        sources, now = self._sources, self._sources.now()
        return {
            "version": __version__,
            "time": round(now.unix, 3),
            "uptime": round(now.monotonic - self._started_at, 3),
            "ready": sources.is_ready(),
            "config": config_of(sources.config, sources.bind_hosts),
            "portal": portal_of(sources.portal(), now.monotonic),
            "data_paths": {
                "userspace": {"clients": [str(each) for each in sources.clients()]},
                "xdp": None if sources.kernel is None else sources.kernel.shown(),
            },
            "totals": self._totals(findings),
            "page": {
                "sort": asked.sort,
                "order": asked.order,
                "limit": asked.limit,
                "offset": asked.offset,
                "channels": asked.channels,
            },
            "allocations": [],
        }

    def _totals(self, findings: Findings) -> model.Totals:
        sources, counters = self._sources, self._sources.counters
        to_peer, to_client = flows_of(*self._census.relayed())
        to_peer_rate, to_client_rate = rates_of(findings)
        return {
            "to_peer": to_peer,
            "to_client": to_client,
            "rates_over": None if findings.seconds is None else round(findings.seconds, 3),
            "to_peer_rate": to_peer_rate,
            "to_client_rate": to_client_rate,
            "allocations": len(sources.tables.by_id),
            "channels": len(sources.tables.live_channels),
            "allocations_made": counters.allocations_made,
            "allocations_freed": _by_name(counters.allocations_freed),
            "responses": _responses(counters),
            "drops": _by_name(counters.drops) | {"kernel": sources.kernel_drops()},
            "send_errors": dict(sources.udp.send_errors.copy()),
        }


def _responses(counters: Counters) -> model.Responses:
    errors: dict[str, dict[str, int]] = {}
    for (method, code), count in counters.errors.copy().items():
        errors.setdefault(method.name.lower(), {})[str(code)] = count
    withheld: dict[str, int] = {}
    for (method, _), count in counters.withheld.copy().items():
        withheld[method.name.lower()] = withheld.get(method.name.lower(), 0) + count
    return {
        "successes": {method.name.lower(): count for method, count in counters.successes.copy().items()},
        "errors": errors,
        "withheld": withheld,
    }


def _by_name(counts: Mapping[Any, int]) -> dict[str, int]:
    # A copy, made in one go: its owner goes on counting.
    return {reason.value: count for reason, count in dict(counts).items()}
