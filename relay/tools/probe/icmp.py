"""ICMP errors of a connected UDP socket: the sender and the reason (ip(7), IP_RECVERR)."""

import contextlib
import socket
import struct
from typing import NamedTuple

from relay.core.addresses import SocketAddress

# Constants of Linux that Python's socket module lacks: level, RECVERR, MTU_DISCOVER, and the host in a sockaddr.
_OPTIONS = {
    socket.AF_INET: (socket.IPPROTO_IP, 11, 10, slice(4, 8)),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25, 23, slice(8, 24)),
}
_PMTUDISC_WANT, _PMTUDISC_PROBE = 1, 3
_ERROR = struct.Struct("=4xBBB9x")
"""sock_extended_err: origin, type and code. The address of the sender follows."""

_PROHIBITED = "administratively prohibited"
_REASONS = {
    **{(2, 3, code): f"{target} unreachable" for code, target in enumerate(("network", "host", "protocol", "port"))},
    **{(2, 3, code): f"{target}{_PROHIBITED}" for code, target in ((9, "network "), (10, "host "), (13, ""))},
    **{(3, 1, code): f"{target} unreachable" for code, target in ((0, "network"), (3, "address"), (4, "port"))},
    **{(3, 1, code): reason for code, reason in ((1, _PROHIBITED), (5, "source rejected"), (6, "route rejected"))},
}
"""By origin (2: ICMP, 3: ICMPv6), type and code (RFC 792, 1812 §5.2.7.1, 4443 §3.1)."""


class Rejection(NamedTuple):
    """An ICMP error in response to a packet."""

    reason: str
    host: str
    """The sender."""

    @property
    def advice(self) -> str:
        """The fix."""
        return f"open the UDP ports in the firewall of {self.host}, or fix its routes"

    def is_by_firewall(self, server: SocketAddress) -> bool:
        """Return whether a firewall rejected the packet, not a closed port of the server."""
        return self.reason != "port unreachable" or self.host != server[0]

    def __str__(self) -> str:
        return f"{self.host} rejects packets (ICMP {self.reason})"


def report_icmp_errors(opened: socket.socket) -> None:
    """Make ICMP errors readable by `read_rejection`."""
    level, recverr, _, _ = _OPTIONS[opened.family]
    opened.setsockopt(level, recverr, 1)


def forbid_fragments(opened: socket.socket, *, forbidden: bool) -> None:
    """Send each packet whole (DF) whatever the known path MTU, or as the system usually does."""
    level, _, mtu_discover, _ = _OPTIONS[opened.family]
    opened.setsockopt(level, mtu_discover, _PMTUDISC_PROBE if forbidden else _PMTUDISC_WANT)


def read_rejection(opened: socket.socket) -> Rejection | None:
    """Read all ICMP errors, and return the last rejection. The socket becomes non-blocking."""
    opened.settimeout(0)
    found = None
    with contextlib.suppress(OSError):
        while True:
            for _, _, data in opened.recvmsg(0, 512, socket.MSG_ERRQUEUE)[1]:
                reason = _REASONS.get(_ERROR.unpack_from(data))
                if reason is not None:
                    host = data[_ERROR.size :][_OPTIONS[opened.family][3]]
                    found = Rejection(reason, socket.inet_ntop(opened.family, host))
    return found
