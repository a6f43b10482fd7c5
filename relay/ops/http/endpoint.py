"""HTTP/1.1 server of the health and the control address, for operators and orchestrators.

Each connection has a thread and carries one request, so no client delays another client. The number of connections, the time
for a request and for a response, and their sizes are limited. These threads never preempt a thread that relays packets.

An address of all interfaces has a second socket for loopback, with its own queue in the kernel, limits and connections. So a
supervisor on this machine gets responses, whatever arrives from elsewhere.
"""

import contextlib
import errno
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus

from relay.config import HTTP_OPTIONS, UsageError
from relay.logger import Logger
from relay.net.endpoint import Endpoint
from relay.ops.http.connections import Limits, Listener
from relay.ops.http.host_check import check_host
from relay.ops.http.messages import (
    MAX_PARAMETERS,
    HttpRequest,
    Page,
    Pages,
    Query,
    error,
    parse_query,
)
from relay.ops.machine import holder

__all__ = ["HttpEndpoint", "Limits", "Page", "Pages", "Query", "error"]

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the keys are compared with
"""Loopback address of each family, by the address of all interfaces."""

_BACKLOG = 64
_RECEIVE_BUFFER, _SEND_BUFFER = 16384, 131072
"""Kernel buffers of a connection, in bytes. The default is megabytes."""

_USER_TIMEOUT = 30_000
"""Milliseconds for which the kernel keeps unacknowledged data, also after the connection is closed here."""

_log = Logger("relay.ops.http")


class HttpEndpoint:
    """HTTP server at an address, until `stop` is called.

    Args:
        name: name of the address, a key of `HTTP_OPTIONS`.
        at: the address.
        pages: pages for GET.
        actions: pages for POST.
        deletions: pages for DELETE.
        hostnames: host names accepted by `check_host`; None accepts any host.
        limits: limits of the address.
        inherited: the listening sockets of another process, if this process takes its place.

    Raises:
        UsageError: the address is in use, or is not an address of this machine.
    """

    def __init__(  # noqa: PLR0913 - an address, its pages and its limits
        self,
        name: str,
        at: Endpoint,
        pages: Pages,
        actions: Pages | None = None,
        deletions: Pages | None = None,
        *,
        hostnames: Sequence[str] | None = None,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        inherited: Sequence[socket.socket] = (),
    ) -> None:
        self.name = name
        self._by_method = {"GET": pages, "HEAD": pages, "POST": actions or {}, "DELETE": deletions or {}}
        self._hostnames = hostnames
        self._turn_seconds = limits.turn_seconds
        # Concurrent requests of most pages would only be slower and take more memory.
        self._turns = {
            path: threading.Semaphore(sys.maxsize if path in limits.shared else 1)
            for each in self._by_method.values()
            for path in each
        }
        self._queue = threading.Semaphore(limits.queue)
        self.listeners = [Listener(each, name, limits, self.page_for) for each in inherited or _listen(name, at)]
        self.port: int = self.listeners[0].listening.getsockname()[1]
        """The actual port, if 0 was configured."""
        self.address = Endpoint(at.host, self.port)

    def stop(self) -> None:
        """Close the address and all connections."""
        for each in self.listeners:
            each.stop()

    def page_for(self, request: HttpRequest) -> Page:
        """Return the page that a request asks for, or an error."""
        if self._hostnames is not None and (rejected := check_host(request, self._hostnames)):
            return rejected
        parent, _, last = request.path.rpartition("/")
        path = request.path if request.path in self._turns else f"{parent}/ID"
        make = self._by_method.get(request.method, {}).get(path)
        if make is not None:
            return self._make(make, path, request.query, {"ID": last} if path != request.path else {})
        if allowed := [method for method, pages in self._by_method.items() if path in pages]:
            text = f"this page accepts {' and '.join(allowed)} only"
            return error(HTTPStatus.METHOD_NOT_ALLOWED, text, ("Allow", ", ".join(allowed)))
        return Page(HTTPStatus.NOT_FOUND, {"error": "no such page", "pages": sorted(self._turns)})

    def _make(self, make: Callable[[Query], Page], path: str, text: str, more: dict[str, str]) -> Page:
        try:
            query = parse_query(text) | more
        except ValueError:
            return error(HTTPStatus.BAD_REQUEST, f"the query is not UTF-8 or has more than {MAX_PARAMETERS} parameters")
        if not self._wait_for_turn(path):
            return error(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests of this page", ("Retry-After", "1"))
        try:
            return make(query)
        except Exception:  # noqa: BLE001 - a page that fails still gets a response
            _log.exception("a page could not be made", path=path)
            return error(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error: see the log")
        finally:
            self._turns[path].release()

    def _wait_for_turn(self, path: str) -> bool:
        """Wait for another request of the same page. Return false if too many requests wait, or after a timeout."""
        if self._turns[path].acquire(blocking=False):
            return True
        if not self._queue.acquire(blocking=False):
            return False
        try:
            return self._turns[path].acquire(timeout=self._turn_seconds)
        finally:
            self._queue.release()


def _listen(name: str, at: Endpoint) -> list[socket.socket]:
    try:
        listening = [_open(at.host, at.port)]
    except OSError as fault:
        if fault.errno == errno.EADDRINUSE:
            by = holder("tcp", at.port)
            message = f"{at}/tcp is in use by {by}: stop that, or give {HTTP_OPTIONS[name]} another port"
        else:
            message = f"can't listen on {at}/tcp ({fault.strerror}): give {HTTP_OPTIONS[name]} an address of this machine"
        raise UsageError(message) from fault
    if at.host in _LOOPBACK:
        # The kernel prefers the socket of the more specific address. Both need SO_REUSEPORT, but only now: earlier, it would
        # hide that the port is in use, and later, let another program of this user share the address.
        with contextlib.suppress(OSError):  # this machine has no such address
            listening[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.append(_open(_LOOPBACK[at.host], listening[0].getsockname()[1], reuse_port=True))
        for each in listening:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    return listening


def _open(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=reuse_port)
    # Accepted connections inherit these options.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)
    return listening
