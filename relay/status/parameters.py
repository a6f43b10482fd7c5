"""What can be asked for in a request for the status."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from relay.status.ranking import SORTS

MOST_ALLOCATIONS = 500
"""In one page."""

MOST_CHANNELS = 2000
"""In one page, of all its allocations together."""

_LONGEST_QUOTE = 40
_MOST_DIGITS = 9

_ORDERS = {"asc": False, "desc": True}


class Parameters(NamedTuple):
    """Which allocations are listed, and how much of them."""

    limit: int = 100
    """Allocations, `MOST_ALLOCATIONS` at most."""
    offset: int = 0
    """Allocations before them."""
    sort: str = "traffic"
    """One of `SORTS`."""
    descending: bool = SORTS["traffic"].descends
    channels: int = 16
    """Of each allocation, in the order in which they were first bound; of all together, `MOST_CHANNELS` at most."""

    @property
    def order(self) -> str:
        """Give the order as requests have it."""
        return "desc" if self.descending else "asc"


def parse(query: Mapping[str, str]) -> Parameters:
    """Read the parameters of a request.

    Raises:
        ValueError: there is something wrong with one. The message is one line that says what, and what may be given.
    """
    readers: dict[str, Callable[[str], Any]] = {
        "limit": lambda text: _number("limit", text, MOST_ALLOCATIONS),
        "offset": lambda text: _number("offset", text, 10**_MOST_DIGITS - 1),
        "sort": lambda text: _one_of("sort", text, SORTS),
        "order": lambda text: _one_of("order", text, _ORDERS),
        "channels": lambda text: _number("channels", text, MOST_CHANNELS),
    }
    for name in query:
        if name not in readers:
            raise ValueError(f"there is no parameter {quote(name)}: {', '.join(readers)} are all there is")
    given = {name: readers[name](text) for name, text in query.items()}
    descending = given.pop("order", None)
    read = Parameters(**given)
    return read._replace(descending=SORTS[read.sort].descends if descending is None else descending == "desc")


def quote(text: str) -> str:
    """Give what someone wrote, short and in one line."""
    shown = "".join(each if each.isprintable() else "?" for each in text[: _LONGEST_QUOTE + 1])
    return f"'{shown}'" if len(shown) <= _LONGEST_QUOTE else f"'{shown[:_LONGEST_QUOTE]}...'"


def _number(name: str, text: str, most: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else most + 1
    if number > most:
        raise ValueError(f"{name} is a number from 0 to {most}, not {quote(text)}")
    return number


def _one_of(name: str, text: str, known: Mapping[str, object]) -> str:
    if text not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}, not {quote(text)}")
    return text
