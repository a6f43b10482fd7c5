"""Where the portal is, and what is said to it in the upgrade request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from relay.core.addresses import Family
from relay.core.concealed import Concealed
from relay.core.credentials import RelaySecret

_PATH = "/relay/websocket"
_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
_PRINTABLE = range(0x21, 0x7F)


class PortalToken(Concealed):
    """What proves to the portal that this relay belongs to its network."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> "PortalToken":
        """Read a token, white space around it left out.

        Raises:
            ValueError: it is empty, or has characters that no token has. The message does not show it.
        """
        stripped = text.strip()
        if not stripped:
            raise ValueError("it is empty")
        if any(ord(character) not in _PRINTABLE for character in stripped):
            raise ValueError("it has white space or other characters in it that no token has")
        return cls(stripped)


@dataclass(frozen=True, slots=True)
class PortalUrl:
    """Where the portal's WebSocket for relays is."""

    text: str
    host: str
    port: int
    is_tls: bool

    @classmethod
    def parse(cls, text: str) -> "PortalUrl":
        """Read ``wss://api.example.com``; ``https`` and ``http`` are taken as ``wss`` and ``ws``.

        Raises:
            ValueError: it is no such URL. The message says what is wrong.
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
    """What the relay tells the portal about itself."""

    url: PortalUrl
    token: PortalToken
    secret: RelaySecret
    name: str | None
    public_hosts: Mapping[Family, str]
    port: int
    """Where clients are answered."""
    user_agent: str = field(default="relay")

    @property
    def request_url(self) -> str:
        """The URL of the upgrade request. The token is not in it: proxies log URLs."""
        given = {
            "name": self.name,
            "ipv4": self.public_hosts.get(Family.IPV4),
            "ipv6": self.public_hosts.get(Family.IPV6),
            "port": self.port,
        }
        # A name from an environment that is not UTF-8 has its bytes as surrogates: they are sent as they were.
        query = urlencode({name: value for name, value in given.items() if value is not None}, errors="surrogateescape")
        return f"{self.url.text}?{query}"

    @property
    def request_headers(self) -> tuple[tuple[str, str], ...]:
        """Its headers, beside those of every upgrade."""
        return (("X-Authorization", f"Bearer {self.token.reveal()}"), ("User-Agent", self.user_agent))
