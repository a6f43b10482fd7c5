"""``GET /status``: state and traffic of the relay, in the form of `relay.status.model`.

The thread of the request builds the response from tables that another thread keeps changing. It works in steps of less than
a millisecond with pauses between, so packets wait no longer than a step. Requests are processed one by one, and all
allocations are scanned at most once per second. Beyond that, the cost of a request depends on the size of its page, which is
limited. Allocations are serialized one by one, because `json.dumps` of a large page would keep the interpreter for
milliseconds.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from relay import __version__
from relay.config import ANY_CPU, Config
from relay.core.addresses import AllocationId, Family, show, socket_address
from relay.core.allocation import CHANNEL_GRACE_PERIOD, Allocation, ChannelBinding
from relay.core.counters import Counters
from relay.core.credentials import parse_username
from relay.core.history import RequestRecord
from relay.core.portal.channel import PortalChannel
from relay.core.timestamp import Timestamp
from relay.net.endpoint import Endpoint
from relay.ops.http.messages import Page, Query
from relay.ops.totals import RelayState, RelayTotals, TrafficCounts, counts_in
from relay.ops.yielder import Yielder
from relay.status import model
from relay.status.parameters import MAX_CHANNELS, parse
from relay.status.scan import Scan

if TYPE_CHECKING:
    # Imported only by relays with offload.
    from relay.offload.datapath import Datapath

FRESH_FOR = 1.0
"""Lifetime of a scan in seconds. Frequent requests cost at most a scan per second, and rates are averages over at least a
second."""

MAX_AGE = 60.0
"""Age in seconds from which a scan is not used for rates: their average would say little about the present."""


PLAIN_SETTINGS = (
    *("service_port", "lowest_port", "highest_port", "max_allocations_per_address", "max_channels", "max_channels_in_all"),
    *("unauthenticated_rate", "unauthenticated_burst", "control_hostnames", "drain_timeout", "switch_interval"),
)
"""Fields of `Config` that are shown as they are."""

MAX_CLIENTS = 20
"""Clients in a page with records of requests."""

FINGERPRINT_DIGITS = 12
"""Hexadecimal digits by which an operator recognises the username of an allocation: `docs/status.md` has the command."""


class StatusPage:
    """The page. A single thread at a time calls it (`relay.ops.http.messages.Pages`)."""

    def __init__(
        self,
        state: RelayState,
        bind_hosts: Mapping[Family, str],
        clients: Callable[[], list[Endpoint]],
        now: Callable[[], Timestamp],
        *,
        yield_if_due: Yielder | None = None,
    ) -> None:
        self._state = state
        self._bind_hosts = bind_hosts
        self._clients = clients
        self._now = now
        self._yield_if_due = yield_if_due or Yielder()
        self._started_at = now().monotonic
        self._scan: Scan | None = None

    def __call__(self, query: Query) -> Page:
        """Return a response."""
        try:
            selection = parse(query)
        except ValueError as error:
            return Page(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        scan = self._fresh_scan()
        first, descending = selection["offset"], selection["order"] == "desc"
        last, matching = first + selection["limit"], len(scan)
        filters = (selection["client"], selection["peer"], selection["port"]) != (None, None, None)
        upto = matching if filters else last
        order = scan.order(selection["sort"], upto, descending=descending)
        if filters:
            order = scan.matching(selection, order)
            matching = len(order)
        rows = ",\n".join(self._rows(order[first:last], scan, selection["channels"]))
        head = json.dumps(self._head(selection, scan, matching))
        # The allocations are the last field.
        return Page(HTTPStatus.OK, f"{head[:-2]}\n{rows}\n]}}\n")

    def _fresh_scan(self) -> Scan:
        """Return the last scan if it is fresh, else make a scan."""
        now, last = self._now().monotonic, self._scan
        if last is not None and now < last.at + FRESH_FOR:
            return last
        before = last if last is not None and now < last.at + MAX_AGE else None
        self._scan = Scan(self._state, now, before, self._yield_if_due)
        return self._scan

    def _head(self, selection: model.Selection, scan: Scan, matching: int) -> model.Status:
        """Return everything but the allocations."""
        state, now = self._state, self._now()
        not_ready = [each.value for each in state.not_ready()]
        drain = RelayTotals(state).drain
        return {
            "version": __version__,
            "time": round(now.unix, 3),
            "uptime": round(now.monotonic - self._started_at, 3),
            "handovers": state.handovers().number,
            "ready": not not_ready,
            "not_ready": not_ready,
            "drain": None
            if drain is None
            else {"until": drain.until, "time_left": drain.time_left, "allocations": drain.allocations},
            "config": _config(state.config, self._bind_hosts),
            "portal": _portal(state.portal(), now.monotonic),
            "data_paths": {
                "userspace": {"clients": [str(each) for each in self._clients()]},
                "xdp": _xdp(state.datapath),
            },
            "totals": self._totals(scan),
            "page": selection,
            "matching": matching,
            "requests_complete_for": round(now.monotonic - max(state.history.complete_since, self._started_at), 1),
            "requests": [] if selection["client"] is None else self._requests(selection["client"]),
            "allocations": [],
        }

    def _totals(self, scan: Scan) -> model.TotalsStatus:
        totals, counters, rates = RelayTotals(self._state), self._state.counters, scan.rates
        return {
            **_flows(totals.traffic, totals.by_kernel),
            "rates_over": None if scan.seconds is None else round(scan.seconds, 3),
            "to_peer_rate": None if rates is None else {"packets": round(rates[0], 1), "bytes": round(rates[1], 1)},
            "to_client_rate": None if rates is None else {"packets": round(rates[2], 1), "bytes": round(rates[3], 1)},
            "allocations": totals.allocations,
            "channels": totals.channels,
            "allocations_made": counters.allocations_made,
            "allocations_freed": {reason.value: count for reason, count in counters.allocations_freed.copy().items()},
            "responses": _responses(counters),
            "drops": totals.drops | {"kernel": totals.kernel_drops},
            "send_errors": dict(self._state.carried_out.udp.send_errors.copy()),
        }

    def _requests(self, network: str) -> list[model.ClientHistory]:
        """Return the records of clients in a network."""
        history, within, now = self._state.history, ip_network(network), self._now().monotonic
        known = self._yield_if_due.between([*history.proven.items(), *history.unproven.items()])
        found = sorted(
            ((client, records.copy()) for client, records in known if ip_address(client[0]) in within),
            key=lambda each: -each[1][-1].last,
        )
        return [
            {"client": show(client), "requests": [_recorded(each, now) for each in records]}
            for client, records in found[:MAX_CLIENTS]
        ]

    def _rows(self, listed: Iterable[AllocationId], scan: Scan, channels: int) -> Iterator[str]:
        """Return each allocation as JSON, without allocations that have ended."""
        left = MAX_CHANNELS
        for id_ in listed:
            allocation = self._state.tables.by_id.get(id_)
            self._yield_if_due()
            if allocation is not None:
                yield self._row(allocation, scan, min(channels, left))
                left -= min(channels, left, allocation.channel_count)

    def _row(self, allocation: Allocation, scan: Scan, limit: int) -> str:
        channels = list(allocation.channels.values())
        written = []
        for channel in channels[:limit]:
            written.append(json.dumps(self._channel(channel, scan.kernel_counts_of(channel))))
            self._yield_if_due()
        username = parse_username(allocation.username)
        rates = scan.rates_of(allocation.id)
        hosts = self._state.config.public_hosts
        row: model.AllocationStatus = {
            "id": allocation.id,
            "client": show(allocation.client),
            "state": allocation.state.value,
            "relayed": [show(socket_address(hosts[family], allocation.port)) for family in allocation.families],
            "credential_expires_at": None if username is None else username.expiry,
            "username_sha256": hashlib.sha256(allocation.username.encode()).hexdigest()[:FINGERPRINT_DIGITS],
            "age": _seconds(self._now().monotonic - allocation.made_at),
            "time_left": self._time_left(allocation.ends),
            "drops": {reason.value: count for reason, count in allocation.drops.copy().items()},
            **_flows(*scan.counts_of(allocation, channels)),
            "to_peer_rate": None if rates is None else round(rates[0], 1),
            "to_client_rate": None if rates is None else round(rates[1], 1),
            "channel_count": len(channels),
            "channels": [],
        }
        # The channels are the last field.
        return f"{json.dumps(row)[:-2]}{', '.join(written)}]}}"

    def _channel(self, channel: ChannelBinding, by_kernel: Sequence[int]) -> model.ChannelStatus:
        ends = channel.until if channel.live else channel.until + CHANNEL_GRACE_PERIOD
        return {
            "number": channel.number,
            "peer": show(channel.peer),
            "state": "live" if channel.live else "cooling",
            "time_left": self._time_left(ends),
            **_flows(TrafficCounts._make(counts_in(channel)).plus(by_kernel), by_kernel),
        }

    def _time_left(self, ends: float) -> float:
        return _seconds(ends - self._now().monotonic)


def _recorded(record: RequestRecord, now: float) -> model.RecordedRequest:
    return {
        "request": record.method.name.lower(),
        "code": None if record.code is None else int(record.code),
        "cause": record.cause,
        "about": record.about,
        "count": record.count,
        "first_ago": _seconds(now - record.first),
        "last_ago": _seconds(now - record.last),
    }


def _config(config: Config, bind_hosts: Mapping[Family, str]) -> dict[str, object]:
    """Return the settings that are not secret. Each is listed, so a new setting is never shown by accident."""
    portal, offload = config.portal, config.offload
    proxy = None if portal is None else portal.proxy
    return {name: getattr(config, name) for name in PLAIN_SETTINGS} | {
        "public_addresses": list(config.public_hosts.values()),
        "bind_addresses": list(bind_hosts.values()),
        "max_allocations": config.capacity,
        "health_address": str(config.health),
        "control_address": str(config.control),
        "metrics_address": None if config.metrics is None else str(config.metrics),
        "handover_socket": None if config.handover_socket is None else str(config.handover_socket),
        "portal_url": None if portal is None else portal.url.text,
        "name": config.name,
        # Without user and password.
        "proxy": None if proxy is None else f"{proxy.host}:{proxy.port}",
        "cpu_affinity": {None: "off", ANY_CPU: "auto"}.get(config.cpu, str(config.cpu)),
        "allow_peers": [str(network) for network in config.allow_peers],
        "deny_peers": [str(network) for network in config.deny_peers],
        "ebpf_offloading": [] if offload is None else list(offload.interfaces),
        "ebpf_attach_mode": None if offload is None else offload.mode.value,
        # Whether metrics are pushed: the URL may contain a password.
        "otlp": config.otlp is not None,
    }


def _portal(portal: PortalChannel | None, now: float) -> model.PortalStatus | None:
    if portal is None:
        return None
    since = portal.entered_at
    return {
        "state": portal.state.value,
        "has_begun": portal.has_begun,
        "state_age": None if since is None else _seconds(now - since),
        "joins": portal.joins,
        "last_failure": portal.last_failure,
    }


def _xdp(datapath: "Datapath | None") -> model.XdpStatus | None:
    if datapath is None:
        return None
    return {
        "interfaces": datapath.devices.modes,
        "failures": dict(datapath.devices.failures),
        "channels": len(datapath.channels.installed),
        "channels_refused": datapath.channels.refused,
    }


def _responses(counters: Counters) -> model.ResponseCounts:
    errors: dict[str, dict[str, int]] = {}
    for (method, code), count in counters.errors.copy().items():
        errors.setdefault(str(method), {})[str(code)] = count
    withheld: dict[str, int] = {}
    for (method, _), count in counters.withheld.copy().items():
        withheld[str(method)] = withheld.get(str(method), 0) + count
    successes = {str(method): count for method, count in counters.successes.copy().items()}
    return {"successes": successes, "errors": errors, "withheld": withheld}


def _flows(traffic: Sequence[int], by_kernel: Sequence[int]) -> model.Flows:
    """Return the traffic in both directions, with the part relayed by the kernel."""
    return {
        "to_peer": {"packets": traffic[0], "bytes": traffic[1], "xdp_packets": by_kernel[0], "xdp_bytes": by_kernel[1]},
        "to_client": {"packets": traffic[2], "bytes": traffic[3], "xdp_packets": by_kernel[2], "xdp_bytes": by_kernel[3]},
    }


def _seconds(span: float) -> float:
    """Return a rounded time span, at least 0: a deadline may pass while the page is made."""
    return round(max(0.0, span), 1)
