"""Requests to the control address: any bytes, in any pieces, are answered in HTTP, and never with a failure of ours."""

import socket
from collections.abc import Iterable
from http import HTTPStatus

import h11

from relay.config import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Limits, Page, Pages, Query
from relay.ops.http.guard import OperatorsOnly
from relay.ops.http.messages import Reception, Request, answer, render
from relay.ops.logs.filter import LogFilter

MODULES = ("relay.ops.http.messages", "relay.ops.http.guard")

LIMITS = Limits(request_bytes=1024, request_seconds=2.0)

SEEDS = (
    b"\x00GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x05GET /status?offset=5&limit=%20 HTTP/1.1\r\nHost: 127.0.0.1:9999\r\nOrigin: http://evil.example\r\n\r\n",
    b"\x10POST /log_filter?directives=info,relay.core=debug HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 3\r\n\r\nabc",
    (
        b"\x01POST /log_filter HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    ),
    b"\x40HEAD http://localhost/readyz HTTP/1.0\r\nHost: localhost\r\n\r\n",
    b"\x02POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    b"\x00OPTIONS * HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    b"\x03\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


def _shown(query: Query) -> Page:
    return Page(HTTPStatus.OK, dict(query))


def _changed(query: Query) -> Page:
    try:
        return Page(HTTPStatus.OK, {"directives": str(LogFilter.parse(query.get("directives", "")))})
    except ValueError as error:
        return Page(HTTPStatus.BAD_REQUEST, {"error": str(error)})


GET: Pages = {"/healthz": _shown, "/readyz": _shown, "/status": _shown, "/log_filter": _shown}
POST: Pages = {"/log_filter": _changed}

_made: list[HttpEndpoint] = []


def endpoint() -> HttpEndpoint:
    """Give the one endpoint on loopback, made when it is first asked for; it lives as long as the process."""
    if not _made:
        _made.append(HttpEndpoint("control", Endpoint("127.0.0.1", 0), GET, POST, guard=OperatorsOnly(), limits=LIMITS))
    return _made[0]


def run(data: bytes) -> None:
    """Have it read at once, and in pieces as long as the first byte says: what is made of it must be the same."""
    piece, data = (data[0] or 1, data[1:]) if data else (1, b"")
    whole = _receive([data])
    pieces = _receive(data[at : at + piece] for at in range(0, len(data), piece))
    if isinstance(whole, Request) or isinstance(pieces, Request):
        assert whole == pieces
    if whole is not None:
        _check(whole)


def _receive(pieces: Iterable[bytes]) -> Request | Page | None:
    """Do as the endpoint does with what it reads."""
    reception = Reception(LIMITS.request_bytes)
    for piece in pieces:
        for at in range(0, len(piece), LIMITS.request_bytes):
            received = reception.receive(piece[at : at + LIMITS.request_bytes])
            if received is not None:
                return received
    return reception.receive(b"")


def _check(received: Request | Page) -> None:
    page = endpoint()._answer(received) if isinstance(received, Request) else received
    assert page.status != HTTPStatus.INTERNAL_SERVER_ERROR
    is_head = isinstance(received, Request) and received.method == "HEAD"
    said = answer(page, render(page, lambda: None), is_head=is_head)
    assert len(said) < 20_000
    method = received.method if isinstance(received, Request) and received.method in ("HEAD", "POST") else "GET"
    read_answer(said, method)


def read_answer(said: bytes, method: str = "GET") -> int:
    """Read an answer as another implementation does, and give its status."""
    client = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost"), ("Connection", "close")]
    client.send(h11.Request(method=method, target="/", headers=headers))
    client.send(h11.EndOfMessage())
    client.receive_data(said)
    client.receive_data(b"")
    events = []
    while not isinstance(event := client.next_event(), h11.ConnectionClosed):
        assert event is not h11.NEED_DATA
        assert event is not h11.PAUSED
        events.append(event)
        if isinstance(event, h11.EndOfMessage):
            break
    assert isinstance(events[0], h11.Response)
    return events[0].status_code


def ask_for_real(data: bytes) -> bytes:
    """Send bytes to the endpoint over loopback, and give what it answers."""
    with socket.create_connection(("127.0.0.1", endpoint().port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answered = b""
        try:
            while piece := connection.recv(65536):
                answered += piece
        except ConnectionResetError:
            pass  # it has closed before it has read everything
        return answered
