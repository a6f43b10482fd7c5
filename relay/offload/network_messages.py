"""Messages of rtnetlink about links, addresses and neighbours, as pyroute2 reads them. No IO.

There are few of them, so that what it takes does not matter (300 µs for a link, 50 µs for a neighbour). Importing it does:
300 ms and 25 MB. So that is done when there is a `Decoder`, which only who wants the offload has.
"""

import logging
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, TypeAlias, TypeVar

from relay.offload.layout import packed_address
from relay.offload.network import Address, Link, Neighbour, NeighbourState

_Message: TypeAlias = Any
"""One of pyroute2, which has no types."""

T = TypeVar("T")

_ETHERNET: Final = 1
_UP, _RUNNING = 0x1, 0x40
_PROXY: Final = 0x08
"""A neighbour that this machine answers for, on the link that the entry is about."""

_TENTATIVE, _FAILED = 0x40, 0x08
_8021Q: Final = 0x8100
_LINK: Final = struct.Struct("=16xBxxxi")
"""What a message about a link has behind its header: family, index."""


class Kind(IntEnum):
    """What a message is about."""

    NEW_LINK = 16
    GONE_LINK = 17
    NEW_ADDRESS = 20
    GONE_ADDRESS = 21
    NEW_ROUTE = 24
    GONE_ROUTE = 25
    NEW_NEIGHBOUR = 28
    GONE_NEIGHBOUR = 29
    NEW_RULE = 32
    GONE_RULE = 33
    NEW_SHARED_HOP = 104
    GONE_SHARED_HOP = 105


def link_index(message: bytes) -> int | None:
    """Tell which link a message is about; None if it is about a bridge's or an address family's view of it, or too short."""
    if len(message) < _LINK.size:
        return None
    family, index = _LINK.unpack_from(message)
    return index if family == socket.AF_UNSPEC else None


class Decoder:
    """Reads messages, with their headers. What makes no sense is None, whatever it is."""

    def __init__(self) -> None:
        from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # type: ignore[import-untyped]  # noqa: PLC0415 - see above
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # type: ignore[import-untyped]  # noqa: PLC0415
        from pyroute2.netlink.rtnl.ndmsg import ndmsg  # type: ignore[import-untyped]  # noqa: PLC0415

        # It writes a traceback about each message that it doesn't understand.
        logging.getLogger("pyroute2").setLevel(logging.CRITICAL + 1)
        self._link, self._address, self._neighbour = ifinfmsg, ifaddrmsg, ndmsg

    def link(self, message: bytes) -> Link | None:
        """Read NEW_LINK."""
        return None if link_index(message) is None else _read(self._link, _link, message)

    def address(self, message: bytes) -> Address | None:
        """Read NEW_ADDRESS."""
        return _read(self._address, _address, message)

    def neighbour(self, message: bytes) -> Neighbour | None:
        """Read NEW_NEIGHBOUR or GONE_NEIGHBOUR."""
        return _read(self._neighbour, _neighbour, message)


def _read(kind: Callable[[bytes], _Message], convert: Callable[[_Message], T | None], message: bytes) -> T | None:
    try:
        decoded = kind(message)
        decoded.decode()
        return convert(decoded)
    except Exception:  # noqa: BLE001 - it is not said what pyroute2 raises; whatever it is, it is about this message alone
        return None


def _mac(text: str | None) -> bytes:
    return bytes.fromhex(text.replace(":", "")) if text else b""


def _link(message: _Message) -> Link | None:
    name, mtu = message.get_attr("IFLA_IFNAME"), message.get_attr("IFLA_MTU")
    if name is None or mtu is None:
        return None  # news about radio, without what a link is
    ipv6 = message.get_nested("IFLA_AF_SPEC", "AF_INET6", "IFLA_INET6_CONF") or {}
    kind = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""
    ethernet = message["ifi_type"] == _ETHERNET
    link = Link(
        ifindex=message["index"],
        name=name,
        mac=_mac(message.get_attr("IFLA_ADDRESS")) if ethernet else b"",
        mtu=mtu,
        ipv6_mtu=min(ipv6.get("mtu") or mtu, mtu),
        up=message["flags"] & (_UP | _RUNNING) == _UP | _RUNNING,
        ethernet=ethernet,
        kind=kind,
    )
    # The other end of a veth pair is called its link, too; and one in another namespace has a number of that one.
    if kind != "vlan" or message.get_attr("IFLA_LINK_NETNSID") is not None:
        return link
    data = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    if data is None or data.get_attr("IFLA_VLAN_PROTOCOL", _8021Q) != _8021Q:
        return link
    return link._replace(parent=message.get_attr("IFLA_LINK") or 0, vlan=data.get_attr("IFLA_VLAN_ID") or 0)


def _address(message: _Message) -> Address | None:
    # With a peer's address, IFA_ADDRESS is that one.
    host = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    if message["family"] not in (socket.AF_INET, socket.AF_INET6) or host is None:
        return None
    flags = message.get_attr("IFA_FLAGS", message["flags"])
    return Address(message["index"], packed_address(host), message["scope"], bool(flags & (_TENTATIVE | _FAILED)))


def _neighbour(message: _Message) -> Neighbour | None:
    host = message.get_attr("NDA_DST")
    if message["family"] not in (socket.AF_INET, socket.AF_INET6) or host is None or message["flags"] & _PROXY:
        return None
    mac = _mac(message.get_attr("NDA_LLADDR"))
    return Neighbour(message["ifindex"], packed_address(host), mac, NeighbourState(message["state"]))
