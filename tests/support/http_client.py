"""HTTP client that sends arbitrary bytes."""

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from relay.net.endpoint import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Limits, Pages

HOST = "127.0.0.1"
_numbers = itertools.count()

PATIENCE = 30
"""Seconds, for a busy machine."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def error(self) -> str:
        """The error message, from a line of JSON."""
        assert self.text.endswith("\n")
        assert self.text.count("\n") == 1
        said = json.loads(self.text)["error"]
        assert isinstance(said, str)
        return said


@contextlib.contextmanager
def serving(
    pages: Pages,
    actions: Pages | None = None,
    hostnames: tuple[str, ...] | None = None,
    host: str = HOST,
    **limits: Any,  # noqa: ANN401
) -> Iterator[HttpEndpoint]:
    """Serve pages on a free port."""
    endpoint = HttpEndpoint(
        f"test-{next(_numbers)}", Endpoint(host, 0), pages, actions, hostnames=hostnames, limits=Limits(**limits)
    )
    try:
        yield endpoint
    finally:
        endpoint.stop()


def connect(endpoint: HttpEndpoint, receive_buffer: int | None = None) -> socket.socket:
    """Connect without sending anything."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE)
    try:
        connection.connect((HOST, endpoint.port))
    except OSError:
        connection.close()
        raise
    return connection


def receive_all(connection: socket.socket) -> bytes:
    """Receive until the server closes or resets the connection."""
    received = []
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            received.append(data)
    return b"".join(received)


def say(endpoint: HttpEndpoint, *pieces: bytes) -> Answer | None:
    """Send bytes and return the response; None if the server closes without a response."""
    with connect(endpoint) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        return read(receive_all(connection))


def read(received: bytes) -> Answer | None:
    """Parse a response, and check that there is a single response."""
    if not received:
        return None
    head, _, body = received.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    version, status, _ = status_line.split(" ", 2)
    assert version == "HTTP/1.1"
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(headers) == len(lines)
    return Answer(int(status), headers, body.decode())


def ask(endpoint: HttpEndpoint, method: str, target: str, *headers: str, host: str | None = "localhost") -> Answer:
    """Send a valid request."""
    lines = [f"{method} {target} HTTP/1.1", *(() if host is None else (f"Host: {host}",)), *headers, "", ""]
    answer = say(endpoint, "\r\n".join(lines).encode("latin-1"))
    assert answer is not None
    return answer
