"""HTTP proxies: selection, and tunnels through a proxy (RFC 9110 §9.3.6)."""

import base64
import math
import re
import socket
import time
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from relay.core.secret import Secret

_LONGEST_ANSWER = 16 * 1024
_DEFAULT_PORT = 80
_STATUS = re.compile(rb"HTTP/\S* (\d{3})")


class ProxyCredentials(Secret):
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
        """Return the proxy for a host from HTTPS_PROXY, HTTP_PROXY and NO_PROXY, or None.

        Raises:
            ValueError: the variable has no HTTP proxy. The message shows no password.
        """
        # The import takes a fifth of the start of the command line. Only relays with a portal need the module.
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
            # Without the message of the exception, which may contain the password.
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
    """Open a tunnel to a host through a proxy connection, within the timeout of ``through``.

    Raises:
        OSError: the proxy refused or failed.
    """
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if proxy.credentials is not None:
        lines.append(f"Proxy-Authorization: {proxy.credentials.expose()}")
    through.sendall("\r\n".join([*lines, "", ""]).encode())
    status = _STATUS.match(_read_head(through))
    if status is None:
        raise ConnectionError("the proxy's answer is no HTTP")
    if not status[1].startswith(b"2"):
        raise ConnectionError(f"the proxy answered {status[1].decode()}")


def _read_head(through: socket.socket) -> bytes:
    """Return the head of the proxy's response. Read byte by byte, because the following bytes belong to the tunnel."""
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
