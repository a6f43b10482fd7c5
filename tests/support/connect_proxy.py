"""A forward proxy for HTTP CONNECT."""

import base64
import contextlib
import socket
import threading
from typing import NamedTuple
from urllib.parse import quote

from tests.support.raw_server import PATIENCE, Peer, RawServer


class ConnectRequest(NamedTuple):
    """A request to the proxy."""

    line: str
    """Such as ``CONNECT localhost:8443 HTTP/1.1``."""
    authorization: str | None
    """The header Proxy-Authorization."""


class ConnectProxy(RawServer):
    """A proxy on 127.0.0.1. A context manager, or start and stop explicitly; a restart uses the same port.

    Args:
        credentials: user and password; without them the response is 407.
        port: 0 for a free port.
    """

    def __init__(self, credentials: tuple[str, str] | None = None, *, port: int = 0) -> None:
        super().__init__(self._serve, port=port)
        self.refuses = False
        """Whether all further requests get 403."""
        self._credentials = credentials
        self._requests: list[ConnectRequest] = []
        self._tunnels = 0

    @property
    def url(self) -> str:
        """The proxy's URL, including required credentials."""
        login = "" if self._credentials is None else ":".join(quote(each, safe="") for each in self._credentials) + "@"
        return f"http://{login}{self.host}:{self.port}"

    @property
    def requests(self) -> list[ConnectRequest]:
        with self._changed:
            return self._requests.copy()

    @property
    def tunnels(self) -> int:
        """Number of tunnels opened."""
        with self._changed:
            return self._tunnels

    def wait_for_request(self, n: int = 1, seconds: float = PATIENCE) -> ConnectRequest:
        """Wait for the n-th request, and return the request."""
        return self._wait_for(self._requests, n, "requests", seconds)

    def _serve(self, peer: Peer) -> None:
        rest = peer.read_head()
        line = peer.request.decode("latin-1").partition("\r\n")[0]
        request = ConnectRequest(line, peer.headers["Proxy-Authorization"])
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()
        method, _, target = line.removesuffix(" HTTP/1.1").partition(" ")
        host, _, port = target.rpartition(":")
        if method != "CONNECT" or not port.isdigit():
            _answer(peer, "400 Bad Request")
        elif self._credentials is not None and request.authorization != _basic(*self._credentials):
            _answer(peer, "407 Proxy Authentication Required", 'Proxy-Authenticate: Basic realm="tests"')
        elif self.refuses:
            _answer(peer, "403 Forbidden")
        else:
            self._tunnel(peer, (host.strip("[]"), int(port)), rest)

    def _tunnel(self, peer: Peer, target: tuple[str, int], rest: bytes) -> None:
        try:
            upstream = socket.create_connection(target, PATIENCE)
        except OSError:
            _answer(peer, "502 Bad Gateway")
            return
        peer.adopt(upstream)
        upstream.settimeout(None)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upstream.sendall(rest)
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with self._changed:
            self._tunnels += 1
            self._changed.notify_all()
        there = threading.Thread(target=_pump, args=(peer.socket, upstream), name="tunnel")
        there.start()
        _pump(upstream, peer.socket)
        there.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Forward data and the end of the stream."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        # A connection is broken, so the opposite direction is useless, too.
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _answer(peer: Peer, status: str, *headers: str) -> None:
    head = "\r\n".join((f"HTTP/1.1 {status}", "Content-Length: 0", "Connection: close", *headers))
    peer.send(f"{head}\r\n\r\n".encode())


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
