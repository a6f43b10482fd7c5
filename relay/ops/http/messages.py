"""Requests and answers as bytes: what may be asked, and how it is said. No socket and no clock.

There is one request in a connection, which is then closed: so nothing can be smuggled behind a first request, and whoever
has been answered holds nothing any more.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple, TypeAlias
from urllib.parse import parse_qsl

import h11

QUERY_PARAMETERS = 16
"""Most of them in one request."""

TARGET_BYTES = 2048
"""Longest path with its query: filters of log entries are the longest that are sent."""

_OVERHEAD = 4
"""How much more than the longest body may come for one, in chunks."""

_DEPTH = 3
"""Of collections in collections, how many levels become text entry by entry: below it there is little in each."""

_TARGET = re.compile(r"(?:http://(?P<authority>[^/?#]+))?(?P<path>/[^?#]*)(?:\?(?P<query>[^#]*))?", re.ASCII)
"""The origin form and the absolute form (RFC 9112 §3.2); the other two are for proxies and for OPTIONS."""

Query: TypeAlias = Mapping[str, str]
"""The first value of each parameter of a request."""


class Page(NamedTuple):
    """What is answered: a status, and an object that becomes JSON, or a text as it is."""

    status: HTTPStatus
    body: Mapping[str, object] | str
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    """More of them, for this answer only."""


Pages: TypeAlias = dict[str, Callable[[Query], Page]]
"""What is answered to a request of each path. Such a callable runs in a thread of its own request, once at a time."""


class Request(NamedTuple):
    """What is asked."""

    method: str
    path: str
    query: str
    headers: Mapping[str, tuple[str, ...]]
    """By their names in lower case; `host` has the one of the target, too, if there is one."""


def error(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> Page:
    """Give a page that says in one line what is wrong."""
    return Page(status, {"error": text}, headers=headers)


def read_query(text: str) -> Query:
    """Read what stands behind the question mark of a URL.

    Raises:
        ValueError: there are more than `QUERY_PARAMETERS`, or it is no UTF-8.
    """
    pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=QUERY_PARAMETERS)
    return MappingProxyType(dict(reversed(pairs)))


class _RefusedError(Exception):
    """A request is not taken."""

    def __init__(self, status: HTTPStatus, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.page = error(status, text, *headers)


class Reception:
    """One request on its way in.

    Args:
        most: bytes of its head, and of its body.
    """

    def __init__(self, most: int) -> None:
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=most)
        self._most = most
        self._received = self._body = 0
        self._request: Request | None = None

    def receive(self, data: bytes) -> Request | Page | None:
        """Take what came, nothing being the end of it; give the request once it is there, or why it is none.

        Its body is left out: nothing that is asked here has one.
        """
        self._received += len(data)
        try:
            self._connection.receive_data(data)
            return self._read()
        except _RefusedError as refused:
            return refused.page
        except h11.RemoteProtocolError as fault:
            return error(HTTPStatus(fault.error_status_hint), f"no HTTP request as it should be: {_said(fault)}")

    def _read(self) -> Request | None:
        while True:
            event = self._connection.next_event()
            if isinstance(event, h11.Request):
                if self._received - len(self._connection.trailing_data[0]) > self._most:
                    raise _RefusedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a head has at most {self._most} bytes")
                self._request = _read_head(event, self._most)
                # Who waits for a word to send the body needs to send none.
                if self._connection.they_are_waiting_for_100_continue:
                    return self._request
            elif isinstance(event, h11.Data):
                self._body += len(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return self._request
            if self._body > self._most or self._received > _OVERHEAD * self._most:
                raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {self._most} bytes")
            if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                return None


def _said(fault: h11.RemoteProtocolError) -> str:
    """Give what is wrong without what was sent, which may be anything."""
    return str(fault).partition(":")[0]


def _read_head(event: h11.Request, most: int) -> Request:
    """Read what a request asks for.

    Raises:
        _RefusedError: it is none that is taken.
    """
    headers: dict[str, tuple[str, ...]] = {}
    for name, value in event.headers:
        headers[name.decode("ascii")] = (*headers.get(name.decode("ascii"), ()), value.decode("latin-1"))
    if not event.http_version.startswith(b"1."):
        raise _RefusedError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.1 is spoken here")
    _check_framing(event, headers, most)
    method = event.method.decode("ascii")
    target = _read_target(method, event.target)
    if target["authority"] is not None and headers.get("host") != (target["authority"],):
        headers["host"] = (*headers.get("host", ()), target["authority"])
    if len(headers.get("host", ())) > 1:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request names more than one host")
    return Request(method, target["path"], target["query"] or "", MappingProxyType(headers))


def _check_framing(event: h11.Request, headers: Mapping[str, tuple[str, ...]], most: int) -> None:
    """Refuse a body that is too long, or whose end is not clear."""
    framing = [name for name in ("content-length", "transfer-encoding") if name in headers]
    # Who sends both, or the second in HTTP/1.0, may mean one request by it and others two (RFC 9112 §6.1).
    if len(framing) > 1 or (framing == ["transfer-encoding"] and event.http_version < b"1.1"):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "it is not clear where the body ends")
    if int(headers.get("content-length", ("0",))[0]) > most:
        raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {most} bytes")


def _read_target(method: str, target: bytes) -> re.Match[str]:
    if len(target) > TARGET_BYTES:
        raise _RefusedError(HTTPStatus.REQUEST_URI_TOO_LONG, f"a path and its query have at most {TARGET_BYTES} bytes")
    match = _TARGET.fullmatch(target.decode("ascii"))
    if match is None and method in ("CONNECT", "OPTIONS"):
        raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "this is no proxy", ("Allow", "GET, HEAD, POST"))
    if match is None:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request names no path: ask for /livez, say")
    return match


def render(page: Page, give_way: Callable[[], object]) -> bytes:
    """Make a page's body of bytes.

    Args:
        page: which.
        give_way: is called again and again, as long as it takes, and should let other threads run.
    """
    if isinstance(page.body, str):
        return page.body.encode()
    parts = []
    for part in _json(page.body):
        parts.append(part)
        give_way()
    parts.append("\n")
    return "".join(parts).encode()


def _json(value: object, depth: int = _DEPTH) -> Iterator[str]:
    """Spell a value as `json.dumps` does, in parts: that one keeps all other threads waiting until it is done."""
    if depth == 0 or not isinstance(value, Mapping | list | tuple):
        yield json.dumps(value)
        return
    start, end = "{}" if isinstance(value, Mapping) else "[]"
    yield start
    separator = ""
    for each in value:
        yield separator
        separator = ", "
        if isinstance(value, Mapping):
            yield f"{json.dumps(str(each))}: "
        yield from _json(value[each] if isinstance(value, Mapping) else each, depth - 1)
    yield end


def answer(page: Page, body: bytes, *, is_head: bool = False) -> bytes:
    """Give the whole answer; to HEAD, what GET would get but for the body."""
    headers = (
        ("Date", formatdate(usegmt=True)),
        ("Content-Type", page.content_type),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        ("Cache-Control", "no-store"),
        # A browser shall take it for nothing else, and show it to no page from elsewhere.
        ("X-Content-Type-Options", "nosniff"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        *page.headers,
    )
    lines = [f"HTTP/1.1 {page.status.value} {page.status.phrase}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + (b"" if is_head else body)
