"""Compose a relay: start its parts in order, and stop them in reverse order."""

import contextlib
import functools
import math
import queue
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Self, cast

import pykka

from relay import __version__
from relay.actors.addresses import AddressActor
from relay.actors.handover import InheritedReader
from relay.actors.mailbox import Mailbox
from relay.actors.messages import Execute, Kick, OwnAddresses
from relay.actors.readers import ListenerActor, RequestListenerActor
from relay.actors.server import DataPaths, ServerActor
from relay.config import Config, PortalAccess, UsageError
from relay.core.addresses import AllocationId, Family
from relay.core.commands import Drained
from relay.core.credentials import SECRET_LENGTH, RelaySecret
from relay.core.events import CoreEvent
from relay.core.overload import SHARED_BATCH_DATAGRAMS, SHARED_LEAST_WAITING, STALE_AFTER
from relay.core.portal.channel import PortalChannel
from relay.core.server import Server
from relay.logger import Logger
from relay.net.endpoint import Endpoint
from relay.net.neighbours import watching_neighbours
from relay.net.receiver import Receiver
from relay.net.reuseport import ReuseportGroup
from relay.net.routes import own_addresses
from relay.net.udp import UdpSocket, discard_waiting
from relay.ops.addresses import (
    relay_addresses,
    relayed_hosts,
    unreachable,
    warn_about_addresses,
    with_several_addresses,
)
from relay.ops.clock import Clock, SystemClock
from relay.ops.kernel_settings import findings
from relay.ops.logs.core import log_event, wanted
from relay.ops.logs.log import Log
from relay.ops.logs.stats import StatsLine, flow_in
from relay.ops.machine import bind_hosts, raise_descriptor_limit
from relay.ops.metrics.push import pushing
from relay.ops.systemd import Systemd
from relay.ops.totals import Handovers, NotReady, RelayState, RelayTotals, ServerCounters
from relay.system.core import random_source, server_config
from relay.system.cpu import sharing_a_cpu
from relay.system.data_paths import OwnNetwork, open_data_paths
from relay.system.events import EventQueue, Failure, SystemRequest, request_drain
from relay.system.liveness import Liveness
from relay.system.pages import PageContext, serving, warn_if_open
from relay.system.shutdown import ANSWERING, Shutdown

if TYPE_CHECKING:
    # Imported only by relays that use them: see _start.
    from relay.actors.portal import PortalActor
    from relay.offload.datapath import Datapath
    from relay.ops.http.endpoint import HttpEndpoint
    from relay.system.offload import Offloading
    from relay.system.succession import Inheritance


_log = Logger("relay.actors.system")


class System:
    """A relay in this process. As a context manager, it starts the relay on entry, and stops it on exit.

    A standalone relay responds to clients from the start. With a portal, the supervisor calls `start_listeners` later.

    Args:
        config: the settings.
        clock: the clock of the core and the actors.
        events: the queue for the supervisor.
        systemd: is told the state of the relay.
        datapath: the kernel's data path, if the kernel relays channels. The system closes it.
        log: the log, whose filter operators can change.
        inheritance: a running relay that this system takes over.

    Raises:
        UsageError: on entry, if this machine can't fulfil the settings.
    """

    def __init__(  # noqa: PLR0913 - the parts of a process
        self,
        config: Config,
        clock: Clock | None = None,
        events: EventQueue | None = None,
        systemd: Systemd | None = None,
        datapath: "Datapath | None" = None,
        log: Log | None = None,
        *,
        inheritance: "Inheritance | None" = None,
    ) -> None:
        self.config = config
        self.events: EventQueue = events or queue.SimpleQueue()
        source = random_source(config.rng_seed)
        self.secret = config.secret or RelaySecret(source.randbytes(SECRET_LENGTH).hex())
        if inheritance is not None:
            if config.secret is not None and config.secret.expose() != inheritance.secret:
                raise UsageError("can't take over the running relay: the relay's secret may not change in one step")
            self.secret = RelaySecret(inheritance.secret)
        self.hosts = bind_hosts(config)
        try:
            own = own_addresses()
            relayed = relayed_hosts(config, self.hosts)
        except OSError as error:
            raise UsageError(f"can't list this machine's addresses ({error.strerror}): allow netlink sockets") from error
        several = with_several_addresses(own, self.hosts)
        self._addresses = OwnAddresses(relay_addresses(own, config, self.hosts), relayed, several)
        rules = server_config(config, self.secret, self._addresses.addresses, offloads=datapath is not None)
        self.core = Server(rules, source)
        self.server_counters = ServerCounters()
        self.groups: dict[Family, ReuseportGroup] = {}
        """The sockets for clients."""
        self.http: dict[str, Endpoint] = {}
        """The addresses of the pages, "health" and "control". A configured port 0 is replaced by the actual port."""
        self.portal: PortalChannel | None = None
        self.portal_actor: pykka.ActorRef[PortalActor] | None = None
        self._clock = clock or SystemClock()
        self.systemd = systemd or Systemd({})
        self._inheritance = inheritance
        self.readers: list[Receiver] = []
        """The readers of the port for clients."""
        self.pages: dict[str, HttpEndpoint] = {}
        self._log = log
        self._datapath = datapath
        self.offload: Offloading | None = None
        self.shutdown = Shutdown(self.systemd, self._clock, lambda: RelayTotals(self.measured).traffic)
        self._stack = contextlib.ExitStack()
        self.has_begun = False
        """Whether the relay responds to clients."""
        self.has_successor = False
        """Whether another process relays now."""
        self.deciding = threading.Lock()
        """Held from the freeze of a handover to its outcome, and for each event. An end of this process in between would
        shut down the sockets of the successor."""
        self._unreachable: Collection[NotReady] = ()
        self._server: pykka.ActorRef[ServerActor] | None = None
        self._liveness: Liveness | None = None
        self._inbox: Mailbox | None = None
        self.measured = RelayState(
            config=config,
            counters=self.core.counters,
            tables=self.core.allocations,
            history=self.core.history,
            carried_out=self.server_counters,
            kernel_drops=self.server_counters.udp.all_kernel_drops,
            inbox=lambda: self._inbox,
            portal=lambda: self.portal,
            not_ready=lambda: self.not_ready,
            datapath=datapath,
            free_ports=lambda: self.core.free_port_count,
            ends=lambda: self.shutdown.ends,
            handovers=lambda: self.handovers,
            lines_lost=lambda: 0 if log is None else log.stream.lost,
        )
        """All counters and tables, for pages, metrics and the log."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.has_begun = False
        self._liveness = None
        # Before the server actor stops, which the watchdog would report as a failure.
        self.systemd.close()
        self._stack.close()

    @property
    def handovers(self) -> Handovers:
        """The takeovers of this relay."""
        return Handovers() if self._inheritance is None else self._inheritance.handovers

    @property
    def not_ready(self) -> Collection[NotReady]:
        """The reasons why new clients should not be sent to this relay; empty if it is ready."""
        reasons = {
            NotReady.STARTING: not self.has_begun,
            NotReady.DRAINING: self.shutdown.is_draining,
            NotReady.STOPPING: self.shutdown.has_begun and not self.shutdown.is_draining,
            NotReady.PORTAL: self.portal is not None and not self.portal.is_joined,
        }
        return (*(reason for reason, is_true in reasons.items() if is_true), *self._unreachable)

    @property
    def listening(self) -> dict[Family, UdpSocket]:
        """The socket from which clients get their datagrams, by family."""
        return {family: group.data[0] for family, group in self.groups.items()}

    @property
    def server(self) -> pykka.ActorRef[ServerActor]:
        """The server actor of a started system."""
        assert self._server is not None  # noqa: S101 - the system is started
        return self._server

    def is_alive(self, timeout: float) -> bool:
        """Check that the server actor handles its messages within some seconds. Return True before start and after stop."""
        liveness = self._liveness
        # Check again afterwards, because the system may have stopped in the meantime.
        return liveness is None or liveness.check(timeout) or self._liveness is None

    def address_of(self, family: Family) -> Endpoint:
        """Return the address for clients of a family."""
        host, port, *_ = self.listening[family].getsockname()
        return Endpoint(host, port)

    def _kick(self, allocation: AllocationId) -> bool | None:
        """End an allocation. Return whether it existed, or None if the server actor does not respond."""
        try:
            return bool(self.server.ask(Kick(allocation), timeout=self.config.timeouts.live)) if self._server else None
        except (pykka.Timeout, pykka.ActorDeadError):
            return None

    def _start(self) -> None:
        """Start all parts but the listeners. Push the end of each part on the stack, which runs them in reverse order."""
        self._stack.enter_context(sharing_a_cpu(self.config))
        if self._datapath is not None:
            self._stack.callback(self._datapath.close)
        raise_descriptor_limit(self.config)
        # The sockets are opened before the portal is joined, so that a port in use is a usage error.
        inheritance = self._inheritance
        self._stack.enter_context(pushing(self.config.otlp, self.measured))
        self.groups, self.offload = open_data_paths(
            self.config,
            OwnNetwork(self.hosts, self._addresses),
            self.core,
            self.server_counters.udp,
            self._clock,
            self._datapath,
            inheritance,
            self._stack,
        )
        self._serve_pages()
        server, inbox = self._start_server()
        if inheritance is not None:
            self._follow_predecessor(inheritance, server)
        # The last usage error was raised above. A usage error must be the only line.
        self._warn()
        self._stack.enter_context(watching_neighbours(inbox.load, self.config.timeouts.look_at_neighbours))
        self._follow_addresses(server, self.offload)
        if self._log is not None:
            self._observe(self._log)
        if self.config.portal is not None:
            self._start_portal(self.config.portal)
        elif inheritance is None:
            self.start_listeners()

    def _serve_pages(self) -> None:
        context = PageContext(
            state=self.measured,
            is_alive=self.is_alive,
            offloading=self.offload,
            bind_hosts=self.hosts,
            clients=lambda: [self.address_of(family) for family in self.groups],
            now=self._clock.now,
            kick=self._kick,
            drain=functools.partial(request_drain, self.events),
            log=self._log,
        )
        inherited = {} if self._inheritance is None else self._inheritance.pages
        self.pages = self._stack.enter_context(serving(self.config, context, inherited))
        self.http = {name: each.address for name, each in self.pages.items()}

    def _start_server(self) -> tuple[pykka.ActorRef[ServerActor], Mailbox]:
        paths = DataPaths(
            self.listening,
            self._addresses.hosts,
            None if self.offload is None else self.offload.carry_out,
            self.config.timeouts,
            {} if self._inheritance is None else self._inheritance.allocations,
        )

        def report(event: Drained | CoreEvent) -> None:
            """Handle an event of the core, in the server actor's thread."""
            if isinstance(event, Drained):
                self.events.put(event)
            else:
                log_event(event, self._clock.monotonic)

        server = ServerActor.start(self.core, paths, self._clock, self.server_counters, self._failed, report)
        self._stack.callback(_stop, "server", server, self.config.timeouts.stop_server)
        self._server = server
        self._liveness = Liveness(server, lambda: self.events.put(SystemRequest.DUMP))
        self._inbox = cast(Mailbox, server.actor_inbox)
        self._stack.callback(self._inbox.close, self.config.timeouts.release_core)
        return server, self._inbox

    def _follow_predecessor(self, inheritance: "Inheritance", server: pykka.ActorRef[ServerActor]) -> None:
        """Relay from now on, in place of another process."""
        assert self._inbox is not None  # noqa: S101 - the server actor's

        def leave(allocations: Collection[AllocationId] | None) -> None:
            if allocations is None:
                self.events.put(SystemRequest.LISTEN)
            else:
                # The next portion waits until the server actor has handled packets in between.
                server.ask(Execute(lambda actor: actor.start_readers(allocations)))

        reader = InheritedReader(inheritance.receiver, server, self._inbox.load, self._failed, leave)
        self.has_begun = True
        inheritance.follow(server, self.systemd, reader)
        reader.begin()

    def _observe(self, log: Log) -> None:
        """Log the core's events that the filter admits, and the relayed traffic."""
        self._stack.enter_context(log.followed_by(lambda: self.core.watch(wanted(log.admits))))
        stats = StatsLine(lambda: flow_in(self.measured), log.report_suppressed)
        self._stack.callback(stats.stop)
        stats.start()

    def _warn(self) -> None:
        """Log unusual settings of the relay and of this machine."""
        for note in () if self._datapath is None else self._datapath.notes:
            _log.info("offload changed", what=note)
        if self.config.rng_seed is not None:
            _log.warning("random numbers are seeded: whoever knows the seed knows the secret; for tests only")
        warn_if_open(self.http["control"])
        smallest = min(opened.receive_buffer for opened in self.listening.values())
        for finding in findings(self.config, smallest):
            _log.warning(**finding._asdict())
        with contextlib.suppress(OSError):
            warn_about_addresses(self.config, self._addresses.hosts)

    def _follow_addresses(self, server: pykka.ActorRef[ServerActor], offload: "Offloading | None") -> None:
        def changed(now: OwnAddresses) -> None:
            server.tell(now)
            if offload is not None:
                offload.follow(now)

        def report(reasons: Collection[NotReady]) -> None:
            self._unreachable = reasons

        # The actor's first look may come after the relay is ready.
        with contextlib.suppress(OSError):
            report(unreachable(self.config, self._addresses.hosts))
        actor = AddressActor.start(self.config, self.hosts, self._addresses, changed, report, self._clock, self._failed)
        self._stack.callback(_stop, "addresses", actor, self.config.timeouts.stop_listener)

    def _start_portal(self, access: PortalAccess) -> None:
        from relay.system.portal import start_portal  # noqa: PLC0415 - not for standalone relays

        self.systemd.status("joining the portal")
        port = next(iter(self.listening.values())).getsockname()[1]
        self.portal, self.portal_actor = start_portal(self.config, access, self.secret, port, self._clock, self.events)
        self._stack.callback(_stop, "portal", self.portal_actor, self.config.timeouts.stop_portal)

    def begin(self) -> None:
        """Handle the portal's first `init`."""
        if self._inheritance is None:
            self.start_listeners()
        else:
            self._inheritance.joined()

    def start_listeners(self) -> None:
        """Respond to clients from now on."""
        for family, group in self.groups.items():
            if self._inheritance is None:
                # Drop earlier datagrams: their clients have retried long ago.
                discard_waiting(group.all)
            for number, opened in enumerate(group.data, 1):
                # Requests are never dropped for their age. Without a socket for requests, the data sockets receive them.
                stale_after = math.inf if group.rest is None else STALE_AFTER
                self._listen(ListenerActor, f"listener-{family.name.lower()}-{number}", opened, stale_after)
            if group.rest is not None:
                self._listen(RequestListenerActor, f"requests-{family.name.lower()}", group.rest, math.inf)
        self.has_begun = True
        _log.info(
            "ready",
            version=__version__,
            clients=[str(self.address_of(family)) for family in self.groups],
            relayed=[str(host) for host in self.config.public_hosts.values()],
            ports=f"{self.config.lowest_port}-{self.config.highest_port}",
            **{name: str(endpoint) for name, endpoint in self.http.items()},
        )
        self.systemd.ready(ANSWERING)
        self.systemd.watch(self.is_alive)

    def _listen(self, listener: type[ListenerActor], name: str, opened: UdpSocket, stale_after: float) -> None:
        assert self._inbox is not None  # noqa: S101 - the server actor's
        receiver = Receiver((opened,), SHARED_LEAST_WAITING, SHARED_BATCH_DATAGRAMS, stale_after)
        self.readers.append(receiver)
        started = listener.start(name, receiver, self.server, self._inbox.load, self._failed)
        self._stack.callback(_stop, name, started, self.config.timeouts.stop_listener)
        self._stack.callback(receiver.stop)

    def _failed(self, actor: str, error: BaseException) -> None:
        self.events.put(Failure(actor, error))


def _stop(name: str, actor: pykka.ActorRef[Any], timeout: float) -> None:
    try:
        actor.stop(timeout=timeout)
    except pykka.Timeout:
        _log.warning("did not stop in time", actor=name, seconds=timeout)
