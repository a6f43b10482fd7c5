"""What the portal client wants done. None of them shows the token or the secret."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType, TypeAlias

ConnectionId = NewType("ConnectionId", int)
"""Numbers the attempts to connect, so that what comes late from one is not taken for another's."""


class Severity(StrEnum):
    """How much a note matters."""

    INFO = "info"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a WebSocket, and report `connected`, `refused` or `lost`."""

    connection: ConnectionId
    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    timeout: float
    """Seconds. The client gives the attempt up by itself after that; name look-ups and addresses have to share it."""


@dataclass(frozen=True, slots=True)
class SendText:
    """Send a text frame."""

    connection: ConnectionId
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Close:
    """Send a close frame, and report `lost` when the portal has closed too."""

    connection: ConnectionId


@dataclass(frozen=True, slots=True)
class Abandon:
    """Let go of a connection or an attempt, whatever it is doing; no report on it is wanted any more."""

    connection: ConnectionId


@dataclass(frozen=True, slots=True)
class Begin:
    """The portal said `init` for the first time: answer clients."""


@dataclass(frozen=True, slots=True)
class Left:
    """The channel is left, as was asked, or there was none."""


@dataclass(frozen=True, slots=True)
class Fatal:
    """The relay can't belong to this portal; the reason says what to do about it, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something that operators should be able to read in the log."""

    severity: Severity
    event: str
    fields: Mapping[str, object] = field(default_factory=dict)


PortalCommand: TypeAlias = Connect | SendText | Close | Abandon | Begin | Left | Fatal | Note
