"""The addresses of this machine to which clients sent their requests, so that packets to the clients come from there."""

import socket
from collections.abc import Container
from typing import Final, TypeAlias

from relay.core.addresses import IPV4_LENGTH, SocketAddress

ControlMessage: TypeAlias = tuple[int, int, bytes]
"""The level, the kind and the value of a control message (cmsg(3))."""

IP_PKTINFO: Final = 8
"""Has no name in the socket module (linux/in.h)."""

_SPARE_CLIENTS: Final = 4096
"""Clients without an allocation that have an entry. More need a forger, or the time of a handshake."""


class AskedAddresses(dict[SocketAddress, ControlMessage]):
    """The addresses of this machine asked by each client, as control messages for packets to the client.

    Clients ignore packets from different addresses (RFC 8656 §3: the 5-tuple). A socket bound to all sends from the
    address preferred by the route.

    Args:
        allocated: the clients with an allocation. Their entries stay, or a forged request could change or displace them.
    """

    def __init__(self, allocated: Container[SocketAddress] = (), *, is_needed: bool = False) -> None:
        super().__init__()
        self.is_needed = is_needed
        """Whether this machine has several addresses: a control message costs 0.9 µs a packet."""
        self._allocated = allocated
        self._most = _SPARE_CLIENTS

    def note(self, client: SocketAddress, kind: int, value: bytes) -> None:
        """Note the destination of a request, from its control message."""
        if not self.is_needed or client in self._allocated:
            return
        if len(self) >= self._most:
            for each in list(self):
                if each not in self._allocated:
                    self.pop(each, None)
            self._most = len(self) + _SPARE_CLIENTS
        # Link-local addresses need no help.
        if kind == IP_PKTINFO or not value.startswith(b"\xfe\x80"):
            self.put(client, _destination(kind, value))

    def put(self, client: SocketAddress, host: bytes) -> None:
        """Send to a client from a host of 4 or 16 bytes. The route decides the interface."""
        is_ipv4 = len(host) == IPV4_LENGTH
        level, kind = (socket.IPPROTO_IP, IP_PKTINFO) if is_ipv4 else (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
        self[client] = (level, kind, bytes(4) + host + bytes(4) if is_ipv4 else host + bytes(4))

    def host(self, client: SocketAddress) -> str | None:
        """Return the address asked by a client, if noted."""
        noted = self.get(client)
        if noted is None:
            return None
        _, kind, value = noted
        return socket.inet_ntop(socket.AF_INET if kind == IP_PKTINFO else socket.AF_INET6, _destination(kind, value))


def _destination(kind: int, value: bytes) -> bytes:
    """Return the local address in an in_pktinfo (after the interface) or the destination in an in6_pktinfo (before it)."""
    return value[4:8] if kind == IP_PKTINFO else value[:16]
