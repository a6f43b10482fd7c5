"""The addresses of a host race, certificates are checked, and waits can be interrupted."""

import contextlib
import select
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.net.dial import ATTEMPT_DELAY, LOOK_UP_TIMEOUT, Dialer, Watch, interleaved
from relay.net.names import HostAddress, LookUp
from relay.net.proxy import Proxy
from tests.support.descriptors import open_descriptors
from tests.support.raw_server import SILENCE, Behaviour, Peer, RawServer, Recital, reset_at_close
from tests.support.requirements import needs_ipv6
from tests.support.scripted_portal import Authority
from tests.support.waiting import wait_until

LONG = 30.0
"""A timeout in seconds that no test reaches."""

SYN_SENT, ESTABLISHED = 2, 1
"""TCP states in TCP_INFO."""

pytestmark = pytest.mark.usefixtures("only_new_garbage")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.ca_file)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    # Collect reference cycles of earlier tests.
    wait_until(lambda: open_descriptors() <= before)


@pytest.fixture
def refusing() -> Iterator[HostAddress]:
    """An address without a listener."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield HostAddress(socket.AF_INET, bound.getsockname())


@contextlib.contextmanager
def unresponsive(host: str) -> Iterator[HostAddress]:
    """An unresponsive address: its accept queue is full."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening, socket.socket(family) as waiting:
        listening.bind((host, 0))
        listening.listen(0)
        waiting.connect(listening.getsockname())
        yield HostAddress(family, listening.getsockname())


@pytest.fixture
def black_hole() -> Iterator[HostAddress]:
    with unresponsive("127.0.0.1") as address:
        yield address


def greet(peer: Peer) -> None:
    """Send a greeting, and wait until the peer closes."""
    peer.send(b"hello")
    peer.wait()


def at(server: RawServer) -> HostAddress:
    return HostAddress(socket.AF_INET, (server.host, server.port))


def found(*addresses: HostAddress) -> LookUp:
    """A lookup with these results."""
    return lambda *_: list(addresses)


class Seen:
    """A watcher that records its sockets."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.timeouts: list[float] = []
        """The timeout of each socket."""
        self.states: list[int] = []
        """The TCP state of each socket when passed to the watcher."""

    def __call__(self, opened: socket.socket) -> None:
        timeout = opened.gettimeout()
        assert timeout is not None, "it would be waited for without end"
        self.sockets.append(opened)
        self.timeouts.append(timeout)
        self.states.append(state_of(opened))


def state_of(opened: socket.socket) -> int:
    return opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def ignore(_: socket.socket) -> None:
    """Do nothing."""


def test_a_connection_reaches_the_host() -> None:
    with RawServer(greet) as server:
        with Dialer("127.0.0.1", server.port, None).dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
            assert opened.getpeername() == ("127.0.0.1", server.port)
        assert server.peer_closed.wait(LONG)


def test_a_tls_connection_reaches_the_host_and_sends_sni(authority: Authority, tls: ssl.SSLContext) -> None:
    names: list[str | None] = []
    context = authority.server_context()
    context.sni_callback = lambda _, name, __: names.append(name)
    with RawServer(greet, tls=context) as server:
        with Dialer("localhost", server.port, tls).dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
            assert isinstance(opened, ssl.SSLSocket)
            assert opened.version() in {"TLSv1.2", "TLSv1.3"}
        assert server.peer_closed.wait(LONG)
    assert names == ["localhost"]


@needs_ipv6
def test_a_host_can_be_an_ipv6_address(authority: Authority, tls: ssl.SSLContext) -> None:
    with (
        RawServer(greet, host="::1", tls=authority.server_context()) as server,
        Dialer("::1", server.port, tls).dial(LONG, ignore) as opened,
    ):
        assert opened.recv(100) == b"hello"


def test_nodelay_is_set() -> None:
    with RawServer(greet) as server, Dialer("127.0.0.1", server.port, None).dial(LONG, ignore) as opened:
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(("timeout", "given"), [(LONG, LOOK_UP_TIMEOUT), (1.5, 1.5)])
def test_the_lookup_timeout_is_bounded_by_the_total_timeout(timeout: float, given: float) -> None:
    asked: list[tuple[str, int, float]] = []

    def look_up(host: str, port: int, seconds: float) -> list[HostAddress]:
        asked.append((host, port, seconds))
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with pytest.raises(socket.gaierror, match="no such name"):
        Dialer("portal.example", 8443, None, look_up=look_up).dial(timeout, ignore)
    assert asked == [("portal.example", 8443, given)]


def test_a_host_without_addresses_is_an_error_with_its_name() -> None:
    with pytest.raises(OSError, match=r"portal\.example has no address"):
        Dialer("portal.example", 443, None, look_up=found()).dial(LONG, ignore)


def test_after_a_refused_connection_the_next_address_is_tried(refusing: HostAddress) -> None:
    with RawServer(greet) as server:
        dialer = Dialer("localhost", 443, None, look_up=found(refusing, refusing, at(server)))
        began = time.monotonic()
        with dialer.dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
        assert time.monotonic() - began < LONG / 3


def test_no_address_is_tried_after_a_successful_connection() -> None:
    with RawServer(greet) as first, RawServer(greet) as second:
        seen = Seen()
        with Dialer("localhost", 443, None, look_up=found(at(first), at(second))).dial(LONG, seen) as opened:
            assert set(seen.sockets) == {opened}
        assert second.peers == []


def test_after_a_quarter_of_a_second_without_an_answer_the_next_address_is_tried_too(black_hole: HostAddress) -> None:
    with RawServer(greet) as server:
        dialer = Dialer("localhost", 443, None, look_up=found(black_hole, at(server)))
        began = time.monotonic()
        with dialer.dial(LONG, ignore) as opened:
            assert ATTEMPT_DELAY <= time.monotonic() - began < LONG / 2
            assert opened.recv(100) == b"hello"


@needs_ipv6
def test_two_unresponsive_ipv6_addresses_cost_a_quarter_of_a_second() -> None:
    with unresponsive("::1") as one, unresponsive("::1") as two, RawServer(greet) as server:
        dialer = Dialer("localhost", 443, None, look_up=found(one, two, at(server)))
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            with dialer.dial(LONG, ignore) as opened:
                assert opened.getpeername() == ("127.0.0.1", server.port)
            seconds.append(time.monotonic() - began)
        # The machine may be busy.
        assert min(seconds) < 0.5


def test_a_refused_connection_shortens_the_wait_for_the_next_address(refusing: HostAddress, black_hole: HostAddress) -> None:
    with RawServer(greet) as server:
        dialer = Dialer("localhost", 443, None, look_up=found(black_hole, *9 * [refusing], at(server)))
        began = time.monotonic()
        dialer.dial(LONG, ignore).close()
        assert time.monotonic() - began < 9 * ATTEMPT_DELAY


def test_a_proxys_addresses_race_too(black_hole: HostAddress) -> None:
    with RawServer(Recital("tunnel", b"HTTP/1.1 200 OK\r\n\r\nhello")) as proxy:
        dialer = Dialer("portal.example", 443, None, Proxy("proxy.example", 3128), found(black_hole, at(proxy)))
        began = time.monotonic()
        with dialer.dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
        assert time.monotonic() - began < LONG / 2


@given(st.lists(st.sampled_from([socket.AF_INET, socket.AF_INET6]), max_size=8))
def test_families_alternate_from_ipv6_on_and_keep_their_order(families: list[int]) -> None:
    addresses = [HostAddress(family, (str(number),)) for number, family in enumerate(families)]
    ordered = interleaved(addresses)
    assert sorted(ordered) == sorted(addresses)
    for family in set(families):
        assert [each for each in ordered if each.family == family] == [each for each in addresses if each.family == family]
    six, four = families.count(socket.AF_INET6), families.count(socket.AF_INET)
    pairs = 2 * min(six, four)
    assert [each.family for each in ordered[:pairs]] == [socket.AF_INET6, socket.AF_INET] * (pairs // 2)


def test_losers_are_closed(black_hole: HostAddress) -> None:
    seen = Seen()
    with RawServer(greet) as server:
        dialer = Dialer("localhost", 443, None, look_up=found(black_hole, at(server)))
        with dialer.dial(LONG, seen) as opened:
            assert {each.fileno() for each in seen.sockets} == {-1, opened.fileno()}


def test_the_time_of_the_lookup_is_subtracted(black_hole: HostAddress) -> None:
    def look_up(*_: object) -> list[HostAddress]:
        threading.Event().wait(0.3)
        return [black_hole]

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        Dialer("localhost", 443, None, look_up=look_up).dial(0.6, ignore)
    assert 0.55 < time.monotonic() - began < LONG


def test_an_address_is_tried_even_after_a_slow_lookup() -> None:
    with RawServer(greet) as server:

        def look_up(*_: object) -> list[HostAddress]:
            threading.Event().wait(0.02)
            return [at(server)]

        with Dialer("localhost", 443, None, look_up=look_up).dial(0.01, ignore) as opened:
            assert opened.recv(100) == b"hello"


def test_the_error_of_the_last_address_is_raised(refusing: HostAddress, black_hole: HostAddress) -> None:
    with pytest.raises(ConnectionRefusedError):
        Dialer("localhost", 443, None, look_up=found(refusing, refusing)).dial(LONG, ignore)
    for addresses in ((refusing, black_hole), (black_hole, refusing), (black_hole, black_hole)):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            Dialer("localhost", 443, None, look_up=found(*addresses)).dial(0.4, ignore)
        assert 0.35 < time.monotonic() - began < LONG


def test_an_unsupported_family_is_skipped() -> None:
    with RawServer(greet) as server:
        unsupported = HostAddress(socket.AF_UNIX + 9999, ("x",))
        Dialer("localhost", 443, None, look_up=found(unsupported, at(server))).dial(LONG, ignore).close()


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ({"names": ("elsewhere.example",)}, "Hostname mismatch"),
        ({"names": ("127.0.0.1",)}, "Hostname mismatch"),
        ({"not_after": datetime.now(UTC) - timedelta(days=1)}, "expired"),
    ],
    ids=["another name", "its address instead of its name", "expired"],
)
def test_a_certificate_must_match_the_host_and_be_valid(tmp_path: Path, flaw: dict[str, Any], says: str) -> None:
    other = Authority(tmp_path, **flaw)
    trusting = ssl.create_default_context(cafile=other.ca_file)
    with RawServer(greet, tls=other.server_context()) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match=says):
            Dialer("localhost", server.port, trusting).dial(LONG, ignore)
        server.wait_for_tls_error()


def test_an_unknown_certificate_authority_is_rejected(tmp_path: Path, tls: ssl.SSLContext) -> None:
    with RawServer(greet, tls=Authority(tmp_path).server_context()) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
            Dialer("localhost", server.port, tls).dial(LONG, ignore)
        server.wait_for_tls_error()


def speak_no_tls(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    peer.wait()


def hang_up(_: Peer) -> None:
    """Close at once."""


@pytest.mark.parametrize("behaviour", [speak_no_tls, hang_up], ids=["no TLS", "closes"])
def test_after_a_failed_handshake_the_next_address_is_tried(
    authority: Authority, tls: ssl.SSLContext, behaviour: Behaviour
) -> None:
    with RawServer(behaviour) as broken, RawServer(greet, tls=authority.server_context()) as well:
        dialer = Dialer("localhost", 443, tls, look_up=found(at(broken), at(well)))
        with dialer.dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
        broken.wait_for_peer()


def test_after_an_untrusted_certificate_the_next_address_is_tried(
    tmp_path: Path, authority: Authority, tls: ssl.SSLContext
) -> None:
    stranger = Authority(tmp_path)
    with (
        RawServer(greet, tls=stranger.server_context()) as other,
        RawServer(greet, tls=authority.server_context()) as well,
        Dialer("localhost", 443, tls, look_up=found(at(other), at(well))).dial(LONG, ignore) as opened,
    ):
        assert opened.recv(100) == b"hello"


def test_a_hanging_handshake_leaves_half_of_the_time_to_further_addresses(authority: Authority, tls: ssl.SSLContext) -> None:
    seen = Seen()
    with RawServer(SILENCE) as silent, RawServer(greet, tls=authority.server_context()) as well:
        dialer = Dialer("localhost", 443, tls, look_up=found(at(silent), at(well)))
        with dialer.dial(6, seen) as opened:
            assert opened.recv(100) == b"hello"
    handshakes = [
        timeout for each, timeout in zip(seen.sockets, seen.timeouts, strict=True) if isinstance(each, ssl.SSLSocket)
    ]
    assert handshakes == pytest.approx([3, 1.5], abs=1)


def test_a_failed_handshake_is_reported_rather_than_an_unresponsive_address(
    tls: ssl.SSLContext, black_hole: HostAddress
) -> None:
    """And early enough for the caller, who abandons the attempt after the timeout."""
    with RawServer(speak_no_tls) as plain:
        began = time.monotonic()
        with pytest.raises(ssl.SSLError):
            Dialer("localhost", 443, tls, look_up=found(black_hole, at(plain))).dial(2, ignore)
        assert time.monotonic() - began < 1.9


def test_a_socket_is_passed_to_the_watcher_before_each_wait(
    authority: Authority, tls: ssl.SSLContext, refusing: HostAddress
) -> None:
    seen = Seen()
    handshakes: list[object] = []

    def watch(opened: socket.socket) -> None:
        seen(opened)
        handshakes.append(opened.version() if isinstance(opened, ssl.SSLSocket) else "none yet")

    with (
        RawServer(greet, tls=authority.server_context()) as server,
        Dialer("localhost", 443, tls, look_up=found(refusing, at(server))).dial(LONG, watch) as opened,
    ):
        assert seen.sockets[-1] is opened
    assert handshakes == [*(len(handshakes) - 1) * ["none yet"], None]
    assert [state == ESTABLISHED for state in seen.states[-2:]] == [True, True]
    assert seen.states[0] != ESTABLISHED


class Attempt:
    """A dial in its own thread."""

    def __init__(self, dialer: Dialer, timeout: float = 3 * LONG, *, watch: Watch | None = None) -> None:
        self.seen = Seen()
        self.error: OSError | None = None
        self._dialer = dialer
        self._timeout = timeout
        self._watch = watch or self.seen
        self._thread = threading.Thread(target=self._run, name="attempt")
        self._thread.start()

    def shut_down(self) -> None:
        """Shut down the last socket, as a watcher does."""
        socket.socket.shutdown(self.seen.sockets[-1], socket.SHUT_RDWR)

    def wait(self, seconds: float = LONG) -> None:
        self._thread.join(seconds)
        ended_by_itself = not self._thread.is_alive()
        if not ended_by_itself:
            with contextlib.suppress(OSError):
                self.shut_down()
            self._thread.join(LONG)
        assert ended_by_itself, f"it goes on after {seconds} s"

    def _run(self) -> None:
        try:
            self._dialer.dial(self._timeout, self._watch).close()
        except OSError as error:
            self.error = error


def test_shutting_down_the_socket_ends_a_hanging_connect(black_hole: HostAddress) -> None:
    attempt = Attempt(Dialer("localhost", 443, None, look_up=found(black_hole)))
    wait_until(lambda: bool(attempt.seen.sockets) and state_of(attempt.seen.sockets[0]) == SYN_SENT)
    attempt.shut_down()
    attempt.wait()
    assert attempt.error is not None


@pytest.mark.parametrize("count", [2, 3, 50])
def test_shutting_down_one_socket_ends_a_hanging_race(count: int) -> None:
    """The next call of the watcher raises, as after `WebSocketLink.abandon`."""
    seen, abandoned = Seen(), threading.Event()

    def watch(opened: socket.socket) -> None:
        seen(opened)
        if abandoned.is_set():
            raise ConnectionAbortedError

    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(unresponsive("127.0.0.1")) for _ in range(count)]
        attempt = Attempt(Dialer("localhost", 443, None, look_up=found(*addresses)), watch=watch)
        wait_until(lambda: len(set(seen.sockets)) > 1)
        abandoned.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(seen.sockets[-1], socket.SHUT_RDWR)
        attempt.wait()
        assert isinstance(attempt.error, ConnectionAbortedError)


@pytest.mark.parametrize("through_tls", [False, True])
def test_a_connect_after_a_shutdown_does_not_hang(
    black_hole: HostAddress, tls: ssl.SSLContext, *, through_tls: bool
) -> None:
    """The shutdown happens after the call of the watcher and before the connect."""

    def watch(opened: socket.socket) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(opened, socket.SHUT_RDWR)

    dialer = Dialer("localhost", 443, tls if through_tls else None, look_up=found(black_hole))
    Attempt(dialer, watch=watch).wait()


def test_shutting_down_the_socket_ends_a_hanging_handshake(tls: ssl.SSLContext) -> None:
    with RawServer(SILENCE) as silent:
        attempt = Attempt(Dialer("localhost", 443, tls, look_up=found(at(silent))))
        wait_until(lambda: bool(attempt.seen.sockets) and isinstance(attempt.seen.sockets[-1], ssl.SSLSocket))
        attempt.shut_down()
        attempt.wait()
        assert attempt.error is not None


def test_shutting_down_the_socket_ends_a_hanging_proxy() -> None:
    with RawServer(SILENCE) as silent:
        attempt = Attempt(Dialer("portal.example", 443, None, Proxy("127.0.0.1", silent.port)))
        wait_until(lambda: bool(attempt.seen.sockets) and state_of(attempt.seen.sockets[0]) == ESTABLISHED)
        attempt.shut_down()
        attempt.wait()
        assert attempt.error is not None


def test_a_watcher_can_end_the_attempt() -> None:
    class UnwantedError(OSError):
        pass

    def watch(_: socket.socket) -> None:
        raise UnwantedError

    with RawServer(greet) as first, RawServer(greet) as second:
        with pytest.raises(UnwantedError):
            Dialer("localhost", 443, None, look_up=found(at(first), at(second))).dial(LONG, watch)
        assert first.peers == second.peers == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failing_watcher_leaves_no_socket_open(authority: Authority, tls: ssl.SSLContext, number: int) -> None:
    shown: list[socket.socket] = []

    def watch(opened: socket.socket) -> None:
        shown.append(opened)
        if len(shown) == number:
            raise RuntimeError("a bug")

    with RawServer(greet, tls=authority.server_context()) as server:
        with pytest.raises(RuntimeError, match="a bug"):
            Dialer("localhost", server.port, tls).dial(LONG, watch)
        assert all(each.fileno() == -1 for each in shown)


def test_failed_attempts_leave_no_socket_open(
    tmp_path: Path, tls: ssl.SSLContext, refusing: HostAddress, black_hole: HostAddress
) -> None:
    """The fixture counts descriptors after each test; this test opens many of all kinds."""
    with (
        RawServer(greet, tls=Authority(tmp_path).server_context()) as stranger,
        RawServer(hang_up) as closing,
        RawServer(speak_no_tls) as plain,
    ):
        ways = (refusing, at(stranger), at(closing), at(plain), black_hole)
        for _ in range(5):
            with pytest.raises(OSError, match=r"^"):
                Dialer("localhost", 443, tls, look_up=found(*ways)).dial(0.05, ignore)


class PatientContext(ssl.SSLContext):
    """Waits for packets in flight before the handshake."""

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **more: Any) -> ssl.SSLSocket:  # noqa: ANN401
        poller = select.poll()
        poller.register(sock, 0)
        assert poller.poll(LONG * 1000), "the peer does not end"
        return super().wrap_socket(sock, *arguments, **more)


def test_a_reset_before_the_handshake_leaves_no_socket_open(authority: Authority) -> None:
    def reset(peer: Peer) -> None:
        reset_at_close(peer.socket)

    with RawServer(reset) as server, warnings.catch_warnings():
        # In CPython 3.11 the exception keeps the socket open until it is deleted.
        warnings.simplefilter("ignore", ResourceWarning)
        context = PatientContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority.ca_file)
        dialer = Dialer("localhost", 443, context, look_up=found(at(server)))
        before = open_descriptors()
        for _ in range(5):
            with pytest.raises(OSError, match=r"^"):
                dialer.dial(LONG, ignore)
        wait_until(lambda: open_descriptors() == before)


def test_an_invalid_host_name_is_a_regular_error(tls: ssl.SSLContext) -> None:
    """With a proxy the name is not resolved locally, and the TLS handshake raises the error."""
    raised: list[type[Exception]] = []
    with RawServer(Recital("tunnel", b"HTTP/1.1 200 OK\r\n\r\n")) as proxy, warnings.catch_warnings():
        # CPython 3.11 leaves the socket to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            Dialer("portal..example", 443, tls, Proxy("127.0.0.1", proxy.port)).dial(LONG, ignore)
        except (OSError, ValueError) as error:
            raised.append(type(error))
    assert issubclass(raised[0], OSError)


def test_with_a_proxy_only_the_name_of_the_proxy_is_resolved() -> None:
    asked: list[tuple[str, int]] = []

    def look_up(host: str, port: int, _: float) -> list[HostAddress]:
        asked.append((host, port))
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    proxy = Proxy("proxy.example", 3128)
    with pytest.raises(socket.gaierror):
        Dialer("portal.example", 443, None, proxy, look_up).dial(LONG, ignore)
    assert asked == [("proxy.example", 3128)]


def test_a_slow_proxy_response_does_not_exceed_the_timeout() -> None:
    dripping = Recital("dripping", b"HTTP/1.1 200 OK\r\nX-Padding: ", b"x", drips=True)
    with RawServer(dripping) as server:
        attempt = Attempt(Dialer("portal.example", 443, None, Proxy("127.0.0.1", server.port)), 0.1)
        attempt.wait()
        assert attempt.error is not None
