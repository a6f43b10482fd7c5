"""Servers that do what no WebSocket library would: a function meets each connection, in a thread of its own.

A behaviour is that function. It ends with the OSError that it gets once the peer has closed, or once the server is stopped.
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
"""Seconds after which what was waited for will not come any more."""

DRIP_SECONDS = 0.2
"""Between two bytes of what comes slowly."""

T = TypeVar("T")

_LONGEST_HEAD = 64 * 1024
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

CONTINUATION, TEXT, PING = 0x0, 0x1, 0x9


class Peer:
    """Whoever has connected, as a behaviour sees it."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.request = b""
        """The head of what it asked for, once that was read."""
        self.sent = 0
        """Bytes that it could be sent (or that the kernel took for it)."""
        self.gone = threading.Event()
        """Set once a behaviour has found that the peer closed."""
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
        """Read an HTTP request up to its empty line, and give what came after that already."""
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
        """Those of the request that was read; their names in any case."""
        return email.message_from_bytes(self.request.partition(b"\r\n")[2])

    def upgrade(self) -> None:
        """Do the opening handshake as RFC 6455 has it."""
        self.read_head()
        key = self.headers["Sec-WebSocket-Key"]
        assert key is not None, f"no WebSocket handshake: {self.request!r}"
        accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest())
        self.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )

    def join(self) -> None:
        """Do the opening handshake, and let the relay join and begin."""
        self.upgrade()
        # It joins with ref 0 right away, so it need not be read to be answered.
        self.send(frame(TEXT, event("phx_reply", {"status": "ok", "response": {}}, ref=0)) + frame(TEXT, event("init", {})))

    def wait(self, seconds: float | None = None) -> None:
        """Let time pass, or wait until the peer closes, which is an OSError; what it sends is thrown away."""
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
        """Do the TLS handshake."""
        self.socket.settimeout(PATIENCE)
        if not self.socket.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the peer has closed")
        # Fails if the connection was reset, as wrapping would too; but that would leave a socket behind that no one closes.
        self.socket.getpeername()
        with self._lock:
            # The wrapper takes the descriptor over: until both have happened, there is nothing to be aborted.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
            secured = self.socket
        secured.do_handshake()
        secured.settimeout(None)

    def adopt(self, other: socket.socket) -> None:
        """Have another socket end along with this one."""
        with self._lock:
            self._adopted.append(other)
            if self._is_aborted:
                _shut(other)

    def abort(self) -> None:
        """End the connection as a crash does, whatever is being done with it; its own thread closes it."""
        with self._lock:
            self._is_aborted = True
            for each in (self.socket, *self._adopted):
                _shut(each)

    def close(self) -> None:
        with self._lock:
            for each in (self.socket, *self._adopted):
                each.close()


def _shut(each: socket.socket) -> None:
    """Wake whoever reads or writes; a close alone does not. What follows the close is a reset."""
    with contextlib.suppress(OSError):
        reset_at_close(each)
        # A TLS socket's own shutdown would take the TLS away under the reader.
        socket.socket.shutdown(each, socket.SHUT_RDWR)


def reset_at_close(each: socket.socket) -> None:
    """Have the kernel send RST instead of FIN once the socket is closed."""
    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Behaviour: TypeAlias = Callable[[Peer], None]


class RawServer:
    """A TCP or TLS server. Use it as a context, or start and stop it; it comes back on the port that it had.

    Args:
        behaviour: what meets a connection, after the TLS handshake if there is one. Its return closes the connection.
        host: an address of this machine.
        port: 0 for any.
        tls: with a certificate; None for plain TCP.
    """

    def __init__(
        self, behaviour: Behaviour, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.host = host
        self.port = port
        self.peer_closed = threading.Event()
        """Set once a behaviour has found that some peer closed."""
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
        """All that have come, those included that did not get through the TLS handshake."""
        with self._changed:
            return self._peers.copy()

    @property
    def sent(self) -> int:
        """Bytes that could be sent, to all of them."""
        return sum(peer.sent for peer in self.peers)

    @property
    def tls_errors(self) -> list[OSError]:
        """What TLS handshakes have failed of."""
        with self._changed:
            return self._tls_errors.copy()

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
        """Prepare for connections, before the first of them can come."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.create_server((self.host, self.port), family=family)

    def stop(self) -> None:
        """Listen no longer, and end all connections at once, without a word to the peers."""
        if not self._is_running:
            return
        self._is_running = False
        # Wakes the thread, which a close does not; and from here on whoever connects is refused.
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
        """Wait until so many have come, and give the last of these."""
        return self._wait_for(self._peers, n, "peers", seconds)

    def wait_for_tls_error(self, n: int = 1, seconds: float = PATIENCE) -> OSError:
        """Wait until so many TLS handshakes have failed, and give what the last of these failed of."""
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
            # What is sent in small pieces arrives in small pieces, and at once.
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
    """Make what is in a frame of the portal."""
    return json.dumps({"topic": "relay", "event": name, "payload": payload, "ref": ref}).encode()


def frame(opcode: int, payload: bytes, *, is_last: bool = True, reserved: int = 0, mask: bytes | None = None) -> bytes:
    """Make a frame as RFC 6455 §5.2 has it, or as it does not."""
    first, masked = is_last << 7 | reserved << 4 | opcode, (mask is not None) << 7
    if mask is not None:
        payload = mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    length = len(payload) - len(mask or b"")
    if length < 126:
        return bytes((first, masked | length)) + payload
    return struct.pack("!BBH", first, masked | 126, length) + payload


@dataclass(frozen=True)
class Recital:
    """A behaviour that says what it has to say, whatever it is told."""

    name: str
    text: bytes
    refrain: bytes = b""
    """What follows again and again; if there is none, silence."""
    drips: bool = False
    """Whether it comes byte by byte."""
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
    """Have it begin after a proper opening handshake."""
    return replace(recital, opening=Peer.upgrade)


def joined(recital: Recital) -> Recital:
    """Have it begin once the relay has joined."""
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
BEFORE_UPGRADE = (SILENCE, NO_UPGRADE_HEADERS, ENDLESS_HEADERS, DRIPPING_HANDSHAKE, ENDLESS_REFUSAL)
"""Answers to the upgrade request that are none."""

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
AFTER_UPGRADE = (
    *(HUGE_FRAME, ENDLESS_FRAGMENTS, ENDLESS_PINGS, ENDLESS_EVENTS),
    *(RESERVED_BITS, MASKED_FRAME, INVALID_UTF8, DRIPPING_FRAME),
)
"""What follows a proper opening handshake, once given to `upgraded` or `joined`."""
