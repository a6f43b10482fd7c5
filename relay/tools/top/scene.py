"""Content of the view: the latest response, past rates, and the settings that keys change."""

import math
import re
from collections import deque
from dataclasses import dataclass, field

from relay.status.model import Status

KEPT = 600
"""Rates: more than a terminal has columns."""

QUIT = frozenset({"q", "Q", "\x03", "\x04"})

SORTS = {"r": "rate", "t": "traffic", "a": "age", "e": "expiry", "c": "client", "p": "port", "n": "channels"}
_LINES = {"\x1b[A": -1, "\x1bOA": -1, "k": -1, "\x1b[B": 1, "\x1bOB": 1, "j": 1}
_PAGES = {"\x1b[5~": -1, "\x1b[6~": 1}
_FIRST = frozenset({"\x1b[H", "\x1bOH", "\x1b[1~", "g"})
_LAST = frozenset({"\x1b[F", "\x1bOF", "\x1b[4~", "G"})

_KEY = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1bO.|\x1b|.", re.DOTALL)


@dataclass(slots=True)
class Scene:
    """Content of a frame."""

    address: str
    latest: Status
    """The latest response."""
    sort: str = "rate"
    offset: int = 0
    paused: bool = False
    help: bool = False
    interval: float = 0.0
    """Minimum seconds between two rates of a sparkline. Keys cause additional requests."""
    rates: deque[tuple[float, float] | None] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Bytes per second to peers and to clients, oldest first; None while the relay was unreachable."""
    is_dropping: bool = False
    """Whether the relay has dropped datagrams since the previous response."""
    problem: str | None = None
    """Why the last request failed; None if it succeeded."""
    silent_for: float = 0.0
    """Seconds since the last response."""
    rated_at: float = -math.inf
    """Uptime of the relay at the newest rate."""

    def __post_init__(self) -> None:
        self.add(self.latest)

    def add(self, status: Status) -> None:
        """Add a response. The uptime is lower than before if the relay was restarted."""
        before, self.latest, self.problem = self.latest, status, None
        self.is_dropping = _drops(status) > _drops(before)
        to_peer, to_client = status["totals"]["to_peer_rate"], status["totals"]["to_client_rate"]
        if to_peer and to_client and not 0 <= status["uptime"] - self.rated_at < self.interval:
            self.rated_at = status["uptime"]
            self.rates.append((to_peer["bytes"], to_client["bytes"]))

    def miss(self, problem: str) -> None:
        """Add a gap, because there was no response."""
        self.problem = problem
        if self.rates:
            self.rates.append(None)

    def scroll_to(self, offset: int, rows: int) -> None:
        """Show the allocations from an offset on, or the last allocations."""
        self.offset = max(0, min(offset, self.latest["matching"] - rows))


def _drops(status: Status) -> int:
    return sum(status["totals"]["drops"].values())


def keys_in(data: bytes) -> list[str]:
    """Return the keys in terminal input; bytes that are not UTF-8 are ignored."""
    return _KEY.findall(data.decode(errors="ignore"))


def press(key: str, scene: Scene, rows: int) -> None:
    """Apply a key. Unknown keys are ignored."""
    if key in SORTS:
        scene.sort, scene.offset = SORTS[key], 0
    elif key == " ":
        scene.paused = not scene.paused
    elif key in {"h", "?", "H", "\x1b"}:
        scene.help = not scene.help and key != "\x1b"
    elif key in _LINES or key in _PAGES:
        scene.scroll_to(scene.offset + _LINES.get(key, 0) + _PAGES.get(key, 0) * max(1, rows - 1), rows)
    elif key in _FIRST:
        scene.offset = 0
    elif key in _LAST:
        scene.scroll_to(scene.latest["matching"], rows)
