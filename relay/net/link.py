"""One WebSocket connection, in a thread of its own, that nothing the other side does can block or fill up.

websocket-client speaks the protocol; what it leaves to its user is here: a limit on what it reads, an end to every wait, a
socket that only one thread ever reads or writes (OpenSSL wants no two), and answers to the upgrade other than 101.
"""

import collections
import contextlib
import os
import select
import socket
import ssl
import threading
from typing import Protocol

import websocket

from relay.core.portal.refusal import Refusal
from relay.net.dial import Dialer
from relay.net.metered import LimitError, MeteredSocket
from relay.net.upgrade import upgrade

UNREAD_MESSAGES = 16
"""Reports that may wait for the listener before no more is read: TCP then slows the other side down."""

STALL_TIMEOUT = 1.0
"""Seconds that a read may wait in the middle of a frame before the thread looks whether there is something to send."""


class Listener(Protocol):
    """Hears what happens to a connection, in the thread of that connection."""

    def connected(self) -> None:
        """The upgrade was answered with 101."""

    def refused(self, refusal: Refusal) -> None:
        """It was answered with something else; nothing else will be heard."""

    def text(self, text: str) -> None:
        """A text message came; `WebSocketLink.take` says that it is dealt with."""

    def other(self, kind: str) -> None:
        """A message or frame of another kind came, likewise."""

    def lost(self, reason: str) -> None:
        """There is no connection, or none any more; nothing else will be heard."""


class AbandonedError(OSError):
    """Nobody wants the connection any more."""


class WebSocketLink:
    """A connection, from dialling to its end.

    Args:
        dialer: connects.
        url: of the upgrade request.
        headers: of the upgrade request, beside those of every one.
        timeout: seconds for dialling.
        listener: hears of it; is told nothing any more after `abandon`.
    """

    def __init__(
        self, dialer: Dialer, url: str, headers: tuple[tuple[str, str], ...], timeout: float, listener: Listener
    ) -> None:
        self._dialer = dialer
        self._url = url
        self._headers = headers
        self._timeout = timeout
        self._listener = listener
        self._outgoing: collections.deque[str | None] = collections.deque()
        self._credit = threading.Semaphore(UNREAD_MESSAGES)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._abandoned = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="portal-connection", daemon=True)

    def start(self) -> None:
        """Begin to dial.

        Raises:
            RuntimeError: there is no thread to be had.
        """
        try:
            self._thread.start()
        except RuntimeError:
            os.close(self._wake)
            raise

    def send(self, text: str) -> None:
        """Send a text message, after those that wait to be sent; never waits."""
        self._leave_word(text)

    def close(self) -> None:
        """Send a close frame, after the messages that wait to be sent; never waits. `lost` follows when the other closes."""
        self._leave_word(None)

    def take(self) -> None:
        """Say that a report was dealt with: another may come."""
        self._credit.release()

    def abandon(self) -> None:
        """End it, whatever it is doing; never waits."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                # The base class's: that of an SSLSocket would change what the other thread is using.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self._leave_word(None)
        self._credit.release()

    def _leave_word(self, text: str | None) -> None:
        self._outgoing.append(text)
        with self._lock:
            if not self._is_over:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        outcome: Refusal | str
        try:
            outcome = self._serve()
        except Exception as error:  # noqa: BLE001 - whatever a library makes of hostile bytes, it is this connection's end
            outcome = _describe(error)
        with self._lock:
            self._is_over = True
            os.close(self._wake)
            opened, self._socket = self._socket, None
            abandoned = self._abandoned
        if opened is not None:
            opened.close()
        if abandoned:
            return
        if isinstance(outcome, Refusal):
            self._listener.refused(outcome)
        else:
            self._listener.lost(outcome)

    def _serve(self) -> Refusal | str:
        """Connect, and exchange messages until the end; give how it ended."""
        opened = self._dialer.dial(self._timeout, self._watch)
        metered = MeteredSocket(opened)
        # A dial leaves the socket with the timeout that it had; from here on, each wait may take as long as the attempt.
        metered.settimeout(self._timeout)
        answer = upgrade(self._url, self._headers, metered)
        if isinstance(answer, Refusal):
            return answer
        if self._abandoned:
            return "abandoned"
        metered.renew()
        metered.settimeout(STALL_TIMEOUT)
        self._listener.connected()
        return self._converse(answer, metered)

    def _watch(self, opened: socket.socket) -> None:
        """Remember the socket to shut down when this is abandoned."""
        with self._lock:
            if self._abandoned:
                raise AbandonedError
            self._socket = opened

    def _converse(self, connection: websocket.WebSocket, metered: MeteredSocket) -> str:
        poller = select.poll()
        poller.register(metered.fileno(), select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._abandoned:
            while self._outgoing:
                text = self._outgoing.popleft()
                if text is None:
                    connection.send_close()
                else:
                    connection.send(text)
            # TLS may have decrypted more than was read: then the kernel knows of nothing.
            ready = {metered.fileno()} if metered.has_pending() else {each for each, _ in poller.poll()}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if metered.fileno() in ready:
                end = self._receive(connection, metered)
                if end is not None:
                    return end
        return "abandoned"

    def _receive(self, connection: websocket.WebSocket, metered: MeteredSocket) -> str | None:
        """Read one message and report it; give how the connection ended, if it did."""
        metered.pause_after(STALL_TIMEOUT)
        try:
            opcode, frame = connection.recv_data_frame(control_frame=True)
        except websocket.WebSocketTimeoutException:
            # What has come of the frame is kept; there may be something to send in the meantime.
            return None
        if opcode in {websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY}:
            # A ping may come in the middle of a message.
            metered.renew()
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            code = int.from_bytes(frame.data[:2], "big") if len(frame.data) > 1 else "none"
            return f"it closed the connection (code {code})"
        self._credit.acquire()
        if self._abandoned:
            return "abandoned"
        if opcode == websocket.ABNF.OPCODE_TEXT:
            self._listener.text(frame.data.decode())
        else:
            self._listener.other("binary" if opcode == websocket.ABNF.OPCODE_BINARY else "control")
        return None


def _describe(error: Exception) -> str:
    """Say in words why there is no connection."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE can name other authorities"
        case ssl.SSLError():
            return f"TLS failed ({error.reason or error})"
        case socket.gaierror():
            return f"its name can't be looked up ({error.strerror})"
        case websocket.WebSocketConnectionClosedException():
            return "it closed the connection"
        case OSError() | LimitError() | websocket.WebSocketTimeoutException():
            return getattr(error, "strerror", None) or str(error) or "it does not answer"
    return f"{type(error).__name__}: {error}"
