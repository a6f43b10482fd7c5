"""Connections to arbitrary portals: each works on or ends with a single readable report, and never blocks its callers."""

import base64
import contextlib
import dataclasses
import hashlib
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

import pytest

from relay.core.portal.events import Connected, ConnectionEvent, ConnectionLost, OtherReceived, TextReceived, UpgradeRefused
from relay.net.dial import Dialer, Watch
from relay.net.limited import MESSAGE_LIMIT
from relay.net.names import HostAddress, LookUp, look_up
from relay.net.proxy import Proxy
from relay.net.websocket import UNREAD_MESSAGES, WebSocketLink
from tests.support import scripted_portal
from tests.support.connect_proxy import ConnectProxy
from tests.support.descriptors import open_descriptors
from tests.support.raw_server import (
    CONTINUATION,
    DRIP_SECONDS,
    DRIPPING_FRAME,
    DRIPPING_HANDSHAKE,
    ENDLESS_EVENTS,
    ENDLESS_FRAGMENTS,
    ENDLESS_HEADERS,
    ENDLESS_PINGS,
    ENDLESS_REFUSAL,
    HUGE_FRAME,
    INVALID_UTF8,
    MASKED_FRAME,
    NO_UPGRADE_HEADERS,
    PING,
    RESERVED_BITS,
    SILENCE,
    TEXT,
    Behaviour,
    Peer,
    RawServer,
    Recital,
    frame,
    redirect_to,
    switching_protocols,
    upgraded,
)
from tests.support.scripted_portal import Authority, ScriptedPortal
from tests.support.waiting import wait_until

T = TypeVar("T")

BINARY, CLOSE, PONG = 0x2, 0x8, 0xA

LONG = 90.0
"""A timeout in seconds that no test reaches."""

PROMPTLY = 30.0
"""Seconds until an abandoned connection has ended on a busy machine. The thread is woken, without polling."""

SOCKET_BUFFERS = int(Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()[2]) + 1024 * 1024
"""Maximum number of bytes in both kernels' buffers, with a small send buffer. The receive buffer grows during fast reads."""

pytestmark = pytest.mark.usefixtures("only_new_garbage")

TLS_OR_NOT = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])


def connection_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "portal-connection"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    descriptors = open_descriptors()
    yield
    wait_until(lambda: not connection_threads())
    # Collect reference cycles of earlier tests.
    wait_until(lambda: open_descriptors() <= descriptors)


@dataclass(frozen=True)
class ShowingDialer(Dialer):
    """Passes each socket of the connection to the test."""

    shown: "queue.SimpleQueue[socket.socket]" = field(default_factory=queue.SimpleQueue)

    def dial(self, timeout: float, watch: Watch) -> socket.socket:
        def watch_and_show(opened: socket.socket) -> None:
            watch(opened)
            self.shown.put(opened)

        return super().dial(timeout, watch_and_show)


class Session:
    """A connection and its reports.

    Args:
        takes: whether each message is acknowledged at once.
    """

    def __init__(self, *, takes: bool = True) -> None:
        self.link: WebSocketLink
        self.shown: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        """The sockets of the connection, if opened by `connect`."""
        self.threads: set[threading.Thread] = set()
        """The threads of the callbacks."""
        self._takes = takes
        self._thread: threading.Thread | None = None
        self._reports: list[tuple[str, object]] = []
        self._changed = threading.Condition()

    def open(
        self,
        dialer: Dialer,
        url: str,
        headers: tuple[tuple[str, str], ...] = (),
        timeout: float = LONG,
    ) -> Self:
        """Start to connect."""
        before = connection_threads()
        self.link = WebSocketLink(dialer, url, headers, timeout, self.hear)
        # None if the thread has already ended.
        self._thread = next((each for each in connection_threads() if each not in before), None)
        return self

    # Callbacks.

    def hear(self, link: WebSocketLink, event: ConnectionEvent) -> None:
        match event:
            case Connected():
                self._note("connected", None)
            case UpgradeRefused():
                self._note("refused", event)
            case TextReceived(text):
                self._note("text", text)
                self._take(link)
            case OtherReceived(is_binary):
                self._note("other", "binary" if is_binary else "control")
                self._take(link)
            case ConnectionLost(reason):
                self._note("lost", reason)

    # Calls of the test.

    @property
    def reports(self) -> list[tuple[str, object]]:
        with self._changed:
            return self._reports.copy()

    @property
    def messages(self) -> list[object]:
        return [what for kind, what in self.reports if kind in {"text", "other"}]

    @property
    def is_over(self) -> bool:
        return any(kind in {"refused", "lost"} for kind, _ in self.reports)

    def wait_for(self, kind: str, n: int = 1, seconds: float = PROMPTLY) -> object:
        """Wait for the n-th report of a kind, and return its content."""

        def found() -> list[object]:
            return [what for each, what in self._reports if each == kind]

        with self._changed:
            came = self._changed.wait_for(lambda: len(found()) >= n, seconds)
            assert came, f"{len(found())} instead of {n} {kind} within {seconds} s: {self._reports[-5:]}"
            return found()[n - 1]

    def wait_for_end(self) -> tuple[str, object]:
        """Wait for the end of the thread, and return the reason."""
        wait_until(lambda: self.is_over)
        self.wait_for_thread()
        ends = [report for report in self.reports if report[0] in {"refused", "lost"}]
        assert ends == self.reports[-1:], "an end is told once, and last"
        return ends[0]

    def wait_until_lost(self) -> str:
        kind, reason = self.wait_for_end()
        assert kind == "lost", reason
        assert isinstance(reason, str)
        assert reason.strip()
        return reason

    def wait_until_refused(self) -> UpgradeRefused:
        kind, refusal = self.wait_for_end()
        assert kind == "refused", refusal
        assert isinstance(refusal, UpgradeRefused)
        return refusal

    def wait_for_thread(self, seconds: float = PROMPTLY) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
            assert not self._thread.is_alive(), f"the thread goes on after {seconds} s"

    def abandon(self) -> None:
        """Abandon the connection, and check that it ends at once without another report."""
        before = self.reports
        began = time.monotonic()
        self.link.abandon()
        self.wait_for_thread()
        assert time.monotonic() - began < PROMPTLY, "an abandon waits for nothing"
        # A running callback is finished.
        assert len(self.reports) <= len(before) + 1
        assert not self.is_over

    def _note(self, kind: str, what: object) -> None:
        with self._changed:
            self._reports.append((kind, what))
            self.threads.add(threading.current_thread())
            self._changed.notify_all()

    def _take(self, link: WebSocketLink) -> None:
        if self._takes:
            link.acknowledge()


Connect: TypeAlias = Callable[..., Session]


@pytest.fixture
def connect(authority: Authority) -> Iterator[Connect]:
    """Connect to a server, and abandon open connections at the end of the test."""
    sessions: list[Session] = []

    def connect(
        server: RawServer,
        *,
        takes: bool = True,
        proxy: Proxy | None = None,
        look_up: LookUp = look_up,
        **opening: Any,  # noqa: ANN401 - arguments of `Session.open`
    ) -> Session:
        tls = ssl.create_default_context(cafile=authority.ca_file) if server.url.startswith("wss") else None
        session = Session(takes=takes)
        dialer = ShowingDialer("localhost", server.port, tls, proxy, look_up, session.shown)
        sessions.append(session)
        return session.open(dialer, f"{server.url}/relay/websocket?port=3478", **opening)

    yield connect
    for session in sessions:
        session.link.abandon()


@contextlib.contextmanager
def serve(behaviour: Behaviour, authority: Authority, *, is_tls: bool) -> Iterator[RawServer]:
    with RawServer(behaviour, tls=authority.server_context() if is_tls else None) as server:
        yield server


@contextlib.contextmanager
def portal_of(authority: Authority, *, is_tls: bool) -> Iterator[ScriptedPortal]:
    with ScriptedPortal(authority if is_tls else None) as portal:
        yield portal


# A well-behaved portal.


@TLS_OR_NOT
def test_messages_arrive_in_order_in_both_directions(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with portal_of(authority, is_tls=is_tls) as portal:
        session = connect(portal)
        session.wait_for("connected")
        connection = portal.wait_for_connection()
        for number in range(200):
            session.link.send(f'{{"event": "to portal", "number": {number}, "text": "naïve"}}')
            connection.send_text(f"to relay {number} €")
        connection.wait_for("to portal", 200)
        assert [each["number"] for each in connection.frames] == list(range(200))
        session.wait_for("text", 200)
        assert session.reports == [("connected", None), *(("text", f"to relay {number} €") for number in range(200))]
        session.abandon()


def test_messages_can_be_queued_before_the_connection(connect: Connect) -> None:
    with ScriptedPortal() as portal:
        portal.script.delay_upgrade = threading.Event()
        session = connect(portal)
        session.link.send('{"event": "early"}')
        portal.wait_for_connection()
        session.link.send('{"event": "early, too"}')
        portal.script.delay_upgrade.set()
        portal.wait_for_connection().wait_for("early, too")
        assert [each["event"] for each in portal.wait_for_connection().frames] == ["early", "early, too"]


def test_the_request_has_the_given_headers_without_origin_or_cookie(connect: Connect) -> None:
    headers = (("X-Authorization", "Bearer token"), ("User-Agent", "Debian/12 relay/1.0.0 (x86_64; 6.1.0)"))
    with ScriptedPortal() as portal:
        session = connect(portal, headers=headers)
        session.wait_for("connected")
        request = portal.wait_for_connection()
        assert (request.path, request.query) == ("/relay/websocket", {"port": "3478"})
        for name, value in headers:
            assert request.headers.get_all(name) == [value]
        assert request.headers["Host"] == f"localhost:{portal.port}"
        assert request.headers["Sec-WebSocket-Version"] == "13"
        assert {name.lower() for name in request.headers} & {"origin", "cookie", "sec-websocket-protocol"} == set()


def test_all_callbacks_run_in_a_single_daemon_thread(connect: Connect) -> None:
    with ScriptedPortal() as portal:
        session = connect(portal)
        session.wait_for("connected")
        (thread,) = connection_threads()
        assert thread.daemon
        portal.wait_for_connection().send_text("hello")
        portal.wait_for_connection().close()
        session.wait_until_lost()
        assert session.threads == {thread}


def test_other_frames_are_reported_by_kind_and_pings_get_pongs(connect: Connect) -> None:
    with ScriptedPortal() as portal:
        session = connect(portal)
        connection = portal.wait_for_connection()
        connection.ping()
        connection.send_binary(b"\xff\x00")
        connection.send_pong(b"unasked")
        session.wait_for("other", 3)
        assert session.messages == ["control", "binary", "control"]


@TLS_OR_NOT
def test_a_burst_of_messages_is_delivered_completely(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    """A single TLS record contains all messages, so the kernel has no unread data after the first message."""

    def speak(peer: Peer) -> None:
        peer.upgrade()
        peer.send(b"".join(frame(TEXT, f"{number}".encode()) for number in range(100)))
        peer.wait()

    with serve(speak, authority, is_tls=is_tls) as server:
        session = connect(server)
        session.wait_for("text", 100)
        assert session.messages == [str(number) for number in range(100)]


@TLS_OR_NOT
def test_frames_in_the_packet_of_the_upgrade_response_are_delivered(
    connect: Connect, authority: Authority, *, is_tls: bool
) -> None:
    def speak(peer: Peer) -> None:
        peer.read_head()
        key = peer.headers["Sec-WebSocket-Key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key, usedforsecurity=False).digest())
        head = b"HTTP/1.1 101 Well\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept
        peer.send(head + b"\r\n\r\n" + frame(TEXT, b"first") + frame(TEXT, b"second"))
        peer.wait()

    with serve(speak, authority, is_tls=is_tls) as server:
        session = connect(server)
        session.wait_for("text", 2)
        assert session.reports == [("connected", None), ("text", "first"), ("text", "second")]


def test_fragments_are_reassembled_even_with_a_ping_in_between(connect: Connect) -> None:
    def speak(peer: Peer) -> None:
        peer.upgrade()
        peer.send(frame(TEXT, b"one, ", is_last=False) + frame(CONTINUATION, b"tw", is_last=False))
        peer.send(frame(PING, b"") + frame(CONTINUATION, b"o"))
        peer.wait()

    with RawServer(speak) as server:
        session = connect(server)
        assert session.wait_for("text") == "one, two"


def test_silence_does_not_close_the_connection(connect: Connect) -> None:
    """The channel, not the connection, limits the silence of a portal."""
    with ScriptedPortal() as portal:
        # The shortest reliable timeout on a busy machine.
        session = connect(portal, timeout=1)
        connection = portal.wait_for_connection()
        session.wait_for("connected")
        threading.Event().wait(1.1)
        connection.send_text("still there")
        assert session.wait_for("text") == "still there"


@TLS_OR_NOT
def test_an_idle_connection_uses_no_cpu(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with portal_of(authority, is_tls=is_tls) as portal:
        session = connect(portal)
        connection = portal.wait_for_connection()
        session.link.send('{"event": "hello"}')
        connection.wait_for("hello")
        connection.send_text("hello")
        session.wait_for("text")
        (thread,) = connection_threads()
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        before = time.clock_gettime(clock)
        threading.Event().wait(0.1)
        assert time.clock_gettime(clock) - before < 0.02


@TLS_OR_NOT
def test_messages_pass_through_a_proxy(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with portal_of(authority, is_tls=is_tls) as portal, ConnectProxy() as stands_between:
        session = connect(portal, proxy=Proxy("127.0.0.1", stands_between.port))
        session.link.send('{"event": "hello"}')
        portal.wait_for_connection().wait_for("hello")
        assert portal.wait_for_connection().headers["Host"] == f"localhost:{portal.port}"
        assert stands_between.tunnels == 1
        session.link.close()
        assert "1000" in session.wait_until_lost()


# Close and abandon.


@TLS_OR_NOT
def test_a_close_sends_queued_messages_and_code_1000(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with portal_of(authority, is_tls=is_tls) as portal:
        session = connect(portal)
        session.wait_for("connected")
        for number in range(20):
            session.link.send(f'{{"event": "last words", "number": {number}}}')
        session.link.close()
        connection = portal.wait_for_connection()
        connection.wait_until_closed()
        assert connection.closed_with == 1000
        assert len(connection.frames) == 20
        assert session.wait_until_lost() == "it closed the connection (code 1000)"


def test_an_unanswered_close_can_be_abandoned(connect: Connect) -> None:
    with RawServer(upgraded(Recital("mute", b""))) as server:
        session = connect(server)
        session.wait_for("connected")
        session.link.close()
        session.abandon()
        assert server.peer_closed.wait(LONG)


@TLS_OR_NOT
@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"\x0f\xa0enough", "it closed the connection (code 4000)"),
        (b"\x03\xe9", "it closed the connection (code 1001)"),
        (b"", "it closed the connection (code none)"),
    ],
)
def test_a_close_frame_of_the_portal_is_reported_with_its_code(
    connect: Connect, authority: Authority, payload: bytes, says: str, *, is_tls: bool
) -> None:
    closing = upgraded(Recital("close", frame(CLOSE, payload)))
    with serve(closing, authority, is_tls=is_tls) as server:
        assert connect(server).wait_until_lost() == says
        assert server.peer_closed.wait(LONG)


@pytest.mark.parametrize("payload", [b"\x03", b"\x00\x00", b"\x03\xed", b"\xff\xff", b"\x03\xe8\xff\xfe"])
def test_an_invalid_close_frame_ends_the_connection(connect: Connect, payload: bytes) -> None:
    with RawServer(upgraded(Recital("close", frame(CLOSE, payload)))) as server:
        connect(server).wait_until_lost()
        assert server.peer_closed.wait(LONG)


@TLS_OR_NOT
def test_a_close_without_a_close_frame_is_reported_as_lost(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with serve(Peer.upgrade, authority, is_tls=is_tls) as server:
        session = connect(server)
        assert session.wait_until_lost() == "it closed the connection"
        assert [kind for kind, _ in session.reports] == ["connected", "lost"]


@TLS_OR_NOT
def test_a_close_before_the_upgrade_response_is_reported_as_lost(
    connect: Connect, authority: Authority, *, is_tls: bool
) -> None:
    def hang_up(peer: Peer) -> None:
        peer.read_head()

    with serve(hang_up, authority, is_tls=is_tls) as server:
        session = connect(server)
        assert session.wait_until_lost() == "it closed the connection"
        assert [kind for kind, _ in session.reports] == ["lost"]


@TLS_OR_NOT
def test_a_reset_is_reported_as_lost(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with portal_of(authority, is_tls=is_tls) as portal:
        session = connect(portal)
        session.wait_for("connected")
        portal.wait_for_connection().drop()
        # Python 3.11 reports a reset as an end of file under TLS.
        expected = {"Connection reset by peer", *(["it closed the connection"] if is_tls else [])}
        assert session.wait_until_lost() in expected


@TLS_OR_NOT
@pytest.mark.parametrize("times", [2, 5])
def test_a_second_abandon_is_ignored(connect: Connect, authority: Authority, times: int, *, is_tls: bool) -> None:
    with portal_of(authority, is_tls=is_tls) as portal:
        session = connect(portal)
        session.wait_for("connected")
        for _ in range(times):
            session.link.abandon()
        session.wait_for_thread()
        session.link.abandon()
        assert session.reports == [("connected", None)]
        connection = portal.wait_for_connection()
        connection.wait_until_closed()
        assert connection.closed_with is None


def test_calls_after_the_end_are_ignored(connect: Connect) -> None:
    with RawServer(Peer.upgrade) as server:
        session = connect(server)
        session.wait_until_lost()
        before = open_descriptors()
        reports = session.reports
        for _ in range(2):
            session.link.send("too late")
            session.link.close()
            session.link.acknowledge()
            session.link.abandon()
        assert session.reports == reports
        assert open_descriptors() == before


# Failed attempts.


def test_a_refused_connection_is_reported_as_lost(connect: Connect) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        nobody = RawServer(SILENCE, port=bound.getsockname()[1])
        assert connect(nobody).wait_until_lost() == "Connection refused"


def test_an_invalid_name_is_reported_as_lost(connect: Connect) -> None:
    def fail(*_: object) -> list[HostAddress]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with RawServer(SILENCE) as server:
        said = connect(server, look_up=fail).wait_until_lost()
    assert said == "its name can't be looked up (Name or service not known)"


def test_a_lookup_timeout_is_reported_as_lost(connect: Connect) -> None:
    def hang(*_: object) -> list[HostAddress]:
        raise TimeoutError("looking up localhost took longer than 5 s")

    with RawServer(SILENCE) as server:
        assert connect(server, look_up=hang).wait_until_lost() == "looking up localhost took longer than 5 s"


@pytest.mark.parametrize("error", [OSError(), TimeoutError(), ConnectionResetError()])
def test_an_error_without_a_message_gets_a_message(connect: Connect, error: OSError) -> None:
    def fail(*_: object) -> list[HostAddress]:
        raise error

    with RawServer(SILENCE) as server:
        # `wait_until_lost` requires a message.
        assert "answer" in connect(server, look_up=fail).wait_until_lost()


def test_any_lookup_error_is_reported_as_lost(connect: Connect) -> None:
    def fail(*_: object) -> list[HostAddress]:
        raise ZeroDivisionError("a bug")

    with RawServer(SILENCE) as server:
        assert connect(server, look_up=fail).wait_until_lost() == "ZeroDivisionError: a bug"


def test_an_untrusted_certificate_is_reported_with_a_hint(connect: Connect, tmp_path: Path) -> None:
    with RawServer(SILENCE, tls=Authority(tmp_path).server_context()) as server:
        said = connect(server).wait_until_lost()
    assert said.startswith("its certificate is not trusted (")
    assert "SSL_CERT_FILE" in said


def test_a_certificate_for_another_name_is_reported_as_a_mismatch(tmp_path: Path) -> None:
    other = Authority(tmp_path, ("elsewhere.example",))
    with RawServer(SILENCE, tls=other.server_context()) as server:
        trusting = ssl.create_default_context(cafile=other.ca_file)
        said = Session().open(Dialer("localhost", server.port, trusting), server.url).wait_until_lost()
    assert "Hostname mismatch" in said


def test_a_server_without_tls_is_reported_as_lost(authority: Authority) -> None:
    no_tls = Recital("no TLS", b"HTTP/1.1 400 Bad Request\r\n\r\n", opening=lambda peer: peer.socket.recv(100))
    with RawServer(no_tls) as server:
        trusting = ssl.create_default_context(cafile=authority.ca_file)
        session = Session().open(Dialer("localhost", server.port, trusting), server.url)
        assert session.wait_until_lost().startswith("TLS failed (")


@TLS_OR_NOT
def test_a_silent_server_is_reported_as_lost_after_the_timeout(
    connect: Connect, authority: Authority, *, is_tls: bool
) -> None:
    with serve(SILENCE, authority, is_tls=is_tls) as server:
        began = time.monotonic()
        said = connect(server, timeout=0.1).wait_until_lost()
        assert 0.09 < time.monotonic() - began < PROMPTLY
        assert said


def test_a_failed_thread_start_is_an_error_and_leaves_no_socket_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    session = Session()
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            session.open(Dialer("localhost", 1, None), "ws://localhost:1/")
    assert open_descriptors() == before
    assert session.reports == []


# HTTP errors.


@TLS_OR_NOT
@pytest.mark.parametrize("chunked", [False, True])
def test_an_http_error_is_reported_with_its_body(
    connect: Connect, authority: Authority, *, chunked: bool, is_tls: bool
) -> None:
    refusal = scripted_portal.Refusal.invalid_token(chunked=chunked)
    with portal_of(authority, is_tls=is_tls) as portal:
        portal.script.refuse = refusal
        session = connect(portal)
        assert session.wait_until_refused() == UpgradeRefused(401, None, refusal.body)
        assert session.reports == [("refused", UpgradeRefused(401, None, refusal.body))]


@pytest.mark.parametrize(("value", "status"), [("7", 503), ("Thu, 01 Jan 1970 00:00:00 GMT", 429), (None, 503)])
def test_an_http_error_is_reported_with_its_unparsed_retry_after(connect: Connect, value: str | None, status: int) -> None:
    with ScriptedPortal() as portal:
        portal.script.refuse = scripted_portal.Refusal.retry_after(value, status)
        assert connect(portal).wait_until_refused() == UpgradeRefused(status, value, b"")


@pytest.mark.parametrize("status", [200, 400, 403, 404, 418, 500, 502])
def test_any_status_except_101_is_an_http_error(connect: Connect, status: int) -> None:
    answer = f"HTTP/1.1 {status} Whatever\r\nContent-Length: 5\r\n\r\nwords".encode()
    with RawServer(Recital("refusal", answer)) as server:
        assert connect(server).wait_until_refused() == UpgradeRefused(status, None, b"words")


PROBLEM = b'{"code": "invalid_token", "detail": "Invalid token"}'


@TLS_OR_NOT
def test_a_body_without_a_length_ends_with_the_connection(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 401 Unauthorized\r\n\r\n" + PROBLEM[:10])
        peer.send(PROBLEM[10:])

    with serve(refuse, authority, is_tls=is_tls) as server:
        assert connect(server).wait_until_refused() == UpgradeRefused(401, None, PROBLEM)


@TLS_OR_NOT
@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\n\r\n", PROBLEM),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 1000\r\n\r\n", PROBLEM),
        (b"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n" % (len(PROBLEM), PROBLEM)),
    ],
    ids=["no length", "a length", "chunked"],
)
def test_an_incomplete_body_times_out(
    connect: Connect,
    authority: Authority,
    head: bytes,
    body: bytes,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_tls: bool,
) -> None:
    monkeypatch.setattr("relay.net.limited.BODY_TIMEOUT", 0.05)
    with serve(Recital("open end", head + body), authority, is_tls=is_tls) as server:
        session = connect(server)
        assert session.wait_until_refused() == UpgradeRefused(401, None, PROBLEM)
        assert server.peer_closed.wait(LONG)


def test_a_chunked_body_ends_with_its_last_chunk(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection does not wait for bytes after the last chunk."""
    monkeypatch.setattr("relay.net.limited.BODY_TIMEOUT", LONG)
    head = b"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n"
    with RawServer(Recital("chunks", head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(PROBLEM), PROBLEM))) as server:
        session = connect(server)
        assert session.wait_until_refused() == UpgradeRefused(401, None, PROBLEM)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 401 Unauthorized\r\n\r\n",
        ENDLESS_REFUSAL.text,
        b"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n10000000\r\n",
    ],
    ids=["no length", "a length", "chunked without chunks", "one chunk"],
)
def test_an_endless_body_is_read_up_to_the_limit(connect: Connect, answer: bytes) -> None:
    with RawServer(hurried(Recital("endless body", answer, b"x" * 65536))) as server:
        refusal = connect(server).wait_until_refused()
        assert refusal.status == 401
        assert len(refusal.body) <= MESSAGE_LIMIT
        assert server.peer_closed.wait(LONG)
        assert server.sent < MESSAGE_LIMIT + SOCKET_BUFFERS


@pytest.mark.parametrize(
    "garbage", [b"x\r\n", b"-1\r\nx\r\n", b"ffffffffffffffffffff\r\nx\r\n", b"\r\n\r\n\r\n", b"\xff\xfe"]
)
def test_an_http_error_with_an_invalid_chunked_body_keeps_its_status(connect: Connect, garbage: bytes) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n" + garbage)

    with RawServer(refuse) as server:
        assert connect(server).wait_until_refused().status == 401


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_http_error_and_is_not_followed(connect: Connect, authority: Authority, status: int) -> None:
    with RawServer(SILENCE) as other, RawServer(SILENCE, tls=authority.server_context()) as another:
        for location in (other.url, f"http://localhost:{other.port}/", another.url):
            answer = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
            with RawServer(Recital("redirect", answer)) as server:
                session = connect(server, headers=(("X-Authorization", "Bearer token"),))
                assert session.wait_until_refused().status == status
        assert (other.peers, another.peers) == ([], [])


@TLS_OR_NOT
def test_a_redirect_over_tls_is_not_followed(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with RawServer(SILENCE) as other, serve(redirect_to(other.url), authority, is_tls=is_tls) as server:
        assert connect(server).wait_until_refused().status == 302
        assert other.peers == []


def test_cookies_are_not_stored(connect: Connect) -> None:
    """Cookies would identify the relay, and accumulate while the relay runs."""
    cookies = b"Set-Cookie: session=1; Domain=localhost\r\nSet-Cookie: more=2; Domain=localhost\r\n"
    answer = b"HTTP/1.1 302 Found\r\nLocation: ws://localhost/\r\nContent-Length: 0\r\n" + cookies + b"\r\n"
    with RawServer(Recital("cookies", answer)) as server:
        for number in range(1, 4):
            connect(server).wait_until_refused()
            assert server.wait_for_peer(number).headers["Cookie"] is None


# Protocol violations.

_TOO_MUCH = f"it sent a message of more than {MESSAGE_LIMIT} bytes"


def hurried(recital: Recital) -> Recital:
    """Use a small send buffer, so the number of sent bytes is about the number of bytes received by the relay."""

    def open_(peer: Peer) -> None:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        recital.opening(peer)

    return dataclasses.replace(recital, opening=open_)


@TLS_OR_NOT
@pytest.mark.parametrize(
    ("recital", "says"),
    [
        (NO_UPGRADE_HEADERS, "Invalid WebSocket Header"),
        (ENDLESS_HEADERS, f"it sent more than {MESSAGE_LIMIT} bytes"),
        (Recital("no HTTP", b"220 mail.example ESMTP\r\n\r\n"), "illegal status line: bytearray(b'220 mail.example ESMTP')"),
        (Recital("no status", b"HTTP/1.1 what?\r\n\r\n"), "illegal status line"),
        (Recital("no text", b"\xff\xfe\r\n\r\n"), "illegal status line"),
        (Recital("no header", b"HTTP/1.1 101 Well\r\nUpgrade\r\n\r\n"), "illegal header line"),
        (Recital("endless line", b"HTTP/1.1 ", b"x" * 1000), f"it sent more than {MESSAGE_LIMIT} bytes"),
        (Recital("no number", b"HTTP/1.1 401 No\r\nContent-Length: x\r\n\r\n"), "bad Content-Length"),
        (upgraded(HUGE_FRAME), _TOO_MUCH),
        (upgraded(ENDLESS_FRAGMENTS), _TOO_MUCH),
        (upgraded(RESERVED_BITS), "rsv"),
        (upgraded(MASKED_FRAME), "masked"),
        (upgraded(Recital("masked ping", frame(PING, b"x", mask=b"mask"))), "masked"),
        (upgraded(Recital("masked fragment", frame(TEXT, b"x", is_last=False, mask=b"mask") + frame(0, b"y"))), "masked"),
        (upgraded(INVALID_UTF8), "decode"),
        (upgraded(Recital("unknown opcode", frame(0x3, b"x"))), "Invalid opcode"),
        (upgraded(Recital("fragmented ping", frame(PING, b"x", is_last=False))), "Invalid ping"),
        (upgraded(Recital("long ping", frame(PING, b"x" * 126))), "too long"),
        (upgraded(Recital("stray continuation", frame(CONTINUATION, b"x"))), "Illegal frame"),
        (upgraded(Recital("text in text", frame(TEXT, b"x", is_last=False) + frame(TEXT, b"x"))), "Illegal frame"),
    ],
    ids=str,
)
def test_a_protocol_violation_is_reported_as_lost_with_a_message(
    connect: Connect, authority: Authority, recital: Recital, says: str, *, is_tls: bool
) -> None:
    with serve(hurried(recital), authority, is_tls=is_tls) as server:
        session = connect(server)
        assert says in session.wait_until_lost()
        assert session.messages == []
        assert server.peer_closed.wait(LONG), "the connection is closed"
        assert server.sent < MESSAGE_LIMIT + SOCKET_BUFFERS


def test_a_response_without_a_status_is_reported_as_lost(connect: Connect) -> None:
    with RawServer(Recital("nothing", b"\r\n\r\n")) as server:
        assert connect(server).wait_until_lost()


@pytest.mark.parametrize(("length", "comes"), [(MESSAGE_LIMIT - 4, True), (MESSAGE_LIMIT - 3, False)])
def test_a_message_above_the_size_limit_is_rejected(connect: Connect, length: int, *, comes: bool) -> None:
    def speak(peer: Peer) -> None:
        peer.upgrade()
        for _ in range(3):
            # Its header has four bytes.
            peer.send(frame(TEXT, b"x" * length))
        peer.wait()

    with RawServer(speak) as server:
        session = connect(server)
        if comes:
            session.wait_for("text", 3)
            assert session.messages == ["x" * length] * 3
        else:
            assert session.wait_until_lost() == _TOO_MUCH
            assert session.messages == []


def test_pings_among_fragments_do_not_extend_the_size_limit(connect: Connect) -> None:
    """Otherwise a portal could fill the relay's memory with an endless message."""
    ping_now_and_then = frame(CONTINUATION, b"x" * 10_000, is_last=False) + frame(PING, b"")
    endless = hurried(upgraded(Recital("pings among fragments", frame(TEXT, b"x", is_last=False), ping_now_and_then)))
    with RawServer(endless) as server:
        session = connect(server)
        enough = 2 * (MESSAGE_LIMIT + SOCKET_BUFFERS)
        wait_until(lambda: session.is_over or server.sent > enough)
        assert server.sent <= enough, "it takes more and more"
        assert session.wait_until_lost() == _TOO_MUCH


class Flood:
    """Sends the same bytes repeatedly, and reports when the connection accepts no more."""

    def __init__(self, message: bytes) -> None:
        self.stalled = threading.Event()
        # Large pieces, because a kernel sometimes accepts a small piece even with a full buffer.
        self._messages = message * max(1, MESSAGE_LIMIT // len(message))

    def __call__(self, peer: Peer) -> None:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.upgrade()
        peer.socket.settimeout(0.1)
        view = memoryview(b"")
        while True:
            view = view or memoryview(self._messages)
            try:
                count = peer.socket.send(view)
            except TimeoutError:
                self.stalled.set()
            else:
                peer.sent += count
                view = view[count:]


@pytest.mark.parametrize(
    "message",
    [frame(TEXT, b"x" * 100), frame(BINARY, b"x" * 100), frame(PONG, b"x" * 100), frame(TEXT, b"x" * 60_000)],
    ids=["texts", "binaries", "pongs", "long texts"],
)
def test_the_number_of_undelivered_messages_is_limited(connect: Connect, message: bytes) -> None:
    flood = Flood(message)
    with RawServer(flood) as server:
        session = connect(server, takes=False)
        wait_until(lambda: len(session.messages) == UNREAD_MESSAGES)
        # A busy machine may have delayed the sender before.
        flood.stalled.clear()
        assert flood.stalled.wait(LONG), "TCP slows the other side down"
        assert len(session.messages) == UNREAD_MESSAGES
        assert server.sent < (UNREAD_MESSAGES + 1) * len(message) + SOCKET_BUFFERS
        for taken in range(1, 4):
            session.link.acknowledge()
            wait_until(lambda taken=taken: len(session.messages) == UNREAD_MESSAGES + taken)  # type: ignore[misc]
        session.abandon()
        assert len(session.messages) == UNREAD_MESSAGES + 3


ENDLESS_BINARIES = Recital("endless binaries", b"", frame(BINARY, b"x" * 200) * 100)


@TLS_OR_NOT
@pytest.mark.parametrize(("recital", "kind"), [(ENDLESS_EVENTS, "text"), (ENDLESS_BINARIES, "other")], ids=str)
def test_a_fast_receiver_gets_all_messages_of_a_flood(
    connect: Connect, authority: Authority, recital: Recital, kind: str, *, is_tls: bool
) -> None:
    with serve(upgraded(recital), authority, is_tls=is_tls) as server:
        session = connect(server)
        session.wait_for(kind, 50 * UNREAD_MESSAGES)
        session.abandon()


@TLS_OR_NOT
@pytest.mark.parametrize("takes", [True, False], ids=["heard", "not heard"])
def test_a_flood_of_pings_ends_the_connection_or_blocks_the_sender(
    connect: Connect, authority: Authority, *, takes: bool, is_tls: bool
) -> None:
    with serve(upgraded(ENDLESS_PINGS), authority, is_tls=is_tls) as server:
        session = connect(server, takes=takes)
        session.wait_for("other", UNREAD_MESSAGES)
        if takes:
            wait_until(lambda: session.is_over or len(session.messages) > 100 * UNREAD_MESSAGES)
        if session.is_over:
            assert session.wait_until_lost()
        else:
            session.abandon()
        assert takes or len(session.messages) == UNREAD_MESSAGES
        assert server.peer_closed.wait(LONG)


# The portal cannot delay an abandon.


def has_begun(session: Session, server: RawServer) -> bool:
    return bool(server.peers) and (server.sent > 0 or bool(session.reports))


@TLS_OR_NOT
@pytest.mark.parametrize(
    "recital",
    [
        DRIPPING_HANDSHAKE,
        upgraded(Recital("mute", b"")),
        upgraded(DRIPPING_FRAME),
        upgraded(Recital("pings", frame(PING, b"x" * 125) * 100)),
        upgraded(ENDLESS_EVENTS),
        upgraded(Recital("half a head", b"\x81")),
        upgraded(Recital("a frame without end", b"\x81\x7f\xff\xff\xff\xff\xff\xff\xff\xffx")),
        upgraded(Recital("a message without end", frame(TEXT, b"x", is_last=False))),
        Recital("half an answer", b"HTTP/1.1 101 "),
        Recital("half a refusal", b"HTTP/1.1 401 No\r\nContent-Length: 100\r\n\r\nhalf"),
        Recital("a dripping refusal", b"HTTP/1.1 401 No\r\n\r\n", b"x", drips=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("takes", [True, False], ids=["heard", "not heard"])
def test_abandoning_ends_the_connection_at_once_in_any_state(
    connect: Connect, authority: Authority, recital: Recital, *, takes: bool, is_tls: bool
) -> None:
    with serve(recital, authority, is_tls=is_tls) as server:
        session = connect(server, takes=takes)
        wait_until(lambda: has_begun(session, server))
        session.abandon()
        assert server.peer_closed.wait(LONG)


@TLS_OR_NOT
def test_abandoning_ends_the_wait_for_a_silent_server_at_once(authority: Authority, *, is_tls: bool) -> None:
    """With TLS, the server does not even complete the handshake."""
    with RawServer(SILENCE) as silent:
        tls = ssl.create_default_context(cafile=authority.ca_file) if is_tls else None
        session = Session().open(Dialer("localhost", silent.port, tls), silent.url)
        silent.wait_for_peer()
        session.abandon()
        assert silent.peer_closed.wait(LONG)
        assert session.reports == []


def test_abandoning_ends_a_hanging_connect_at_once(connect: Connect) -> None:
    with socket.socket() as listening, socket.socket() as waiting:
        listening.bind(("127.0.0.1", 0))
        # The accept queue is full: further connections get no response.
        listening.listen(0)
        waiting.connect(listening.getsockname())
        session = connect(RawServer(SILENCE, port=listening.getsockname()[1]))
        session.shown.get(timeout=PROMPTLY)
        session.abandon()
        assert session.reports == []


def test_abandoning_during_a_lookup_prevents_the_connection(connect: Connect) -> None:
    asked, may_answer = threading.Event(), threading.Event()

    def hang(*_: object) -> list[HostAddress]:
        asked.set()
        assert may_answer.wait(LONG)
        return [HostAddress(socket.AF_INET, ("127.0.0.1", server.port))] * 3

    with RawServer(SILENCE) as server:
        session = connect(server, look_up=hang)
        assert asked.wait(LONG)
        session.link.abandon()
        may_answer.set()
        session.wait_for_thread()
        assert session.reports == []
        assert server.peers == []


def test_abandoning_right_after_the_start_ends_the_connection(connect: Connect) -> None:
    with ScriptedPortal() as portal:
        for _ in range(20):
            session = connect(portal)
            session.link.abandon()
            session.wait_for_thread()
            assert not session.is_over


def test_abandoning_from_a_callback_ends_the_connection() -> None:
    class Fickle(Session):
        def hear(self, link: WebSocketLink, event: ConnectionEvent) -> None:
            super().hear(link, event)
            if isinstance(event, TextReceived):
                link.abandon()

    with RawServer(upgraded(ENDLESS_EVENTS)) as server:
        session = Fickle().open(Dialer("localhost", server.port, None), server.url)
        session.wait_for("text")
        session.wait_for_thread()
        assert [kind for kind, _ in session.reports] == ["connected", "text"]


class HeldSocket(socket.socket):
    """A socket whose reads block until the test releases them."""

    may_read: threading.Event
    is_read: threading.Event

    def recv(self, *arguments: int) -> bytes:
        self.is_read.set()
        assert self.may_read.wait(LONG)
        return super().recv(*arguments)


@dataclass(frozen=True)
class HeldDialer(Dialer):
    """Returns such sockets."""

    may_read: threading.Event = field(default_factory=threading.Event)
    is_read: threading.Event = field(default_factory=threading.Event)

    def dial(self, timeout: float, watch: Watch) -> socket.socket:
        opened = super().dial(timeout, lambda _: None)
        held = HeldSocket(fileno=opened.detach())
        held.settimeout(timeout)
        held.may_read, held.is_read = self.may_read, self.is_read
        watch(held)
        return held


def test_an_unread_upgrade_response_is_not_reported_after_abandoning() -> None:
    with RawServer(upgraded(ENDLESS_EVENTS)) as server:
        dialer = HeldDialer("localhost", server.port, None)
        session = Session().open(dialer, f"{server.url}/")
        assert dialer.is_read.wait(LONG)
        # More than the upgrade response has arrived.
        wait_until(lambda: server.sent > 1000)
        session.link.abandon()
        dialer.may_read.set()
        session.wait_for_thread()
        assert session.reports == []


def drip_and_listen(heard: "queue.SimpleQueue[bytes]") -> Behaviour:
    """Send a text byte by byte, and record the received bytes."""

    def behave(peer: Peer) -> None:
        peer.upgrade()
        for byte in frame(TEXT, b"x" * 1000):
            peer.send(bytes((byte,)))
            peer.socket.settimeout(DRIP_SECONDS)
            with contextlib.suppress(TimeoutError):
                data = peer.socket.recv(65536)
                if not data:
                    raise ConnectionResetError
                heard.put(data)
            peer.socket.settimeout(None)

    return behave


@TLS_OR_NOT
def test_messages_are_sent_while_a_frame_arrives_slowly(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with serve(drip_and_listen(heard), authority, is_tls=is_tls) as server:
        session = connect(server)
        session.wait_for("connected")
        for number in range(2):
            wait_until(lambda number=number: server.sent > 130 + number)  # type: ignore[misc]
            session.link.send("a heartbeat")
            # The masked content is arbitrary.
            assert heard.get(timeout=PROMPTLY)
        session.abandon()


@TLS_OR_NOT
def test_messages_are_sent_while_a_frame_is_incomplete(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    may_go_on = threading.Event()
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def behave(peer: Peer) -> None:
        peer.upgrade()
        whole = frame(TEXT, b"in two halves")
        peer.send(whole[:7])
        heard.put(peer.socket.recv(65536))
        assert may_go_on.wait(LONG)
        peer.send(whole[7:])
        peer.wait()

    with serve(behave, authority, is_tls=is_tls) as server:
        session = connect(server)
        session.wait_for("connected")
        wait_until(lambda: server.sent > 130)
        session.link.send("a heartbeat")
        assert heard.get(timeout=LONG)
        may_go_on.set()
        assert session.wait_for("text") == "in two halves"


def test_messages_are_sent_while_a_tls_record_is_incomplete(authority: Authority) -> None:
    """A TLS record without a message, such as a session ticket, makes the socket readable too."""
    half_sent, may_go_on = threading.Event(), threading.Event()
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def behave(peer: Peer) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = authority.server_context().wrap_bio(incoming, outgoing, server_side=True)

        def until_done(step: Callable[[], T]) -> T:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    peer.socket.sendall(outgoing.read())
                    incoming.write(peer.socket.recv(65536))

        until_done(tls.do_handshake)
        peer.request = until_done(lambda: tls.read(65536)).partition(b"\r\n\r\n")[0]
        tls.write(switching_protocols(peer))
        peer.socket.sendall(outgoing.read())
        tls.write(frame(TEXT, b"in two halves"))
        record = outgoing.read()
        peer.socket.sendall(record[:9])
        half_sent.set()
        heard.put(until_done(lambda: tls.read(65536)))
        assert may_go_on.wait(LONG)
        peer.socket.sendall(record[9:])
        peer.wait()

    with RawServer(behave) as server:
        trusting = ssl.create_default_context(cafile=authority.ca_file)
        session = Session().open(Dialer("localhost", server.port, trusting), server.url)
        session.wait_for("connected")
        assert half_sent.wait(LONG)
        session.link.send("a heartbeat")
        assert heard.get(timeout=LONG)
        may_go_on.set()
        assert session.wait_for("text") == "in two halves"
        session.abandon()


def deaf(peer: Peer) -> None:
    """Read nothing after the upgrade."""
    peer.upgrade()
    # Only an error of the socket ends the loop, such as a close by the relay.
    poller = select.poll()
    poller.register(peer.socket, select.POLLRDHUP)
    poller.poll()


MEGABYTE = "x" * 2**20


def test_a_stalled_send_is_reported_as_lost(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.net.limited.SEND_TIMEOUT", 0.1)
    with RawServer(deaf) as server:
        session = connect(server)
        session.wait_for("connected")
        for _ in range(20):
            session.link.send(MEGABYTE)
        assert session.wait_until_lost() == "it reads nothing"


@TLS_OR_NOT
def test_a_stalled_send_can_be_abandoned(
    connect: Connect, authority: Authority, monkeypatch: pytest.MonkeyPatch, *, is_tls: bool
) -> None:
    monkeypatch.setattr("relay.net.limited.SEND_TIMEOUT", LONG)
    with serve(deaf, authority, is_tls=is_tls) as server:
        session = connect(server)
        session.wait_for("connected")
        began = time.monotonic()
        for _ in range(20):
            session.link.send(MEGABYTE)
        assert time.monotonic() - began < PROMPTLY, "a send waits for nothing"
        while not session.shown.empty():
            opened = session.shown.get()
        # The kernel's buffer is full: a send blocks.
        wait_until(lambda: not select.select((), (opened,), (), 0)[1])
        session.abandon()


@TLS_OR_NOT
def test_closed_connections_leave_no_descriptors_or_threads(connect: Connect, authority: Authority, *, is_tls: bool) -> None:
    with portal_of(authority, is_tls=is_tls) as portal:
        for number in range(50):
            session = connect(portal)
            if number % 4 == 1:
                session.shown.get(timeout=PROMPTLY)
            elif number % 4 > 1:
                session.wait_for("connected")
            if number % 4 == 3:
                session.link.close()
                session.wait_until_lost()
            else:
                session.link.abandon()
                session.wait_for_thread()
        assert connection_threads() == []
    # The fixture counts descriptors after each test.
