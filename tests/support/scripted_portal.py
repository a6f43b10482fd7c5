"""A portal with real TLS and WebSocket, and behaviour scripted by a test."""

import base64
import contextlib
import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeAlias
from urllib.parse import parse_qsl, urlsplit

import trustme
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.sync.server import Server, ServerConnection, serve

from relay.core.credentials import Credential
from tests.support.raw_server import PATIENCE, Peer, RawServer, reset_at_close

CLOSE_SECONDS = 10
"""Seconds the portal waits for a relay to close after a close frame or a rejection."""

SILENCE_LIMIT = 41.0
"""Seconds without a frame of the relay after which the portal closes a connection."""

GRACE = 1.0
"""Seconds of an absence after which the portal tells clients to drop the relay."""

_Data: TypeAlias = dict[str, Any]


class Authority:
    """A private certificate authority, with a server certificate.

    Args:
        directory: the directory for ``ca.pem``.
        names: names in the server's certificate; by default ``localhost`` and the loopback addresses.
        not_after: expiry of the certificate.
    """

    def __init__(
        self, directory: Path, names: tuple[str, ...] = ("localhost", "127.0.0.1", "::1"), not_after: datetime | None = None
    ) -> None:
        authority = trustme.CA()
        self.ca_file = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        self._certificate = authority.issue_cert(*names, not_after=not_after)

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._certificate.configure_cert(context)
        return context


@dataclass(frozen=True)
class Refusal:
    """A rejection of the upgrade request."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    chunked: bool = False

    @classmethod
    def problem(cls, status: int, code: str, detail: str, *, chunked: bool = False) -> Self:
        """Create a rejection with a problem document (RFC 9457), like portals."""
        title = HTTPStatus(status).phrase
        body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
        kind = ("Content-Type", "application/problem+json; charset=utf-8")
        return cls(status, json.dumps(body).encode(), (kind,), chunked)

    @classmethod
    def invalid_token(cls, *, chunked: bool = False) -> Self:
        return cls.problem(401, "invalid_token", "Invalid token", chunked=chunked)

    @classmethod
    def missing_token(cls, *, chunked: bool = False) -> Self:
        return cls.problem(401, "missing_token", "Missing token", chunked=chunked)

    @classmethod
    def retry_after(cls, value: int | str | None, status: int = 503) -> Self:
        """Create a 503 or 429, optionally with Retry-After."""
        return cls(status, b"", () if value is None else (("Retry-After", str(value)),))

    def response(self) -> Response:
        """Return the response in the library's type."""
        body, length = self.body, ("Content-Length", str(len(self.body)))
        if self.chunked:
            pieces = [self.body[i : i + 20] for i in range(0, len(self.body), 20)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))
            length = ("Transfer-Encoding", "chunked")
        headers = Headers([*self.headers, length, ("Connection", "close")])
        return Response(self.status, HTTPStatus(self.status).phrase, headers, body)


@dataclass
class Script:
    """Behaviour of the portal. A test can change or replace the script at any time."""

    refuse_next: list[Refusal] = field(default_factory=list)
    """Responses to the next upgrade requests, in order."""
    refuse: Refusal | None = None
    """The response to later upgrade requests; None accepts relays."""
    delay_upgrade: threading.Event | None = None
    """The response to the upgrade, even a rejection, waits for this event."""
    answers_join: bool = True
    join_error: str | None = None
    """The reason for rejecting joins."""
    sends_init: bool = True
    answers_heartbeats: bool = True
    is_cut_off: bool = False
    """Whether frames of the relay are lost on the way."""
    answers_leave: bool = True
    ref_as_string: bool = False
    """Whether replies contain the ref as a string."""


class Connection:
    """An upgrade request and its connection, even if rejected."""

    def __init__(
        self, portal: "ScriptedPortal", changed: threading.Condition, websocket: ServerConnection, request: Request
    ) -> None:
        url = urlsplit(request.path)
        self.target = request.path
        """The request target: path and query."""
        self.path = url.path
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.headers = request.headers
        """Headers of the request, with case-insensitive names."""
        self.status: int | None = None
        """The status of the response: 101, or the status of a rejection."""
        self.opened = False
        """Whether frames can be exchanged."""
        self.joined = False
        """Whether a join was accepted, and `init` sent if scripted."""
        self.closed = False
        self.closed_with: int | None = None
        """The code of the relay's close frame (1005 without a code); None without a close frame."""
        self.how_it_ended = ""
        """The library's reason, including WebSocket protocol errors of the relay."""
        self._portal = portal
        self._websocket = websocket
        self._changed = changed
        self._frames: list[_Data] = []

    @property
    def frames(self) -> list[_Data]:
        """Frames received from the relay, in order."""
        with self._changed:
            return self._frames.copy()

    @property
    def stamp_secret(self) -> str | None:
        """The secret sent by the relay in its last join."""
        joins = (each["payload"] for each in reversed(self.frames) if each.get("event") == "phx_join")
        return next((payload["stamp_secret"] for payload in joins), None)

    @property
    def left(self) -> bool:
        """Whether the relay has sent a leave."""
        return any(each.get("event") == "phx_leave" for each in self.frames)

    def __repr__(self) -> str:
        told = ", ".join(str(each.get("event")) for each in self.frames) or "nothing"
        ended = f", closed: {self.how_it_ended or 'without a word'}" if self.closed else ""
        return f"<{self.path} answered {self.status}, told {told}{ended}>"

    def wait_for(self, event: str, n: int = 1, seconds: float = PATIENCE) -> _Data:
        """Wait for the n-th frame with an event, and return the frame."""

        def found() -> list[_Data]:
            return [each for each in self._frames if each.get("event") == event]

        self._wait(lambda: len(found()) >= n, f"no {event} (number {n})", seconds)
        return found()[n - 1]

    def wait_until_opened(self, seconds: float = PATIENCE) -> None:
        self._wait(lambda: self.opened, "not opened", seconds)

    def wait_until_joined(self, seconds: float = PATIENCE) -> None:
        self._wait(lambda: self.joined, "not joined", seconds)

    def wait_until_left(self, seconds: float = PATIENCE) -> None:
        self._wait(lambda: self.left, "not left", seconds)

    def wait_until_closed(self, seconds: float = PATIENCE) -> None:
        self._wait(lambda: self.closed, "not closed", seconds)

    def send(self, event: str, payload: _Data | None = None, topic: str = "relay", ref: int | str | None = None) -> None:
        """Send a frame. All send methods wait for an open connection, and fail once the connection is closed."""
        self.send_text(json.dumps({"topic": topic, "event": event, "payload": payload or {}, "ref": ref}))

    def send_init(self) -> None:
        self.send("init")

    def send_text(self, text: str) -> None:
        self._open_websocket.send(text)

    def send_binary(self, data: bytes) -> None:
        self._open_websocket.send(data)

    def send_ping(self) -> None:
        """Send a ping without waiting for its pong."""
        self._open_websocket.ping()

    def ping(self, seconds: float = PATIENCE) -> None:
        """Send a ping and wait for its pong."""
        assert self._open_websocket.ping().wait(seconds), f"no pong within {seconds} s: {self}"

    def send_pong(self, data: bytes) -> None:
        """Send an unsolicited pong."""
        self._open_websocket.pong(data)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame, and wait briefly for the relay's close."""
        self._portal.presence.leave(self)
        self._open_websocket.close(code, reason)

    def drop(self) -> None:
        """Reset the TCP connection, even before the upgrade."""
        self._portal.presence.leave(self)
        with contextlib.suppress(OSError):
            reset_at_close(self._websocket.socket)
        # First, because a woken reader would send FIN.
        self._websocket.socket.close()
        self._websocket.close_socket()

    @property
    def _open_websocket(self) -> ServerConnection:
        self.wait_until_opened()
        return self._websocket

    def take(self, message: str | bytes) -> None:
        """Record a frame of the relay, and act on the script. The library closes with 1011 for invalid JSON."""
        frame = json.loads(message)
        with self._changed:
            self._frames.append(frame)
            self._changed.notify_all()
        self._answer(frame)

    def note(self, **changes: object) -> None:
        """Record changed attributes by name."""
        with self._changed:
            for name, value in changes.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def _answer(self, frame: _Data) -> None:
        script = self._portal.script
        match frame.get("topic"), frame.get("event"):
            case "relay", "phx_join":
                self._answer_join(frame, script)
            case "phoenix", "heartbeat" if script.answers_heartbeats:
                self._reply(frame)
            case "relay", "phx_leave":
                self._portal.presence.leave(self)
                if script.answers_leave:
                    self._reply(frame)
                    self.send("phx_close")

    def _answer_join(self, frame: _Data, script: Script) -> None:
        if not script.answers_join:
            return
        if script.join_error is not None:
            self._reply(frame, "error", {"reason": script.join_error})
            return
        self._portal.presence.join(self, frame["payload"]["stamp_secret"])
        self._reply(frame)
        if script.sends_init:
            self.send_init()
        self.note(joined=True)

    def _reply(self, frame: _Data, status: str = "ok", response: _Data | None = None) -> None:
        ref = str(frame.get("ref")) if self._portal.script.ref_as_string else frame.get("ref")
        self.send("phx_reply", {"status": status, "response": response or {}}, frame["topic"], ref)

    def _wait(self, condition: Callable[[], bool], otherwise: str, seconds: float) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, seconds), f"{otherwise} within {seconds} s: {self}"


class Presence:
    """The relays that the portal offers to clients, by their secrets. A later join replaces an earlier one without a gap."""

    def __init__(self) -> None:
        self.absences: list[float] = []
        """The seconds of each absence that a join has ended."""
        self._joined: dict[str, Connection] = {}
        self._left_at: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def secrets(self) -> set[str]:
        return set(self._joined)

    @property
    def drops(self) -> int:
        """How often clients were told to drop a relay."""
        with self._lock:
            ended, now = self.absences, time.monotonic()
            return sum(absence > GRACE for absence in (*ended, *(now - left_at for left_at in self._left_at.values())))

    def join(self, connection: Connection, secret: str) -> None:
        with self._lock:
            self._joined[secret] = connection
            if secret in self._left_at:
                self.absences.append(time.monotonic() - self._left_at.pop(secret))

    def leave(self, connection: Connection) -> None:
        with self._lock:
            for secret in [secret for secret, current in self._joined.items() if current is connection]:
                del self._joined[secret]
                self._left_at[secret] = time.monotonic()


class ScriptedPortal(RawServer):
    """The portal. A context manager, or start and stop explicitly; a restart uses the same port.

    Args:
        authority: issuer of its certificate; None for plain ``ws://``.
        host: an address of this machine.
        port: 0 for any.
        script: the behaviour; by default a working portal.
    """

    def __init__(
        self, authority: Authority | None = None, *, host: str = "127.0.0.1", port: int = 0, script: Script | None = None
    ) -> None:
        super().__init__(self._serve, host=host, port=port, tls=None if authority is None else authority.server_context())
        self.script = Script() if script is None else script
        self.presence = Presence()
        self._authority = authority
        self._library: Server
        self._connections: list[Connection] = []
        self._by_socket: dict[object, Connection] = {}

    @property
    def ca_file(self) -> Path:
        assert self._authority is not None, "a portal without TLS"
        return self._authority.ca_file

    @property
    def connections(self) -> list[Connection]:
        """All upgrade requests, including requests before a restart."""
        with self._changed:
            return self._connections.copy()

    def listen(self) -> socket.socket:
        listening = super().listen()
        self._library = serve(
            self._converse,
            sock=listening,
            compression=None,
            process_request=self._answer_request,
            process_response=self._note_response,
            server_header=None,
            ping_interval=None,
            close_timeout=CLOSE_SECONDS,
        )
        # These are for the library's accept loop, which is not used: the loop ends if a client disconnects before the TLS
        # handshake, and its stop waits for clients.
        self._library.shutdown_watcher.close()
        self._library.shutdown_notifier.close()
        return listening

    def wait_for_connection(self, n: int = 1, seconds: float = PATIENCE) -> Connection:
        """Wait for the n-th upgrade request, and return its connection."""
        return self._wait_for_any(lambda _: True, "connections", n, seconds)

    def wait_until_joined(self, n: int = 1, seconds: float = PATIENCE) -> Connection:
        """Wait until n connections have joined, and return the n-th."""
        return self._wait_for_any(lambda connection: connection.joined, "joined connections", n, seconds)

    def wait_until_left(self, n: int = 1, seconds: float = PATIENCE) -> Connection:
        """Wait until relays have left n connections, and return the n-th."""
        return self._wait_for_any(lambda connection: connection.left, "connections that were left", n, seconds)

    def mint(self, salt: str, ttl: int = 3600) -> Credential:
        """Create a credential for a client with the secret of the last join."""
        secret = next((each.stamp_secret for each in reversed(self.connections) if each.stamp_secret is not None), None)
        assert secret is not None, f"no relay has told its secret: {self.connections}"
        expiry = int(time.time()) + ttl
        digest = hashlib.sha256(f"{expiry}:{secret}:{salt}".encode()).digest()
        return Credential(f"{expiry}:{salt}", base64.b64encode(digest).decode().rstrip("="))

    def _wait_for_any(self, matches: Callable[[Connection], bool], what: str, n: int, seconds: float) -> Connection:
        def found() -> list[Connection]:
            return [each for each in self._connections if matches(each)]

        with self._changed:
            came = self._changed.wait_for(lambda: len(found()) >= n, seconds)
            assert came, f"{len(found())} instead of {n} {what} within {seconds} s: {self._connections}"
            return found()[n - 1]

    def _serve(self, peer: Peer) -> None:
        # A send to a relay without a reader must not block forever.
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PATIENCE * 1000))
        self._library.handler(peer.socket, None)
        with self._changed:
            connection = self._by_socket.pop(peer.socket, None)
        if connection is not None:
            self.presence.leave(connection)
            connection.note(closed=True)

    def _answer_request(self, websocket: ServerConnection, request: Request) -> Response | None:
        connection = Connection(self, self._changed, websocket, request)
        with self._changed:
            self._connections.append(connection)
            self._by_socket[websocket.socket] = connection
            self._changed.notify_all()
        held = self.script.delay_upgrade
        # No event reports the end of the connection in the meantime.
        while held is not None and websocket.protocol.state is State.CONNECTING and not held.wait(0.02):
            pass
        with self._changed:
            refusal = self.script.refuse_next.pop(0) if self.script.refuse_next else self.script.refuse
        return None if refusal is None else refusal.response()

    def _note_response(self, websocket: ServerConnection, _: Request, response: Response) -> None:
        self._by_socket[websocket.socket].note(status=response.status_code)

    def _converse(self, websocket: ServerConnection) -> None:
        connection = self._by_socket[websocket.socket]
        connection.note(opened=True)
        try:
            heard_at = time.monotonic()
            while True:
                message = websocket.recv(heard_at + SILENCE_LIMIT - time.monotonic())
                if not self.script.is_cut_off:
                    heard_at = time.monotonic()
                    connection.take(message)
        except TimeoutError:
            # The library closes the connection.
            self.presence.leave(connection)
            connection.note(how_it_ended="silence")
        except ConnectionClosed as closed:
            connection.note(closed_with=closed.rcvd and closed.rcvd.code, how_it_ended=str(closed))
