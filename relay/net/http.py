"""A single HTTP/1.1 request, for the relay's own pages and for the metadata services of clouds."""

import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

import h11

from relay.config import Endpoint

_READ_BYTES = 65536


class Response(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes


def request(
    at: Endpoint, target: str, headers: Mapping[str, str], until: float, *, limit: int, method: str = "GET"
) -> Response:
    """Send a request for a path and query without a body, and return the response.

    The timeout of http.client applies to each read, so a server that trickles bytes would be waited for without limit. Here
    ``until`` is the limit of the whole response, on the monotonic clock. Head and body have at most ``limit`` bytes each.

    Raises:
        OSError: the request failed; TimeoutError if the response was not complete in time.
        ValueError: the response is no HTTP, incomplete or too long. The message is one line, without parts of the response.
    """
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=limit)
    sent = {"Host": str(at), "Connection": "close", **headers}
    data = client.send(h11.Request(method=method, target=target, headers=list(sent.items())))
    client.send(h11.EndOfMessage())
    try:
        with socket.create_connection((at.host, at.port), _left(until)) as connection:
            connection.sendall(data or b"")
            return _receive(connection, client, until, limit)
    except h11.RemoteProtocolError as error:
        # The text after the colon quotes the server.
        raise ValueError(f"invalid HTTP response: {str(error).partition(':')[0]}") from error


def _receive(connection: socket.socket, client: h11.Connection, until: float, limit: int) -> Response:
    response, body = None, b""
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            connection.settimeout(_left(until))
            data = connection.recv(_READ_BYTES)
            if not data and response is None:
                raise ValueError("the connection was closed without a response")
            client.receive_data(data)
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > limit:
                raise ValueError("the response is too long")
        elif response is not None:
            headers = {name.decode("ascii"): value.decode("latin-1") for name, value in response.headers}
            return Response(response.status_code, headers, body)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
