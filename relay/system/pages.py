"""All pages of the HTTP addresses."""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from relay import __version__
from relay.config import LIVE_TIMEOUT, Config
from relay.core.addresses import AllocationId, Family
from relay.core.timestamp import Timestamp
from relay.logger import Level, Logger
from relay.net.endpoint import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Limits, Page, Pages, Query, error
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.log import Log
from relay.ops.metrics.prometheus import MetricsPage
from relay.ops.totals import Drain, NotReady, RelayState, RelayTotals
from relay.options import parse_timeout
from relay.status.page import StatusPage

if TYPE_CHECKING:
    # Imported only by relays with offload.
    from relay.system.offload import Offloading

_LIMITS = Limits(shared=frozenset(("/livez",)))
"""A flood of the health address must not cause a 503 for the supervisor's probe, which would restart the relay."""

_ID = re.compile(r"[0-9]{1,15}", re.ASCII)

_log = Logger("relay.actors.pages")


class PageContext(NamedTuple):
    """Inputs of the pages. The threads of requests read them."""

    state: RelayState
    is_alive: Callable[[float], bool]
    """Whether the server actor responds within the given number of seconds."""
    offloading: "Offloading | None"
    """None without offload."""
    bind_hosts: Mapping[Family, str]
    clients: Callable[[], list[Endpoint]]
    """The addresses at which the relay answers clients."""
    now: Callable[[], Timestamp]
    kick: Callable[[AllocationId], bool | None]
    """Ends an allocation; returns whether it existed, or None without a response."""
    drain: Callable[[float | None], str | None]
    """Drains for some seconds, or stops draining (None). Returns the reason of a refusal, or None."""
    log: Log | None = None
    """The log, if its filter can be changed."""


class PageSet(NamedTuple):
    """Pages by method."""

    get: Pages
    post: Pages
    delete: Pages | None = None


def control(config: Config, context: PageContext, health: Pages) -> PageSet:
    """Return the pages of the control address, which include the health pages."""
    status = StatusPage(context.state, context.bind_hosts, context.clients, context.now)
    drain = drain_pages(context.state, context.drain, config.drain_timeout)
    get: Pages = {**health, **drain.get, "/metrics": MetricsPage(context.state), "/status": status}
    post = drain.post
    if context.offloading is not None:
        datapath = context.offloading.datapath
        offload = offload_pages(datapath.state, context.offloading.channels, context.offloading.switch)
        get, post = get | offload.get, post | offload.post
    if context.log is not None:
        log_filter = log_filter_pages(context.log)
        get, post = get | log_filter.get, post | log_filter.post
    return PageSet(get, post, {"/allocations/ID": kick_page(context.kick)})


@contextlib.contextmanager
def serving(
    config: Config, context: PageContext, inherited: Mapping[str, Sequence[socket.socket]] = MappingProxyType({})
) -> Iterator[dict[str, HttpEndpoint]]:
    """Serve all HTTP addresses while the context lasts.

    Args:
        config: the settings.
        context: the inputs of the pages.
        inherited: the listening sockets of a predecessor, by name.

    Yields:
        The servers, by the names of their addresses.

    Raises:
        UsageError: an address is in use, or is not an address of this machine.
    """
    with contextlib.ExitStack() as stack:
        servers: dict[str, HttpEndpoint] = {}
        health = health_pages(
            context.state.not_ready, context.is_alive, config.timeouts.live, lambda: RelayTotals(context.state).drain
        )
        of_control = control(config, context, health)
        pages = {
            "health": PageSet(health, {}),
            "control": of_control,
            "metrics": PageSet({"/metrics": of_control.get["/metrics"]}, {}),
        }
        for name, at in config.http.items():
            names = config.control_hostnames if name == "control" else None
            http = HttpEndpoint(name, at, *pages[name], hostnames=names, limits=_LIMITS, inherited=inherited.get(name, ()))
            stack.callback(http.stop)
            servers[name] = http
        yield servers


def warn_if_open(control: Endpoint) -> None:
    """Log a warning if other machines can reach the control address."""
    if not control.is_loopback:
        _log.warning(
            "the control address is not loopback: whoever reaches it sees and changes what operators may",
            control=str(control),
            mend="--control-endpoint 127.0.0.1:9999, or a firewall",
        )


def health_pages(
    not_ready: Callable[[], Collection[NotReady]],
    is_alive: Callable[[float], bool],
    live_timeout: float = LIVE_TIMEOUT,
    drain: Callable[[], Drain | None] = lambda: None,
) -> Pages:
    """Return the pages by which an orchestrator checks that the relay is alive and ready for clients.

    Args:
        not_ready: returns the reasons why the relay is not ready for clients.
        is_alive: says whether the server actor responds within the given number of seconds.
        live_timeout: seconds that the server actor has to respond.
        drain: returns the drain; None unless the relay drains or stops.
    """

    def healthz(_: Query) -> Page:
        return Page(HTTPStatus.OK, {"status": "ok", "version": __version__})

    def livez(_: Query) -> Page:
        if is_alive(live_timeout):
            return Page(HTTPStatus.OK, {"status": "alive", "version": __version__})
        _log.error("the server actor does not answer", seconds=live_timeout)
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "hangs", "version": __version__})

    def readyz(_: Query) -> Page:
        reasons = [each.value for each in not_ready()]
        if not reasons:
            return Page(HTTPStatus.OK, {"status": "ready", "version": __version__})
        current = drain()
        body = {"status": "not ready", "reasons": reasons, "drain": current and current._asdict(), "version": __version__}
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, body)

    return {"/healthz": healthz, "/livez": livez, "/readyz": readyz}


def drain_pages(state: RelayState, request_drain: Callable[[float | None], str | None], default: float) -> PageSet:
    """Return the page that shows a drain, and the pages that start and cancel a drain.

    Args:
        state: has the drain.
        request_drain: drains for some seconds, or stops draining (None). Returns the reason of a refusal, or None.
        default: the seconds of a drain without the parameter `timeout`; 0 if there is no default.
    """
    began_at = time.monotonic()

    def shown(_: Query) -> Page:
        drain = RelayTotals(state).drain
        # By the uptime, a client notices that another process responds.
        uptime = round(time.monotonic() - began_at, 3)
        return Page(HTTPStatus.OK, {"drain": drain and drain._asdict(), "uptime": uptime})

    def request(seconds: float | None) -> Page:
        refusal = request_drain(seconds)
        return error(HTTPStatus.CONFLICT, refusal) if refusal else shown({})

    def started(query: Query) -> Page:
        if query.keys() - {"timeout"}:
            return error(HTTPStatus.BAD_REQUEST, "the only parameter is timeout: use /drain?timeout=5m")
        try:
            seconds = parse_timeout(query["timeout"]) if "timeout" in query else default
        except ValueError as fault:
            return error(HTTPStatus.BAD_REQUEST, str(fault))
        if not seconds and "timeout" not in query:
            return error(HTTPStatus.BAD_REQUEST, "no timeout: use timeout=5m, or start the relay with --drain-timeout")
        return request(seconds)

    return PageSet({"/drain": shown}, {"/drain": started, "/drain/cancel": lambda _: request(None)})


def offload_pages(
    state: Callable[[], Mapping[str, object]],
    channels: Callable[[], Mapping[str, object]],
    switch: Callable[[bool], bool],
) -> PageSet:
    """Return the pages that show offload, and the pages that switch it on and off.

    Args:
        state: returns all totals.
        channels: returns the traffic of each channel.
        switch: attaches (true) or detaches, and returns whether it succeeded.
    """

    def switched(*, attached: bool) -> Page:
        return Page(HTTPStatus.OK if switch(attached) else HTTPStatus.SERVICE_UNAVAILABLE, state())

    return PageSet(
        {"/offload": lambda _: Page(HTTPStatus.OK, state()), "/offload/channels": lambda _: Page(HTTPStatus.OK, channels())},
        {"/offload/attach": lambda _: switched(attached=True), "/offload/detach": lambda _: switched(attached=False)},
    )


def log_filter_pages(log: Log) -> PageSet:
    """Return the page that shows the log filter, and the page that changes it."""

    def shown(_: Query) -> Page:
        return Page(HTTPStatus.OK, {"directives": str(log.filter_in_force)})

    def changed(query: Query) -> Page:
        before = str(log.filter_in_force)
        if "directives" not in query:
            text = "the parameter directives is missing: use, for example, /log_filter?directives=info,relay.core=debug"
            return Page(HTTPStatus.BAD_REQUEST, {"error": text, "directives": before})
        try:
            log_filter = LogFilter.parse(query["directives"])
        except ValueError as error:
            return Page(HTTPStatus.BAD_REQUEST, {"error": str(error), "directives": before})
        is_logged = log.admits("relay.actors.pages", Level.INFO)
        if is_logged:
            # Before the change, since the new filter may suppress this line.
            _log.info("log filter changed", directives=str(log_filter), before=before)
        log.change_filter(log_filter)
        if not is_logged:
            _log.info("log filter changed", directives=str(log_filter), before=before)
        return shown(query)

    return PageSet({"/log_filter": shown}, {"/log_filter": changed})


def kick_page(kick: Callable[[AllocationId], bool | None]) -> Callable[[Query], Page]:
    """Return the page that ends an allocation."""

    def page(query: Query) -> Page:
        id_ = query["ID"]
        if _ID.fullmatch(id_) is None:
            return error(HTTPStatus.BAD_REQUEST, "the id of an allocation is a number: /status lists them")
        existed = kick(AllocationId(int(id_)))
        if existed is None:
            return error(HTTPStatus.SERVICE_UNAVAILABLE, "the relay does not answer: it starts, stops or hangs")
        if not existed:
            return error(HTTPStatus.NOT_FOUND, f"there is no allocation {id_}: it has ended, or never existed")
        return Page(HTTPStatus.OK, {"ended": int(id_)})

    return page
