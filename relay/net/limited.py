"""A WebSocket with a limit on the bytes of a message, for a server that is not trusted.

h11 parses the response to the upgrade, and websocket-client the frames. Neither limits a whole message.
"""

import base64
import contextlib
import hashlib
import os
import socket
import time
from urllib.parse import urlsplit

import h11
from websocket import ABNF, WebSocket, WebSocketException, WebSocketProtocolException

from relay.core.portal.events import UpgradeRefused
from relay.net.http import Exchange, LimitError

MESSAGE_LIMIT = 64 * 1024
"""Bytes of a message, and of the head and the body of an upgrade response. A portal's messages have some hundred bytes."""

SEND_TIMEOUT = 5.0
"""Seconds for a send while the send buffer is full because the server has stopped reading."""

BODY_TIMEOUT = 1.0
"""Seconds for a refusal's body."""

_CONTROL_LIMIT = 125
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""The constant of RFC 6455 §1.3."""


def upgrade(opened: socket.socket, url: str, headers: tuple[tuple[str, str], ...], timeout: float) -> UpgradeRefused | None:
    """Request the upgrade of a connection. Return the refusal, or None after the upgrade.

    Raises:
        h11.RemoteProtocolError: the response is not HTTP.
        WebSocketException: the response is not a valid upgrade.
        OSError: no response arrived in ``timeout`` seconds, or its head is too long.
    """
    parts = urlsplit(url)
    key = base64.b64encode(os.urandom(16)).decode()
    required = [
        ("Host", parts.netloc),
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", key),
    ]
    target = parts._replace(scheme="", netloc="").geturl() or "/"
    exchange = Exchange(opened, MESSAGE_LIMIT)
    request = h11.Request(method="GET", target=target, headers=[*required, *headers])
    head = exchange.head(request, time.monotonic() + timeout)
    found = {name: value.decode("latin-1") for name, value in head.headers}
    if isinstance(head, h11.Response):
        # A redirect too: to follow it would send the token to another host.
        with contextlib.suppress(OSError, h11.RemoteProtocolError):
            # A refusal counts without the rest of its body, too.
            exchange.read_body(time.monotonic() + BODY_TIMEOUT)
        return UpgradeRefused(head.status_code, found.get(b"retry-after"), bytes(exchange.body))
    accept = base64.b64encode(hashlib.sha1(key.encode() + _ACCEPT_GUID, usedforsecurity=False).digest())
    if (
        found.get(b"upgrade", "").lower() != "websocket"
        or "upgrade" not in found.get(b"connection", "").lower()
        or found.get(b"sec-websocket-accept") != accept.decode()
    ):
        raise WebSocketException("Invalid WebSocket Header")
    return None


class LimitedWebSocket(WebSocket):
    """The client's end of a WebSocket, after the upgrade. The socket does not block.

    The owner closes the socket. Another thread may shut the socket down, and so end any wait.
    """

    def __init__(self, opened: socket.socket) -> None:
        # The library validates UTF-8 in Python, at 0.6 µs a byte. Decoding the text validates faster.
        super().__init__(enable_multithread=False, skip_utf8_validation=True)
        self.frame_buffer.recv = self._read
        opened.settimeout(0)
        self._opened = opened
        self._left = MESSAGE_LIMIT

    def send(self, payload: str | bytes, opcode: int = ABNF.OPCODE_TEXT) -> int:
        """Send a message or a control frame. Return its length.

        Raises:
            OSError: the send failed or took too long.
        """
        data = ABNF.create_frame(payload, opcode).format()
        self._opened.settimeout(SEND_TIMEOUT)
        try:
            self._opened.sendall(data)
        except TimeoutError:
            raise ConnectionError("it reads nothing") from None
        finally:
            self._opened.settimeout(0)
        return len(data)

    def receive(self) -> tuple[int, bytes]:
        """Return the opcode and the content of a message or a control frame. Answer a ping or a close frame.

        Raises:
            BlockingIOError: the rest of a frame has not arrived. The next call continues.
            ssl.SSLWantReadError: the same with TLS.
            OSError: the connection has ended, or a message exceeds MESSAGE_LIMIT.
            WebSocketException: a frame is invalid.
        """
        opcode, content = self.recv_data(control_frame=True)
        if opcode < ABNF.OPCODE_CLOSE:
            # Not after a ping, which may arrive in the middle of a message.
            self._left = MESSAGE_LIMIT
        return opcode, content

    def recv_frame(self) -> ABNF:
        """Return a frame that follows two more rules of RFC 6455: §5.1 and §5.5."""
        frame: ABNF = super().recv_frame()  # type: ignore[no-untyped-call]
        if frame.mask_value:
            raise WebSocketProtocolException("a masked frame")
        if frame.opcode >= ABNF.OPCODE_CLOSE and len(frame.data) > _CONTROL_LIMIT:
            raise WebSocketProtocolException("a control frame is too long")
        return frame

    def _read(self, size: int) -> bytes:
        """Return some bytes, at least one."""
        if self._left <= 0:
            raise LimitError(f"it sent a message of more than {MESSAGE_LIMIT} bytes")
        data = self._opened.recv(min(size, self._left))
        if not data:
            raise ConnectionError("it closed the connection")
        self._left -= len(data)
        return data
