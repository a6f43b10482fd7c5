"""Every address of a host is tried, each for its share of the time; certificates are checked; nobody has to wait."""

import contextlib
import gc
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

from relay.net.dial import LOOK_UP_TIMEOUT, Dialer, Watch
from relay.net.names import HostAddress, LookUp
from relay.net.proxy import Proxy
from tests.conftest import needs_ipv6, wait_until
from tests.raw_server import SILENCE, Behaviour, Peer, RawServer, Recital, reset_at_close
from tests.scripted_portal import Authority

LONG = 30.0
"""Seconds that no test takes: whatever ends sooner was not waited for."""

SHARING = 59
"""Addresses beside one, so that its share of all that time is half a second, and each of them has more."""

SYN_SENT, ESTABLISHED = 2, 1
"""States of TCP, as TCP_INFO has them."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.ca_file)


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    # Whatever an earlier test has left in a cycle may be gone, too.
    wait_until(lambda: open_descriptors() <= before)


@pytest.fixture
def refusing() -> Iterator[HostAddress]:
    """An address at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield HostAddress(socket.AF_INET, bound.getsockname())


@pytest.fixture
def black_hole() -> Iterator[HostAddress]:
    """An address at which nothing is answered: the place for connections that wait to be accepted is taken."""
    with socket.socket() as listening, socket.socket() as waiting:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting.connect(listening.getsockname())
        yield HostAddress(socket.AF_INET, listening.getsockname())


def greet(peer: Peer) -> None:
    """Say who is there, and wait until the other side is gone."""
    peer.send(b"hello")
    peer.wait()


def at(server: RawServer) -> HostAddress:
    return HostAddress(socket.AF_INET, (server.host, server.port))


def found(*addresses: HostAddress) -> LookUp:
    """A look-up that finds these."""
    return lambda *_: list(addresses)


class Seen:
    """A watch that keeps what it is shown."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.shares: list[float] = []
        """The timeout of each."""
        self.states: list[int] = []
        """The state of TCP of each when it was shown."""

    def __call__(self, opened: socket.socket) -> None:
        share = opened.gettimeout()
        assert share is not None, "it would be waited for without end"
        self.sockets.append(opened)
        self.shares.append(share)
        self.states.append(state_of(opened))


def state_of(opened: socket.socket) -> int:
    return opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def ignore(_: socket.socket) -> None:
    """Watch nothing."""


def test_a_connection_leads_to_the_host() -> None:
    with RawServer(greet) as server:
        with Dialer("127.0.0.1", server.port, None).dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
            assert opened.getpeername() == ("127.0.0.1", server.port)
        assert server.peer_closed.wait(LONG)


def test_a_connection_with_tls_leads_to_the_host_and_tells_its_name(authority: Authority, tls: ssl.SSLContext) -> None:
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
def test_a_host_can_be_an_address_of_ipv6(authority: Authority, tls: ssl.SSLContext) -> None:
    with (
        RawServer(greet, host="::1", tls=authority.server_context()) as server,
        Dialer("::1", server.port, tls).dial(LONG, ignore) as opened,
    ):
        assert opened.recv(100) == b"hello"


def test_small_frames_do_not_wait_for_each_other() -> None:
    with RawServer(greet) as server, Dialer("127.0.0.1", server.port, None).dial(LONG, ignore) as opened:
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(("timeout", "given"), [(LONG, LOOK_UP_TIMEOUT), (1.5, 1.5)])
def test_the_name_is_looked_up_within_the_time_for_all_and_no_more_than_its_own(timeout: float, given: float) -> None:
    asked: list[tuple[str, int, float]] = []

    def look_up(host: str, port: int, seconds: float) -> list[HostAddress]:
        asked.append((host, port, seconds))
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with pytest.raises(socket.gaierror, match="no such name"):
        Dialer("portal.example", 8443, None, look_up=look_up).dial(timeout, ignore)
    assert asked == [("portal.example", 8443, given)]


def test_a_host_without_addresses_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match=r"portal\.example has no address"):
        Dialer("portal.example", 443, None, look_up=found()).dial(LONG, ignore)


def test_an_address_that_refuses_is_followed_by_the_next(refusing: HostAddress) -> None:
    with RawServer(greet) as server:
        dialer = Dialer("localhost", 443, None, look_up=found(refusing, refusing, at(server)))
        began = time.monotonic()
        with dialer.dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
        assert time.monotonic() - began < LONG / 3


def test_the_first_address_that_answers_is_the_last_that_is_tried() -> None:
    with RawServer(greet) as first, RawServer(greet) as second:
        seen = Seen()
        with Dialer("localhost", 443, None, look_up=found(at(first), at(second))).dial(LONG, seen) as opened:
            assert seen.sockets == [opened]
        assert second.peers == []


def test_an_address_that_swallows_packets_costs_the_next_no_more_than_its_share(black_hole: HostAddress) -> None:
    with RawServer(greet) as server:
        dialer = Dialer("localhost", 443, None, look_up=found(black_hole, *SHARING * [at(server)]))
        began = time.monotonic()
        with dialer.dial(LONG, ignore) as opened:
            assert 0.45 < time.monotonic() - began < LONG / 2
            assert opened.recv(100) == b"hello"


def test_the_time_is_shared_among_the_addresses_that_are_left(refusing: HostAddress) -> None:
    seen = Seen()
    with pytest.raises(ConnectionRefusedError):
        Dialer("localhost", 443, None, look_up=found(*[refusing] * 4)).dial(100 * LONG, seen)
    assert seen.shares == pytest.approx([25 * LONG, 33.3 * LONG, 50 * LONG, 100 * LONG], rel=0.02)


def test_what_the_look_up_took_is_not_shared(refusing: HostAddress) -> None:
    def look_up(*_: object) -> list[HostAddress]:
        threading.Event().wait(0.3)
        return [refusing]

    seen = Seen()
    with pytest.raises(ConnectionRefusedError):
        Dialer("localhost", 443, None, look_up=look_up).dial(1.0, seen)
    (share,) = seen.shares
    assert share <= 0.7


def test_an_address_is_tried_even_if_the_look_up_took_all_the_time() -> None:
    with RawServer(greet) as server:

        def look_up(*_: object) -> list[HostAddress]:
            threading.Event().wait(0.1)
            return [at(server)]

        with Dialer("localhost", 443, None, look_up=look_up).dial(0.05, ignore) as opened:
            assert opened.recv(100) == b"hello"


def test_the_error_is_that_of_the_last_address(refusing: HostAddress, black_hole: HostAddress) -> None:
    with pytest.raises(ConnectionRefusedError):
        Dialer("localhost", 443, None, look_up=found(black_hole, refusing)).dial(0.4, ignore)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        Dialer("localhost", 443, None, look_up=found(refusing, black_hole)).dial(0.4, ignore)
    assert 0.35 < time.monotonic() - began < LONG


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ({"names": ("elsewhere.example",)}, "Hostname mismatch"),
        ({"names": ("127.0.0.1",)}, "Hostname mismatch"),
        ({"not_after": datetime.now(UTC) - timedelta(days=1)}, "expired"),
    ],
    ids=["another name", "its address instead of its name", "expired"],
)
def test_a_certificate_of_a_trusted_authority_has_to_be_for_the_host_and_valid(
    tmp_path: Path, flaw: dict[str, Any], says: str
) -> None:
    other = Authority(tmp_path, **flaw)
    trusting = ssl.create_default_context(cafile=other.ca_file)
    with RawServer(greet, tls=other.server_context()) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match=says):
            Dialer("localhost", server.port, trusting).dial(LONG, ignore)
        server.wait_for_tls_error()


def test_an_authority_that_nobody_trusts_is_not_trusted(tmp_path: Path, tls: ssl.SSLContext) -> None:
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
def test_an_address_whose_tls_is_broken_is_followed_by_the_next(
    authority: Authority, tls: ssl.SSLContext, behaviour: Behaviour
) -> None:
    with RawServer(behaviour) as broken, RawServer(greet, tls=authority.server_context()) as well:
        dialer = Dialer("localhost", 443, tls, look_up=found(at(broken), at(well)))
        with dialer.dial(LONG, ignore) as opened:
            assert opened.recv(100) == b"hello"
        broken.wait_for_peer()


def test_an_address_whose_certificate_is_not_trusted_is_followed_by_the_next(
    tmp_path: Path, authority: Authority, tls: ssl.SSLContext
) -> None:
    stranger = Authority(tmp_path)
    with (
        RawServer(greet, tls=stranger.server_context()) as other,
        RawServer(greet, tls=authority.server_context()) as well,
        Dialer("localhost", 443, tls, look_up=found(at(other), at(well))).dial(LONG, ignore) as opened,
    ):
        assert opened.recv(100) == b"hello"


def test_a_handshake_that_hangs_takes_no_more_than_its_share(authority: Authority, tls: ssl.SSLContext) -> None:
    with RawServer(SILENCE) as silent, RawServer(greet, tls=authority.server_context()) as well:
        dialer = Dialer("localhost", 443, tls, look_up=found(at(silent), *SHARING * [at(well)]))
        began = time.monotonic()
        with dialer.dial(LONG, ignore) as opened:
            assert 0.45 < time.monotonic() - began < LONG / 2
            assert opened.recv(100) == b"hello"


def test_every_socket_is_shown_before_it_is_waited_for(
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
    assert handshakes == ["none yet", "none yet", None]
    assert [state == ESTABLISHED for state in seen.states] == [False, False, True]


class Attempt:
    """A dial in a thread of its own."""

    def __init__(self, dialer: Dialer, timeout: float = 3 * LONG, *, watch: Watch | None = None) -> None:
        self.seen = Seen()
        self.error: OSError | None = None
        self._dialer = dialer
        self._timeout = timeout
        self._watch = watch or self.seen
        self._thread = threading.Thread(target=self._run, name="attempt")
        self._thread.start()

    def shut_down(self) -> None:
        """End what was shown last, as whoever watches does."""
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


def test_a_connect_that_hangs_ends_when_its_socket_is_shut_down(black_hole: HostAddress) -> None:
    attempt = Attempt(Dialer("localhost", 443, None, look_up=found(black_hole)))
    wait_until(lambda: bool(attempt.seen.sockets) and state_of(attempt.seen.sockets[0]) == SYN_SENT)
    attempt.shut_down()
    attempt.wait()
    assert attempt.error is not None


@pytest.mark.parametrize("through_tls", [False, True])
def test_a_connect_that_was_not_begun_does_not_hang_when_its_socket_is_shut_down(
    black_hole: HostAddress, tls: ssl.SSLContext, *, through_tls: bool
) -> None:
    """The word comes between the moment when it is shown and the connect."""

    def watch(opened: socket.socket) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(opened, socket.SHUT_RDWR)

    dialer = Dialer("localhost", 443, tls if through_tls else None, look_up=found(black_hole))
    Attempt(dialer, watch=watch).wait()


def test_a_handshake_that_hangs_ends_when_its_socket_is_shut_down(tls: ssl.SSLContext) -> None:
    with RawServer(SILENCE) as silent:
        attempt = Attempt(Dialer("localhost", 443, tls, look_up=found(at(silent))))
        wait_until(lambda: len(attempt.seen.sockets) == 2)
        attempt.shut_down()
        attempt.wait()
        assert attempt.error is not None


def test_a_proxy_that_hangs_ends_when_its_socket_is_shut_down() -> None:
    with RawServer(SILENCE) as silent:
        attempt = Attempt(Dialer("portal.example", 443, None, Proxy("127.0.0.1", silent.port)))
        wait_until(lambda: bool(attempt.seen.sockets) and state_of(attempt.seen.sockets[0]) == ESTABLISHED)
        attempt.shut_down()
        attempt.wait()
        assert attempt.error is not None


def test_a_watch_that_wants_none_ends_it_and_nobody_is_connected_to() -> None:
    class UnwantedError(OSError):
        pass

    def watch(_: socket.socket) -> None:
        raise UnwantedError

    with RawServer(greet) as server:
        with pytest.raises(UnwantedError):
            Dialer("localhost", 443, None, look_up=found(at(server), at(server))).dial(LONG, watch)
        assert server.peers == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_watch_that_fails_leaves_nothing_open(authority: Authority, tls: ssl.SSLContext, number: int) -> None:
    shown: list[socket.socket] = []

    def watch(opened: socket.socket) -> None:
        shown.append(opened)
        if len(shown) == number:
            raise RuntimeError("a bug")

    with RawServer(greet, tls=authority.server_context()) as server:
        with pytest.raises(RuntimeError, match="a bug"):
            Dialer("localhost", server.port, tls).dial(LONG, watch)
        assert all(each.fileno() == -1 for each in shown)


def test_attempts_that_fail_leave_nothing_open(
    tmp_path: Path, tls: ssl.SSLContext, refusing: HostAddress, black_hole: HostAddress
) -> None:
    """The descriptors are counted after each test here; this one has many of all kinds."""
    with (
        RawServer(greet, tls=Authority(tmp_path).server_context()) as stranger,
        RawServer(hang_up) as closing,
        RawServer(speak_no_tls) as plain,
    ):
        ways = (refusing, at(stranger), at(closing), at(plain), black_hole)
        for _ in range(5):
            with pytest.raises(OSError, match=r"^"):
                Dialer("localhost", 443, tls, look_up=found(*ways)).dial(0.2, ignore)


class PatientContext(ssl.SSLContext):
    """Lets what is under way arrive before TLS begins."""

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **more: Any) -> ssl.SSLSocket:  # noqa: ANN401
        poller = select.poll()
        poller.register(sock, 0)
        assert poller.poll(LONG * 1000), "the peer does not end"
        return super().wrap_socket(sock, *arguments, **more)


def test_a_connection_that_is_reset_before_tls_begins_leaves_nothing_open(authority: Authority) -> None:
    def reset(peer: Peer) -> None:
        reset_at_close(peer.socket)

    with RawServer(reset) as server, warnings.catch_warnings():
        # CPython 3.11 leaves the socket, which it has to itself by then, to whoever has the error: it goes with that.
        warnings.simplefilter("ignore", ResourceWarning)
        context = PatientContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority.ca_file)
        dialer = Dialer("localhost", 443, context, look_up=found(at(server)))
        before = open_descriptors()
        for _ in range(5):
            with pytest.raises(OSError, match=r"^"):
                dialer.dial(LONG, ignore)
        wait_until(lambda: open_descriptors() == before)


def test_a_host_that_can_not_be_a_name_is_an_error_like_all_others(tls: ssl.SSLContext) -> None:
    """Through a proxy it is not looked up here, so that it is TLS that finds out."""
    raised: list[type[Exception]] = []
    with RawServer(Recital("tunnel", b"HTTP/1.1 200 OK\r\n\r\n")) as proxy, warnings.catch_warnings():
        # CPython 3.11 leaves the socket, which it has to itself by then, to be collected.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            Dialer("portal..example", 443, tls, Proxy("127.0.0.1", proxy.port)).dial(LONG, ignore)
        except (OSError, ValueError) as error:
            raised.append(type(error))
    assert issubclass(raised[0], OSError)


def test_through_a_proxy_the_name_of_the_proxy_is_looked_up_and_that_of_the_host_is_not() -> None:
    asked: list[tuple[str, int]] = []

    def look_up(host: str, port: int, _: float) -> list[HostAddress]:
        asked.append((host, port))
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    proxy = Proxy("proxy.example", 3128)
    with pytest.raises(socket.gaierror):
        Dialer("portal.example", 443, None, proxy, look_up).dial(LONG, ignore)
    assert asked == [("proxy.example", 3128)]


def test_a_proxy_that_drips_its_answer_takes_no_longer_than_was_said() -> None:
    dripping = Recital("dripping", b"HTTP/1.1 200 OK\r\nX-Padding: ", b"x", drips=True)
    with RawServer(dripping) as server:
        attempt = Attempt(Dialer("portal.example", 443, None, Proxy("127.0.0.1", server.port)), 0.5)
        attempt.wait()
        assert attempt.error is not None
