"""HTTP proxies: which one is to be used, and a tunnel through it (RFC 9110 §9.3.6)."""

import base64
import math
import socket
import time
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote, urlsplit

from relay.core.concealed import Concealed

_LONGEST_ANSWER = 16 * 1024
_DEFAULT_PORT = 80


class ProxyCredentials(Concealed):
    """The value of Proxy-Authorization."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy."""

    host: str
    port: int
    credentials: ProxyCredentials | None = None

    @classmethod
    def from_environment(cls, host: str, *, is_tls: bool) -> "Proxy | None":
        """Give the proxy that the environment has for a host, if any (HTTPS_PROXY, HTTP_PROXY, NO_PROXY).

        Raises:
            ValueError: it is no HTTP proxy. The message shows no password.
        """
        # A fifth of what the command line takes to start, and only a relay in a network needs it.
        import urllib.request  # noqa: PLC0415

        proxies = urllib.request.getproxies()
        url = proxies.get("https" if is_tls else "http")
        if not url or urllib.request.proxy_bypass(host, proxies):
            return None
        variable = "HTTPS_PROXY" if is_tls else "HTTP_PROXY"
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or _DEFAULT_PORT
        except ValueError:
            # Without what it says, which may have the password in it.
            raise ValueError(f"{variable} is no URL") from None
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{variable} is no http:// URL with a host: other proxies are not supported")
        return cls(parts.hostname, port, _credentials(parts.username, parts.password))


def _credentials(user: str | None, password: str | None) -> ProxyCredentials | None:
    if user is None:
        return None
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return ProxyCredentials("Basic " + base64.b64encode(pair.encode()).decode())


def open_tunnel(through: socket.socket, host: str, port: int, proxy: Proxy) -> None:
    """Have a proxy connect to a host, within the timeout of ``through``, which then leads there.

    Raises:
        OSError: it did not.
    """
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if proxy.credentials is not None:
        lines.append(f"Proxy-Authorization: {proxy.credentials.reveal()}")
    through.sendall("\r\n".join([*lines, "", ""]).encode())
    status = _status_of(_read_head(through))
    if status is None:
        raise ConnectionError("the proxy's answer is no HTTP")
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise ConnectionError(f"the proxy answered {status}")


def _read_head(through: socket.socket) -> bytes:
    """Read up to the empty line, byte by byte: what follows it is not the proxy's."""
    head = bytearray()
    timeout = through.gettimeout()
    until = math.inf if timeout is None else time.monotonic() + timeout
    while not head.endswith(b"\r\n\r\n"):
        if time.monotonic() >= until:
            raise TimeoutError("the proxy takes too long to answer")
        byte = through.recv(1)
        if not byte:
            raise ConnectionError("the proxy closed the connection")
        head += byte
        if len(head) > _LONGEST_ANSWER:
            raise ConnectionError("the proxy's answer does not end")
    return bytes(head)


def _status_of(head: bytes) -> int | None:
    version, _, rest = head.partition(b" ")
    digits = rest[:3]
    return int(digits) if version.startswith(b"HTTP/") and len(digits) == 3 and digits.isdigit() else None  # noqa: PLR2004
