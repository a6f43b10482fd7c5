"""A running server with flows: sockets of clients, with the address for their peer's packets."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

from benchmarks.clients import CHANNEL, Client, allocate, bind_channels, udp_socket
from benchmarks.measure import MeasurementError, cpu_ns
from benchmarks.servers import DIRECT, PLAIN, PLAIN_FIRST_CHANNEL, PLAIN_FIRST_PORT, Running, Server, started
from relay.core.addresses import SocketAddress

_PRIMER = b"primer"
_LONGEST_AGE = 240.0
"""Seconds until a restart: no client refreshes, and coturn's permissions expire after 300."""


class Flow(NamedTuple):
    """A client with a channel."""

    client: socket.socket
    channel: int
    """0: payloads have no header."""
    relayed: SocketAddress

    def line(self) -> str:
        """Return the flow as a line of the load generator's input."""
        return f"{self.client.fileno()} {self.channel} {self.relayed[0]} {self.relayed[1]}\n"


class Session:
    """A running server with its flows, in the network namespaces of clients, server and peer, if given."""

    def __init__(self, server: Server, cpus: Iterable[int], *rooms: Callable[[], AbstractContextManager[None]]) -> None:
        self.server = server
        self.client_room, self.server_room, peer_room = rooms or (nullcontext,) * 3
        self._started_at = time.monotonic()
        self._flows: list[Flow] = []
        self._running: Running | None = None
        with contextlib.ExitStack() as stack:
            with peer_room():
                self.peer = stack.enter_context(udp_socket(*server.endpoints.peer))
            if server.command:
                with self.server_room():
                    self._running = stack.enter_context(started(server, cpus))
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Stop the server, and close all sockets."""
        self._stack.close()

    @property
    def is_too_old(self) -> bool:
        """Return whether channels and permissions may expire soon."""
        return time.monotonic() - self._started_at > _LONGEST_AGE

    def check(self) -> None:
        """Check that the server still runs."""
        if self._running is not None:
            self._running.check()

    @property
    def pid(self) -> int | None:
        """Process id of the server, if there is a server."""
        return None if self._running is None else self._running.pid

    def cpu_ns(self) -> int:
        """Return the CPU time of the server so far."""
        return 0 if self.pid is None else cpu_ns(self.pid)

    def flows(self, count: int) -> list[Flow]:
        """Return some flows, and make the missing flows."""
        missing = range(len(self._flows), count)
        if missing:
            make = {PLAIN: _plain_flows, DIRECT: _direct_flows}.get(self.server.name, _turn_flows)
            with self.client_room():
                self._flows += make(self._stack, self.server, self.peer, missing)
        return self._flows[:count]


def turn_flows_of(clients: list[Client]) -> list[Flow]:
    """Return the flows of clients with channels."""
    return [Flow(client.socket, CHANNEL, client.relayed) for client in clients]


def _turn_flows(stack: ExitStack, server: Server, peer: socket.socket, numbers: range) -> list[Flow]:
    clients = [stack.enter_context(contextlib.closing(Client(server, number))) for number in numbers]
    allocate(clients)
    bind_channels(clients, peer.getsockname())
    return turn_flows_of(clients)


def _plain_flows(stack: ExitStack, server: Server, peer: socket.socket, numbers: range) -> list[Flow]:
    """Make flows of the plain relay, which learns a client's address from its first packet."""
    flows = []
    for number in numbers:
        client = stack.enter_context(udp_socket(server.endpoints.client_host))
        client.connect(server.address)
        channel = PLAIN_FIRST_CHANNEL + number
        client.send(channel.to_bytes(2, "big") + len(_PRIMER).to_bytes(2, "big") + _PRIMER)
        try:
            while peer.recv(65535) != _PRIMER:
                continue
        except TimeoutError as error:
            raise MeasurementError("the plain relay relays nothing") from error
        flows.append(Flow(client, channel, (server.endpoints.host, PLAIN_FIRST_PORT + number)))
    return flows


def _direct_flows(stack: ExitStack, server: Server, _: socket.socket, numbers: range) -> list[Flow]:
    """Make flows without any server."""
    flows = []
    for _number in numbers:
        client = stack.enter_context(udp_socket(server.endpoints.client_host))
        client.connect(server.endpoints.peer)
        flows.append(Flow(client, 0, client.getsockname()))
    return flows
