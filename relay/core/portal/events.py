"""Events of a connection to the portal. Each input of `PortalChannel.handle_event` is defined here, and only here."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Connected:
    """The portal accepted the upgrade with 101."""


@dataclass(frozen=True, slots=True)
class UpgradeRefused:
    """The portal answered the upgrade with another status. The connection has ended."""

    status: int
    retry_after: str | None = None
    """The unchecked header value."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class TextReceived:
    """A text message arrived."""

    text: str


@dataclass(frozen=True, slots=True)
class OtherReceived:
    """A binary message or a control frame arrived."""

    is_binary: bool


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The attempt failed, or the connection has ended."""

    reason: str


ConnectionEvent: TypeAlias = Connected | UpgradeRefused | TextReceived | OtherReceived | ConnectionLost
