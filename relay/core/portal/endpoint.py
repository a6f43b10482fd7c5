"""The portal's URL and the contents of the upgrade request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from relay.core.addresses import Family
from relay.core.credentials import RelaySecret
from relay.core.secret import Secret

_PATH = "/relay/websocket"
_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
_PRINTABLE = range(0x21, 0x7F)


class PortalToken(Secret):
    """The token that authenticates this relay to the portal."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> "PortalToken":
        """Parse a token. Remove all white space, because consoles wrap long lines.

        Raises:
            ValueError: the token is empty or has invalid characters. The message does not show the token.
        """
        token = "".join(text.split())
        if not token:
            raise ValueError("it is empty")
        if any(ord(character) not in _PRINTABLE for character in token):
            raise ValueError("it has characters that no token has")
        return cls(token)


@dataclass(frozen=True, slots=True)
class PortalUrl:
    """The URL of the portal's WebSocket for relays."""

    text: str
    host: str
    port: int
    is_tls: bool

    @classmethod
    def parse(cls, text: str) -> "PortalUrl":
        """Parse ``wss://api.example.com``. ``https`` and ``http`` mean ``wss`` and ``ws``.

        Raises:
            ValueError: the URL is invalid. The message says why.
        """
        parts = urlsplit(text.strip())
        scheme = _SCHEMES.get(parts.scheme)
        if scheme is None:
            raise ValueError("it does not begin with wss:// (or ws://, https://, http://)")
        if parts.username is not None or parts.password is not None:
            raise ValueError("it has a user or a password in it, which the portal does not want")
        if parts.query or parts.fragment:
            raise ValueError("it has a query or a fragment, which only the relay adds")
        if not parts.hostname or any(ord(character) not in _PRINTABLE for character in parts.netloc + parts.path):
            raise ValueError("it names no host")
        port = parts.port if parts.port is not None else 443 if scheme == "wss" else 80
        if port == 0:
            raise ValueError("its port is 0")
        path = parts.path.rstrip("/") + _PATH
        return cls(urlunsplit((scheme, parts.netloc, path, "", "")), parts.hostname, port, scheme == "wss")


@dataclass(frozen=True, slots=True)
class PortalConfig:
    """The relay's description of itself for the portal."""

    url: PortalUrl
    token: PortalToken
    secret: RelaySecret
    name: str | None
    public_hosts: Mapping[Family, str]
    port: int
    """The port for clients."""
    user_agent: str = field(default="relay")

    @property
    def request_url(self) -> str:
        """Return the URL of the upgrade request. The URL has no token, because proxies log URLs."""
        given = {
            "name": self.name,
            "ipv4": self.public_hosts.get(Family.IPV4),
            "ipv6": self.public_hosts.get(Family.IPV6),
            "port": self.port,
        }
        # A name from a non-UTF-8 environment has its bytes as surrogates. The original bytes are sent.
        query = urlencode({name: value for name, value in given.items() if value is not None}, errors="surrogateescape")
        return f"{self.url.text}?{query}"

    @property
    def request_headers(self) -> tuple[tuple[str, str], ...]:
        """Return the additional headers of the upgrade request."""
        return (("X-Authorization", f"Bearer {self.token.expose()}"), ("User-Agent", self.user_agent))
