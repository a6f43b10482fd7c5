"""What is a request, what is none, and what is said to either."""

import json
from http import HTTPStatus
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.ops.http.messages import Page, Reception, Request, answer, render

MOST = 2048

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /do HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def receive(data: bytes, *, piece: int | None = None) -> Request | Page | None:
    """Give what becomes of some bytes."""
    reception = Reception(MOST)
    for at in range(0, len(data), piece or len(data)):
        found = reception.receive(data[at : at + (piece or len(data))])
        if found is not None:
            return found
    return reception.receive(b"")


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
        (head("Host: [::1]:9999", target="http://[::1]:9999/a?b"), "GET", "/a", "b"),
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
    assert isinstance(request, Request)
    assert request[:3] == (method, path, query)


def test_who_waits_for_a_word_to_send_the_body_is_answered_without_it() -> None:
    reception = Reception(MOST)
    asked = reception.receive(head("Host: a", "Expect: 100-continue", "Content-Length: 9", method="POST", target="/do"))
    assert isinstance(asked, Request)


@pytest.mark.parametrize("piece", [None, 1, 1000])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /\r\n\r\n", 400),  # HTTP/0.9
        (b"GET / HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (head("Host: a", version="3.0"), 505),
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
        (head("Host: a", target="*", method="OPTIONS"), 405),
        (head("Host: a:443", target="a:443", method="CONNECT"), 405),
        (head("Host: a", target="x"), 400),
        (head("Host: a", target="/x#y"), 400),
        (head("Host: a", target="https://a/"), 400),
        (head("Host: a", target="http://a"), 400),
        (head("Host: a", target="/" + "x" * 2048), 431),
        (head("Host: a", "X: " + "y" * MOST), 431),
        (head("Host: a", *("X: y" for _ in range(MOST))), 431),
        (head("Host: a", f"Content-Length: {MOST + 1}", method="POST"), 413),
        (head("Host: a", "Content-Length: 99999999999999999999", method="POST"), 413),
        (head("Host: a", "Content-Length: " + "9" * 1000, method="POST"), 400),
        (head("Host: a", "Content-Length: -1", method="POST"), 400),
        (head("Host: a", "Content-Length: +3", method="POST") + b"abc", 400),
        (head("Host: a", "Content-Length: 3", "Content-Length: 4", method="POST") + b"abc", 400),
        (head("Host: a", "Content-Length: 3, 4", method="POST") + b"abc", 400),
        (head("Host: a", "Content-Length: 9", method="POST") + b"abc", 400),
        (head("Host: a", "Content-Length: 3", "Transfer-Encoding: chunked", method="POST") + b"0\r\n\r\n", 400),
        (head("Host: a", "Transfer-Encoding: chunked", method="POST", version="1.0") + b"0\r\n\r\n", 400),
        (head("Host: a", "Transfer-Encoding: gzip, chunked", method="POST"), 501),
        (head("Host: a", "Transfer-Encoding: xchunked", method="POST"), 501),
        (head("Host: a", "Transfer-Encoding: chunked", "Transfer-Encoding: identity", method="POST"), 501),
        (CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n", 400),
        (CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n", 400),
        (CHUNKED + b"3\r\nabcdef\r\n0\r\n\r\n", 400),
        (CHUNKED + b"f" * 30 + b"\r\n", 400),
        (CHUNKED + b"800\r\n" + b"x" * 0x800 + b"\r\n1\r\nx\r\n0\r\n\r\n", 413),
        (CHUNKED + b"1;" + b"x" * 3000, 431),
        (CHUNKED + (b"1;" + b"x" * 1000 + b"\r\ny\r\n") * 9, 413),
        (CHUNKED + b"0\r\n" + b"X: " + b"y" * 3000, 431),
        (CHUNKED + b"3\r\nabc", 400),
    ],
)
def test_what_is_no_request_is_told_so(data: bytes, status: int, piece: int | None) -> None:
    found = receive(data, piece=piece)
    assert isinstance(found, Page)
    assert found.status == status
    assert isinstance(found.body, dict)
    assert "\n" not in found.body["error"]


def test_a_target_that_is_too_long_is_told_so_where_heads_may_be_longer() -> None:
    found = Reception(8192).receive(head("Host: a", target="/" + "x" * 2048))
    assert isinstance(found, Page)
    assert found.status == HTTPStatus.REQUEST_URI_TOO_LONG


def test_who_says_nothing_is_told_nothing() -> None:
    assert Reception(MOST).receive(b"") is None


@given(st.lists(st.binary(max_size=300), max_size=12), st.sampled_from([b"", GET[:-2], CHUNKED, head("Host: a")[:-2]]))
def test_any_bytes_are_a_request_or_none(pieces: list[bytes], start: bytes) -> None:
    reception = Reception(MOST)
    for piece in (*filter(None, (start, *pieces)), b""):
        found = reception.receive(piece)
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
    gave_way = []
    text = render(Page(HTTPStatus.OK, body), lambda: gave_way.append(1)).decode()
    assert text == json.dumps(body) + "\n"
    assert len(gave_way) >= len(body)


@given(st.text(st.characters(codec="utf-8")), st.booleans())
def test_a_real_client_reads_what_is_answered(text: str, is_head: bool) -> None:  # noqa: FBT001 - drawn
    page = Page(HTTPStatus.METHOD_NOT_ALLOWED, text, "text/plain; charset=utf-8", (("Allow", "GET, HEAD"),))
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="HEAD" if is_head else "GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(answer(page, text.encode(), is_head=is_head))
    response = client.next_event()
    assert isinstance(response, h11.Response)
    headers = {name.decode(): value.decode() for name, value in response.headers}
    assert (response.status_code, headers["allow"], headers["connection"]) == (405, "GET, HEAD", "close")
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert int(headers["content-length"]) == len(text.encode())
    assert "server" not in headers
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert body == (b"" if is_head else text.encode())
