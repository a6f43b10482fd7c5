"""Query parameters of ``GET /status``."""

from collections.abc import Mapping
from ipaddress import ip_network
from typing import Any, cast

from relay.status.model import Selection
from relay.status.scan import SORTS

MAX_ALLOCATIONS = 500
"""Allocations in a page."""

MAX_CHANNELS = 2000
"""Channels in a page, over all its allocations."""

_MAX_DIGITS = 9
_MAX_QUOTE = 40

_LARGEST = {"limit": MAX_ALLOCATIONS, "offset": 10**_MAX_DIGITS - 1, "channels": MAX_CHANNELS, "port": 65535}
_NETWORKS = ("client", "peer")
_CHOICES = {"sort": tuple(SORTS), "order": ("asc", "desc")}
_ASCENDING = ("expiry", "client", "port")
"""Sort keys of which the smallest comes first by default."""

_DEFAULTS: dict[str, Any] = {"limit": 100, "offset": 0, "sort": "traffic", "order": None, "channels": 16}
_DEFAULTS |= dict.fromkeys((*_NETWORKS, "port"))


def parse(query: Mapping[str, str]) -> Selection:
    """Parse the parameters of a request.

    Raises:
        ValueError: a parameter is unknown or invalid. The message is a line that says what is accepted.
    """
    read = _DEFAULTS.copy()
    for name, text in query.items():
        quoted = ascii(text[:_MAX_QUOTE]) + "..." * (len(text) > _MAX_QUOTE)
        if name in _LARGEST:
            number = int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None
            if number is None or number > _LARGEST[name]:
                raise ValueError(f"{name} is a number from 0 to {_LARGEST[name]}, not {quoted}")
            read[name] = number
        elif name in _NETWORKS:
            try:
                read[name] = str(ip_network(text, strict=False))
            except ValueError:
                raise ValueError(f"{name} is an address or a network such as 192.0.2.0/24, not {quoted}") from None
        elif name in _CHOICES:
            if text not in _CHOICES[name]:
                raise ValueError(f"{name} is one of {', '.join(_CHOICES[name])}, not {quoted}")
            read[name] = text
        else:
            raise ValueError(f"there is no parameter {name[:_MAX_QUOTE]!a}: {', '.join(_DEFAULTS)} are all there is")
    read["order"] = read["order"] or ("asc" if read["sort"] in _ASCENDING else "desc")
    return cast(Selection, read)
