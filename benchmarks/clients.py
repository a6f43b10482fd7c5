"""TURN clients of the benchmarks: allocate, bind a channel, refresh."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from benchmarks.errors import MeasurementError
from benchmarks.servers import Server
from relay.core import attributes
from relay.core.addresses import SocketAddress
from relay.core.attributes import Attribute
from relay.core.credentials import FIREZONE_REALM, integrity_key
from relay.core.stun import Message, MessageClass, Method, decode, encode

T = TypeVar("T")
AttributeValues: TypeAlias = Sequence[tuple[Attribute[Any], Any]]

CHANNEL = 0x4000
CONCURRENT = 32
"""Requests in flight during setup: enough to keep a server busy, few enough for any receive buffer."""

UDP = 17
LONGEST = 65535
_LIFETIME = 600
_UNAUTHORIZED = "401"
_RECEIVE_BUFFER = 4 * 1024 * 1024
_SO_RCVBUFFORCE = 33
_ANSWER_SECONDS = 1.0
_TRIES = 5
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

    def __init__(self, server: Server, number: int) -> None:
        if server.credential is None:
            raise MeasurementError(f"{server.name} does not authenticate clients")
        self._server = server
        self._number = number
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

    def learn_nonce(self, challenge: Message) -> None:
        """Store the nonce of a 401 response."""
        self._nonce = challenge.get(attributes.NONCE)
        if self._nonce is None or _code_of(challenge) != _UNAUTHORIZED:
            raise MeasurementError(f"{self._server.name} answered {_code_of(challenge)} instead of 401 with a nonce")

    def required(self, response: Message, attribute: Attribute[T]) -> T:
        """Return an attribute of a success response."""
        self.check_success(response)
        value = response.get(attribute)
        if value is None:
            raise MeasurementError(f"{self._server.name} answered without {attribute.name}")
        return value

    def check_success(self, response: Message) -> None:
        """Check that a response is a success response."""
        if response.message_class is not MessageClass.SUCCESS:
            request = f"{Method(response.method)} of client {self._number:,}"
            raise MeasurementError(
                f"{self._server.name} rejected {request} with {_code_of(response)}; {self._server.log_tail()}"
            )

    def response(self, request: Request) -> Message:
        """Wait for the response to a sent request; send the request again after each timeout."""
        for _ in range(_TRIES):
            try:
                return self._next_response(request)
            except TimeoutError:
                self.socket.send(request.data)
            except ConnectionRefusedError as error:
                raise MeasurementError(f"{self._server.name} has closed its port") from error
        raise MeasurementError(f"{self._server.name} did not respond within {_TRIES * _ANSWER_SECONDS:.0f} s")

    def _next_response(self, request: Request) -> Message:
        while True:
            response = decode(self.socket.recv(LONGEST))
            if isinstance(response, Message) and response.transaction_id == request.transaction_id:
                return response


def allocate(clients: Sequence[Client], concurrent: int = CONCURRENT) -> float:
    """Make an allocation for each client, and return the duration in seconds."""
    start = time.perf_counter()
    transport = ((attributes.REQUESTED_TRANSPORT, UDP),)
    for at in range(0, len(clients), concurrent):
        group = clients[at : at + concurrent]
        for client, challenge in _exchange(group, Method.ALLOCATE, transport):
            client.learn_nonce(challenge)
        for client, response in _exchange(group, Method.ALLOCATE, transport):
            client.relayed = client.required(response, attributes.XOR_RELAYED_ADDRESS)
    return time.perf_counter() - start


def bind_channels(clients: Sequence[Client], peer: SocketAddress) -> None:
    """Bind channel `CHANNEL` of each client to the peer."""
    values = ((attributes.CHANNEL_NUMBER, CHANNEL), (attributes.XOR_PEER_ADDRESS, peer))
    for at in range(0, len(clients), CONCURRENT):
        for client, response in _exchange(clients[at : at + CONCURRENT], Method.CHANNEL_BIND, values):
            client.check_success(response)


def refresh(client: Client, times: int) -> float:
    """Refresh one allocation many times in series, and return the duration in seconds.

    Requests are encoded beforehand and responses checked superficially, so the server takes most of the time.
    """
    requests = [client.request(Method.REFRESH, ((attributes.LIFETIME, _LIFETIME),)) for _ in range(times)]
    client.socket.send(requests[0].data)
    client.check_success(client.response(requests[0]))
    start = time.perf_counter()
    for transaction_id, data in requests:
        client.socket.send(data)
        response = client.socket.recv(LONGEST)
        if response[:2] != _REFRESH_SUCCESS or response[8:20] != transaction_id:
            raise MeasurementError("a Refresh was rejected, or answered twice")
    return time.perf_counter() - start


def _exchange(clients: Sequence[Client], method: Method, values: AttributeValues) -> Iterator[tuple[Client, Message]]:
    """Send one request for each client, then return each client with its response."""
    requests = [client.request(method, values) for client in clients]
    for client, request in zip(clients, requests, strict=True):
        client.socket.send(request.data)
    return ((client, client.response(request)) for client, request in zip(clients, requests, strict=True))


def _code_of(response: Message) -> str:
    error = response.get(attributes.ERROR_CODE)
    return "success" if error is None else str(error.code)
