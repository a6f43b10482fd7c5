"""Slow and hostile clients use few resources, and do not block other clients."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.net.endpoint import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Limits, Page, Pages, Query
from relay.system.pages import health_pages
from tests.support.http_client import HOST, ask, connect, read, receive_all, say, serving
from tests.support.log_lines import capture_logs
from tests.support.waiting import wait_until

PAGES = health_pages(tuple, lambda _: True)
OK = HTTPStatus.OK
SOON = 30
"""Seconds, for a busy machine."""
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


def threads(endpoint: HttpEndpoint) -> int:
    """Return the number of threads of requests."""
    return sum(thread.name == f"{endpoint.name}-request" for thread in threading.enumerate())


def connections_of(endpoint: HttpEndpoint) -> int:
    """Return the number of open connections."""
    return sum(map(len, endpoint.listeners))


def is_idle(endpoint: HttpEndpoint) -> bool:
    """Check that no connection is open and no request is being answered.

    The check also succeeds before a connection is accepted, so a test first waits for the begin of its request.
    """
    return connections_of(endpoint) == 0 and threads(endpoint) == 0


def is_closed(connection: socket.socket) -> bool:
    """Wait, and check that the server closes the connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


class Slow:
    """A page that waits for a test."""

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
    """Return a page of some bytes, and the health pages."""
    return {**PAGES, "/large": lambda _: Page(OK, "x" * size, "text/plain")}


@contextlib.contextmanager
def crowd(endpoint: HttpEndpoint, number: int, first: bytes) -> Iterator[list[socket.socket]]:
    """Open connections, and begin a request in each."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(number):
            connection = stack.enter_context(connect(endpoint))
            connection.sendall(first)
            connections.append(connection)
        yield connections


def trickle(connections: list[socket.socket], stop: threading.Event) -> None:
    """Send a byte in each connection, again and again."""
    while not stop.wait(0.02):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(b"x")


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: "])
def test_a_normal_client_is_served_despite_many_slow_requests(first: bytes) -> None:
    with serving(PAGES, request_seconds=60) as endpoint, crowd(endpoint, 40, first) as connections:
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


def test_a_new_connection_closes_the_oldest() -> None:
    with serving(PAGES, connections=3, request_seconds=60) as endpoint, crowd(endpoint, 4, b"GET ") as connections:
        assert is_closed(connections[0])
        for each in connections[1:]:
            each.settimeout(0)
            with pytest.raises(BlockingIOError):
                each.recv(1)


def test_a_slow_request_has_a_total_time_limit() -> None:
    with (
        serving(PAGES, request_seconds=0.2) as endpoint,
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
        assert answer.error == "the request was not complete within 0.2 s"


def test_the_response_does_not_wait_for_a_body() -> None:
    head = b"POST /do HTTP/1.1\r\nHost: a\r\nContent-Length: 8000\r\n\r\n"
    with serving(PAGES, {"/do": lambda _: Page(OK, {})}, request_seconds=60) as endpoint:
        answer = say(endpoint, head)
        assert answer is not None
        assert answer.status == OK


def test_an_unread_response_has_a_time_limit() -> None:
    with serving(large(8 << 20), answer_seconds=0.3) as endpoint, connect(endpoint, 4096) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(1) == b"H"
        wait_until(lambda: is_idle(endpoint))
        assert 0 < len(receive_all(connection)) < 8 << 20


def test_a_slowly_read_response_has_a_total_time_limit() -> None:
    with serving(large(8 << 20), answer_seconds=0.3) as endpoint, connect(endpoint, 4096) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        taken = 0
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1000):
                taken += len(data)
                # The rate of a deliberately slow client.
                time.sleep(0.005)
        assert 0 < taken < 8 << 20


def test_a_large_response_is_complete() -> None:
    with serving(large(8 << 20)) as endpoint:
        answer = ask(endpoint, "GET", "/large")
        assert len(answer.text) == 8 << 20
        assert ask(endpoint, "HEAD", "/large").headers["Content-Length"] == str(8 << 20)


def test_unread_responses_have_a_total_size_limit() -> None:
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
        assert ask(endpoint, "GET", "/healthz").status == OK
        # With headers, three responses exceed the size limit. The oldest were dropped, the newest are being sent.
        assert [len(receive_all(each)) > 1 << 20 for each in slow] == [False] * 4 + [True] * 2


def test_a_slowly_read_response_gives_way_to_a_new_client() -> None:
    with (
        serving(large(8 << 20), connections=3, answer_seconds=60, answer_bytes=64 << 20) as endpoint,
        crowd(endpoint, 3, b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n") as slow,
    ):
        for each in slow:
            assert each.recv(1) == b"H"
        assert ask(endpoint, "GET", "/healthz").status == OK
        assert len(receive_all(slow[0])) < 8 << 20
        assert len(receive_all(slow[2])) > 7 << 20


def test_connections_above_the_rate_wait() -> None:
    with serving(PAGES, rate=20, burst=1) as endpoint:
        began = time.monotonic()
        for _ in range(30):
            assert ask(endpoint, "GET", "/healthz").status == OK
        assert time.monotonic() - began > 0.4


def test_loopback_has_a_queue_and_connections_of_its_own() -> None:
    """Without them, the last of the connections would wait for minutes."""
    with (
        serving(PAGES, host="0.0.0.0", rate=1, burst=1, connections=2, request_seconds=600) as endpoint,
        contextlib.ExitStack() as stack,
    ):
        mine = stack.enter_context(connect(endpoint))
        wait_until(lambda: connections_of(endpoint) == 1)
        for _ in range(200):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)  # noqa: FBT003 - its only parameter
            # Only 127.0.0.1 has the second socket: another address stands for another machine.
            other.connect_ex(("127.0.0.2", endpoint.port))
        wait_until(lambda: connections_of(endpoint) == 3)
        mine.sendall(GET)
        assert b"200 OK" in receive_all(mine)
        assert ask(endpoint, "GET", "/healthz").status == OK


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_no_other_program_can_share_the_address(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with serving(PAGES, host=host) as endpoint, pytest.raises(OSError, match="Address already in use"):
        socket.create_server((host, endpoint.port), family=family, reuse_port=True)


def test_a_slow_page_does_not_delay_other_pages() -> None:
    slow = Slow()
    with serving({**PAGES, "/slow": slow}) as endpoint, connect(endpoint) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.begun.acquire(timeout=30)
        assert ask(endpoint, "GET", "/healthz").status == OK
        slow.may_end.release()
        answer = read(receive_all(connection))
        assert answer is not None
        assert answer.text == "done"


def test_a_page_is_made_by_one_thread_at_a_time_and_some_requests_wait() -> None:
    slow = Slow()
    with serving({**PAGES, "/slow": slow}, queue=2, turn_seconds=60) as endpoint:
        with crowd(endpoint, 4, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n") as connections:
            assert slow.begun.acquire(timeout=30)
            # One request is being processed and two wait, in any order.
            (answered,), _, _ = select.select(connections, [], [], SOON)
            too_many = read(receive_all(answered))
            assert too_many is not None
            assert (too_many.status, too_many.headers["Retry-After"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "1")
            assert ask(endpoint, "GET", "/healthz").status == OK
            connections.remove(answered)
            for _ in connections:
                slow.may_end.release()
            assert [b"200 OK" in receive_all(each) for each in connections] == [True] * 3
        assert slow.most_at_once == 1


def test_a_shared_page_is_made_by_any_number_of_threads() -> None:
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


def test_the_wait_for_a_page_has_a_time_limit() -> None:
    slow = Slow()
    with serving({"/slow": slow}, turn_seconds=0.1) as endpoint, connect(endpoint) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.begun.acquire(timeout=30)
        assert ask(endpoint, "GET", "/slow").status == HTTPStatus.SERVICE_UNAVAILABLE
        slow.may_end.release()


def test_a_connection_with_a_page_in_progress_is_not_closed() -> None:
    slow = Slow()
    with serving({**PAGES, "/slow": slow}, connections=3, request_seconds=60) as endpoint, connect(endpoint) as patient:
        patient.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.begun.acquire(timeout=30)
        with crowd(endpoint, 10, b"GET "):
            assert ask(endpoint, "GET", "/healthz").status == OK
        slow.may_end.release()
        assert b"200 OK" in receive_all(patient)


def test_a_new_connection_waits_while_all_pages_are_being_made() -> None:
    pages = {"/one": Slow("1"), "/two": Slow("2")}
    with serving({**PAGES, **pages}, connections=2) as endpoint, contextlib.ExitStack() as stack:
        patient = []
        for path in ("/one", "/two", "/healthz"):
            patient.append(stack.enter_context(connect(endpoint)))
            patient[-1].sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            # A connection without a page in progress would be closed for the next.
            if path in pages:
                assert pages[path].begun.acquire(timeout=30)
        assert threads(endpoint) == 2
        pages["/two"].may_end.release()
        assert b"200 OK" in receive_all(patient[2])
        pages["/one"].may_end.release()
        assert [b"200 OK" in receive_all(each) for each in patient[:2]] == [True, True]


def test_a_failing_page_gets_a_500_and_the_next_works() -> None:
    def broken(_: Query) -> Page:
        raise RuntimeError("a secret")

    with capture_logs() as logs, serving({**PAGES, "/broken": broken}) as endpoint:
        answer = ask(endpoint, "GET", "/broken")
        assert answer.status == HTTPStatus.INTERNAL_SERVER_ERROR
        assert "secret" not in answer.text
        assert ask(endpoint, "GET", "/healthz").status == OK
    assert [entry["path"] for entry in logs] == ["/broken"]


def test_a_second_request_in_a_connection_is_ignored() -> None:
    with serving(PAGES) as endpoint:
        answer = say(endpoint, GET * 20)
        assert answer is not None
        assert answer.status == OK
        assert answer.headers["Connection"] == "close"
        assert answer.text.count("{") == 1


def test_an_unread_body_does_not_reset_the_response() -> None:
    head = b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with serving(PAGES) as endpoint:
        answer = say(endpoint, head, b"x" * 100_000)
        assert answer is not None
        assert answer.status == HTTPStatus.METHOD_NOT_ALLOWED


def test_data_after_the_response_does_not_reset_the_connection() -> None:
    head = b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with serving(PAGES, leave_seconds=30) as endpoint, connect(endpoint) as connection:
        connection.sendall(head)
        assert b"405" in receive_all(connection)
        connection.sendall(b"x" * 100_000)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: is_idle(endpoint))
        # A reset connection would raise an error.
        assert connection.recv(1) == b""


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE", "CONNECT", "FROB"])
@pytest.mark.parametrize("path", ["/healthz", "/nowhere"])
def test_every_response_has_the_security_headers(method: str, path: str) -> None:
    with serving(PAGES) as endpoint:
        answer = ask(endpoint, method, path)
    headers = answer.headers
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    assert headers["Content-Type"] == "application/json"
    assert "Date" in headers
    assert "Server" not in headers
    assert answer.text == "" if method == "HEAD" else int(headers["Content-Length"]) == len(answer.text)


def test_stopping_closes_open_connections() -> None:
    before = set(threading.enumerate())
    endpoint = HttpEndpoint("test", Endpoint(HOST, 0), PAGES, limits=Limits(request_seconds=60))
    with crowd(endpoint, 5, b"GET ") as connections:
        wait_until(lambda: connections_of(endpoint) == 5)
        endpoint.stop()
        assert all(is_closed(each) for each in connections)
        with pytest.raises(ConnectionRefusedError):
            connect(endpoint)
    wait_until(lambda: threads(endpoint) == 0 and set(threading.enumerate()) <= before)


@pytest.fixture(scope="module")
def hardened() -> Iterator[HttpEndpoint]:
    """An address with short limits, which must survive any input."""
    with serving(PAGES, {"/do": lambda _: Page(OK, {})}, request_seconds=0.3, leave_seconds=0.1) as endpoint:
        yield endpoint
        assert ask(endpoint, "GET", "/healthz").status == OK
        wait_until(lambda: is_idle(endpoint))


PARTS = [
    *(b"GET ", b"POST ", b"HEAD ", b"CONNECT ", b"/healthz", b"/do", b"*", b"http://a/", b"?a=%00"),
    *(b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r", b"\0", b"\r\n\r\n", b": ", b"Host: a\r\n", b"Host: b\r\n"),
    *(b"Content-Length: 5\r\n", b"Content-Length: -", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n"),
    *(b"Upgrade: h2c\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n", b"ffffffff\r\n"),
    *(b"\x16\x03\x01", b"x" * 9000, b"\xff" * 30, b"%" * 30),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.sampled_from(PARTS) | st.binary(max_size=40), max_size=12), st.integers(0, 3).map(bool))
def test_any_bytes_get_at_most_one_response(hardened: HttpEndpoint, parts: list[bytes], half_closes: bool) -> None:  # noqa: FBT001 - drawn
    with connect(hardened) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"".join(parts))
            if half_closes:
                connection.shutdown(socket.SHUT_WR)
        answer = read(receive_all(connection))
    if answer is not None and answer.status != OK and answer.text:
        assert answer.error


def test_a_vanished_client_leaves_no_connection() -> None:
    with serving(large(8 << 20)) as endpoint:
        for first in (b"", b"GET", b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n"):
            with connect(endpoint) as connection:
                connection.sendall(first)
                wait_until(lambda: connections_of(endpoint) == 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            wait_until(lambda: is_idle(endpoint))
