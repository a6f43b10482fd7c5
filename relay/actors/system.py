"""Starts the relay in order, hears what happens to it, and stops it in reverse order."""

import contextlib
import dataclasses
import queue
import random
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self, TypeAlias, cast

import pykka
import structlog

from relay import __version__
from relay.actors.clock import Clock, SystemClock
from relay.actors.inbox import ServerInbox
from relay.actors.listener import ListenerActor
from relay.actors.server import ServerActor, SocketCounters
from relay.config import Config, Endpoint
from relay.core.addresses import Family
from relay.core.config import ServerConfig
from relay.core.credentials import SECRET_LENGTH, RelaySecret
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.net.udp import RECEIVE_BUFFER, Receiver, is_receive_buffer_capped
from relay.ops.http import HttpEndpoint, health_pages
from relay.ops.machine import bind_hosts, open_service_socket, own_addresses, raise_descriptor_limit

SWITCH_INTERVAL = 0.5
"""Seconds for which a thread may keep the interpreter while others wait for it. Threads here give it up at every read and
send; taking it from them by force, as CPython does after 5 ms, lets a thousand threads with a packet each fight over it.
With 1,000 busy allocations at 20,000 packets/s this doubled what was relayed, and a stop took 0.6 s instead of 7."""

LISTENER_STOP_TIMEOUT = 0.5
"""Seconds. A listener is woken from its read at once; it may be telling the server actor something."""

SERVER_STOP_TIMEOUT = 2.0
"""Seconds, in which the server actor finishes its message and closes the allocations; datagrams that wait are dropped."""

_log = structlog.get_logger("relay.actors.system")


class Request(Enum):
    """What someone outside wants of the running system."""

    STOP = "stop"
    DUMP = "dump"


@dataclass(frozen=True, slots=True)
class Failure:
    """An actor failed, and the system can't go on without it."""

    actor: str
    error: BaseException


News: TypeAlias = queue.SimpleQueue[Request | Failure]
"""What happens to a system. Safe to put to from a signal handler."""


class System:
    """One relay in one process.

    Use it as a context: entering starts it, leaving stops it, whatever happened in between.

    Args:
        config: what was asked for.
        clock: stamps what reaches the core.
        news: what `run` waits for, if someone has begun to put to it before.

    Raises:
        BadUseError: on entering, if this machine can't give what the config asks for.
    """

    def __init__(self, config: Config, clock: Clock | None = None, news: News | None = None) -> None:
        self.config = config
        self.news: News = news or queue.SimpleQueue()
        source = random.SystemRandom() if config.rng_seed is None else random.Random(config.rng_seed)  # noqa: S311 - asked for
        self.secret = config.secret or RelaySecret(source.randbytes(SECRET_LENGTH).hex())
        self.hosts = bind_hosts(config)
        self.core = Server(_server_config(config, self.secret, self.hosts), source)
        self.socket_counters = SocketCounters()
        self.is_ready = False
        """Whether it answers on the port for clients."""
        self._clock = clock or SystemClock()
        self._started_at = time.monotonic()
        self._stack = contextlib.ExitStack()
        self.listening: dict[Family, socket.socket] = {}
        self._inbox: ServerInbox | None = None
        self._http: dict[str, Endpoint] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_ready = False
        self._stack.close()

    def run(self, dump: Callable[[], None]) -> int:
        """Wait until the end, and give the exit code: 0 if it was asked for, 1 if an actor failed.

        Args:
            dump: is called when someone asks to see what all threads do.
        """
        while True:
            news = self.news.get()
            if news is Request.STOP:
                return 0
            if news is Request.DUMP:
                try:
                    dump()
                except Exception:  # noqa: BLE001 - looking at the relay must not end it
                    _log.exception("the dump failed; the relay goes on")
            if isinstance(news, Failure):
                _log.critical(
                    "an actor failed and the relay can't go on",
                    actor=news.actor,
                    error=f"{type(news.error).__name__}: {news.error}",
                    exc_info=news.error,
                )
                return 1

    def address_of(self, family: Family) -> Endpoint:
        """Give where clients of a family are listened to."""
        host, port, *_ = self.listening[family].getsockname()
        return Endpoint(host, port)

    def summary(self) -> dict[str, object]:
        """Give the state of everything in numbers, read without asking any actor."""
        allocations, counters = self.core.allocations, self.core.counters
        return {
            "version": __version__,
            "uptime_seconds": round(time.monotonic() - self._started_at, 1),
            "ready": self.is_ready,
            "allocations": len(allocations.by_id),
            "live_channels": len(allocations.live_channels),
            "server_inbox": 0 if self._inbox is None else len(self._inbox),
            "dropped_before_inbox": 0 if self._inbox is None else self._inbox.dropped,
            **{name.name: getattr(counters, name.name) for name in dataclasses.fields(counters)},
            **{name.name: getattr(self.socket_counters, name.name) for name in dataclasses.fields(self.socket_counters)},
        }

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Start all there is; what was started is undone by ``stack``, in reverse order."""
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_INTERVAL)
        if self.config.rng_seed is not None:
            _log.warning("random numbers are seeded: whoever knows the seed knows the secret; for tests only")
        raise_descriptor_limit(self.config)
        for family, host in self.hosts.items():
            opened = open_service_socket(family, host, self.config.service_port)
            stack.callback(opened.close)
            self.listening[family] = opened
            if is_receive_buffer_capped(opened):
                _log.warning(
                    "receive buffers are small: bursts will lose packets", want=f"net.core.rmem_max={RECEIVE_BUFFER}"
                )
        pages = health_pages(lambda: self.is_ready)
        for name, endpoint in (("health", self.config.health), ("control", self.config.control)):
            http = HttpEndpoint(name, endpoint, pages)
            stack.callback(http.stop)
            # Port 0 was any that is free: this is the one.
            self._http[name] = Endpoint(endpoint.host, http.port)
        server = ServerActor.start(self.core, self.listening, self.hosts, self._clock, self.socket_counters, self._failed)
        stack.callback(_stop, "server", server, SERVER_STOP_TIMEOUT)
        self._inbox = cast(ServerInbox, server.actor_inbox)
        stack.callback(self._inbox.close)
        # Where a portal will have its say: this is what its `init` lets happen.
        self._begin(stack, server, self._inbox)

    def _begin(self, stack: contextlib.ExitStack, server: pykka.ActorRef[ServerActor], inbox: ServerInbox) -> None:
        """Answer clients from now on."""
        for family, opened in self.listening.items():
            receiver = Receiver((opened,))
            name = f"listener-{family.name.lower()}"
            listener = ListenerActor.start(name, receiver, server, inbox, self._failed)
            stack.callback(_stop, name, listener, LISTENER_STOP_TIMEOUT)
            stack.callback(receiver.stop)
        self.is_ready = True
        _log.info(
            "ready",
            version=__version__,
            clients=[str(self.address_of(family)) for family in self.listening],
            relayed=[str(host) for host in self.config.public_hosts.values()],
            ports=f"{self.config.lowest_port}-{self.config.highest_port}",
            **{name: str(endpoint) for name, endpoint in self._http.items()},
        )

    def _failed(self, actor: str, error: BaseException) -> None:
        self.news.put(Failure(actor, error))


def _stop(name: str, actor: pykka.ActorRef[Any], timeout: float) -> None:
    try:
        actor.stop(timeout=timeout)
    except pykka.Timeout:
        _log.warning("did not stop in time", actor=name, seconds=timeout)


def _server_config(config: Config, secret: RelaySecret, hosts: dict[Family, str]) -> ServerConfig:
    public = config.public_hosts
    return ServerConfig(
        secret=secret,
        public_hosts=public,
        ports=config.ports,
        peers=PeerPolicy(
            relay_addresses=own_addresses() | frozenset(hosts.values()) | frozenset(public.values()),
            service_ports=frozenset((config.service_port, config.health.port, config.control.port)),
            relayed_ports=config.ports,
            public_addresses=frozenset(public.values()),
            allow=config.allow_peers,
            deny=config.deny_peers,
        ),
        max_allocations=config.capacity,
        software=f"firezone-relay/{__version__}",
    )
