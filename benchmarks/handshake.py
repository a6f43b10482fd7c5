"""TURN clients, as far as the load needs them: they allocate, bind a channel, and refresh."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from benchmarks.failure import FailedError
from benchmarks.servers import Server
from relay.core.addresses import SocketAddress
from relay.core.attributes import (
    CHANNEL_NUMBER,
    ERROR_CODE,
    LIFETIME,
    NONCE,
    REALM,
    REQUESTED_TRANSPORT,
    USERNAME,
    XOR_PEER_ADDRESS,
    XOR_RELAYED_ADDRESS,
    Attribute,
)
from relay.core.credentials import FIREZONE_REALM, integrity_key
from relay.core.stun import Message, MessageClass, Method, decode, encode

T = TypeVar("T")
AttributeValues: TypeAlias = Sequence[tuple[Attribute[Any], Any]]

CHANNEL = 0x4000
AT_ONCE = 32
"""Requests under way while many clients are set up: enough to keep a server busy, few enough to fit any receive buffer."""

_UDP = 17
_LIFETIME = 600
_UNAUTHORIZED = "401"
_RECEIVE_BUFFER = 4 * 1024 * 1024
_SO_RCVBUFFORCE = 33
_ANSWER_SECONDS = 1.0
_TRIES = 5
_REFRESHED = b"\x01\x04"
"""The type of a success answer to Refresh (RFC 8489 §5)."""

_LONGEST = 65535


class Request(NamedTuple):
    """A request, ready to be sent."""

    transaction_id: bytes
    data: bytes


def udp_socket(host: str, port: int = 0) -> socket.socket:
    """Open a socket that loses nothing for lack of room, as far as this machine allows."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind((host, port))
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    except PermissionError:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    opened.settimeout(_ANSWER_SECONDS)
    return opened


class Client:
    """One client of a server, on a socket of its own."""

    def __init__(self, server: Server, number: int) -> None:
        if server.credential is None:
            raise FailedError(f"{server.name} has no clients that log in")
        self._server = server
        self._number = number
        self._credential = server.credential(number)
        self._key = integrity_key(self._credential.username, FIREZONE_REALM, self._credential.password)
        self._nonce: bytes | None = None
        self.relayed: SocketAddress = ("", 0)
        """Its relayed address, once it has allocated."""
        self.socket = udp_socket(server.client_host)
        self.socket.connect(server.address)

    def close(self) -> None:
        """Close the socket; the allocation stays until it expires."""
        self.socket.close()

    def request(self, method: Method, attributes: AttributeValues) -> Request:
        """Make a request, signed if the server has asked for that."""
        transaction_id, key = os.urandom(12), None
        if self._nonce is not None:
            login = ((USERNAME, self._credential.username), (REALM, FIREZONE_REALM), (NONCE, self._nonce))
            attributes, key = (*attributes, *login), self._key
        return Request(transaction_id, encode(MessageClass.REQUEST, method, transaction_id, attributes, key=key))

    def learn_nonce(self, challenge: Message) -> None:
        """Take the nonce from the answer to a request that was not signed."""
        self._nonce = challenge.get(NONCE)
        if self._nonce is None or _code_of(challenge) != _UNAUTHORIZED:
            raise FailedError(f"{self._server.name} answered {_code_of(challenge)} where it should ask for credentials")

    def take(self, answer: Message, attribute: Attribute[T]) -> T:
        """Take what a successful answer must have."""
        self.demand_success(answer)
        value = answer.get(attribute)
        if value is None:
            raise FailedError(f"{self._server.name} answered without {attribute.name}")
        return value

    def demand_success(self, answer: Message) -> None:
        """Make sure that a request was not refused."""
        if answer.message_class is not MessageClass.SUCCESS:
            what = f"{Method(answer.method)} of client {self._number:,}"
            raise FailedError(f"{self._server.name} refused {what} with {_code_of(answer)}; {self._server.last_words()}")

    def answer(self, request: Request) -> Message:
        """Wait for the answer to a request that has been sent; it is repeated if none comes."""
        for _ in range(_TRIES):
            try:
                return self._next_answer(request)
            except TimeoutError:
                self.socket.send(request.data)
            except ConnectionRefusedError as error:
                raise FailedError(f"{self._server.name} is gone: its port is closed") from error
        raise FailedError(f"{self._server.name} did not answer within {_TRIES * _ANSWER_SECONDS:.0f} s")

    def _next_answer(self, request: Request) -> Message:
        while True:
            answer = decode(self.socket.recv(_LONGEST))
            if isinstance(answer, Message) and answer.transaction_id == request.transaction_id:
                return answer


def allocate(clients: Sequence[Client], at_once: int) -> float:
    """Make an allocation for each client, and give the seconds that took."""
    start = time.perf_counter()
    transport = ((REQUESTED_TRANSPORT, _UDP),)
    for group in _groups(clients, at_once):
        for client, challenge in _ask(group, Method.ALLOCATE, transport):
            client.learn_nonce(challenge)
        for client, answer in _ask(group, Method.ALLOCATE, transport):
            client.relayed = client.take(answer, XOR_RELAYED_ADDRESS)
    return time.perf_counter() - start


def bind_channels(clients: Sequence[Client], peer: SocketAddress) -> None:
    """Bind channel `CHANNEL` of each client to the peer."""
    attributes = ((CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, peer))
    for group in _groups(clients, AT_ONCE):
        for client, answer in _ask(group, Method.CHANNEL_BIND, attributes):
            client.demand_success(answer)


def refresh(client: Client, times: int) -> float:
    """Refresh one allocation many times, one after another, and give the seconds that took.

    The requests are made beforehand, and the answers looked at no more than needed: what takes time is the server.
    """
    requests = [client.request(Method.REFRESH, ((LIFETIME, _LIFETIME),)) for _ in range(times)]
    client.demand_success(_exchange(client, requests[0]))
    start = time.perf_counter()
    for transaction_id, data in requests:
        client.socket.send(data)
        answer = client.socket.recv(_LONGEST)
        if answer[:2] != _REFRESHED or answer[8:20] != transaction_id:
            raise FailedError("a refresh was refused, or answered twice")
    return time.perf_counter() - start


def _exchange(client: Client, request: Request) -> Message:
    client.socket.send(request.data)
    return client.answer(request)


def _ask(clients: Sequence[Client], method: Method, attributes: AttributeValues) -> Iterator[tuple[Client, Message]]:
    """Send one request for each client, and give their answers once all have been sent."""
    requests = [client.request(method, attributes) for client in clients]
    for client, request in zip(clients, requests, strict=True):
        client.socket.send(request.data)
    return ((client, client.answer(request)) for client, request in zip(clients, requests, strict=True))


def _groups(clients: Sequence[Client], size: int) -> Iterator[Sequence[Client]]:
    return (clients[at : at + size] for at in range(0, len(clients), size))


def _code_of(answer: Message) -> str:
    error = answer.get(ERROR_CODE)
    return "success" if error is None else str(error.code)
