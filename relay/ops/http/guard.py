"""Who may ask at the control address: programs and people on this machine, not pages of web sites in their browsers.

A page of any site can have a browser ask here. Two things stand against it. A site whose name suddenly means an address of
this machine (DNS rebinding) is recognised by its name, which the browser puts into Host; and a page of another site that
sends a form here, by Origin and Sec-Fetch-Site, which no page can leave out or change.
"""

import re
from collections.abc import Callable
from http import HTTPStatus
from ipaddress import ip_address
from typing import TypeAlias

from relay.ops.http.messages import Page, Request, error

Guard: TypeAlias = Callable[[Request], Page | None]
"""Gives what a request is answered if it is refused, whatever it asks for."""

_HOST = re.compile(r"(?:\[(?P<literal>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]{1,5})?", re.ASCII)

_READING = frozenset(("GET", "HEAD"))

_SAME_SITE = frozenset(("same-origin", "none"))
"""What a browser says of requests of this address's own pages, and of what its user typed."""


def anyone(_: Request) -> None:
    """Refuse nobody."""


class OperatorsOnly:
    """Refuses what a page of a web site had a browser send.

    Args:
        names: by which this machine may be asked, besides its addresses and localhost.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._names = frozenset(("localhost", *(name.lower() for name in names)))

    def __call__(self, request: Request) -> Page | None:
        """Give why a request is refused, if it is."""
        hosts = request.headers.get("host", ())
        match = _HOST.fullmatch(hosts[0]) if hosts else None
        if match is None:
            return error(HTTPStatus.BAD_REQUEST, "the request names no host (RFC 9112 section 3.2)")
        name = match["name"] or ""
        if not (_is_address(match["literal"] or name) or name.lower().rstrip(".") in self._names):
            text = "this name is not known here: ask by an address or localhost, or give the relay --control-hostname"
            return error(HTTPStatus.MISDIRECTED_REQUEST, text)
        if request.method not in _READING and not _is_from_here(request, hosts[0]):
            return error(HTTPStatus.FORBIDDEN, "a page of another site sent this: use curl or the like")
        return None


def _is_address(text: str) -> bool:
    """Tell whether a host is an address: no name server can make that mean another machine."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_from_here(request: Request, host: str) -> bool:
    """Tell whether a request comes from no browser, or from a page of the address itself."""
    origins, sites = request.headers.get("origin", ()), request.headers.get("sec-fetch-site", ())
    return all(origin.lower() == f"http://{host.lower()}" for origin in origins) and all(
        site in _SAME_SITE for site in sites
    )
