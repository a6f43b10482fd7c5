"""Flows: a client's socket, an address of the server to which its peer sends, and how the load is told of them."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from benchmarks.failure import FailedError
from benchmarks.handshake import AT_ONCE, CHANNEL, Client, allocate, bind_channels, udp_socket
from benchmarks.servers import DIRECT, PLAIN, PLAIN_FIRST_CHANNEL, PLAIN_FIRST_PORT, Server
from relay.core.addresses import SocketAddress

_PRIMER = b"primer"


class Flow(NamedTuple):
    """A client with a channel."""

    client: socket.socket
    channel: int
    """0: payloads travel without a header."""
    relayed: SocketAddress

    def line(self) -> str:
        """Say it as the load generator wants to be told."""
        return f"{self.client.fileno()} {self.channel} {self.relayed[0]} {self.relayed[1]}\n"


class Flows:
    """The flows through one server. Close it to close all sockets."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stack = ExitStack()
        self._flows: list[Flow] = []
        self.peer = self._stack.enter_context(udp_socket(*server.peer))
        """All peers are this one socket."""

    def close(self) -> None:
        """Close the sockets."""
        self._stack.close()

    def first(self, count: int) -> list[Flow]:
        """Give some flows; those that are not there yet are made.

        Raises:
            FailedError: the server refused, or did not answer.
        """
        missing = range(len(self._flows), count)
        if missing:
            self._flows += _WAYS.get(self._server.name, _turn_flows)(self._stack, self._server, self.peer, missing)
        return self._flows[:count]


def turn_flows_of(clients: list[Client]) -> list[Flow]:
    """Give the flows of clients that have a channel."""
    return [Flow(client.socket, CHANNEL, client.relayed) for client in clients]


def _turn_flows(stack: ExitStack, server: Server, peer: socket.socket, numbers: range) -> list[Flow]:
    clients = [Client(server, number) for number in numbers]
    for client in clients:
        stack.callback(client.close)
    allocate(clients, AT_ONCE)
    bind_channels(clients, peer.getsockname())
    return turn_flows_of(clients)


def _plain_flows(stack: ExitStack, server: Server, peer: socket.socket, numbers: range) -> list[Flow]:
    """Flows of the plain relay, which learns a client's address from its first packet."""
    flows = []
    for number in numbers:
        client = stack.enter_context(udp_socket(server.client_host))
        client.connect(server.address)
        channel = PLAIN_FIRST_CHANNEL + number
        client.send(channel.to_bytes(2, "big") + len(_PRIMER).to_bytes(2, "big") + _PRIMER)
        _wait_for_primer(peer)
        flows.append(Flow(client, channel, (server.address[0], PLAIN_FIRST_PORT + number)))
    return flows


def _wait_for_primer(peer: socket.socket) -> None:
    try:
        while peer.recv(65535) != _PRIMER:
            continue
    except TimeoutError as error:
        raise FailedError("the plain relay relays nothing") from error


def _direct_flows(stack: ExitStack, server: Server, _: socket.socket, numbers: range) -> list[Flow]:
    """Flows through no server at all."""
    flows = []
    for _number in numbers:
        client = stack.enter_context(udp_socket(server.client_host))
        client.connect(server.peer)
        flows.append(Flow(client, 0, client.getsockname()))
    return flows


_WAYS: dict[str, Callable[[ExitStack, Server, socket.socket, range], list[Flow]]] = {
    PLAIN: _plain_flows,
    DIRECT: _direct_flows,
}
