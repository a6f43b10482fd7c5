"""RTM_GETROUTE: questions to the kernel's routing tables, and its answers, as bytes. No IO.

Written out here although pyroute2 knows these messages, too: a moved gateway has all destinations asked for again, and may
take a second for 16,000 of them. To decode an answer takes pyroute2 130 µs, 2 s for all, and this module 7 µs.
"""

import struct
from functools import lru_cache
from typing import Final

from relay.offload.network import LookUp, NoRoute, Outcome, Route

HEADER: Final = struct.Struct("=IHHII")
"""Of any netlink message: length, type, flags, sequence number, port."""

ERROR: Final = 2
"""The type of a message that says that a request has failed."""

_GET_ROUTE, _NEW_ROUTE = 26, 24
_REQUEST = 1
_AF_INET, _AF_INET6 = 2, 10
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
"""Family, lengths of destination and source, class, table, protocol, scope, type, flags."""

_ATTRIBUTE: Final = struct.Struct("=HH")
_WORD: Final = struct.Struct("=I")
_DST, _SRC, _OIF, _GATEWAY, _PREFSRC, _METRICS, _VIA, _ENCAP_TYPE, _IP_PROTO = 1, 2, 4, 5, 7, 8, 18, 21, 27
_METRIC_MTU = 2
_TYPE_MASK: Final = 0x3FFF
"""Without the flags that tell that an attribute has others inside, or its byte order."""

_UNICAST: Final = 1
_NO_ROUTES: Final = {
    2: NoRoute.LOCAL,
    **dict.fromkeys((3, 4, 5), NoRoute.NOT_UNICAST),  # broadcast, anycast, multicast
    **dict.fromkeys((6, 7, 8), NoRoute.UNREACHABLE),  # black hole, unreachable, prohibited
}
_MAPPED: Final = bytes(10) + b"\xff\xff"
_IPV4_LENGTH, _IPV6_LENGTH = 4, 16
# A rule may send UDP another way than the rest.
_UDP: Final = _ATTRIBUTE.pack(5, _IP_PROTO) + b"\x11\0\0\0"


def request(look_up: LookUp, sequence: int) -> bytes:
    """Write a question.

    Args:
        look_up: what is asked.
        sequence: 32 bits that the answer will have, too.
    """
    destination, source = look_up.destination, look_up.source
    family = _AF_INET6
    if destination.startswith(_MAPPED):
        family, destination, source = _AF_INET, destination[12:], source and source[12:]
    bits = 8 * len(destination)
    body = _ROUTE.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, 0) + _attribute(_DST, destination) + _UDP
    if source:
        body += _attribute(_SRC, source)
    return HEADER.pack(HEADER.size + len(body), _GET_ROUTE, _REQUEST, sequence, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def answer(message: bytes) -> tuple[int, Outcome] | None:
    """Read one message.

    Args:
        message: with its header; it may be anything.

    Returns:
        The sequence number of the question, and the answer; None for what is none.
    """
    if len(message) < HEADER.size:
        return None
    length, kind, _, sequence, _ = HEADER.unpack_from(message)
    if kind == ERROR:
        return sequence, NoRoute.UNREACHABLE
    if kind != _NEW_ROUTE:
        return None
    # Longer than what there is: cut off, as only a route with a lot around it would be.
    if not HEADER.size + _ROUTE.size <= length <= len(message):
        return sequence, NoRoute.UNKNOWN
    type_of_route = message[HEADER.size + 7]
    if type_of_route != _UNICAST:
        return sequence, _NO_ROUTES.get(type_of_route, NoRoute.UNKNOWN)
    found = _attributes(message, HEADER.size + _ROUTE.size, length).get
    return sequence, _route(*map(found, (_OIF, _GATEWAY, _VIA, _PREFSRC, _METRICS, _ENCAP_TYPE)))


def _attributes(message: bytes, offset: int, end: int) -> dict[int, bytes]:
    """Give what there is, up to what makes no sense."""
    found = {}
    unpack = _ATTRIBUTE.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(message, offset)
        if length < 4 or offset + length > end:  # noqa: PLR2004 - both are what the structure takes
            break
        found[kind & _TYPE_MASK] = message[offset + 4 : offset + length]
        offset += length + 3 & ~3
    return found


# Most destinations share one of a few ways: so they also share what is kept of it.
@lru_cache(maxsize=256)
def _route(
    interface: bytes | None,
    gateway: bytes | None,
    via: bytes | None,
    source: bytes | None,
    metrics: bytes | None,
    tunnel: bytes | None,
) -> Outcome:
    """Make sense of the values of attributes, None for those that there are not."""
    if tunnel is not None:
        return NoRoute.TUNNEL
    if interface is None or len(interface) != _WORD.size:
        return NoRoute.UNKNOWN
    # The one of another family has that in front, which its length tells as well.
    next_hop = via[2:] if gateway is None and via is not None else gateway
    if next_hop is not None and len(next_hop) not in (_IPV4_LENGTH, _IPV6_LENGTH):
        return NoRoute.UNKNOWN
    return Route(_WORD.unpack(interface)[0], _mapped(next_hop), _mapped(source), _mtu(metrics))


def _mapped(address: bytes | None) -> bytes | None:
    if address is None:
        return None
    if len(address) == _IPV4_LENGTH:
        return _MAPPED + address
    return address if len(address) == _IPV6_LENGTH else None


def _mtu(metrics: bytes | None) -> int | None:
    if not metrics:
        return None
    value = _attributes(metrics, 0, len(metrics)).get(_METRIC_MTU, b"")
    return _WORD.unpack(value)[0] or None if len(value) == _WORD.size else None
