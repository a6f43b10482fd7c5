"""A single HTTP/1.1 request: to the relay's own pages, to metadata services of clouds, to proxies and to the portal."""

import socket
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

import h11

from relay.net.endpoint import Endpoint

_READ_BYTES = 65536


class LimitError(ConnectionError):
    """The server has sent too many bytes."""


class Response(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes


class Exchange:
    """A request without a body, and the response to it.

    The timeout of http.client applies to each read, so a server that trickles bytes would be waited for without limit. Here
    ``until`` is the limit of a whole head or body, on the monotonic clock.

    Args:
        connection: a connected socket. Each read sets its timeout.
        limit: bytes of the head, and of the body.
        peer: the subject of error messages.
    """

    def __init__(self, connection: socket.socket, limit: int, peer: str = "it") -> None:
        self._connection = connection
        self._client = h11.Connection(h11.CLIENT, max_incomplete_event_size=limit)
        self._limit = self._left = limit
        self._peer = peer
        self.body = bytearray()
        """The body, as far as it was read."""

    def head(self, request: h11.Request, until: float) -> h11.Response | h11.InformationalResponse:
        """Send the request, and return the head of the final response or of a 101.

        The bytes after the head stay unread, because they may not be HTTP.

        Raises:
            OSError: no head arrived in time, or it is too long.
            h11.RemoteProtocolError: the head is not HTTP.
        """
        data = self._client.send(request)
        self._client.send(h11.EndOfMessage())
        self._connection.settimeout(_left(until))
        self._connection.sendall(data or b"")
        while True:
            event = self._client.next_event()
            if event is h11.NEED_DATA and not self._receive(1, until):
                raise ConnectionError(f"{self._peer} closed the connection")
            if isinstance(event, h11.Response):
                return event
            if isinstance(event, h11.InformationalResponse) and event.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
                return event

    def read_body(self, until: float) -> None:
        """Read the whole body. Errors are as for `head`."""
        self._left = self._limit
        while not isinstance(event := self._client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                self._receive(_READ_BYTES, until)
            elif isinstance(event, h11.Data):
                self.body += event.data

    def _receive(self, most: int, until: float) -> int:
        self._connection.settimeout(_left(until))
        data = self._connection.recv(most)
        self._left -= len(data)
        if self._left < 0:
            raise LimitError(f"{self._peer} sent more than {self._limit} bytes")
        self._client.receive_data(data)
        return len(data)


def request(
    at: Endpoint, target: str, headers: Mapping[str, str], until: float, *, limit: int, method: str = "GET"
) -> Response:
    """Send a request for a path and query, and return the response. Head and body have at most ``limit`` bytes each.

    Raises:
        OSError: the request failed; TimeoutError if the response was not complete in time.
        ValueError: the response is no HTTP or incomplete. The message is one line, without parts of the response.
    """
    sent = {"Host": str(at), "Connection": "close", **headers}
    try:
        with socket.create_connection((at.host, at.port), _left(until)) as connection:
            exchange = Exchange(connection, limit, "the server")
            head = exchange.head(h11.Request(method=method, target=target, headers=list(sent.items())), until)
            exchange.read_body(until)
    except h11.RemoteProtocolError as error:
        # The text after the colon quotes the server.
        raise ValueError(f"invalid HTTP response: {str(error).partition(':')[0]}") from error
    found = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
    return Response(head.status_code, found, bytes(exchange.body))


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
