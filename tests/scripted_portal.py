"""A portal made of real parts, TLS and WebSocket included, that does to a relay what a test tells it to."""

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
from tests.raw_server import PATIENCE, Peer, RawServer, reset_at_close

CLOSE_SECONDS = 10
"""How long the portal waits for a relay to close after a close frame or a refusal, before it closes itself."""

_Data: TypeAlias = dict[str, Any]


class Authority:
    """A certificate authority that no one else trusts, and what it has issued to one server.

    Args:
        directory: where to put ``ca.pem``.
        names: whom the server's certificate names; ``localhost`` and the addresses of loopback by default.
        not_after: when the certificate expires.
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
    """An answer to the upgrade request other than 101."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    chunked: bool = False

    @classmethod
    def problem(cls, status: int, code: str, detail: str, *, chunked: bool = False) -> Self:
        """Make one with a problem document (RFC 9457), as portals do."""
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
        """Make a 503 or 429 with that header, or without."""
        return cls(status, b"", () if value is None else (("Retry-After", str(value)),))

    def response(self) -> Response:
        """Give it as the library wants it."""
        body, length = self.body, ("Content-Length", str(len(self.body)))
        if self.chunked:
            pieces = [self.body[i : i + 20] for i in range(0, len(self.body), 20)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))
            length = ("Transfer-Encoding", "chunked")
        headers = Headers([*self.headers, length, ("Connection", "close")])
        return Response(self.status, HTTPStatus(self.status).phrase, headers, body)


@dataclass
class Script:
    """What the portal does. A test can change it, or put another in its place, at any time."""

    refuse_next: list[Refusal] = field(default_factory=list)
    """What the next upgrade requests are answered, one each."""
    refuse: Refusal | None = None
    """What those after them are answered; None lets relays in."""
    delay_upgrade: threading.Event | None = None
    """Nothing is answered until this is set, not even a refusal."""
    answers_join: bool = True
    join_error: str | None = None
    """The reason with which joins are refused."""
    sends_init: bool = True
    answers_heartbeats: bool = True
    answers_leave: bool = True
    ref_as_string: bool = False
    """Whether replies have the ref as a string, whatever the relay sent."""


class Connection:
    """One upgrade request, and what came of it. Refused ones are connections too."""

    def __init__(self, portal: "ScriptedPortal", websocket: ServerConnection, request: Request) -> None:
        url = urlsplit(request.path)
        self.path = url.path
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.headers = request.headers
        """Those of the request, by name in any case."""
        self.requested_at = time.monotonic()
        self.status: int | None = None
        """What the request was answered: 101, or that of a refusal."""
        self.opened = False
        """Whether frames can be exchanged."""
        self.joined = False
        """Whether a join was answered with ok, and `init` sent if that is in the script."""
        self.closed = False
        self.closed_with: int | None = None
        """The code of the relay's close frame (1005 if it has none); None if there was no such frame."""
        self.how_it_ended = ""
        """In the library's words; says so if the relay broke the WebSocket protocol."""
        self._portal = portal
        self._websocket = websocket
        self._changed = portal._changed
        self._frames: list[_Data] = []
        self._unreadable: list[str | bytes] = []

    @property
    def frames(self) -> list[_Data]:
        """What the relay sent, in order."""
        with self._changed:
            return self._frames.copy()

    @property
    def stamp_secret(self) -> str | None:
        """What the relay told when it joined, the last time if it did so again."""
        joins = (each["payload"] for each in reversed(self.frames) if each.get("event") == "phx_join")
        return next((payload["stamp_secret"] for payload in joins), None)

    @property
    def left(self) -> bool:
        """Whether the relay said that it leaves."""
        return any(each.get("event") == "phx_leave" for each in self.frames)

    @property
    def unreadable(self) -> list[str | bytes]:
        """What the relay sent that was no JSON object."""
        with self._changed:
            return self._unreadable.copy()

    def __repr__(self) -> str:
        told = ", ".join(str(each.get("event")) for each in self.frames) or "nothing"
        ended = f", closed: {self.how_it_ended or 'without a word'}" if self.closed else ""
        return f"<{self.path} answered {self.status}, told {told}{ended}>"

    def wait_for(self, event: str, n: int = 1, seconds: float = PATIENCE) -> _Data:
        """Wait for the n-th frame with an event, and give it."""

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
        """Send a frame; this and what follows waits until the connection is opened, and fails once it is closed."""
        self.send_text(json.dumps({"topic": topic, "event": event, "payload": payload or {}, "ref": ref}))

    def send_init(self) -> None:
        self.send("init")

    def send_text(self, text: str) -> None:
        self._open_websocket.send(text)

    def send_binary(self, data: bytes) -> None:
        self._open_websocket.send(data)

    def ping(self, seconds: float = PATIENCE) -> None:
        """Send a ping and wait for its pong."""
        assert self._open_websocket.ping().wait(seconds), f"no pong within {seconds} s: {self}"

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame, and wait for the relay to answer and close, but not for long."""
        self._open_websocket.close(code, reason)

    def drop(self) -> None:
        """Reset the TCP connection, opened or not."""
        with contextlib.suppress(OSError):
            reset_at_close(self._websocket.socket)
        # First of all: the reader, if it was woken before, would send FIN.
        self._websocket.socket.close()
        self._websocket.close_socket()

    @property
    def _open_websocket(self) -> ServerConnection:
        self.wait_until_opened()
        return self._websocket

    def take(self, message: str | bytes) -> None:
        """Record what the relay sent, and do what the script says."""
        frame: object = None
        with contextlib.suppress(ValueError):
            frame = json.loads(message)
        with self._changed:
            if isinstance(frame, dict):
                self._frames.append(frame)
            else:
                self._unreadable.append(message)
            self._changed.notify_all()
        if isinstance(frame, dict):
            self._answer(frame)

    def note(self, **changes: object) -> None:
        """Record what has become of it: attributes by name."""
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
            case "relay", "phx_leave" if script.answers_leave:
                self._reply(frame)
                self.send("phx_close")

    def _answer_join(self, frame: _Data, script: Script) -> None:
        if not script.answers_join:
            return
        if script.join_error is not None:
            self._reply(frame, "error", {"reason": script.join_error})
            return
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


class ScriptedPortal(RawServer):
    """The portal. Use it as a context, or start and stop it; it comes back on the port that it had.

    Args:
        authority: of its certificate; None for plain ``ws://``.
        host: an address of this machine.
        port: 0 for any.
        script: what it does; by default what a portal does that is well.
    """

    def __init__(
        self, authority: Authority | None = None, *, host: str = "127.0.0.1", port: int = 0, script: Script | None = None
    ) -> None:
        super().__init__(self._serve, host=host, port=port, tls=None if authority is None else authority.server_context())
        self.script = Script() if script is None else script
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
        """All that asked for an upgrade, those before a restart included."""
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
        # These are for its own loop, which is not used: it ends for good if a client is gone before the TLS handshake, and
        # its stop waits for clients.
        self._library.shutdown_watcher.close()
        self._library.shutdown_notifier.close()
        return listening

    def wait_for_connection(self, n: int = 1, seconds: float = PATIENCE) -> Connection:
        """Wait for the n-th upgrade request, and give its connection."""
        return self._wait_for_any(lambda _: True, "connections", n, seconds)

    def wait_until_joined(self, n: int = 1, seconds: float = PATIENCE) -> Connection:
        """Wait until n connections have joined so far, and give the last of these."""
        return self._wait_for_any(lambda connection: connection.joined, "joined connections", n, seconds)

    def wait_until_left(self, n: int = 1, seconds: float = PATIENCE) -> Connection:
        """Wait until n connections have been left so far, and give the last of these."""
        return self._wait_for_any(lambda connection: connection.left, "connections that were left", n, seconds)

    def mint(self, salt: str, ttl: int = 3600) -> Credential:
        """Make a credential of the secret that a relay has told last, as a portal does for its clients."""
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
        # A test that sends to a relay that does not read should not wait for it forever.
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PATIENCE * 1000))
        self._library.handler(peer.socket, None)
        with self._changed:
            connection = self._by_socket.pop(peer.socket, None)
        if connection is not None:
            connection.note(closed=True)

    def _answer_request(self, websocket: ServerConnection, request: Request) -> Response | None:
        connection = Connection(self, websocket, request)
        with self._changed:
            self._connections.append(connection)
            self._by_socket[websocket.socket] = connection
            self._changed.notify_all()
        held = self.script.delay_upgrade
        # That the relay or the portal ends the connection meanwhile is something no event tells.
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
            while True:
                connection.take(websocket.recv())
        except ConnectionClosed as closed:
            connection.note(closed_with=closed.rcvd and closed.rcvd.code, how_it_ended=str(closed))
