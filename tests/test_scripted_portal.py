"""The doubles of the portal and of what stands before it do what tests of the relay take for granted."""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidProxyStatus, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_websocket

from relay.core.credentials import RelaySecret, mint
from tests.conftest import needs_ipv6, wait_until
from tests.connect_proxy import ConnectProxy
from tests.raw_server import (
    AFTER_UPGRADE,
    BEFORE_UPGRADE,
    DRIPPING_FRAME,
    ENDLESS_EVENTS,
    ENDLESS_FRAGMENTS,
    ENDLESS_HEADERS,
    ENDLESS_REFUSAL,
    HUGE_FRAME,
    INVALID_UTF8,
    MASKED_FRAME,
    NO_UPGRADE_HEADERS,
    RESERVED_BITS,
    SILENCE,
    RawServer,
    Recital,
    joined,
    redirect_to,
    upgraded,
)
from tests.scripted_portal import Authority, Refusal, Script, ScriptedPortal

Connector: TypeAlias = Callable[..., ClientConnection]

OK = {"status": "ok", "response": {}}
TIMEOUT = 30
PATH = "/relay/websocket?name=a%20relay&ipv4=127.0.0.1&port=3478"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def portal(authority: Authority) -> Iterator[ScriptedPortal]:
    with ScriptedPortal(authority) as portal:
        yield portal


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # The library's readers end by themselves, right after the connections that they read from.
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def connect(authority: Authority) -> Iterator[Connector]:
    """Connect as a relay does, and close at the end of the test."""
    with contextlib.ExitStack() as stack:

        def connect(
            url: str, ca_file: Path = authority.ca_file, proxy: str | None = None, headers: dict[str, str] | None = None
        ) -> ClientConnection:
            tls = ssl.create_default_context(cafile=ca_file)
            # This client reads and writes in two threads. With TLS 1.3, tickets come after the handshake: if one is read
            # just when the request is written, OpenSSL gets stuck, once in a thousand times or less.
            tls.maximum_version = ssl.TLSVersion.TLSv1_2
            opening = open_websocket(
                url + PATH,
                ssl=tls if url.startswith("wss") else None,
                proxy=proxy,
                additional_headers=headers,
                open_timeout=TIMEOUT,
                close_timeout=0.1,
                ping_interval=None,
            )
            return stack.enter_context(opening)

        yield connect


def send(client: ClientConnection, event: str, ref: int, topic: str = "relay", **payload: str) -> None:
    client.send(json.dumps({"topic": topic, "event": event, "payload": payload, "ref": ref}))


def receive(client: ClientConnection) -> dict[str, Any]:
    frame: dict[str, Any] = json.loads(client.recv(TIMEOUT))
    return frame


def join(client: ClientConnection, stamp_secret: str) -> None:
    send(client, "phx_join", 0, stamp_secret=stamp_secret)
    assert receive(client)["payload"] == OK
    assert receive(client)["event"] == "init"


def test_a_relay_joins_is_told_to_begin_beats_and_leaves(portal: ScriptedPortal, connect: Connector) -> None:
    client = connect(portal.url, headers={"X-Authorization": "Bearer token"})
    connection = portal.wait_for_connection()
    assert connection.path == "/relay/websocket"
    assert connection.query == {"name": "a relay", "ipv4": "127.0.0.1", "port": "3478"}
    assert connection.headers["x-authorization"] == "Bearer token"
    send(client, "phx_join", 0, stamp_secret="the secret")
    assert receive(client) == {"topic": "relay", "event": "phx_reply", "payload": OK, "ref": 0}
    assert receive(client) == {"topic": "relay", "event": "init", "payload": {}, "ref": None}
    assert portal.wait_until_joined() is connection
    assert connection.status == 101
    assert connection.stamp_secret == "the secret"
    send(client, "heartbeat", 1, "phoenix")
    assert receive(client) == {"topic": "phoenix", "event": "phx_reply", "payload": OK, "ref": 1}
    send(client, "phx_leave", 2)
    assert receive(client) == {"topic": "relay", "event": "phx_reply", "payload": OK, "ref": 2}
    assert receive(client) == {"topic": "relay", "event": "phx_close", "payload": {}, "ref": None}
    client.close()
    connection.wait_until_closed()
    assert connection.closed_with == 1000
    assert portal.wait_until_left() is connection
    assert [frame["event"] for frame in connection.frames] == ["phx_join", "heartbeat", "phx_leave"]


def test_each_part_of_the_script_can_be_left_out(portal: ScriptedPortal, connect: Connector) -> None:
    portal.script = Script(answers_join=False, answers_heartbeats=False, answers_leave=False, ref_as_string=True)
    client = connect(portal.url)
    connection = portal.wait_for_connection()
    for ref, (event, topic) in enumerate((("phx_join", "relay"), ("heartbeat", "phoenix"), ("phx_leave", "relay"))):
        send(client, event, ref, topic)
        connection.wait_for(event)
    portal.script.answers_join, portal.script.sends_init = True, False
    send(client, "phx_join", 3)
    # All that came before was left unanswered.
    assert receive(client)["ref"] == "3"
    connection.wait_until_joined()
    connection.send_init()
    assert receive(client)["event"] == "init"
    portal.script = Script(join_error="invalid_stamp_secret")
    send(client, "phx_join", 4)
    refusal = {"status": "error", "response": {"reason": "invalid_stamp_secret"}}
    assert receive(client) == {"topic": "relay", "event": "phx_reply", "payload": refusal, "ref": 4}
    assert connection.wait_for("phx_join", n=3)["ref"] == 4


def test_the_portal_can_say_anything(portal: ScriptedPortal, connect: Connector) -> None:
    client = connect(portal.url)
    connection = portal.wait_for_connection()
    connection.send("disconnect", {"reason": "token_expired"}, ref="7")
    assert receive(client) == {"topic": "relay", "event": "disconnect", "payload": {"reason": "token_expired"}, "ref": "7"}
    connection.send_text("{")
    assert client.recv(TIMEOUT) == "{"
    connection.send_binary(b"\xff")
    assert client.recv(TIMEOUT) == b"\xff"
    client.send("no JSON")
    client.send(b"\xff")
    send(client, "told_afterwards", 1)
    connection.wait_for("told_afterwards")
    assert connection.unreadable == ["no JSON", b"\xff"]


def test_the_portal_pings_and_closes(portal: ScriptedPortal, connect: Connector) -> None:
    client = connect(portal.url)
    connection = portal.wait_for_connection()
    connection.ping()
    connection.close(4000, "enough")
    with pytest.raises(ConnectionClosed) as closed:
        client.recv(TIMEOUT)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "enough")
    connection.wait_until_closed()
    assert connection.closed_with == 4000


@pytest.mark.parametrize("chunked", [False, True])
def test_a_refusal_has_a_body_that_says_why(portal: ScriptedPortal, connect: Connector, *, chunked: bool) -> None:
    portal.script.refuse = Refusal.invalid_token(chunked=chunked)
    with pytest.raises(InvalidStatus) as refused:
        connect(portal.url)
    response = refused.value.response
    assert response.status_code == 401
    assert response.headers["Content-Type"] == "application/problem+json; charset=utf-8"
    assert ("Transfer-Encoding" in response.headers, "Content-Length" in response.headers) == (chunked, not chunked)
    assert response.body is not None
    assert json.loads(response.body)["code"] == "invalid_token"
    assert portal.wait_for_connection().status == 401


def test_the_first_attempts_can_be_refused(portal: ScriptedPortal, connect: Connector) -> None:
    portal.script.refuse_next = [Refusal.retry_after(7), Refusal.retry_after("Thu, 01 Jan 1970 00:00:00 GMT", 429)]
    for status, retry_after in ((503, "7"), (429, "Thu, 01 Jan 1970 00:00:00 GMT")):
        with pytest.raises(InvalidStatus) as refused:
            connect(portal.url)
        assert refused.value.response.status_code == status
        assert refused.value.response.headers["Retry-After"] == retry_after
    join(connect(portal.url), "the secret")
    assert portal.wait_until_joined() is portal.wait_for_connection(3)


def test_an_upgrade_can_be_held_back(portal: ScriptedPortal, connect: Connector) -> None:
    portal.script.delay_upgrade = threading.Event()
    attempt = threading.Thread(target=connect, args=(portal.url,))
    attempt.start()
    connection = portal.wait_for_connection()
    with pytest.raises(AssertionError, match="not opened"):
        connection.wait_until_opened(0.01)
    assert connection.status is None
    portal.script.delay_upgrade.set()
    connection.wait_until_opened()
    attempt.join()


def test_a_portal_that_falls_over_lets_go_of_everyone_and_comes_back(portal: ScriptedPortal, connect: Connector) -> None:
    url = portal.url
    client = connect(url)
    join(client, "the first secret")
    before = portal.wait_until_joined()
    portal.script.delay_upgrade = threading.Event()
    with socket.create_connection((portal.host, portal.port)) as before_tls:

        def stop_once_it_is_there() -> None:
            portal.wait_for_connection(2)
            portal.stop()

        stopping = threading.Thread(target=stop_once_it_is_there)
        stopping.start()
        with pytest.raises((InvalidMessage, OSError)):
            # Held back until the portal falls over.
            connect(url)
        stopping.join()
        before_tls.settimeout(TIMEOUT)
        with contextlib.suppress(ConnectionResetError):
            assert before_tls.recv(1) == b""
    with pytest.raises(ConnectionClosed):
        client.recv(TIMEOUT)
    assert (before.closed, before.closed_with) == (True, None)
    with pytest.raises(ConnectionRefusedError):
        connect(url)
    portal.script.delay_upgrade = None
    portal.start()
    assert portal.url == url
    join(connect(url), "the second secret")
    assert portal.wait_until_joined(2).stamp_secret == "the second secret"


@pytest.mark.parametrize("tls", [False, True])
def test_a_dropped_connection_is_reset(authority: Authority, connect: Connector, *, tls: bool) -> None:
    with ScriptedPortal(authority if tls else None) as portal:
        client = connect(portal.url)
        connection = portal.wait_for_connection()
        connection.wait_until_opened()
        connection.drop()
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(TIMEOUT)
        # Python 3.11 takes a reset for an end under TLS.
        assert tls or isinstance(closed.value.__cause__, ConnectionResetError)
        connection.wait_until_closed()
        assert connection.closed_with is None


def test_a_relay_that_vanishes_closes_without_a_code(portal: ScriptedPortal, connect: Connector) -> None:
    client = connect(portal.url)
    join(client, "the secret")
    client.close_socket()
    connection = portal.wait_until_joined()
    connection.wait_until_closed()
    assert connection.closed_with is None
    assert not connection.left
    with pytest.raises(ConnectionClosed):
        connection.send_init()


def test_credentials_are_minted_of_the_secret_that_was_told(portal: ScriptedPortal, connect: Connector) -> None:
    with pytest.raises(AssertionError, match="no relay has told its secret"):
        portal.mint("salt")
    join(connect(portal.url), "s3cret")
    minted = portal.mint("salt", ttl=60)
    assert minted == mint(RelaySecret("s3cret"), int(minted.username.partition(":")[0]), "salt")


def test_waiting_in_vain_says_what_there_was_instead(portal: ScriptedPortal, connect: Connector) -> None:
    with pytest.raises(AssertionError, match=r"0 instead of 1 connections within 0\.01 s: \[\]"):
        portal.wait_for_connection(seconds=0.01)
    send(connect(portal.url), "heartbeat", 1, "phoenix")
    connection = portal.wait_for_connection()
    connection.wait_for("heartbeat")
    with pytest.raises(AssertionError, match=r"not joined within 0\.01 s: </relay/websocket answered 101, told heartbeat>"):
        connection.wait_until_joined(0.01)


@pytest.mark.parametrize(
    "flaw",
    [{}, {"names": ("elsewhere.example",)}, {"not_after": datetime.now(UTC) - timedelta(days=1)}],
    ids=["unknown authority", "wrong name", "expired"],
)
def test_a_certificate_can_be_bad(tmp_path: Path, authority: Authority, connect: Connector, flaw: dict[str, Any]) -> None:
    other = Authority(tmp_path, **flaw)
    with ScriptedPortal(other) as portal:
        with pytest.raises(ssl.SSLCertVerificationError):
            # That the authority is trusted does not make up for the name or the date.
            connect(portal.url, portal.ca_file if flaw else authority.ca_file)
        assert isinstance(portal.wait_for_tls_error(), ssl.SSLError)
        assert portal.connections == []


def test_a_portal_can_do_without_tls(connect: Connector) -> None:
    with ScriptedPortal() as portal:
        assert portal.url.startswith("ws://localhost:")
        join(connect(portal.url), "the secret")


@needs_ipv6
def test_a_portal_can_be_on_ipv6(authority: Authority, connect: Connector) -> None:
    with ScriptedPortal(authority, host="::1") as portal:
        join(connect(portal.url), "the secret")


def test_clients_that_are_gone_at_once_do_no_harm(portal: ScriptedPortal, connect: Connector) -> None:
    for _ in range(20):
        with socket.create_connection((portal.host, portal.port)) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    portal.wait_for_tls_error(20)
    join(connect(portal.url), "the secret")


@pytest.mark.parametrize("credentials", [None, ("user", "p@ss")])
def test_a_proxy_lets_a_relay_through(
    portal: ScriptedPortal, connect: Connector, credentials: tuple[str, str] | None
) -> None:
    with ConnectProxy(credentials) as proxy:
        client = connect(portal.url, proxy=proxy.url)
        join(client, "the secret")
        proxy.wait_for_tunnel()
        request = proxy.wait_for_request()
        assert request.line == f"CONNECT localhost:{portal.port} HTTP/1.1"
        assert request.authorization == (None if credentials is None else "Basic dXNlcjpwQHNz")
        client.close(1001)
        connection = portal.wait_until_joined()
        connection.wait_until_closed()
        assert connection.closed_with == 1001


@pytest.mark.parametrize(("refuses", "status"), [(False, 407), (True, 403)])
def test_a_proxy_refuses(portal: ScriptedPortal, connect: Connector, *, refuses: bool, status: int) -> None:
    with ConnectProxy(None if refuses else ("user", "pass")) as proxy:
        proxy.refuses = refuses
        with pytest.raises(InvalidProxyStatus) as refused:
            connect(portal.url, proxy=f"http://{proxy.host}:{proxy.port}")
        assert refused.value.response.status_code == status
        assert proxy.tunnels == 0
        assert portal.peers == []


def test_a_proxy_that_stops_takes_its_tunnels_with_it(portal: ScriptedPortal, connect: Connector) -> None:
    with ConnectProxy() as proxy:
        client = connect(portal.url, proxy=proxy.url)
        join(client, "the secret")
        assert proxy.tunnels == 1
    portal.wait_until_joined().wait_until_closed()
    with pytest.raises(ConnectionClosed):
        client.recv(TIMEOUT)


@contextlib.contextmanager
def ask(server: RawServer, authority: Authority | None = None) -> Iterator[socket.socket]:
    """Send an upgrade request to a server that may answer anything."""
    with contextlib.ExitStack() as stack:
        client: socket.socket = stack.enter_context(socket.create_connection((server.host, server.port), TIMEOUT))
        if authority is not None:
            context = ssl.create_default_context(cafile=authority.ca_file)
            client = stack.enter_context(context.wrap_socket(client, server_hostname="localhost"))
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        yield client


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("recital", [*BEFORE_UPGRADE, *map(upgraded, AFTER_UPGRADE)], ids=str)
def test_a_raw_server_notices_that_its_peer_is_gone(authority: Authority, recital: Recital, *, tls: bool) -> None:
    with RawServer(recital, tls=authority.server_context() if tls else None) as server:
        with ask(server, authority if tls else None) as client:
            assert recital is SILENCE or client.recv(1)
        assert server.peer_closed.wait(TIMEOUT)
        assert server.wait_for_peer().gone.is_set()
        assert (server.sent > 0) == (recital is not SILENCE)


@pytest.mark.parametrize("recital", [SILENCE, ENDLESS_HEADERS, ENDLESS_REFUSAL, upgraded(HUGE_FRAME)], ids=str)
def test_a_raw_server_stops_though_its_peer_does_not_read(recital: Recital) -> None:
    with RawServer(recital) as server, ask(server) as client:
        assert recital is SILENCE or client.recv(1)
        server.wait_for_peer()
        server.stop()
        assert not server.peer_closed.is_set()


@pytest.mark.parametrize(
    ("recital", "code"),
    [(RESERVED_BITS, 1002), (MASKED_FRAME, 1002), (INVALID_UTF8, 1007), (HUGE_FRAME, 1009), (ENDLESS_FRAGMENTS, 1009)],
    ids=str,
)
def test_what_follows_the_upgrade_is_wrong_in_the_way_it_should_be(connect: Connector, recital: Recital, code: int) -> None:
    with RawServer(upgraded(recital)) as server:
        client = connect(server.url)

        def has_given_up() -> bool:
            with contextlib.suppress(TimeoutError, ConnectionClosed):
                client.recv(0.05)
            return client.protocol.close_sent is not None

        wait_until(has_given_up)
        assert client.protocol.close_sent is not None
        assert client.protocol.close_sent.code == code


def test_an_answer_without_the_headers_of_an_upgrade_is_none(connect: Connector) -> None:
    with RawServer(NO_UPGRADE_HEADERS) as server, pytest.raises(Exception, match="Connection header"):
        connect(server.url)


def test_a_raw_server_lets_a_relay_join_first(connect: Connector) -> None:
    with RawServer(joined(ENDLESS_EVENTS)) as server:
        client = connect(server.url)
        join(client, "the secret")
        assert {receive(client)["event"] for _ in range(100)} == {"nonsense"}


def test_a_frame_drips(connect: Connector) -> None:
    with RawServer(upgraded(DRIPPING_FRAME)) as server:
        client = connect(server.url)
        with pytest.raises(TimeoutError):
            client.recv(0.3)
        assert server.wait_for_peer().headers["Upgrade"] == "websocket"
        assert server.sent < 1000


def test_a_redirect_names_another_server() -> None:
    with RawServer(SILENCE) as other, RawServer(redirect_to(other.url)) as server:
        with ask(server) as client:
            answer = client.recv(4096).decode()
        assert answer.startswith("HTTP/1.1 302 ")
        assert f"\r\nLocation: {other.url}\r\n" in answer
        assert other.peers == []
