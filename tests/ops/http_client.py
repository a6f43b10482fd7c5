"""A client of HTTP that sends what it likes, byte by byte if need be."""

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from relay.config import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Limits, Pages
from relay.ops.http.guard import Guard, anyone

HOST = "127.0.0.1"
_numbers = itertools.count()

PATIENCE = 30
"""Seconds, on a machine that is busy with something else."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def error(self) -> str:
        """What is said to be wrong: in one line of JSON."""
        assert self.text.endswith("\n")
        assert self.text.count("\n") == 1
        said = json.loads(self.text)["error"]
        assert isinstance(said, str)
        return said


@contextlib.contextmanager
def serving(pages: Pages, actions: Pages | None = None, guard: Guard = anyone, **limits: Any) -> Iterator[HttpEndpoint]:  # noqa: ANN401
    """Serve pages at a port that is free."""
    endpoint = HttpEndpoint(
        f"test-{next(_numbers)}", Endpoint(HOST, 0), pages, actions, guard=guard, limits=Limits(**limits)
    )
    try:
        yield endpoint
    finally:
        endpoint.stop()


def connect(endpoint: HttpEndpoint, receive_buffer: int | None = None) -> socket.socket:
    """Connect to it, and send nothing yet."""
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
    """Receive until the other side closes, or forgets us."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return received


def say(endpoint: HttpEndpoint, *pieces: bytes) -> Answer | None:
    """Send something, and give the answer; None if it just closes."""
    with connect(endpoint) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        return read(receive_all(connection))


def read(received: bytes) -> Answer | None:
    """Take an answer to pieces, and see that it is one and no more."""
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
    """Ask as a well-behaved client does."""
    lines = [f"{method} {target} HTTP/1.1", *(() if host is None else (f"Host: {host}",)), *headers, "", ""]
    answer = say(endpoint, "\r\n".join(lines).encode("latin-1"))
    assert answer is not None
    return answer
