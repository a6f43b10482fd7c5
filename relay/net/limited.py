"""A WebSocket with a limit on the bytes of a message, for a server that is not trusted.

h11 parses the response to the upgrade, and websocket-client the frames. Neither limits a whole message.
"""

import base64
import hashlib
import os
import socket
from http import HTTPStatus
from typing import cast
from urllib.parse import urlsplit

import h11
from websocket import ABNF, WebSocketException, WebSocketProtocolException, continuous_frame, frame_buffer

from relay.core.portal.events import UpgradeRefused

MESSAGE_LIMIT = 64 * 1024
"""Bytes of a message or of an upgrade response, including headers. A portal's messages have some hundred bytes."""

SEND_TIMEOUT = 5.0
"""Seconds for a send while the send buffer is full because the server has stopped reading."""

BODY_TIMEOUT = 1.0
"""Seconds for each read of a refusal's body."""

_CONTROL_LIMIT = 125
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""The constant of RFC 6455 §1.3."""


class LimitError(Exception):
    """The server has sent too many bytes."""


class LimitedWebSocket:
    """The client's end of a WebSocket on a connected socket.

    The owner closes the socket. Another thread may shut the socket down, and so end any wait.
    """

    def __init__(self, opened: socket.socket) -> None:
        self._opened = opened
        self._left = MESSAGE_LIMIT
        # The library validates UTF-8 in Python, at 0.6 µs a byte. Decoding the text validates faster.
        self._frames = frame_buffer(self._read, skip_utf8_validation=True)
        self._fragments = continuous_frame(fire_cont_frame=False, skip_utf8_validation=True)

    def upgrade(self, url: str, headers: tuple[tuple[str, str], ...], timeout: float) -> UpgradeRefused | None:
        """Request the upgrade. Return the refusal, or None after the upgrade.

        Each read of the head of the response may take ``timeout`` seconds.

        Raises:
            h11.RemoteProtocolError: the response is not HTTP.
            WebSocketException: the response is not a valid upgrade.
            OSError: no response arrived.
            LimitError: the head of the response is too long.
        """
        parts = urlsplit(url)
        target = parts._replace(scheme="", netloc="").geturl() or "/"
        key = base64.b64encode(os.urandom(16)).decode()
        required = [
            ("Host", parts.netloc),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Version", "13"),
        ]
        request = h11.Request(method="GET", target=target, headers=[*required, ("Sec-WebSocket-Key", key), *headers])
        client = h11.Connection(h11.CLIENT, max_incomplete_event_size=MESSAGE_LIMIT)
        self._opened.settimeout(timeout)
        self._opened.sendall(client.send(request) or b"")
        client.send(h11.EndOfMessage())
        answer = self._receive_answer(client)
        if isinstance(answer, UpgradeRefused):
            return answer
        found = dict(answer.headers)
        accept = base64.b64encode(hashlib.sha1(key.encode() + _ACCEPT_GUID, usedforsecurity=False).digest())
        if (
            found.get(b"upgrade", b"").lower() != b"websocket"
            or b"upgrade" not in found.get(b"connection", b"").lower()
            or found.get(b"sec-websocket-accept") != accept
        ):
            raise WebSocketException("Invalid WebSocket Header")
        self._left = MESSAGE_LIMIT
        self._opened.settimeout(0)
        return None

    def _receive_answer(self, client: h11.Connection) -> h11.InformationalResponse | UpgradeRefused:
        """Return the 101, or any other response as a refusal. A redirect would send the token to another host."""
        response, body = None, b""
        try:
            while not isinstance(event := client.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    # Byte by byte up to the body: the bytes after a 101 are frames.
                    client.receive_data(self._read(1 if response is None else MESSAGE_LIMIT))
                elif isinstance(event, h11.Response):
                    response = event
                    self._opened.settimeout(BODY_TIMEOUT)
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.InformationalResponse) and event.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
                    return event
        except (OSError, LimitError, h11.RemoteProtocolError):
            # A refusal counts without the rest of its body, too.
            if response is None:
                raise
        assert response is not None  # noqa: S101 - it precedes the end of the message
        found = {name: value.decode("latin-1") for name, value in response.headers}
        return UpgradeRefused(response.status_code, found.get(b"retry-after"), body)

    def send(self, data: str | bytes, opcode: int = ABNF.OPCODE_TEXT) -> None:
        """Send a message or a control frame.

        Raises:
            OSError: the send failed or took too long.
        """
        self._opened.settimeout(SEND_TIMEOUT)
        try:
            self._opened.sendall(ABNF.create_frame(data, opcode).format())
        except TimeoutError:
            raise ConnectionError("it reads nothing") from None
        finally:
            self._opened.settimeout(0)

    def close(self) -> None:
        """Send a close frame with code 1000."""
        self.send(b"\x03\xe8", ABNF.OPCODE_CLOSE)

    def receive(self) -> tuple[int, bytes]:
        """Return the opcode and the content of a message or a control frame. Answer a ping or a close frame.

        Raises:
            BlockingIOError: the rest of a frame has not arrived. The next call continues.
            ssl.SSLWantReadError: the same with TLS.
            OSError: the connection has ended.
            LimitError: a message exceeds MESSAGE_LIMIT.
            WebSocketException: a frame is invalid.
        """
        while True:
            frame = self._frames.recv_frame()
            if frame.mask_value:
                # RFC 6455 §5.1
                raise WebSocketProtocolException("a masked frame")
            if frame.opcode >= ABNF.OPCODE_CLOSE:
                break
            self._fragments.validate(frame)
            self._fragments.add(frame)
            if frame.fin:
                # Not after a ping, which may arrive in the middle of a message.
                self._left = MESSAGE_LIMIT
                opcode, whole = self._fragments.extract(frame)
                return opcode, whole.data
        if len(frame.data) > _CONTROL_LIMIT:
            raise WebSocketProtocolException("a control frame is too long")
        if frame.opcode == ABNF.OPCODE_CLOSE:
            self.close()
        elif frame.opcode == ABNF.OPCODE_PING:
            self.send(frame.data, ABNF.OPCODE_PONG)
        return frame.opcode, cast(bytes, frame.data)

    def _read(self, size: int) -> bytes:
        """Return some bytes, at least one."""
        if self._left <= 0:
            raise LimitError(f"it sent a message of more than {MESSAGE_LIMIT} bytes")
        data = self._opened.recv(min(size, self._left))
        if not data:
            raise ConnectionError("it closed the connection")
        self._left -= len(data)
        return data
