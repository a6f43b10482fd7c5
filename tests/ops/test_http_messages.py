"""Valid and invalid requests, and responses."""

import json
from http import HTTPStatus
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.ops.http.messages import HttpRequest, Page, parse_request, render, response

MOST = 2048

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /do HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def new_parser(limit: int = MOST) -> h11.Connection:
    """Return a parser of heads up to a limit."""
    return h11.Connection(h11.SERVER, max_incomplete_event_size=limit)


def receive(data: bytes, *, piece: int | None = None) -> HttpRequest | Page | None:
    """Parse some bytes."""
    parser = new_parser()
    for at in range(0, len(data), piece or len(data)):
        found = parse_request(parser, data[at : at + (piece or len(data))])
        if found is not None:
            return found
    return parse_request(parser, b"")


def head(*lines: str, method: str = "GET", target: str = "/x", version: str = "1.1") -> bytes:
    return "\r\n".join((f"{method} {target} HTTP/{version}", *lines, "", "")).encode("latin-1")


@pytest.mark.parametrize("piece", [None, 1, 7])
@pytest.mark.parametrize(
    ("data", "method", "path", "query"),
    [
        (GET, "GET", "/healthz", ""),
        (GET + GET, "GET", "/healthz", ""),
        (head("Host: a", target="/a/b?c=d&e"), "GET", "/a/b", "c=d&e"),
        (head("Host: a", target="/a?b?c"), "GET", "/a", "b?c"),
        (head("Host: a", target="//elsewhere/x"), "GET", "//elsewhere/x", ""),
        (head(version="1.0"), "GET", "/x", ""),
        (head("Host: a", "Content-Length: 3", method="POST") + b"abc", "POST", "/x", ""),
        (head("Host: a", "Content-Length: 3, 3", method="POST") + b"abc", "POST", "/x", ""),
        (CHUNKED + b"3;note=1\r\nabc\r\n0\r\nTrailer: x\r\n\r\n", "POST", "/do", ""),
        (head("Host: a", "Upgrade: websocket", "Connection: Upgrade"), "GET", "/x", ""),
        (head("Host: a", method="PROPFIND"), "PROPFIND", "/x", ""),
        (GET.replace(b"\r\n", b"\n"), "GET", "/healthz", ""),
    ],
)
def test_a_request_is_read_in_any_pieces(data: bytes, method: str, path: str, query: str, piece: int | None) -> None:
    request = receive(data, piece=piece)
    assert isinstance(request, HttpRequest)
    assert request[:3] == (method, path, query)


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked",
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Content-Length: 9\r\nExpect: 100-continue",
    ],
)
def test_a_request_is_complete_without_its_body(framing: str) -> None:
    parser = new_parser()
    assert isinstance(parse_request(parser, head("Host: a", framing, method="POST", target="/do")), HttpRequest)


@pytest.mark.parametrize("piece", [None, 1, 1000])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /\r\n\r\n", 400),  # HTTP/0.9
        (b"GET / HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (head("Host: a", version="11"), 400),
        (head(), 400),  # a Host is missing
        (head("Host: a", "Host: a"), 400),
        (head("Host: a", "host: b"), 400),
        (head("Host: a", "Host: b", version="1.0"), 400),
        (head("Host: a", target="http://b/"), 400),
        (head("Host : a"), 400),
        (head(" Host: a"), 400),
        (head("Host: a\0b"), 400),
        (head("Host: a", "X\0: b"), 400),
        (head("Host: a", "no colon"), 400),
        (head("Host: a", target="/\0"), 400),
        (head("Host: a", target="/ü"), 400),
        (head("Host: a", target="/a b"), 400),
        (head("Host: a", target="*", method="OPTIONS"), 400),
        (head("Host: a:443", target="a:443", method="CONNECT"), 400),
        (head("Host: a", target="x"), 400),
        (head("Host: a", target="https://a/"), 400),
        (head("Host: a", target="http://a"), 400),
        (head("Host: a", target="/" + "x" * 2048)[:-2], 431),
        (head("Host: a", "X: " + "y" * MOST)[:-2], 431),
        (head("Host: a", *("X: y" for _ in range(MOST)))[:-2], 431),
        (head("Host: a", "Content-Length: " + "9" * 1000, method="POST"), 400),
        (head("Host: a", "Content-Length: -1", method="POST"), 400),
        (head("Host: a", "Content-Length: +3", method="POST") + b"abc", 400),
        (head("Host: a", "Content-Length: 3", "Content-Length: 4", method="POST") + b"abc", 400),
        (head("Host: a", "Content-Length: 3, 4", method="POST") + b"abc", 400),
        (head("Host: a", "Transfer-Encoding: gzip, chunked", method="POST"), 501),
        (head("Host: a", "Transfer-Encoding: xchunked", method="POST"), 501),
        (head("Host: a", "Transfer-Encoding: chunked", "Transfer-Encoding: identity", method="POST"), 501),
    ],
)
def test_an_invalid_request_gets_an_error(data: bytes, status: int, piece: int | None) -> None:
    found = receive(data, piece=piece)
    assert isinstance(found, Page)
    assert found.status == status
    assert isinstance(found.body, dict)
    assert "\n" not in found.body["error"]


def test_a_long_target_is_rejected_even_below_the_limit_of_the_head() -> None:
    found = parse_request(new_parser(8192), head("Host: a", target="/" + "x" * 2048))
    assert isinstance(found, Page)
    assert found.status == HTTPStatus.REQUEST_URI_TOO_LONG


def test_a_connection_without_a_request_gets_no_response() -> None:
    assert parse_request(new_parser(), b"") is None


@given(st.lists(st.binary(max_size=300), max_size=12), st.sampled_from([b"", GET[:-2], CHUNKED, head("Host: a")[:-2]]))
def test_any_bytes_are_a_request_or_an_error(pieces: list[bytes], start: bytes) -> None:
    parser = new_parser()
    for piece in (*filter(None, (start, *pieces)), b""):
        found = parse_request(parser, piece)
        if found is not None:
            break
    if isinstance(found, Page):
        assert 400 <= found.status < 600


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_a_body_is_one_line_of_json(body: dict[str, Any]) -> None:
    yields = []
    text = render(Page(HTTPStatus.OK, body), lambda: yields.append(1)).decode()
    assert text == json.dumps(body) + "\n"
    assert len(yields) >= len(body)


@given(st.text(st.characters(codec="utf-8")), st.booleans())
def test_a_real_client_parses_responses(text: str, is_head: bool) -> None:  # noqa: FBT001 - drawn
    page = Page(HTTPStatus.METHOD_NOT_ALLOWED, text, "text/plain; charset=utf-8", (("Allow", "GET, HEAD"),))
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="HEAD" if is_head else "GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(response(page, text.encode(), is_head=is_head))
    event = client.next_event()
    assert isinstance(event, h11.Response)
    headers = {name.decode(): value.decode() for name, value in event.headers}
    assert (event.status_code, headers["allow"], headers["connection"]) == (405, "GET, HEAD", "close")
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert int(headers["content-length"]) == len(text.encode())
    assert "server" not in headers
    body = b""
    while isinstance(part := client.next_event(), h11.Data):
        body += bytes(part.data)
    assert isinstance(part, h11.EndOfMessage)
    assert body == (b"" if is_head else text.encode())
