"""The health and the control address: HTTP/1.1, for operators and orchestrators, not for the public's load.

A thread accepts; each connection has a thread of its own, for one request. That is few lines, and no client can keep
another waiting: there are so many connections at once, each has so many seconds for its request and for its answer in total,
and one more has the oldest that is not done with its request give way. h11 reads the requests.
"""

import errno
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import structlog

from relay.config import BadUseError, Endpoint
from relay.ops.http.crowd import Crowd, Stage, Visitor
from relay.ops.http.door import Door
from relay.ops.http.guard import Guard, anyone
from relay.ops.http.messages import (
    QUERY_PARAMETERS,
    Page,
    Pages,
    Query,
    Reception,
    Request,
    answer,
    error,
    read_query,
    render,
)
from relay.ops.machine import holder
from relay.ops.threads import yield_cpu, yield_to_others

__all__ = ["HttpEndpoint", "Limits", "Page", "Pages", "Query", "error"]

STOP_TIMEOUT = 1
"""Seconds to wait for the threads at the end."""

_BACKLOG = 64
_PIECE = 65536
"""Bytes that are given to the kernel at once."""

_LAST_READS = 64
"""Of what a client goes on to send after its answer."""

_RECEIVE_BUFFER, _SEND_BUFFER = 16384, 131072
"""Bytes that the kernel keeps for a connection; by default it is megabytes."""

_UNACKNOWLEDGED = 30_000
"""Milliseconds for which the kernel keeps what a client does not take."""

_SHORTAGE_REST = 0.1
"""Seconds to wait when the machine has no descriptor, thread or memory for a connection."""

_REST = 0.05
"""Seconds between two reads of one request."""

_LONGEST_PIECE = 0.0005
"""Seconds of work after which other threads get their chance."""

_log = structlog.get_logger("relay.ops.http")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the clients of one address may take, all together and each."""

    connections: int = 16
    request_bytes: int = 8192
    """Longest head, and longest body."""
    request_seconds: float = 5.0
    """For all of a request, however it trickles in."""
    answer_seconds: float = 30.0
    """For all of an answer."""
    answer_bytes: int = 16 << 20
    """Of all answers that are not taken yet. A single one may be longer."""
    shared: frozenset[str] = frozenset()
    """Paths of pages that do no work of their own: any number of each may be made at once."""
    turn_seconds: float = 5.0
    """For another's request of the same page to be done."""
    queue: int = 4
    """Requests that wait for that."""
    leave_seconds: float = 1.0
    """For a client to close, once it has its answer."""
    rate: int = 100
    """Connections a second, of all sources together."""
    source_rate: int = 20
    """Of one, by other machines."""
    burst: int = 2
    """Seconds' worth of either that may come at once."""


class HttpEndpoint:
    """Serves pages at one address, from its making until it is stopped.

    Args:
        name: of the option that says where.
        at: where.
        pages: what is answered to GET.
        actions: what is done and answered upon POST.
        guard: refuses requests, whatever they ask for.
        limits: for clients.

    Raises:
        BadUseError: the address is in use, or this machine does not have it.
    """

    def __init__(
        self,
        name: str,
        at: Endpoint,
        pages: Pages,
        actions: Pages | None = None,
        *,
        guard: Guard = anyone,
        limits: Limits = Limits(),
    ) -> None:
        self._listening = _listen(name, at)
        self.port: int = self._listening.getsockname()[1]
        self._name = name
        self._by_method = {"GET": pages, "HEAD": pages, "POST": actions or {}}
        self._guard = guard
        self._limits = limits
        self._crowd = Crowd(limits.connections, limits.answer_bytes)
        self._door = Door(limits.rate, limits.source_rate, limits.burst)
        self._turns = {page: threading.Lock() for page in {*pages, *(actions or {})}}
        self._queue = threading.Semaphore(limits.queue)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the address and all connections."""
        self._is_stopped = True
        # This wakes the thread that accepts; to close would not.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._crowd.disperse(STOP_TIMEOUT)
        self._thread.join(STOP_TIMEOUT)
        self._listening.close()

    def _accept(self) -> None:
        # Inherited by the threads of connections: none of them takes the CPU from one that relays.
        yield_to_others()
        while not self._is_stopped:
            time.sleep(self._door.pause(time.monotonic()))
            try:
                connection, source = self._listening.accept()
            except OSError as fault:
                if fault.errno != errno.ECONNABORTED and not self._is_stopped:
                    self._crowd.make_room()
                    time.sleep(_SHORTAGE_REST)
                continue
            visitor = Visitor(connection, self._limits.request_seconds)
            if not self._door.lets_in(source, time.monotonic()):
                visitor.turn_away()
            elif self._crowd.admit(visitor):
                self._begin(visitor)
            else:
                visitor.turn_away()

    def _begin(self, visitor: Visitor) -> None:
        try:
            threading.Thread(target=self._serve, args=(visitor,), name=f"{self._name}-request", daemon=True).start()
        except RuntimeError:
            self._crowd.leave(visitor)
            time.sleep(_SHORTAGE_REST)

    def _serve(self, visitor: Visitor) -> None:
        try:
            request = self._read(visitor)
            if request is not None:
                visitor.stage = Stage.WORKING
                give_way = _GiveWay()
                page = request if isinstance(request, Page) else self._answer(request)
                said = answer(
                    page, render(page, give_way), is_head=isinstance(request, Request) and request.method == "HEAD"
                )
                self._send(visitor, said)
                self._see_off(visitor)
        except OSError:
            pass  # it is gone, or was too slow
        finally:
            self._crowd.leave(visitor)

    def _read(self, visitor: Visitor) -> Request | Page | None:
        """Receive a request; give what to answer instead if it is none, and None if there is nothing to answer."""
        reception = Reception(self._limits.request_bytes)
        while True:
            try:
                visitor.wait_no_longer()
                data = visitor.socket.recv(self._limits.request_bytes)
            except TimeoutError:
                return error(HTTPStatus.REQUEST_TIMEOUT, f"a request has {self._limits.request_seconds:g} s")
            received = reception.receive(data)
            if received is not None or not data or visitor.is_cut:
                return None if visitor.is_cut else received
            # Nearly all send a request in one go. To look at each byte of the others would take a client's pleasure of CPU.
            time.sleep(_REST)

    def _answer(self, request: Request) -> Page:
        refused = self._guard(request)
        if refused is not None:
            return refused
        page = self._by_method.get(request.method, {}).get(request.path)
        if page is not None:
            return self._call(page, request)
        if allowed := [each for each, pages in self._by_method.items() if request.path in pages]:
            text = f"{' and '.join(allowed)} is all there is"
            return error(HTTPStatus.METHOD_NOT_ALLOWED, text, ("Allow", ", ".join(allowed)))
        return Page(HTTPStatus.NOT_FOUND, {"error": "no such page", "pages": sorted(self._turns)})

    def _call(self, page: Callable[[Query], Page], request: Request) -> Page:
        """Have a page made, one at a time of most: several at once would only be slower and take more memory."""
        try:
            query = read_query(request.query)
        except ValueError:
            return error(HTTPStatus.BAD_REQUEST, f"give at most {QUERY_PARAMETERS} parameters, in UTF-8")
        if request.path in self._limits.shared:
            return self._make(page, query, request)
        turn = self._turns[request.path]
        if not turn.acquire(blocking=False) and not self._wait_for(turn):
            return error(HTTPStatus.SERVICE_UNAVAILABLE, "too many ask for this at once", ("Retry-After", "1"))
        try:
            return self._make(page, query, request)
        finally:
            turn.release()

    def _make(self, page: Callable[[Query], Page], query: Query, request: Request) -> Page:
        try:
            return page(query)
        except Exception:  # noqa: BLE001 - a page that fails is no reason to answer nothing
            _log.exception("a page could not be made", path=request.path)
            return error(HTTPStatus.INTERNAL_SERVER_ERROR, "this page could not be made: the log says why")

    def _wait_for(self, turn: threading.Lock) -> bool:
        if not self._queue.acquire(blocking=False):
            return False
        try:
            return turn.acquire(timeout=self._limits.turn_seconds)
        finally:
            self._queue.release()

    def _send(self, visitor: Visitor, said: bytes) -> None:
        visitor.until = time.monotonic() + self._limits.answer_seconds
        self._crowd.hold(visitor, len(said))
        rest = memoryview(said)
        while rest:
            visitor.wait_no_longer()
            rest = rest[visitor.socket.send(rest[:_PIECE]) :]

    def _see_off(self, visitor: Visitor) -> None:
        """Wait until the client closes: to close with something unread could take the answer from it (RFC 9112 §9.6)."""
        visitor.until = time.monotonic() + self._limits.leave_seconds
        self._crowd.see_off(visitor)
        visitor.socket.shutdown(socket.SHUT_WR)
        for _ in range(_LAST_READS):
            visitor.wait_no_longer()
            if not visitor.socket.recv(_PIECE):
                break


class _GiveWay:
    """Lets other threads run, when it is called and some work was done."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def __call__(self) -> None:
        if time.perf_counter() - self._since > _LONGEST_PIECE:
            yield_cpu()
            self._since = time.perf_counter()


def _listen(name: str, at: Endpoint) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in at.host else socket.AF_INET
        listening = socket.create_server((at.host, at.port), family=family, backlog=_BACKLOG)
    except OSError as fault:
        if fault.errno == errno.EADDRINUSE:
            by = holder("tcp", at.port)
            message = f"{at}/tcp is in use by {by}: stop that, or give --{name}-address another port"
        else:
            message = f"can't listen on {at}/tcp ({fault.strerror}): give --{name}-address an address of this machine"
        raise BadUseError(message) from fault
    # Connections inherit all of them.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    # Also for those that are closed here and have not taken the end of their answer.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED)
    return listening
