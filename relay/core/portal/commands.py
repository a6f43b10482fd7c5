"""Commands of the portal client. Their reprs show neither the token nor the secret."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a WebSocket, and report `Connected`, `UpgradeRefused` or `ConnectionLost`."""

    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    timeout: float
    """Seconds for all name look-ups and addresses. The channel abandons the attempt after the same time."""


@dataclass(frozen=True, slots=True)
class SendText:
    """Send a text frame."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Close:
    """Send a close frame, and report `ConnectionLost` when the portal has closed too."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """End the connection or the attempt at once, in any state, without further events."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Start to answer clients: the portal sent its first `init`."""


@dataclass(frozen=True, slots=True)
class Left:
    """The channel has been left as requested."""


@dataclass(frozen=True, slots=True)
class Fatal:
    """The portal does not accept the relay. The reason says how to fix the cause, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Write a log entry, a warning or an information."""

    event: str
    fields: Mapping[str, object]
    is_warning: bool = True


PortalCommand: TypeAlias = Connect | SendText | Close | Abandon | Begin | Left | Fatal | Note
