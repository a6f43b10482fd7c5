"""Requests and responses as bytes, without sockets or clocks.

A connection carries a single request and is then closed. So no second request can be smuggled behind the first, and a client
holds no resources after its response.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple, TypeAlias
from urllib.parse import parse_qsl

import h11

MAX_PARAMETERS = 16
"""Query parameters in a request."""

MAX_TARGET_BYTES = 2048
"""Length of path and query. Filters of log entries are the longest legitimate queries."""

Query: TypeAlias = Mapping[str, str]
"""The first value of each parameter."""


class Page(NamedTuple):
    """A response: JSON if the body is a mapping, else text."""

    status: HTTPStatus
    body: Mapping[str, object] | str
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    """Additional headers."""


Pages: TypeAlias = dict[str, Callable[[Query], Page]]
"""Functions that return pages, by path. Each runs in the thread of a request, in a single thread at a time. The last part of
a path that ends with ``/ID`` can be any text, which is the parameter ``ID``."""


class HttpRequest(NamedTuple):
    """Head of a request. No page uses a body, so the body is discarded unread."""

    method: str
    path: str
    query: str
    headers: Mapping[str, Sequence[str]]
    """Values by lower-case name."""


def error(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> Page:
    """Return a page with an error message, which is a single line."""
    return Page(status, {"error": text}, headers=headers)


def parse_query(text: str) -> dict[str, str]:
    """Parse the query of a URL into the first value of each parameter.

    Raises:
        ValueError: it has more than `MAX_PARAMETERS` parameters, or is not UTF-8.
    """
    pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS)
    return dict(reversed(pairs))


def parse_request(connection: h11.Connection, data: bytes) -> HttpRequest | Page | None:
    """Parse received bytes; empty bytes are the end of the stream. h11 is stricter than most parsers.

    Returns:
        The request once its head is complete, the response if the head is invalid, or None if more bytes are needed.
    """
    try:
        connection.receive_data(data)
        event = connection.next_event()
    except h11.RemoteProtocolError as fault:
        # The text after the colon quotes the client.
        reason = str(fault).partition(":")[0]
        return error(HTTPStatus(fault.error_status_hint), f"invalid HTTP request: {reason}")
    if not isinstance(event, h11.Request):
        return None
    target = event.target.decode("ascii")
    if len(target) > MAX_TARGET_BYTES:
        text = f"the path and query are longer than {MAX_TARGET_BYTES} bytes"
        return error(HTTPStatus.REQUEST_URI_TOO_LONG, text)
    if not target.startswith("/"):
        return error(HTTPStatus.BAD_REQUEST, "the request target is not a path: use a path such as /livez")
    path, _, query = target.partition("?")
    headers: dict[str, list[str]] = {}
    for name, value in event.headers:
        headers.setdefault(name.decode("ascii"), []).append(value.decode("latin-1"))
    return HttpRequest(event.method.decode("ascii"), path, query, headers)


def render(page: Page, yield_if_due: Callable[[], object]) -> bytes:
    """Return the body of a page. Encode JSON in small parts, and let other threads run after each part."""
    if isinstance(page.body, str):
        return page.body.encode()
    body = bytearray()
    for part in json.JSONEncoder(default=dict).iterencode(page.body):
        body += part.encode()
        yield_if_due()
    return bytes(body + b"\n")


def response(page: Page, body: bytes, *, is_head: bool = False) -> bytes:
    """Return a complete response. A response to HEAD has the headers of GET and no body."""
    headers = (
        ("Date", formatdate(usegmt=True)),
        ("Content-Type", page.content_type),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        ("Cache-Control", "no-store"),
        # A browser must not guess another type, nor show the response to a page of another site.
        ("X-Content-Type-Options", "nosniff"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        *page.headers,
    )
    lines = [f"HTTP/1.1 {page.status.value} {page.status.phrase}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + (b"" if is_head else body)
