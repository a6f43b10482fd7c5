"""Listening sockets and their connections: one request each, within limits of number, rate, time and size."""

import contextlib
import errno
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address

import h11

from relay.core.addresses import ClientAddress, SocketAddress
from relay.core.limiter import Limiter
from relay.net.threads import yield_to_others
from relay.ops.http.messages import HttpRequest, Page, error, parse_request, render, response
from relay.ops.yielder import Yielder

REJECT_COST = 0.05
"""CPU cost of a rejected connection relative to an accepted connection, which costs 0.6 ms: 2,000 rejections per second cost
as much as 100 requests. So a flood of one source leaves room in the kernel's queue for connections of other sources."""

LEAST_PAUSE = 0.01
"""Seconds. After each pause the connections of a flood are rejected together, which costs 25 µs each instead of 80 µs."""

STOP_TIMEOUT = 1
"""Seconds to wait for the threads in `stop`."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: discard unsent data on close, so the data takes no kernel memory."""

_SEND_SIZE = 65536
"""Bytes passed to the kernel in a call."""

_LAST_READS = 64
"""Reads of data that a client sends after its request."""

_READ_PAUSE = 0.05
"""Seconds between two reads of a request. Nearly all requests arrive in a single read; a trickling client must not cost a
read per byte."""

_PAUSE = 0.1
"""Seconds to the next attempt, if the machine has no descriptor, thread or memory, or no connection can be closed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an address."""

    connections: int = 16
    request_bytes: int = 8192
    """Bytes above which an incomplete head is rejected. A body is discarded."""
    request_seconds: float = 5.0
    """Total time for a request."""
    answer_seconds: float = 30.0
    """Total time for a response."""
    answer_bytes: int = 16 << 20
    """Responses that are being sent, over all connections. A single response may be larger."""
    shared: frozenset[str] = frozenset()
    """Paths that may be requested any number of times at once, because their pages only wait."""
    turn_seconds: float = 5.0
    """Time to wait for another request of the same page."""
    queue: int = 4
    """Requests that wait for another request."""
    leave_seconds: float = 1.0
    """Time for a client to close after the response."""
    rate: int = 100
    """Connections per second of all sources."""
    source_rate: int = 20
    """Connections per second of a remote address."""
    burst: int = 2
    """Seconds' worth of either rate that may arrive at once."""


@dataclass(slots=True, eq=False)
class Connection:
    """An accepted connection."""

    socket: socket.socket
    deadline: float
    """Monotonic time limit of the request, or of the response."""
    is_working: bool = False
    """Whether its page is being made. Then the connection is never closed for a new client."""
    is_done: bool = False
    """Whether the response is sent. Then the connection is the first to be closed for a new client."""
    size: int = 0
    """Bytes of a response that is being sent."""
    is_shut: bool = False
    """Whether the listener has closed the connection, or rejected it."""

    def limit_time(self) -> None:
        """Set the timeout of the next read or write to the time left.

        Raises:
            TimeoutError: no time is left.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)

    def shut(self) -> None:
        """Wake the thread of the connection, which then finds it closed."""
        self.is_shut = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. Reset the connection if the response is not sent."""
        if self.is_shut or self.size:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()


class Listener:
    """A thread that accepts the connections of a socket, and a thread that serves each connection.

    Args:
        listening: the socket.
        name: the name of the thread that accepts.
        limits: the limits of the connections.
        page_for: returns the page that a request asks for, or an error.
    """

    def __init__(self, listening: socket.socket, name: str, limits: Limits, page_for: Callable[[HttpRequest], Page]) -> None:
        self.listening = listening
        self.thread = 0
        """The native id of the thread that accepts; 0 if none does."""
        self._name = name
        self._limits = limits
        self._page_for = page_for
        self._limiter = AcceptLimiter(limits)
        self._changed = threading.Condition()
        self._open: dict[Connection, None] = {}
        """Open connections, in the order of their arrival."""
        self._is_stopped = False
        self._thread = threading.Thread(target=self._accept_all, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._open)

    def withdraw(self) -> None:
        """Accept no more, because another process does."""
        self._is_stopped = True

    def descriptors(self) -> list[int]:
        """Return the descriptor of the socket."""
        return [self.listening.fileno()]

    def stop(self) -> None:
        """Close the socket and all connections, and wait for their threads."""
        self._is_stopped = True
        # Unlike close(), this wakes the thread that accepts.
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        with self._changed:
            for each in self._open:
                each.shut()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._open, STOP_TIMEOUT)
        self._thread.join(STOP_TIMEOUT)
        self.listening.close()

    def _accept_all(self) -> None:
        self.thread = threading.get_native_id()
        # The threads of connections inherit this.
        yield_to_others()
        while not self._is_stopped:
            time.sleep(self._limiter.pause(time.monotonic()))
            try:
                self._accept()
            except (OSError, RuntimeError) as fault:
                if getattr(fault, "errno", None) != errno.ECONNABORTED and not self._is_stopped:
                    self._make_room()
                    time.sleep(_PAUSE)
        self.thread = 0

    def _accept(self) -> None:
        """Accept a connection.

        Raises:
            OSError: the machine has no descriptor or memory.
            RuntimeError: the machine has no thread.
        """
        accepted, source = self.listening.accept()
        connection = Connection(accepted, time.monotonic() + self._limits.request_seconds)
        if not self._limiter.allows(source, time.monotonic()) or not self._add(connection):
            connection.is_shut = True
            connection.close()
            return
        try:
            threading.Thread(target=self._run, args=(connection,), name=f"{self._name}-request", daemon=True).start()
        except RuntimeError:
            self._remove(connection)
            raise

    def _run(self, connection: Connection) -> None:
        try:
            self._serve(connection)
        except OSError:
            pass  # the client is gone or too slow, or this listener has shut the connection
        finally:
            self._remove(connection)

    def _serve(self, connection: Connection) -> None:
        received = self._read(connection)
        if received is None:
            return
        connection.is_working = True
        page = received if isinstance(received, Page) else self._page_for(received)
        is_head = isinstance(received, HttpRequest) and received.method == "HEAD"
        data = response(page, render(page, Yielder()), is_head=is_head)
        self._start_sending(connection, len(data))
        self._send(connection, data)

    def _read(self, connection: Connection) -> HttpRequest | Page | None:
        """Receive a request. Return the response if the request is invalid, and None if the client is gone."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.request_bytes)
        while True:
            try:
                connection.limit_time()
                data = connection.socket.recv(self._limits.request_bytes)
            except TimeoutError:
                text = f"the request was not complete within {self._limits.request_seconds:g} s"
                return error(HTTPStatus.REQUEST_TIMEOUT, text)
            received = parse_request(parser, data)
            if received is not None or not data or connection.is_shut:
                return None if connection.is_shut else received
            time.sleep(_READ_PAUSE)

    def _start_sending(self, connection: Connection, size: int) -> None:
        """Note the size of a response. Close the oldest connections that are sending if the sum is too large."""
        with self._changed:
            connection.size, connection.is_working = size, False
            sending = [each for each in self._open if each.size and not each.is_shut]
            excess = sum(each.size for each in sending) - self._limits.answer_bytes
            for each in sending:
                if excess > 0 and each is not connection:
                    excess -= each.size
                    each.shut()

    def _send(self, connection: Connection, data: bytes) -> None:
        connection.deadline = time.monotonic() + self._limits.answer_seconds
        rest = memoryview(data)
        while rest:
            connection.limit_time()
            rest = rest[connection.socket.send(rest[:_SEND_SIZE]) :]
        # Wait until the client closes: closing with unread data could discard the response (RFC 9112 §9.6).
        connection.deadline = time.monotonic() + self._limits.leave_seconds
        connection.size, connection.is_done = 0, True
        connection.socket.shutdown(socket.SHUT_WR)
        for _ in range(_LAST_READS):
            connection.limit_time()
            if not connection.socket.recv(_SEND_SIZE):
                break

    def _add(self, connection: Connection) -> bool:
        """Add a connection, after closing the oldest if there are too many. Return false if the listener is stopped."""
        with self._changed:
            while len(self._open) >= self._limits.connections and not self._is_stopped:
                self._make_room()
                self._changed.wait(_PAUSE)
            if not self._is_stopped:
                self._open[connection] = None
            return not self._is_stopped

    def _remove(self, connection: Connection) -> None:
        with self._changed:
            connection.close()
            self._open.pop(connection, None)
            self._changed.notify_all()

    def _make_room(self) -> None:
        """Shut the oldest connection, unless a connection is already shut and about to go."""
        with self._changed:
            idle = [each for each in self._open if not each.is_working]
            if idle and not any(each.is_shut for each in self._open):
                # A thread may wait for the CPU before it reads a request, so connections with a response are closed first.
                max(idle, key=lambda each: each.is_done).shut()


class AcceptLimiter:
    """Rate limits of new connections, per source and in total. Connections above the total wait in the kernel."""

    def __init__(self, limits: Limits) -> None:
        self._cost = 1 / limits.rate
        self._burst = float(limits.burst)
        self._sources = Limiter(limits.source_rate, limits.source_rate * limits.burst, random.SystemRandom())
        self._paid_until = 0.0

    def allows(self, source: SocketAddress, now: float) -> bool:
        """Check the rate of a source, at a monotonic time. Loopback is always allowed."""
        allowed = ip_address(source[0].partition("%")[0]).is_loopback or self._sources.allows(ClientAddress(source), now)
        self._paid_until = max(self._paid_until, now) + self._cost * (1 if allowed else REJECT_COST)
        return allowed

    def pause(self, now: float) -> float:
        """Return the seconds to wait before the next accept."""
        pause = self._paid_until - now - self._burst
        return max(pause, LEAST_PAUSE) if pause > 0 else 0.0
