"""The upgrade of a connection to a WebSocket, and the answers to it that are none."""

import contextlib
import http.client
import io
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import websocket
from websocket._handshake import CookieJar  # see `upgrade`

from relay.core.portal.refusal import Refusal
from relay.net.metered import MESSAGE_LIMIT, LimitError, MeteredSocket

BODY_TIMEOUT = 1.0
"""Seconds that each read of a body may take whose end nothing tells."""


class StrictWebSocket(websocket.WebSocket):
    """A WebSocket that takes no masked frame from a server (RFC 6455 §5.1), as the library does."""

    def recv_frame(self) -> websocket.ABNF:
        """Read a frame."""
        frame: websocket.ABNF = super().recv_frame()  # type: ignore[no-untyped-call]
        if frame.mask_value:
            raise websocket.WebSocketProtocolException("a masked frame")
        return frame


def upgrade(url: str, headers: tuple[tuple[str, str], ...], through: MeteredSocket) -> websocket.WebSocket | Refusal:
    """Ask for the upgrade; give the WebSocket, or the answer that is none.

    Args:
        url: of the request.
        headers: beside those of every such request.
        through: the connection; its timeout is that of each read.

    Raises:
        websocket.WebSocketException: the answer is no HTTP, or no WebSocket's.
        OSError: there was none.
        LimitError: it was too long.
    """
    # It checks texts in Python, at 0.6 µs a byte; whoever decodes one finds out for less.
    connection = StrictWebSocket(skip_utf8_validation=True)
    # Whatever cookies an earlier connection was given would be sent, and kept for the life of the process.
    CookieJar.jar.clear()
    lines = [f"{name}: {value}" for name, value in headers]
    try:
        connection.connect(  # type: ignore[no-untyped-call]
            url, header=lines, socket=through, redirect_limit=0, suppress_origin=True, timeout=through.gettimeout()
        )
    except websocket.WebSocketBadStatusException as error:
        if error.status_code is None:
            raise websocket.WebSocketException("its answer to the upgrade has no status") from error
        found = error.resp_headers or {}
        body = error.resp_body if error.resp_body is not None else _body_without_length(found, through)
        return Refusal(error.status_code, found.get("retry-after"), body)
    except websocket.WebSocketException:
        if connection.status is not None and connection.status != HTTPStatus.SWITCHING_PROTOCOLS:
            # A redirect. Following it would hand the token to whoever it names.
            return Refusal(connection.status)
        raise
    return connection


class _Received:
    """Bytes, as `http.client` takes a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any) -> io.BytesIO:  # noqa: ANN401 - a mode, which is always "rb"
        return io.BytesIO(self._data)


def _body_without_length(headers: Mapping[str, str], metered: MeteredSocket) -> bytes:
    """Read a body whose length the headers don't tell, as far as it comes: websocket-client leaves it."""
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    body = b""
    metered.settimeout(BODY_TIMEOUT)
    with contextlib.suppress(OSError, LimitError):
        while data := metered.recv(MESSAGE_LIMIT):
            body += data
            if chunked and body.endswith(b"0\r\n\r\n"):
                break
    if not chunked:
        return body
    # A socket is all that it reads from.
    response = http.client.HTTPResponse(_Received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body))  # type: ignore[arg-type]
    try:
        response.begin()
        return response.read()
    except http.client.IncompleteRead as error:
        return error.partial
    except (http.client.HTTPException, ValueError, OverflowError):
        # A length that is no number, or one that no memory has.
        return b""
