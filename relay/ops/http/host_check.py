"""Access check of the control address: programs and people are served, pages of web sites in a browser are not.

Any web page can make a browser send requests here. Two checks reject them. A web site can point its own name at an address
of this machine (DNS rebinding); the browser sends this name in Host. A page of another site can send a form; browsers
add Origin and Sec-Fetch-Site, which no page can omit or change.
"""

import re
from collections.abc import Iterable
from http import HTTPStatus
from ipaddress import ip_address

from relay.ops.http.messages import HttpRequest, Page, error

_HOST = re.compile(r"(?:\[(?P<literal>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]{1,5})?", re.ASCII)

_SAFE_METHODS = frozenset(("GET", "HEAD"))

_SAME_SITE = frozenset(("same-origin", "none"))
"""Values of Sec-Fetch-Site for a page of this address, and for a URL typed by the user."""


def check_host(request: HttpRequest, names: Iterable[str]) -> Page | None:
    """Return the response to a request of a web site, or None.

    Args:
        request: the request.
        names: accepted host names. IP addresses and `localhost` are always accepted.
    """
    hosts = request.headers.get("host", ())
    match = _HOST.fullmatch(hosts[0]) if hosts else None
    if match is None:
        return error(HTTPStatus.BAD_REQUEST, "the request has no valid Host header (RFC 9112 section 3.2)")
    name = match["name"] or ""
    if not (_is_address(match["literal"] or name) or name.lower().rstrip(".") in {"localhost", *map(str.lower, names)}):
        text = "unknown host name: use an IP address or localhost, or start the relay with --control-hostname"
        return error(HTTPStatus.MISDIRECTED_REQUEST, text)
    if request.method not in _SAFE_METHODS and not _is_same_site(request, hosts[0]):
        return error(HTTPStatus.FORBIDDEN, "a page of another site sent this request: use a command such as curl")
    return None


def _is_address(text: str) -> bool:
    """Check whether a host is an IP address, which no name server can redirect."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_same_site(request: HttpRequest, host: str) -> bool:
    """Check that a request comes from a page of this address, or from no browser."""
    origins, sites = request.headers.get("origin", ()), request.headers.get("sec-fetch-site", ())
    return all(origin.lower() == f"http://{host.lower()}" for origin in origins) and all(
        site in _SAME_SITE for site in sites
    )
