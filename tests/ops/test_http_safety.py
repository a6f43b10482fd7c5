"""Slow and hostile clients get little, and keep nobody else from getting theirs."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from relay.actors.pages import health_pages
from relay.config import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Limits, Page, Pages, Query
from tests.conftest import wait_until
from tests.ops.http_client import HOST, ask, connect, read, receive_all, say, serving

PAGES = health_pages(lambda: True, lambda _: True)
OK = HTTPStatus.OK
SOON = 30
"""Seconds, for a machine that has other work."""
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


def threads(endpoint: HttpEndpoint) -> int:
    """Give how many requests are being seen to."""
    return sum(thread.name == f"{endpoint._name}-request" for thread in threading.enumerate())


def is_closed(connection: socket.socket) -> bool:
    """Tell whether the other side has closed it, or soon does."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


class Slow:
    """A page that takes until it is let go."""

    def __init__(self, body: str = "done") -> None:
        self.body = body
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.at_once = self.most_at_once = 0

    def __call__(self, _: Query) -> Page:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.begun.release()
        assert self.may_end.acquire(timeout=30)
        self.at_once -= 1
        return Page(OK, self.body, "text/plain")


def large(size: int) -> Pages:
    """Give a page of some bytes, and the others."""
    return {**PAGES, "/large": lambda _: Page(OK, "x" * size, "text/plain")}


@contextlib.contextmanager
def crowd(endpoint: HttpEndpoint, number: int, first: bytes) -> Iterator[list[socket.socket]]:
    """Connect often, and begin a request in each connection."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(number):
            connection = stack.enter_context(connect(endpoint))
            connection.sendall(first)
            connections.append(connection)
        yield connections


def trickle(connections: list[socket.socket], stop: threading.Event) -> None:
    """Send a byte now and then in each."""
    while not stop.wait(0.02):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(b"x")


@pytest.mark.parametrize(
    "first", [b"", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8000\r\n\r\n"]
)
def test_however_many_trickle_a_good_client_gets_its_answer(first: bytes) -> None:
    with serving(PAGES, request_seconds=60) as endpoint, crowd(endpoint, 100, first) as connections:
        stop = threading.Event()
        trickler = threading.Thread(target=trickle, args=(connections, stop))
        trickler.start()
        try:
            for _ in range(5):
                assert ask(endpoint, "GET", "/healthz").status == OK
                assert threads(endpoint) <= 17
        finally:
            stop.set()
            trickler.join()


def test_the_oldest_that_is_not_done_gives_way() -> None:
    with serving(PAGES, connections=3, request_seconds=60) as endpoint, crowd(endpoint, 4, b"GET ") as connections:
        assert is_closed(connections[0])
        for each in connections[1:]:
            each.settimeout(0)
            with pytest.raises(BlockingIOError):
                each.recv(1)


def test_who_trickles_is_cut_off_after_so_many_seconds_in_total() -> None:
    with (
        serving(PAGES, request_seconds=0.5) as endpoint,
        crowd(endpoint, 1, GET[:-2] + b"X: ") as (connection,),
    ):
        stop = threading.Event()
        trickler = threading.Thread(target=trickle, args=([connection], stop))
        trickler.start()
        try:
            answer = read(receive_all(connection))
        finally:
            stop.set()
            trickler.join()
        assert answer is not None
        assert answer.status == HTTPStatus.REQUEST_TIMEOUT
        assert answer.error == "a request has 0.5 s"


def test_a_body_that_does_not_come_is_not_waited_for_either() -> None:
    head = b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 8000\r\n\r\n"
    with serving(PAGES, request_seconds=0.2) as endpoint:
        answer = say(endpoint, head)
        assert answer is not None
        assert answer.status == HTTPStatus.REQUEST_TIMEOUT


def test_who_does_not_take_a_large_answer_is_cut_off() -> None:
    with serving(large(8 << 20), answer_seconds=0.3) as endpoint, connect(endpoint, 4096) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: threads(endpoint) == 0 and len(endpoint._crowd) == 0, SOON)
        assert 0 < len(receive_all(connection)) < 8 << 20


def test_who_takes_a_little_now_and_then_is_cut_off_as_well() -> None:
    with serving(large(8 << 20), answer_seconds=0.5) as endpoint, connect(endpoint, 4096) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        taken = 0
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1000):
                taken += len(data)
                # The pace of a client that is slow on purpose.
                time.sleep(0.005)
        assert 0 < taken < 8 << 20


def test_who_takes_it_gets_all_of_a_large_answer() -> None:
    with serving(large(8 << 20)) as endpoint:
        answer = ask(endpoint, "GET", "/large")
        assert len(answer.text) == 8 << 20
        assert ask(endpoint, "HEAD", "/large").headers["Content-Length"] == str(8 << 20)


def test_answers_that_nobody_takes_are_bounded_together() -> None:
    with (
        serving(large(1 << 20), answer_bytes=3 << 20, answer_seconds=60) as endpoint,
        contextlib.ExitStack() as stack,
    ):
        slow = []
        for _ in range(6):
            connection = stack.enter_context(connect(endpoint, 4096))
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(1) == b"H"
            slow.append(connection)
            held = sum(each.holds for each in list(endpoint._crowd._present) if not each.is_cut)
            assert held <= 3 << 20
        assert ask(endpoint, "GET", "/healthz").status == OK
        # The first has made room, the last is still being served.
        assert len(receive_all(slow[0])) < 1 << 20
        assert len(receive_all(slow[-1])) > 1 << 20


def test_who_takes_too_long_over_an_answer_gives_way_to_who_asks() -> None:
    with (
        serving(large(8 << 20), connections=3, answer_seconds=60, answer_bytes=64 << 20) as endpoint,
        crowd(endpoint, 3, b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n") as slow,
    ):
        for each in slow:
            assert each.recv(1) == b"H"
        assert ask(endpoint, "GET", "/healthz").status == OK
        assert len(receive_all(slow[0])) < 8 << 20
        assert len(receive_all(slow[2])) > 7 << 20


def test_what_comes_faster_than_the_rate_waits() -> None:
    with serving(PAGES, rate=20, burst=1) as endpoint:
        began = time.monotonic()
        for _ in range(30):
            assert ask(endpoint, "GET", "/healthz").status == OK
        assert time.monotonic() - began > 0.4


def test_a_page_that_takes_long_keeps_no_other_page_waiting() -> None:
    slow = Slow()
    with serving({**PAGES, "/slow": slow}) as endpoint, connect(endpoint) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.begun.acquire(timeout=30)
        assert ask(endpoint, "GET", "/healthz").status == OK
        slow.may_end.release()
        answer = read(receive_all(connection))
        assert answer is not None
        assert answer.text == "done"


def test_a_page_is_made_once_at_a_time_and_some_wait_for_it() -> None:
    slow = Slow()
    with serving({**PAGES, "/slow": slow}, queue=2, turn_seconds=60) as endpoint:
        with crowd(endpoint, 3, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n") as connections:
            assert slow.begun.acquire(timeout=30)
            wait_until(lambda: not endpoint._queue._value, SOON)
            too_many = ask(endpoint, "GET", "/slow")
            assert (too_many.status, too_many.headers["Retry-After"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "1")
            assert ask(endpoint, "GET", "/healthz").status == OK
            for _ in connections:
                slow.may_end.release()
            assert [b"200 OK" in receive_all(each) for each in connections] == [True] * 3
        assert slow.most_at_once == 1


def test_a_page_that_does_no_work_of_its_own_is_made_for_as_many_as_ask() -> None:
    slow = Slow()
    with (
        serving({"/slow": slow}, queue=0, shared=frozenset(("/slow",))) as endpoint,
        crowd(endpoint, 8, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n") as connections,
    ):
        for _ in connections:
            assert slow.begun.acquire(timeout=30)
        for _ in connections:
            slow.may_end.release()
        assert [b"200 OK" in receive_all(each) for each in connections] == [True] * 8


def test_who_waits_too_long_for_a_page_is_told_so() -> None:
    slow = Slow()
    with serving({"/slow": slow}, turn_seconds=0.1) as endpoint, connect(endpoint) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.begun.acquire(timeout=30)
        assert ask(endpoint, "GET", "/slow").status == HTTPStatus.SERVICE_UNAVAILABLE
        slow.may_end.release()


def test_who_is_being_worked_for_does_not_give_way() -> None:
    slow = Slow()
    with serving({**PAGES, "/slow": slow}, connections=3, request_seconds=60) as endpoint, connect(endpoint) as patient:
        patient.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.begun.acquire(timeout=30)
        with crowd(endpoint, 10, b"GET "):
            assert ask(endpoint, "GET", "/healthz").status == OK
        slow.may_end.release()
        assert b"200 OK" in receive_all(patient)


def test_where_all_are_being_worked_for_one_more_waits_until_one_is_done() -> None:
    pages = {"/one": Slow("1"), "/two": Slow("2")}
    with serving({**PAGES, **pages}, connections=2) as endpoint, contextlib.ExitStack() as stack:
        patient = [stack.enter_context(connect(endpoint)) for _ in range(3)]
        for connection, path in zip(patient, ("one", "two", "healthz"), strict=True):
            connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        for page in pages.values():
            assert page.begun.acquire(timeout=30)
        assert threads(endpoint) == 2
        pages["/two"].may_end.release()
        assert b"200 OK" in receive_all(patient[2])
        pages["/one"].may_end.release()
        assert [b"200 OK" in receive_all(each) for each in patient[:2]] == [True, True]


def test_a_page_that_fails_is_an_answer_and_the_next_is_well() -> None:
    def broken(_: Query) -> Page:
        raise RuntimeError("a secret")

    with capture_logs() as logs, serving({**PAGES, "/broken": broken}) as endpoint:
        answer = ask(endpoint, "GET", "/broken")
        assert answer.status == HTTPStatus.INTERNAL_SERVER_ERROR
        assert "secret" not in answer.text
        assert ask(endpoint, "GET", "/healthz").status == OK
    assert [entry["path"] for entry in logs] == ["/broken"]


def test_a_second_request_in_a_connection_is_none() -> None:
    with serving(PAGES) as endpoint:
        answer = say(endpoint, GET * 20)
        assert answer is not None
        assert answer.status == OK
        assert answer.headers["Connection"] == "close"
        assert answer.text.count("{") == 1


def test_what_is_sent_after_a_refusal_does_not_take_it_away() -> None:
    head = b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with serving(PAGES) as endpoint:
        answer = say(endpoint, head, b"x" * 100_000)
        assert answer is not None
        assert answer.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def test_what_is_sent_after_the_answer_is_taken_so_that_it_does_not_break_the_connection() -> None:
    head = b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with serving(PAGES, leave_seconds=30) as endpoint, connect(endpoint) as connection:
        connection.sendall(head)
        assert b"413" in receive_all(connection)
        connection.sendall(b"x" * 100_000)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: len(endpoint._crowd) == 0, SOON)
        # It would raise an error if the connection had been reset.
        assert connection.recv(1) == b""


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE", "CONNECT", "FROB"])
@pytest.mark.parametrize("path", ["/healthz", "/nowhere"])
def test_every_answer_has_the_headers_that_matter(method: str, path: str) -> None:
    with serving(PAGES) as endpoint:
        answer = ask(endpoint, method, path)
    headers = answer.headers
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    assert headers["Content-Type"] == "application/json"
    assert "Date" in headers
    assert "Server" not in headers
    assert answer.text == "" if method == "HEAD" else int(headers["Content-Length"]) == len(answer.text)


def test_stopping_closes_what_is_open() -> None:
    before = set(threading.enumerate())
    endpoint = HttpEndpoint("test", Endpoint(HOST, 0), PAGES, limits=Limits(request_seconds=60))
    with crowd(endpoint, 5, b"GET ") as connections:
        wait_until(lambda: len(endpoint._crowd) == 5, SOON)
        endpoint.stop()
        assert all(is_closed(each) for each in connections)
        with pytest.raises(ConnectionRefusedError):
            connect(endpoint)
    wait_until(lambda: threads(endpoint) == 0 and set(threading.enumerate()) <= before, SOON)


@pytest.fixture(scope="module")
def hardened() -> Iterator[HttpEndpoint]:
    """An address with short limits, which lives through all that comes."""
    with serving(PAGES, {"/do": lambda _: Page(OK, {})}, request_seconds=0.3, leave_seconds=0.1) as endpoint:
        yield endpoint
        assert ask(endpoint, "GET", "/healthz").status == OK
        wait_until(lambda: threads(endpoint) == 0, SOON)


PARTS = [
    *(b"GET ", b"POST ", b"HEAD ", b"CONNECT ", b"/healthz", b"/do", b"*", b"http://a/", b"?a=%00"),
    *(b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r", b"\0", b"\r\n\r\n", b": ", b"Host: a\r\n", b"Host: b\r\n"),
    *(b"Content-Length: 5\r\n", b"Content-Length: -", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n"),
    *(b"Upgrade: h2c\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n", b"ffffffff\r\n"),
    *(b"\x16\x03\x01", b"x" * 9000, b"\xff" * 30, b"%" * 30),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PARTS) | st.binary(max_size=40), max_size=12), st.booleans())
def test_any_bytes_get_one_answer_or_none(hardened: HttpEndpoint, parts: list[bytes], half_closes: bool) -> None:  # noqa: FBT001 - drawn
    with connect(hardened) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"".join(parts))
            if half_closes:
                connection.shutdown(socket.SHUT_WR)
        answer = read(receive_all(connection))
    if answer is not None and answer.status != OK and answer.text:
        assert answer.error


def test_a_client_that_vanishes_leaves_nothing() -> None:
    with serving(large(8 << 20)) as endpoint:
        for first in (b"", b"GET", b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n"):
            with connect(endpoint) as connection:
                connection.sendall(first)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_until(lambda: threads(endpoint) == 0 and len(endpoint._crowd) == 0, SOON)
