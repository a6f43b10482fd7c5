"""Starts the relay in order, hears what happens to it, and stops it in reverse order."""

import contextlib
import math
import queue
import time
from collections.abc import Callable
from typing import Any, Self, cast

import pykka
import structlog

from relay import __version__
from relay.actors.clock import Clock, SystemClock
from relay.actors.core import random_source, server_config
from relay.actors.departure import PORTAL_STOP_TIMEOUT, SERVER_STOP_TIMEOUT, Departing, Departure
from relay.actors.inbox import ServerInbox
from relay.actors.listener import ListenerActor, RequestListenerActor
from relay.actors.news import Event, Failure, News, Request
from relay.actors.observing import observing
from relay.actors.offload import Offloading
from relay.actors.pages import Sources, serving, warn_if_open
from relay.actors.portal import PortalActor
from relay.actors.pulse import Pulse
from relay.actors.receiving import STALE_AFTER
from relay.actors.server import DataPaths, ServerActor, ServerCounters
from relay.actors.summary import summary_of
from relay.config import Config, Endpoint, PortalAccess
from relay.core.addresses import Family
from relay.core.commands import Drained
from relay.core.credentials import SECRET_LENGTH, RelaySecret
from relay.core.events import CoreEvent
from relay.core.portal.channel import PortalChannel
from relay.core.portal.commands import Begin, Fatal, Left
from relay.core.portal.endpoint import PortalConfig
from relay.core.server import Server
from relay.net.dial import Dialer
from relay.net.receiver import Receiver
from relay.net.steering import Steered
from relay.net.udp import UdpSocket, discard_waiting
from relay.offload.datapath import Datapath
from relay.ops.kernel_settings import findings, read_machine
from relay.ops.logs.core import CoreLog
from relay.ops.logs.lines import exception_words
from relay.ops.logs.log import Log
from relay.ops.logs.stats import flow_in
from relay.ops.machine import (
    bind_hosts,
    open_service_sockets,
    raise_descriptor_limit,
    trusted_authorities,
    user_agent,
)
from relay.ops.metrics import sources as metrics
from relay.ops.metrics.push import pushing
from relay.ops.systemd import Systemd
from relay.ops.threads import sharing_a_cpu, yield_cpu

WAITING_FROM_CLIENTS = 320
"""Datagrams that may wait in each socket that clients share, however large an overload is: a batch for each of a few busy
clients. With four such sockets this is 8 ms of what one CPU relays."""

BATCH_FROM_CLIENTS = 128
"""Datagrams and trains that are read in one go from a socket that clients share."""

LISTENER_STOP_TIMEOUT = 0.5
"""Seconds. A listener is woken from its read at once; it may be telling the server actor something."""

_DROPS_AT_ONCE = 256
"""Sockets that are asked for their drops before others get the CPU."""

_log = structlog.get_logger("relay.actors.system")


class System:
    """One relay in one process.

    Use it as a context: entering starts it, leaving stops it, whatever happened in between. Without a portal it answers
    clients from the start; with one, `run` has to hear first that the portal says so.

    Args:
        config: what was asked for.
        clock: stamps what reaches the core.
        news: what `run` waits for, if someone has begun to put to it before.
        systemd: is told how far it is.
        datapath: what has the kernel relay, if it does; closed at the end.
        log: has its filter changed by operators, and what the core tells of written.

    Raises:
        BadUseError: on entering, if this machine can't give what the config asks for.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock | None = None,
        news: News | None = None,
        systemd: Systemd | None = None,
        datapath: Datapath | None = None,
        log: Log | None = None,
    ) -> None:
        self.config = config
        self.news: News = news or queue.SimpleQueue()
        source = random_source(config.rng_seed)
        self.secret = config.secret or RelaySecret(source.randbytes(SECRET_LENGTH).hex())
        self.hosts = bind_hosts(config)
        self.core = Server(server_config(config, self.secret, self.hosts, offloads=datapath is not None), source)
        self.server_counters = ServerCounters()
        self.portal: PortalChannel | None = None
        self.listening: dict[Family, UdpSocket] = {}
        """What clients are sent from."""
        self._kernel_drops = 0
        self._steered: dict[Family, Steered] = {}
        """Where clients send to, `listening` among them."""
        self._clock = clock or SystemClock()
        self._systemd = systemd or Systemd({})
        self._log = log
        self._core_log = CoreLog(self._clock.monotonic, None if log is None else log.leaves_out)
        self._offloading = None if datapath is None else Offloading(datapath, self.hosts, self._clock)
        self._started_at = time.monotonic()
        self._stack = contextlib.ExitStack()
        self._has_begun = False
        self._departure = Departure(self._systemd)
        self._server: pykka.ActorRef[ServerActor] | None = None
        self._pulse: Pulse | None = None
        self._portal_actor: pykka.ActorRef[PortalActor] | None = None
        self._inbox: ServerInbox | None = None
        self._http: dict[str, Endpoint] = {}
        self._measured = metrics.Sources(
            counters=self.core.counters,
            tables=self.core.allocations,
            carried_out=self.server_counters,
            kernel_drops=self.kernel_drops,
            inbox=lambda: self._inbox,
            portal=lambda: self.portal,
            is_ready=lambda: self.is_ready,
            datapath=datapath,
            lines_lost=lambda: 0 if log is None else log.lines_lost,
        )

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._has_begun = False
        self._pulse = None
        # Before the server actor, whose end would look like a death to the watchdog.
        self._systemd.close()
        self._stack.close()

    @property
    def is_ready(self) -> bool:
        """Whether new clients should be sent here: it answers them, its portal knows it, and it is not about to end."""
        return self._has_begun and not self._departure.has_begun and (self.portal is None or self.portal.is_joined)

    def run(self, dump: Callable[[], None]) -> int:
        """Wait until the end, and give the exit code: 0 if it was asked for, 1 if it had to be.

        Args:
            dump: is called when someone asks to see what all threads do.
        """
        while True:
            try:
                event = self.news.get(timeout=self._departure.patience())
            except queue.Empty:
                code = self._departure.stop_waiting(len(self.core.allocations.by_id))
            else:
                code = self._hear(event, dump)
            if code is not None:
                return code

    def _hear(self, event: Event, dump: Callable[[], None]) -> int | None:
        """Act on news; give the exit code if it is the end."""
        match event:
            case Request.DUMP:
                _dump(dump)
            case Request.STOP:
                return 0
            case Request.LEAVE:
                actors = Departing(self._portal_actor, self._server, len(self.core.allocations.by_id))
                return self._departure.leave(actors, self.config.drain_timeout)
            case Begin():
                self._begin()
            case Left() | Drained():
                return self._departure.note_done(event)
            case Fatal():
                _log.critical("the relay can't be part of its network", reason=event.reason)
                return 1
            case Failure():
                _log.critical(
                    "an actor failed and the relay can't go on",
                    actor=event.actor,
                    error=exception_words(event.error),
                    exc_info=event.error,
                )
                return 1
        return None

    def address_of(self, family: Family) -> Endpoint:
        """Give where clients of a family are listened to."""
        host, port, *_ = self.listening[family].getsockname()
        return Endpoint(host, port)

    def summary(self) -> dict[str, object]:
        """Give the state of everything in numbers, read without asking any actor."""
        return summary_of(self._measured, time.monotonic() - self._started_at)

    def kernel_drops(self) -> int:
        """Give how many datagrams found the buffer of a socket full, of all sockets that there are and were."""
        udp = self.server_counters.udp
        drops = udp.kernel_drops
        for number, opened in enumerate(tuple(udp.open), 1):
            drops += opened.drops()
            if not number % _DROPS_AT_ONCE:
                # 32,768 sockets take 40 ms, and packets need not wait for that.
                yield_cpu()
        # A socket that is closed meanwhile is in neither number: what was counted is not taken back.
        self._kernel_drops = max(self._kernel_drops, drops)
        return self._kernel_drops

    def _start(self) -> None:
        """Start all there is but the listeners; what was started is undone by leaving the context, in reverse order."""
        self._stack.enter_context(sharing_a_cpu(self.config))
        offload = self._offloading
        if offload is not None:
            self._stack.callback(offload.datapath.close)
        raise_descriptor_limit(self.config)
        self._open_sockets()
        sources = Sources(
            is_ready=lambda: self.is_ready,
            is_alive=self._is_alive,
            offloading=offload,
            metrics=self._measured,
            bind_hosts=self.hosts,
            clients=lambda: [self.address_of(family) for family in self.listening],
            now=self._clock.now,
            log=self._log,
        )
        self._http = self._stack.enter_context(serving(self.config, sources))
        self._stack.enter_context(pushing(self.config.otlp, self._measured))
        # Not before: bad use is one line, and no other.
        self._tell_of_settings()
        paths = DataPaths(self.listening, self.hosts, None if offload is None else offload.carry_out)
        server = ServerActor.start(self.core, paths, self._clock, self.server_counters, self._failed, self._hear_server)
        self._stack.callback(_stop, "server", server, SERVER_STOP_TIMEOUT)
        self._server = server
        self._pulse = Pulse(server, lambda: self.news.put(Request.DUMP))
        self._inbox = cast(ServerInbox, server.actor_inbox)
        self._stack.callback(self._inbox.close)
        if offload is not None:
            self._stack.callback(offload.stop)
            offload.start()
        if self._log is not None:
            self._stack.enter_context(observing(self.core, lambda: flow_in(self._measured), self._log))
        if self.config.portal is None:
            self._begin()
        else:
            self._join(self.config.portal)

    def _open_sockets(self) -> None:
        """Take the port that clients talk to, so that a port that is in use is known of at once; nobody is answered yet."""
        for family, host in self.hosts.items():
            steered = open_service_sockets(family, host, self.config.service_port, self.server_counters.udp)
            for each in steered.all:
                self._stack.callback(each.close)
            self._steered[family] = steered
            self.listening[family] = steered.data[0]

    def _tell_of_settings(self) -> None:
        """Say what was asked for and is not usual, and which settings of this machine will bite, with what mends them."""
        for note in () if self._offloading is None else self._offloading.datapath.notes:
            _log.info("offload changed", what=note)
        if self.config.rng_seed is not None:
            _log.warning("random numbers are seeded: whoever knows the seed knows the secret; for tests only")
        warn_if_open(self._http["control"])
        smallest = min(opened.receive_buffer for opened in self.listening.values())
        for finding in findings(self.config, read_machine(smallest)):
            _log.warning(**finding._asdict())

    def _join(self, access: PortalAccess) -> None:
        """Begin to join the portal, whose `init` is the word to begin."""
        port = next(iter(self.listening.values())).getsockname()[1]
        config = PortalConfig(
            access.url, access.token, self.secret, access.name, self.config.public_hosts, port, user_agent()
        )
        # Its own source: the server actor draws from the other one in another thread.
        self.portal = PortalChannel(config, random_source(self.config.rng_seed))
        tls = trusted_authorities() if access.url.is_tls else None
        if tls is None:
            _log.warning("the portal is talked to without TLS: whoever listens sees the token and the secret")
        dialer = Dialer(access.url.host, access.url.port, tls, access.proxy)
        _log.info(
            "joining the portal", url=access.url.text, proxy=access.proxy and f"{access.proxy.host}:{access.proxy.port}"
        )
        self._systemd.status("joining the portal")
        self._portal_actor = PortalActor.start(self.portal, dialer, self._clock, self.news.put, self._failed)
        self._stack.callback(_stop, "portal", self._portal_actor, PORTAL_STOP_TIMEOUT)

    def _begin(self) -> None:
        """Answer clients from now on: the gate is open."""
        assert self._server is not None  # noqa: S101 - it is started before
        for family, steered in self._steered.items():
            # What came before was for nobody, and its senders have long tried again.
            discard_waiting(steered.all)
            for number, opened in enumerate(steered.data, 1):
                # Requests are never thrown away, however long they have waited; nor is what comes by the same socket.
                stale_after = math.inf if steered.rest is None else STALE_AFTER
                self._listen(ListenerActor, f"listener-{family.name.lower()}-{number}", opened, stale_after)
            if steered.rest is not None:
                self._listen(RequestListenerActor, f"requests-{family.name.lower()}", steered.rest, math.inf)
        self._has_begun = True
        _log.info(
            "ready",
            version=__version__,
            clients=[str(self.address_of(family)) for family in self.listening],
            relayed=[str(host) for host in self.config.public_hosts.values()],
            ports=f"{self.config.lowest_port}-{self.config.highest_port}",
            **{name: str(endpoint) for name, endpoint in self._http.items()},
        )
        self._systemd.ready("answering clients")
        self._systemd.watch(self._is_alive)

    def _listen(self, listener: type[ListenerActor], name: str, opened: UdpSocket, stale_after: float) -> None:
        assert self._inbox is not None  # noqa: S101 - it is the server actor's
        receiver = Receiver((opened,), WAITING_FROM_CLIENTS, BATCH_FROM_CLIENTS, stale_after)
        started = listener.start(name, receiver, self._inbox, self._failed)
        self._stack.callback(_stop, name, started, LISTENER_STOP_TIMEOUT)
        self._stack.callback(receiver.stop)

    def _is_alive(self, timeout: float) -> bool:
        """Tell whether the server actor works off its messages, within some seconds; or is not there, at start and end."""
        pulse = self._pulse
        # Looked at again, since the end may have come meanwhile.
        return pulse is None or pulse.beats(timeout) or self._pulse is None

    def _hear_server(self, told: Drained | CoreEvent) -> None:
        """Take what the server actor tells, in its thread."""
        if isinstance(told, Drained):
            self.news.put(told)
        else:
            self._core_log.write(told)

    def _failed(self, actor: str, error: BaseException) -> None:
        self.news.put(Failure(actor, error))


def _stop(name: str, actor: pykka.ActorRef[Any], timeout: float) -> None:
    try:
        actor.stop(timeout=timeout)
    except pykka.Timeout:
        _log.warning("did not stop in time", actor=name, seconds=timeout)


def _dump(dump: Callable[[], None]) -> None:
    try:
        dump()
    except Exception:  # noqa: BLE001 - looking at the relay must not end it
        _log.exception("the dump failed; the relay goes on")
