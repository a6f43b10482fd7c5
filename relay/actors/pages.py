"""All pages of the health and of the control address: who answers what, in one place."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import NamedTuple

import structlog

from relay import __version__
from relay.actors.offload import Offloading
from relay.config import Config, Endpoint
from relay.core.addresses import Family
from relay.core.instant import Instant
from relay.ops.http.endpoint import HttpEndpoint, Limits, Page, Pages, Query
from relay.ops.http.guard import OperatorsOnly, anyone
from relay.ops.logs.filter import Level, LogFilter
from relay.ops.logs.log import Log
from relay.ops.metrics import sources as metrics
from relay.ops.metrics.prometheus import MetricsPage
from relay.status import answer as status
from relay.status.answer import StatusPage
from relay.status.kernel import OffloadedKernel

LIVE_PATIENCE = 3.0
"""Seconds in which the server actor has to answer for the relay to be taken for alive: fewer than whoever asks waits for."""

_LIMITS = Limits(shared=frozenset(("/livez",)))
"""Whoever floods the health address must not have another one told 503 there, who would end the relay for it."""

_log = structlog.get_logger("relay.actors.pages")


class Sources(NamedTuple):
    """What pages are made of. They are read from other threads, without asking any actor."""

    is_ready: Callable[[], bool]
    """Whether new clients should be sent here."""
    is_alive: Callable[[float], bool]
    """Whether the server actor works off its messages, within some seconds."""
    offloading: Offloading | None
    """What has the kernel relay, if it does."""
    metrics: metrics.Sources
    """All that can be measured."""
    bind_hosts: Mapping[Family, str]
    clients: Callable[[], list[Endpoint]]
    """Where they are answered."""
    now: Callable[[], Instant]
    log: Log | None = None
    """What has its filter changed, if it can be."""


class Answered(NamedTuple):
    """The pages of one address."""

    get: Pages
    post: Pages


def health(sources: Sources) -> Answered:
    """Give what anyone may see: whether the relay lives, and whether it answers clients."""
    return Answered(health_pages(sources.is_ready, sources.is_alive), {})


def control(config: Config, sources: Sources) -> Answered:
    """Give what operators see and do."""
    get, post = health(sources)
    get = get | {"/metrics": MetricsPage(sources.metrics), "/status": status_page(config, sources)}
    if sources.offloading is not None:
        offload = offload_pages(sources.offloading.datapath.state, sources.offloading.channels, sources.offloading.switch)
        get, post = get | offload.get, post | offload.post
    if sources.log is not None:
        log_filter = log_filter_pages(sources.log)
        get, post = get | log_filter.get, post | log_filter.post
    return Answered(get, post)


@contextlib.contextmanager
def serving(config: Config, sources: Sources) -> Iterator[dict[str, Endpoint]]:
    """Answer at both addresses, for as long as the context lasts.

    Yields:
        Where, by the names of the options; what was asked for as port 0 is the one that was free.

    Raises:
        BadUseError: an address is in use, or this machine does not have it.
    """
    with contextlib.ExitStack() as stack:
        at: dict[str, Endpoint] = {}
        for name, asked, answered, guard in (
            ("health", config.health, health(sources), anyone),
            ("control", config.control, control(config, sources), OperatorsOnly(config.control_hostnames)),
        ):
            http = HttpEndpoint(name, asked, answered.get, answered.post, guard=guard, limits=_LIMITS)
            stack.callback(http.stop)
            at[name] = Endpoint(asked.host, http.port)
        yield at


def warn_if_open(control: Endpoint) -> None:
    """Say so if others than this machine's programs can reach the control address."""
    if not control.is_loopback:
        _log.warning(
            "the control address is not loopback: whoever reaches it sees and changes what operators may",
            control=str(control),
            mend="--control-address 127.0.0.1:9999, or a firewall",
        )


def status_page(config: Config, sources: Sources) -> StatusPage:
    """Give the page that shows what the relay is and does."""
    measured = sources.metrics
    return StatusPage(
        status.Sources(
            config=config,
            bind_hosts=sources.bind_hosts,
            tables=measured.tables,
            counters=measured.counters,
            udp=measured.carried_out.udp,
            kernel=None if measured.datapath is None else OffloadedKernel(measured.datapath),
            now=sources.now,
            is_ready=sources.is_ready,
            portal=measured.portal,
            clients=sources.clients,
            kernel_drops=measured.kernel_drops,
        )
    )


def health_pages(is_ready: Callable[[], bool], is_alive: Callable[[float], bool]) -> Pages:
    """Give the pages by which an orchestrator sees whether the relay lives, and whether it answers clients."""

    def healthz(_: Query) -> Page:
        return Page(HTTPStatus.OK, {"status": "ok", "version": __version__})

    def livez(_: Query) -> Page:
        if is_alive(LIVE_PATIENCE):
            return Page(HTTPStatus.OK, {"status": "alive", "version": __version__})
        _log.error("the server actor does not answer", seconds=LIVE_PATIENCE)
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "hangs", "version": __version__})

    def readyz(_: Query) -> Page:
        if is_ready():
            return Page(HTTPStatus.OK, {"status": "ready", "version": __version__})
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "not ready", "version": __version__})

    return {"/healthz": healthz, "/livez": livez, "/readyz": readyz}


def offload_pages(
    state: Callable[[], Mapping[str, object]],
    channels: Callable[[], Mapping[str, object]],
    switch: Callable[[bool], bool],
) -> Answered:
    """Give the pages that show what the kernel relays, and those that switch it on and off.

    Args:
        state: all that is counted.
        channels: what each channel relayed.
        switch: attaches (true) or detaches, and tells whether that went well.
    """

    def switched(*, attached: bool) -> Page:
        return Page(HTTPStatus.OK if switch(attached) else HTTPStatus.SERVICE_UNAVAILABLE, state())

    return Answered(
        {"/offload": lambda _: Page(HTTPStatus.OK, state()), "/offload/channels": lambda _: Page(HTTPStatus.OK, channels())},
        {"/offload/attach": lambda _: switched(attached=True), "/offload/detach": lambda _: switched(attached=False)},
    )


def log_filter_pages(log: Log) -> Answered:
    """Give the page that shows which events are logged, and the one that changes it."""

    def shown(_: Query) -> Page:
        return Page(HTTPStatus.OK, {"directives": str(log.filter_in_force)})

    def changed(query: Query) -> Page:
        before = str(log.filter_in_force)
        if "directives" not in query:
            text = "no directives are given: ask for /log_filter?directives=info,relay.core=debug, say"
            return Page(HTTPStatus.BAD_REQUEST, {"error": text, "directives": before})
        try:
            log_filter = LogFilter.parse(query["directives"])
        except ValueError as error:
            return Page(HTTPStatus.BAD_REQUEST, {"error": str(error), "directives": before})
        is_told = log.admits("relay.actors.pages", Level.INFO)
        if is_told:
            # By the one that was: else one that writes less would be put in force without a line.
            _log.info("log filter changed", directives=str(log_filter), before=before)
        log.change_filter(log_filter)
        if not is_told:
            _log.info("log filter changed", directives=str(log_filter), before=before)
        return shown(query)

    return Answered({"/log_filter": shown}, {"/log_filter": changed})
