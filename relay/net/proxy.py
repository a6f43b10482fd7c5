"""The HTTP proxy for a host."""

import base64
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from relay.core.secret import Secret

_DEFAULT_PORT = 80


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
