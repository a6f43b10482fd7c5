"""Which server is probed: from what an operator writes to the addresses behind it."""

import contextlib
import ipaddress
import queue
import socket
import threading
from typing import NamedTuple

from relay.core.addresses import SocketAddress

STUN_PORT = 3478
"""RFC 8489 §18.6."""

LOOKUP_TIMEOUT = 10.0
"""Seconds for a look-up; the system's own limit may be minutes."""

_LAST_PORT = 0xFFFF


class TargetError(ValueError):
    """The host can't be probed since it is misspelt or unknown; as text, one line that says so."""


class Target(NamedTuple):
    """A server as it was written."""

    host: str
    """A name, or an address without brackets."""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_target(text: str) -> Target:
    """Read ``HOST``, ``HOST:PORT``, ``[IPv6]`` or ``[IPv6]:PORT``; an IPv6 address without port may go without brackets.

    Raises:
        TargetError: it is none of these.
    """
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            raise TargetError(f"{text!r} is not an address in brackets: write [IPv6] or [IPv6]:PORT")
        port = rest[1:] if rest else str(STUN_PORT)
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        port = str(STUN_PORT)
    if not host:
        raise TargetError(f"{text!r} names no host: write HOST or HOST:PORT")
    if ":" in host and not _is_ipv6(host):
        raise TargetError(f"{host!r} is no IPv6 address: write HOST, HOST:PORT or [IPv6]:PORT")
    if not (port.isascii() and port.isdigit() and len(port) <= len(str(_LAST_PORT)) and 0 < int(port) <= _LAST_PORT):
        raise TargetError(f"{port!r} is no port: write a number from 1 to {_LAST_PORT} after the host, or leave it out")
    return Target(host, int(port))


def resolve(target: Target, timeout: float = LOOKUP_TIMEOUT) -> tuple[SocketAddress, ...]:
    """Look up the addresses of a server, in the order in which the system would try them.

    Args:
        target: the server.
        timeout: seconds.

    Raises:
        TargetError: there is none, or the look-up took too long.
    """
    found: queue.SimpleQueue[tuple[SocketAddress, ...] | TargetError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not a name"
            found.put(TargetError(f"{target.host!r} is unknown ({why}): check the spelling, or give an address"))
        else:
            found.put(tuple(dict.fromkeys(entry[4] for entry in entries)))  # type: ignore[misc]  # of both families

    # The system's look-up can't be cancelled, so it has a thread that may be left behind.
    threading.Thread(target=look_up, name="look-up", daemon=True).start()
    answer: tuple[SocketAddress, ...] | TargetError | None = None
    with contextlib.suppress(queue.Empty):
        answer = found.get(timeout=timeout)
    if answer is None:
        raise TargetError(f"the look-up of {target.host!r} took over {timeout:g} s: is DNS at work? else give an address")
    if isinstance(answer, TargetError):
        raise answer
    return answer


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
