"""An independent implementation checks the bytes sent by the raw server."""

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.support.raw_server import (
    DRIPPING_FRAME,
    ENDLESS_FRAGMENTS,
    ENDLESS_HEADERS,
    ENDLESS_REFUSAL,
    HUGE_FRAME,
    INVALID_UTF8,
    MASKED_FRAME,
    PATIENCE,
    RESERVED_BITS,
    SILENCE,
    RawServer,
    Recital,
    redirect_to,
    upgraded,
)
from tests.support.scripted_portal import Script, ScriptedPortal
from tests.support.waiting import wait_until


@contextlib.contextmanager
def ask(server: RawServer) -> Iterator[socket.socket]:
    """Send an upgrade request to a server, and return the socket."""
    with socket.create_connection((server.host, server.port), PATIENCE) as client:
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        yield client


@contextlib.contextmanager
def open_websocket(server: RawServer) -> Iterator[ClientConnection]:
    with connect(server.url, proxy=None, open_timeout=PATIENCE, close_timeout=0.1, ping_interval=None) as client:
        yield client


@pytest.mark.parametrize("recital", [SILENCE, ENDLESS_HEADERS, ENDLESS_REFUSAL, upgraded(HUGE_FRAME)], ids=str)
def test_a_raw_server_stops_even_if_its_peer_does_not_read(recital: Recital) -> None:
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
def test_bytes_after_the_upgrade_have_the_intended_error(recital: Recital, code: int) -> None:
    with RawServer(upgraded(recital)) as server, open_websocket(server) as client:

        def has_given_up() -> bool:
            # The client reads more only after a call of recv.
            with contextlib.suppress(TimeoutError, ConnectionClosed):
                client.recv(0.01)
            return client.protocol.close_sent is not None

        wait_until(has_given_up)
        assert client.protocol.close_sent is not None
        assert client.protocol.close_sent.code == code


def test_slow_bytes_are_sent_at_intervals() -> None:
    with RawServer(upgraded(DRIPPING_FRAME)) as server, ask(server) as client:
        read = b""
        while not read.endswith(b"\r\n\r\n"):
            read += client.recv(1)
        assert b"".join(client.recv(1) for _ in range(3)) == DRIPPING_FRAME.text[:3]
        # The remaining bytes take minutes.
        assert server.sent < 1000 < len(DRIPPING_FRAME.text)


def test_a_redirect_has_the_location_of_another_server() -> None:
    with RawServer(SILENCE) as other, RawServer(redirect_to(other.url)) as server, ask(server) as client:
        answer = client.recv(4096).decode()
        assert answer.startswith("HTTP/1.1 302 ")
        assert f"\r\nLocation: {other.url}\r\n" in answer


def test_the_scripted_portal_can_return_refs_as_strings() -> None:
    with ScriptedPortal(script=Script(ref_as_string=True)) as portal, open_websocket(portal) as client:
        client.send(json.dumps({"topic": "relay", "event": "phx_join", "payload": {"stamp_secret": "secret"}, "ref": 0}))
        assert json.loads(client.recv(PATIENCE))["ref"] == "0"
