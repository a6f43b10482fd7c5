"""One WebSocket connection in its own thread. The server can neither block the thread nor fill the memory.

Only this thread uses the socket, because OpenSSL forbids concurrent use of a connection.
"""

import collections
import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable

from websocket import ABNF

from relay.core.portal import events
from relay.core.portal.events import ConnectionEvent, UpgradeRefused
from relay.net.dial import Dialer
from relay.net.limited import LimitedWebSocket, upgrade

UNREAD_MESSAGES = 16
"""Unacknowledged messages before the thread stops reading. TCP then slows the server down."""


class WebSocketLink:
    """A connection, from dialling to its end, in a thread that starts at once.

    Args:
        dialer: connects.
        url: the URL of the upgrade request.
        headers: additional headers of the upgrade request.
        timeout: seconds for dialling, and for each read of the response to the upgrade.
        report: receives this link and every event, in the thread of the connection. `UpgradeRefused` and `ConnectionLost`
            are the last event. No event follows `abandon`.

    Raises:
        OSError: no descriptor is free.
        RuntimeError: the thread can't be started.
    """

    def __init__(
        self,
        dialer: Dialer,
        url: str,
        headers: tuple[tuple[str, str], ...],
        timeout: float,
        report: "Callable[[WebSocketLink, ConnectionEvent], None]",
    ) -> None:
        self._dialer = dialer
        self._url = url
        self._headers = headers
        self._timeout = timeout
        self._report = report
        self._outgoing: collections.deque[str | None] = collections.deque()
        self._credit = threading.Semaphore(UNREAD_MESSAGES)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._abandoned = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Wakes the thread to send; -1 after the end."""
        try:
            threading.Thread(target=self._run, name="portal-connection", daemon=True).start()
        except RuntimeError:
            os.close(self._wake)
            raise

    def send(self, text: str) -> None:
        """Queue a text message. Never wait."""
        self._enqueue(text)

    def close(self) -> None:
        """Queue a close frame. Never wait. `ConnectionLost` follows when the server closes too."""
        self._enqueue(None)

    def acknowledge(self) -> None:
        """Allow the report of another message."""
        self._credit.release()

    def abandon(self) -> None:
        """End the connection at once, in any state. Never wait."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                # Not SSLSocket.shutdown, which would change state in use by another thread.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self._enqueue(None)
        self._credit.release()

    def _enqueue(self, text: str | None) -> None:
        self._outgoing.append(text)
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        end: ConnectionEvent | None
        try:
            end = self._serve()
        except Exception as error:  # noqa: BLE001 - hostile bytes may raise anything in a library; only this connection ends
            end = events.ConnectionLost(_describe(error))
        with self._lock:
            os.close(self._wake)
            self._wake = -1
            opened, self._socket = self._socket, None
            abandoned = self._abandoned
        if opened is not None:
            opened.close()
        if end is not None and not abandoned:
            self._report(self, end)

    def _serve(self) -> UpgradeRefused | None:
        """Connect, and exchange messages until the link is abandoned. Return the refusal of the upgrade.

        Raises:
            Exception: the connection failed or has ended.
        """
        opened = self._dialer.dial(self._timeout, self._watch)
        refusal = upgrade(opened, self._url, self._headers, self._timeout)
        if refusal is None and not self._abandoned:
            self._report(self, events.Connected())
            self._exchange(LimitedWebSocket(opened), opened)
        return refusal

    def _watch(self, opened: socket.socket) -> None:
        """Remember the socket for `abandon`."""
        with self._lock:
            if self._abandoned:
                raise ConnectionAbortedError
            self._socket = opened

    def _exchange(self, connection: LimitedWebSocket, opened: socket.socket) -> None:
        poller = select.poll()
        poller.register(opened, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._abandoned:
            while self._outgoing:
                text = self._outgoing.popleft()
                if text is None:
                    connection.send_close()
                else:
                    connection.send(text)
            # TLS may hold decrypted bytes; the kernel then reports the socket as not readable.
            has_pending = isinstance(opened, ssl.SSLSocket) and opened.pending()
            ready = {opened.fileno()} if has_pending else {each for each, _ in poller.poll()}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if opened.fileno() in ready:
                self._receive(connection)

    def _receive(self, connection: LimitedWebSocket) -> None:
        """Read one message and report it."""
        try:
            opcode, content = connection.receive()
        except (BlockingIOError, ssl.SSLWantReadError):
            # Messages can be sent in the middle of a frame, too.
            return
        if opcode == ABNF.OPCODE_CLOSE:
            code = int.from_bytes(content[:2], "big") if len(content) > 1 else "none"
            raise ConnectionError(f"it closed the connection (code {code})")
        self._credit.acquire()
        if self._abandoned:
            return
        if opcode == ABNF.OPCODE_TEXT:
            self._report(self, events.TextReceived(content.decode()))
        else:
            self._report(self, events.OtherReceived(is_binary=opcode == ABNF.OPCODE_BINARY))


def _describe(error: Exception) -> str:
    """Return the reason of a failed connection in words."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE can name other authorities"
        case ssl.SSLEOFError():
            return "it closed the connection"
        case ssl.SSLError():
            return f"TLS failed ({error.reason or error})"
        case socket.gaierror():
            return f"its name can't be looked up ({error.strerror})"
        case OSError():
            return getattr(error, "strerror", None) or str(error) or "it does not answer"
    return f"{type(error).__name__}: {error}"
