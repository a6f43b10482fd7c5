"""Servers with behaviour impossible with a WebSocket library: a function handles each connection, in its own thread.

The function is called a behaviour. It ends with an OSError once the peer closes or the server stops.
"""

import base64
import contextlib
import email
import email.message
import hashlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, TypeAlias, TypeVar

PATIENCE = 30.0
"""Seconds until a wait fails."""

DRIP_SECONDS = 0.02
"""Seconds between two bytes of a slow sender."""

T = TypeVar("T")

_LONGEST_HEAD = 64 * 1024
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

CONTINUATION, TEXT, PING = 0x0, 0x1, 0x9


class Peer:
    """A connected peer, for a behaviour."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.request = b""
        """The head of the HTTP request, once read."""
        self.sent = 0
        """Bytes sent to the peer, including bytes in kernel buffers."""
        self.gone = threading.Event()
        """Set once a behaviour has noticed the close of the peer."""
        self._lock = threading.Lock()
        self._adopted: list[socket.socket] = []
        self._is_aborted = False

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = self.socket.send(view)
            self.sent += count
            view = view[count:]

    def read_head(self) -> bytes:
        """Read an HTTP request up to its empty line, and return data received after the request."""
        read = b""
        while b"\r\n\r\n" not in read:
            assert len(read) < _LONGEST_HEAD, f"an endless request: {read[:200]!r}"
            data = self.socket.recv(4096)
            if not data:
                raise ConnectionResetError("the peer has closed")
            read += data
        self.request, _, rest = read.partition(b"\r\n\r\n")
        return rest

    @property
    def headers(self) -> email.message.Message:
        """Headers of the request, with case-insensitive names."""
        return email.message_from_bytes(self.request.partition(b"\r\n")[2])

    def upgrade(self) -> None:
        """Perform the opening handshake of RFC 6455."""
        self.read_head()
        self.send(switching_protocols(self))

    def join(self) -> None:
        """Perform the opening handshake, accept the join, and send init."""
        self.upgrade()
        # The relay joins with ref 0 at once, so the reply does not require reading the join.
        self.send(frame(TEXT, event("phx_reply", {"status": "ok", "response": {}}, ref=0)) + frame(TEXT, event("init", {})))

    def wait(self, seconds: float | None = None) -> None:
        """Wait for some time or until the peer closes (OSError); discard received data."""
        until = None if seconds is None else time.monotonic() + seconds
        left = seconds
        try:
            while left is None or left > 0:
                self.socket.settimeout(left)
                if not self.socket.recv(65536):
                    raise ConnectionResetError("the peer has closed")
                left = None if until is None else until - time.monotonic()
        except TimeoutError:
            pass
        finally:
            self.socket.settimeout(None)

    def secure(self, tls: ssl.SSLContext) -> None:
        """Perform the TLS handshake."""
        self.socket.settimeout(PATIENCE)
        if not self.socket.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the peer has closed")
        # Fails if the connection was reset. Wrapping would fail, too, but leak a socket.
        self.socket.getpeername()
        with self._lock:
            # The wrapper takes over the descriptor. `abort` must not run in between.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
            secured = self.socket
        secured.do_handshake()
        secured.settimeout(None)

    def adopt(self, other: socket.socket) -> None:
        """Close another socket together with this connection."""
        with self._lock:
            self._adopted.append(other)
            if self._is_aborted:
                _shut(other)

    def abort(self) -> None:
        """Reset the connection like a crash, even during reads and writes. Its own thread closes the socket."""
        with self._lock:
            self._is_aborted = True
            for each in (self.socket, *self._adopted):
                _shut(each)

    def close(self) -> None:
        with self._lock:
            for each in (self.socket, *self._adopted):
                each.close()


def switching_protocols(peer: Peer) -> bytes:
    """Return the response to the opening handshake of RFC 6455."""
    key = peer.headers["Sec-WebSocket-Key"]
    assert key is not None, f"no WebSocket handshake: {peer.request!r}"
    accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def _shut(each: socket.socket) -> None:
    """Wake readers and writers, which a close does not. The later close sends RST."""
    with contextlib.suppress(OSError):
        reset_at_close(each)
        # The shutdown of a TLS socket would remove its TLS state during a read.
        socket.socket.shutdown(each, socket.SHUT_RDWR)


def reset_at_close(each: socket.socket) -> None:
    """Make the kernel send RST instead of FIN at the close."""
    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Behaviour: TypeAlias = Callable[[Peer], None]


class RawServer:
    """A TCP or TLS server. A context manager, or start and stop explicitly; a restart uses the same port.

    Args:
        behaviour: handles a connection after the TLS handshake, if any. Its return closes the connection.
        host: a local address.
        port: 0 for a free port.
        tls: a context with a certificate; None for plain TCP.
    """

    def __init__(
        self, behaviour: Behaviour, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.host = host
        self.port = port
        self.peer_closed = threading.Event()
        """Set once a behaviour has noticed the close of a peer."""
        self._behaviour = behaviour
        self._tls = tls
        self._changed = threading.Condition()
        self._peers: list[Peer] = []
        self._tls_errors: list[OSError] = []
        self._is_running = False
        self._listening: socket.socket
        self._accepting: threading.Thread
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        host = {"127.0.0.1": "localhost", "::1": "[::1]"}.get(self.host, self.host)
        return f"{'ws' if self._tls is None else 'wss'}://{host}:{self.port}"

    @property
    def peers(self) -> list[Peer]:
        """All connections, including connections with a failed TLS handshake."""
        with self._changed:
            return self._peers.copy()

    @property
    def sent(self) -> int:
        """Bytes sent to all peers."""
        return sum(peer.sent for peer in self.peers)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._listening = self.listen()
        self.port = self._listening.getsockname()[1]
        self._is_running = True
        self._accepting = threading.Thread(target=self._accept, name="raw server")
        self._accepting.start()

    def listen(self) -> socket.socket:
        """Prepare for connections, before the first connection."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.create_server((self.host, self.port), family=family)

    def stop(self) -> None:
        """Stop listening, and abort all connections."""
        if not self._is_running:
            return
        self._is_running = False
        # Wakes the thread, which a close does not. From now on connections are refused.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join(PATIENCE)
        self._listening.close()
        for peer in self.peers:
            peer.abort()
        while self._threads:
            thread = self._threads.pop()
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{self._behaviour} does not end"

    def wait_for_peer(self, n: int = 1, seconds: float = PATIENCE) -> Peer:
        """Wait for the n-th connection, and return its peer."""
        return self._wait_for(self._peers, n, "peers", seconds)

    def wait_for_tls_error(self, n: int = 1, seconds: float = PATIENCE) -> OSError:
        """Wait for the n-th failed TLS handshake, and return its error."""
        return self._wait_for(self._tls_errors, n, "failed TLS handshakes", seconds)

    def _wait_for(self, arrivals: list[T], n: int, what: str, seconds: float) -> T:
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(arrivals) >= n, seconds)
            assert arrived, f"{len(arrivals)} instead of {n} {what} within {seconds} s"
            return arrivals[n - 1]

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listening.accept()
            except ConnectionAbortedError:
                continue
            except OSError:
                if self._is_running:
                    raise
                return
            # Without Nagle's algorithm small writes arrive separately and at once.
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(accepted)
            self._threads.append(threading.Thread(target=self._meet, args=(peer,), name="raw server's peer"))
            with self._changed:
                self._peers.append(peer)
                self._changed.notify_all()
            self._threads[-1].start()

    def _meet(self, peer: Peer) -> None:
        try:
            if self._tls is None or self._secure(peer, self._tls):
                self._behaviour(peer)
        except OSError:
            if self._is_running:
                peer.gone.set()
                self.peer_closed.set()
        finally:
            peer.close()

    def _secure(self, peer: Peer, tls: ssl.SSLContext) -> bool:
        try:
            peer.secure(tls)
        except OSError as error:
            with self._changed:
                self._tls_errors.append(error)
                self._changed.notify_all()
            return False
        return True


def event(name: str, payload: dict[str, object], ref: int | None = None) -> bytes:
    """Return the content of a frame of the portal."""
    return json.dumps({"topic": "relay", "event": name, "payload": payload, "ref": ref}).encode()


def frame(opcode: int, payload: bytes, *, is_last: bool = True, reserved: int = 0, mask: bytes | None = None) -> bytes:
    """Encode a frame of RFC 6455 §5.2, valid or invalid."""
    first, masked = is_last << 7 | reserved << 4 | opcode, (mask is not None) << 7
    if mask is not None:
        payload = mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    length = len(payload) - len(mask or b"")
    if length < 126:
        return bytes((first, masked | length)) + payload
    return struct.pack("!BBH", first, masked | 126, length) + payload


@dataclass(frozen=True)
class Recital:
    """A behaviour that sends scripted data regardless of received data."""

    name: str
    text: bytes
    refrain: bytes = b""
    """Repeated data after the beginning; empty for silence."""
    drips: bool = False
    """Whether each byte is sent separately."""
    opening: Callable[[Peer], object] = Peer.read_head

    def __str__(self) -> str:
        return self.name

    def __call__(self, peer: Peer) -> None:
        self.opening(peer)
        self._say(peer, self.text)
        while self.refrain:
            self._say(peer, self.refrain)
        peer.wait()

    def _say(self, peer: Peer, text: bytes) -> None:
        if not self.drips:
            peer.send(text)
            return
        for byte in text:
            peer.send(bytes((byte,)))
            peer.wait(DRIP_SECONDS)


def upgraded(recital: Recital) -> Recital:
    """Start the recital after a valid opening handshake."""
    return replace(recital, opening=Peer.upgrade)


def joined(recital: Recital) -> Recital:
    """Start the recital once the relay has joined."""
    return replace(recital, opening=Peer.join)


def redirect_to(location: str) -> Recital:
    return Recital("redirect", f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())


_SWITCH = b"HTTP/1.1 101 Switching Protocols\r\n"
_UPGRADE = _SWITCH + b"Upgrade: websocket\r\nConnection: Upgrade\r\n"

SILENCE = Recital("silence", b"", opening=Peer.wait)
NO_UPGRADE_HEADERS = Recital("no upgrade headers", _SWITCH + b"Server: none\r\n\r\n")
ENDLESS_HEADERS = Recital("endless headers", _UPGRADE, (b"X-Padding: " + b"x" * 50 + b"\r\n") * 100)
DRIPPING_HANDSHAKE = Recital("dripping handshake", _UPGRADE + b"X-Padding: ", b"x", drips=True)
ENDLESS_REFUSAL = Recital(
    "endless refusal",
    b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n" % 2**40,
    b"x" * 65536,
)

HUGE_FRAME = Recital("huge frame", struct.pack("!BBQ", 0x81, 127, 2**40), b"x" * 65536)
ENDLESS_FRAGMENTS = Recital(
    "endless fragments", frame(TEXT, b'"', is_last=False), frame(CONTINUATION, b"x" * 1000, is_last=False) * 50
)
ENDLESS_PINGS = Recital("endless pings", b"", frame(PING, b"x" * 125) * 100)
ENDLESS_EVENTS = Recital("endless events", b"", frame(TEXT, event("nonsense", {})) * 100)
RESERVED_BITS = Recital("reserved bits", frame(TEXT, event("init", {}), reserved=4))
MASKED_FRAME = Recital("masked frame", frame(TEXT, event("init", {}), mask=b"mask"))
INVALID_UTF8 = Recital("invalid UTF-8", frame(TEXT, b'{"topic": "relay\xff\xfe"}'))
DRIPPING_FRAME = Recital("dripping frame", frame(TEXT, event("init", {}).ljust(10_000)), drips=True)
