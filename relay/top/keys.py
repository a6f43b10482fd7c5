"""What keys do."""

import re
from collections.abc import Iterator

from relay.top.view import Wishes

QUIT = frozenset({"q", "Q", "\x03", "\x04"})

_SORTS = {
    "r": "rate",
    "t": "traffic",
    "a": "age",
    "e": "expiry",
    "c": "client",
    "p": "port",
    "n": "channels",
}

_MOVES = {
    "\x1b[A": -1, "\x1bOA": -1, "k": -1,
    "\x1b[B": 1, "\x1bOB": 1, "j": 1,
}  # fmt: skip
"""Lines."""

_PAGES = {"\x1b[5~": -1, "\x1b[6~": 1}
_FIRST = frozenset({"\x1b[H", "\x1bOH", "\x1b[1~", "g"})
_LAST = frozenset({"\x1b[F", "\x1bOF", "\x1b[4~", "G"})

_KEY = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1bO.|\x1b|.", re.DOTALL)


def keys_in(data: bytes) -> Iterator[str]:
    """Give the keys in what a terminal sent; what is no text is no key."""
    for found in _KEY.finditer(data.decode(errors="ignore")):
        yield found[0]


def press(key: str, wishes: Wishes, rows: int, total: int) -> None:
    """Do what a key is for, if it is for anything.

    Args:
        key: one of `keys_in`.
        wishes: what follows from it is written here.
        rows: allocations on the screen.
        total: allocations of the relay.
    """
    last = max(0, total - rows)
    if key in _SORTS:
        # Another order begins at its beginning.
        wishes.sort, wishes.inverted, wishes.offset = _SORTS[key], False, 0
    elif key == "i":
        wishes.inverted, wishes.offset = not wishes.inverted, 0
    elif key == " ":
        wishes.paused = not wishes.paused
    elif key in {"h", "?", "H"}:
        wishes.help = not wishes.help
    elif key in _MOVES:
        wishes.offset = min(max(0, wishes.offset + _MOVES[key]), last)
    elif key in _PAGES:
        wishes.offset = min(max(0, wishes.offset + _PAGES[key] * max(1, rows - 1)), last)
    elif key in _FIRST:
        wishes.offset = 0
    elif key in _LAST:
        wishes.offset = last
    elif key == "\x1b" and wishes.help:
        wishes.help = False
