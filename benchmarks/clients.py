"""TURN clients of the benchmarks: allocate, bind a channel, refresh."""

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

from benchmarks.measure import MeasurementError
from benchmarks.servers import Server
from relay.core import attributes
from relay.core.addresses import SocketAddress
from relay.core.attributes import Attribute
from relay.core.credentials import FIREZONE_REALM, integrity_key
from relay.core.stun import Message, MessageClass, Method, decode, encode

AttributeValues: TypeAlias = Sequence[tuple[Attribute[Any], Any]]

CHANNEL = 0x4000
CONCURRENT = 32
"""Requests in flight during setup: enough to keep a server busy, few enough for any receive buffer."""

_UDP = 17
LONGEST = 65535
_UNAUTHORIZED = "401"
_RECEIVE_BUFFER = 4 * 1024 * 1024
_SO_RCVBUFFORCE = 33
_ANSWER_SECONDS = 1.0
_REFRESH_SUCCESS = b"\x01\x04"
"""Message type of a success response to Refresh (RFC 8489 §5)."""


class Request(NamedTuple):
    """An encoded request."""

    transaction_id: bytes
    data: bytes


def udp_socket(host: str, port: int = 0) -> socket.socket:
    """Open a socket with the largest receive buffer that this process may set."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind((host, port))
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    except PermissionError:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    opened.settimeout(_ANSWER_SECONDS)
    return opened


class Client:
    """A client of a server, with a socket of its own."""

    def __init__(self, server: Server, number: int, waits: Sequence[float] = (1.0,) * 5) -> None:
        if server.credential is None:
            raise MeasurementError(f"{server.name} does not authenticate clients")
        self._server = server
        self._number = number
        self._waits = waits
        """Seconds until each retransmission of a request, and until its failure."""
        self._credential = server.credential(number)
        self._key = integrity_key(self._credential.username, FIREZONE_REALM, self._credential.password)
        self._nonce: bytes | None = None
        self.relayed: SocketAddress = ("", 0)
        """Relayed address, after a successful Allocate."""
        self.socket = udp_socket(server.endpoints.client_host)
        self.socket.connect(server.address)

    def close(self) -> None:
        """Close the socket; the allocation stays until its expiry."""
        self.socket.close()

    def request(self, method: Method, values: AttributeValues) -> Request:
        """Encode a request, signed once the nonce is known."""
        transaction_id, key = os.urandom(12), None
        if self._nonce is not None:
            login = (
                (attributes.USERNAME, self._credential.username),
                (attributes.REALM, FIREZONE_REALM),
                (attributes.NONCE, self._nonce),
            )
            values, key = (*values, *login), self._key
        return Request(transaction_id, encode(MessageClass.REQUEST, method, transaction_id, values, key=key))

    def allocate(self) -> Request:
        """Encode an Allocate request."""
        return self.request(Method.ALLOCATE, ((attributes.REQUESTED_TRANSPORT, _UDP),))

    def refresh(self, lifetime: int = 600) -> Request:
        """Encode a Refresh request."""
        return self.request(Method.REFRESH, ((attributes.LIFETIME, lifetime),))

    def bind(self, peer: SocketAddress, channel: int = CHANNEL) -> Request:
        """Encode a ChannelBind request."""
        values = ((attributes.CHANNEL_NUMBER, channel), (attributes.XOR_PEER_ADDRESS, peer))
        return self.request(Method.CHANNEL_BIND, values)

    def learn_nonce(self, challenge: Message) -> None:
        """Store the nonce of a 401 response."""
        self._nonce = challenge.get(attributes.NONCE)
        if self._nonce is None or _code_of(challenge) != _UNAUTHORIZED:
            raise MeasurementError(f"{self._server.name} answered {_code_of(challenge)} instead of 401 with a nonce")

    def check_success(self, response: Message) -> None:
        """Check that a response is a success response."""
        if response.message_class is not MessageClass.SUCCESS:
            request = f"{Method(response.method)} of client {self._number:,}"
            raise MeasurementError(
                f"{self._server.name} rejected {request} with {_code_of(response)}; {self._server.log_tail()}"
            )

    def ask(self, request: Request) -> Message:
        """Send a request, and return the response."""
        self.socket.send(request.data)
        return self.response(request)

    def response(self, request: Request) -> Message:
        """Wait for the response to a sent request; send the request again after each timeout."""
        for wait in self._waits:
            self.socket.settimeout(wait)
            try:
                return self._next_response(request)
            except TimeoutError:
                self.socket.send(request.data)
            except ConnectionRefusedError as error:
                raise MeasurementError(f"{self._server.name} has closed its port") from error
        raise MeasurementError(f"{self._server.name} did not respond within {sum(self._waits):.0f} s")

    def _next_response(self, request: Request) -> Message:
        while True:
            response = decode(self.socket.recv(LONGEST))
            if isinstance(response, Message) and response.transaction_id == request.transaction_id:
                return response


def allocate(clients: Sequence[Client], concurrent: int = CONCURRENT) -> float:
    """Make an allocation for each client, and return the duration in seconds."""
    start = time.perf_counter()
    for at in range(0, len(clients), concurrent):
        group = clients[at : at + concurrent]
        for client, challenge in _exchange((client, client.allocate()) for client in group):
            client.learn_nonce(challenge)
        for client, response in _exchange((client, client.allocate()) for client in group):
            client.check_success(response)
            client.relayed = response.get(attributes.XOR_RELAYED_ADDRESS) or client.relayed
    return time.perf_counter() - start


def bind_channels(clients: Sequence[Client], peer: SocketAddress) -> None:
    """Bind channel `CHANNEL` of each client to the peer."""
    check_all((client, client.bind(peer)) for client in clients)


def refresh(client: Client, times: int) -> float:
    """Refresh one allocation many times in series, and return the duration in seconds.

    Requests are encoded beforehand and responses checked superficially, so the server takes most of the time.
    """
    requests = [client.refresh() for _ in range(times)]
    client.check_success(client.ask(requests[0]))
    start = time.perf_counter()
    for transaction_id, data in requests:
        client.socket.send(data)
        response = client.socket.recv(LONGEST)
        if response[:2] != _REFRESH_SUCCESS or response[8:20] != transaction_id:
            raise MeasurementError("a Refresh was rejected, or answered twice")
    return time.perf_counter() - start


def check_all(requests: Iterable[tuple[Client, Request]]) -> None:
    """Send requests, some at a time, and check that all succeed."""
    left = iter(requests)
    while group := tuple(islice(left, CONCURRENT)):
        for client, response in _exchange(group):
            client.check_success(response)


def _exchange(requests: Iterable[tuple[Client, Request]]) -> Iterator[tuple[Client, Message]]:
    """Send all requests, then return each client with its response."""
    sent = tuple(requests)
    for client, request in sent:
        client.socket.send(request.data)
    return ((client, client.response(request)) for client, request in sent)


def _code_of(response: Message) -> str:
    error = response.get(attributes.ERROR_CODE)
    return "success" if error is None else str(error.code)
