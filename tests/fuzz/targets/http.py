"""Requests to the control address: any bytes in any pieces get an HTTP response, but never 500."""

import socket
from collections.abc import Iterable
from http import HTTPStatus

import h11

from relay.net.endpoint import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Limits, Page, Pages, Query
from relay.ops.http.messages import HttpRequest, parse_request, render, response
from relay.ops.logs.filter import LogFilter

MODULES = ("relay.ops.http.messages", "relay.ops.http.host_check")

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
    """Return the only endpoint on loopback, created by the first call for the lifetime of the process."""
    if not _made:
        _made.append(HttpEndpoint("control", Endpoint("127.0.0.1", 0), GET, POST, hostnames=(), limits=LIMITS))
    return _made[0]


def run(data: bytes) -> None:
    """Parse the input at once, and in pieces of the size in the first byte; both results must be equal."""
    piece, data = (data[0] or 1, data[1:]) if data else (1, b"")
    whole = _receive([data])
    pieces = _receive(data[at : at + piece] for at in range(0, len(data), piece))
    if isinstance(whole, HttpRequest) or isinstance(pieces, HttpRequest):
        assert whole == pieces
    if whole is not None:
        _check(whole)


def _receive(pieces: Iterable[bytes]) -> HttpRequest | Page | None:
    """Process input as the endpoint does."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=LIMITS.request_bytes)
    for piece in pieces:
        for at in range(0, len(piece), LIMITS.request_bytes):
            received = parse_request(parser, piece[at : at + LIMITS.request_bytes])
            if received is not None:
                return received
    return parse_request(parser, b"")


def _check(received: HttpRequest | Page) -> None:
    page = endpoint().page_for(received) if isinstance(received, HttpRequest) else received
    assert page.status != HTTPStatus.INTERNAL_SERVER_ERROR
    is_head = isinstance(received, HttpRequest) and received.method == "HEAD"
    said = response(page, render(page, lambda: None), is_head=is_head)
    assert len(said) < 20_000
    method = received.method if isinstance(received, HttpRequest) and received.method in ("HEAD", "POST") else "GET"
    read_answer(said, method)


def read_answer(said: bytes, method: str = "GET") -> int:
    """Parse a response with an independent implementation, and return its status."""
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
    """Send bytes to the endpoint over loopback, and return the response."""
    with socket.create_connection(("127.0.0.1", endpoint().port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answered = b""
        try:
            while piece := connection.recv(65536):
                answered += piece
        except ConnectionResetError:
            pass  # the endpoint has closed before reading everything
        return answered
