"""A socket for a library that trusts the other side: it reads no more than it may, and no send of its own waits for long."""

import math
import socket
import ssl
import time

MESSAGE_LIMIT = 64 * 1024
"""Bytes of a message, or of an answer to the upgrade, with all headers. A portal's messages have some hundred."""

SEND_TIMEOUT = 5.0
"""Seconds for a frame to be taken by a kernel whose send buffer is full: the other side has stopped reading."""


class LimitError(Exception):
    """The other side sent more than it may."""


class MeteredSocket:
    """What websocket-client takes for a socket: it reads no more than is allowed, and a send that stalls ends it."""

    # websocket-client closes what is not closed; here that is up to whoever opened it.
    _closed = True

    def __init__(self, opened: socket.socket) -> None:
        self._opened = opened
        self._left = MESSAGE_LIMIT
        self._pause_at = math.inf

    def pause_after(self, seconds: float) -> None:
        """Let reads end with a timeout after some seconds, even if each of them gets something."""
        self._pause_at = time.monotonic() + seconds

    def renew(self) -> None:
        """Allow another message."""
        self._left = MESSAGE_LIMIT

    def recv(self, size: int) -> bytes:
        """Read some bytes.

        Raises:
            LimitError: nothing more is allowed.
            TimeoutError: nothing came, or it is time for a pause.
        """
        if time.monotonic() >= self._pause_at:
            raise TimeoutError
        if self._left <= 0:
            raise LimitError(f"it sent a message of more than {MESSAGE_LIMIT} bytes")
        data = self._opened.recv(min(size, self._left))
        self._left -= len(data)
        return data

    def send(self, data: bytes) -> int:
        """Send all of it.

        Raises:
            ConnectionError: that took too long. A timeout would be taken for one of reading, and half a frame would be sent.
        """
        timeout = self._opened.gettimeout()
        self._opened.settimeout(SEND_TIMEOUT)
        try:
            self._opened.sendall(data)
        except TimeoutError:
            raise ConnectionError("it reads nothing") from None
        finally:
            self._opened.settimeout(timeout)
        return len(data)

    def has_pending(self) -> bool:
        """Tell whether there are bytes to read of which the kernel knows nothing any more."""
        return isinstance(self._opened, ssl.SSLSocket) and self._opened.pending() > 0

    def fileno(self) -> int:
        """Give the descriptor."""
        return self._opened.fileno()

    def gettimeout(self) -> float | None:
        """Give the timeout of a read in seconds."""
        return self._opened.gettimeout()

    def settimeout(self, seconds: float | None) -> None:
        """Set it."""
        self._opened.settimeout(seconds)

    def shutdown(self, _: int) -> None:
        """Leave that to whoever opened it."""

    def close(self) -> None:
        """Leave that to whoever opened it."""
