"""Layout of the tables shared with the XDP program: the C structures of `program.c`."""

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from operator import mul
from typing import Final, NamedTuple

_LARGEST_MTU: Final = 0xFFFF
V4_MAPPED: Final = bytes(10) + b"\xff\xff"
"""Prefix of an IPv4 address."""

ADDRESS_LENGTH: Final = len(V4_MAPPED) + 4

END: Final = struct.Struct(">16sHH")
"""A key of `clients` and `peers`: address, port, and channel number or relayed port."""

CHANNEL: Final = struct.Struct("=QQ20sII4x")
"""A value of `clients` and `peers`: nanoseconds of expiry, sum of the entry, the other end, slot and flags, place of this
end's host in `ways`."""

_CHANNEL_SUMMED: Final = struct.Struct("=20s20sQI")

HAIRPIN: Final = 1 << 31
"""A flag beside the slot in `CHANNEL`: the peer is a relayed address of this relay."""

NEXT_HOP: Final = struct.Struct("=I16s6s6s2sHIQQ")
"""A value of `next_hops`, by destination: interface, source, MAC addresses to and from, VLAN tag, MTU, flags, sum of the
entry, and the program's own time."""

_NEXT_HOP_SUMMED: Final = struct.Struct("=16sI16s6s6s2sHI")

STALE: Final = 1
"""A flag of `NEXT_HOP`: one packet per second passes through the kernel, which then probes the neighbour."""

_BITS: Final = (1 << 64) - 1
_WEIGHTS: Final = tuple(pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, 15))
_words_of_channel = struct.Struct("=13I").unpack
_words_of_next_hop = struct.Struct("=14I").unpack

OWN_ADDRESSES: Final = 16
DEVICES: Final = 16
"""Capacity of `SETTINGS`."""

SETTINGS: Final = struct.Struct(f"=HHHH{20 * OWN_ADDRESSES}sI{16 * DEVICES}s")
"""Service port, lowest and highest relayed port, number of own addresses; own addresses; number of devices; devices."""

OWN: Final = struct.Struct("=16s2sxx")
"""An own address in `SETTINGS`: address, and VLAN tag of its packets."""

DEVICE: Final = struct.Struct("=I6sHI")
"""A device in `SETTINGS`: interface, MAC address, flags, interface in routes."""

SEND_BACK: Final = 1
"""A flag of `DEVICE`: the driver can send from the receiving interface (XDP_TX)."""

STRICT: Final = 2
"""A flag of `DEVICE`: the sysctl rp_filter is 1."""

WAY: Final = struct.Struct("=2sI2x")
"""An entry of `ways`, the route to a host: VLAN tag, and interface; or 0 without a route to another machine."""
NO_WAY: Final = bytes(WAY.size)

DIRECTIONS: Final = ("to_peer", "to_client")
SIZES: Final = 16
SIZE_STEP: Final = 128
"""Bytes per step of the size histogram. The last step has no upper bound."""

USAGE: Final = struct.Struct("=QQQ8x")
"""An entry of `usage` for one CPU: packets, bytes of payload, and nanoseconds of the last packet."""


class PassReason(IntEnum):
    """Reasons for leaving a datagram to the relay's sockets, in the order of program.c."""

    NO_CHANNEL_DATA = 0
    """A request, or an unknown message."""
    ODD_LENGTH = 1
    """ChannelData with padding, or truncated."""
    UNBOUND = 2
    EXPIRED = 3
    NO_NEXT_HOP = 4
    """The next hop is unknown, or on an interface without the program."""
    STALE_NEIGHBOUR = 5
    """Makes the kernel probe the next hop."""
    TOO_LONG = 6
    """Longer than the path MTU."""
    NO_CHECKSUM = 7
    PARTIAL_CHECKSUM = 8
    """An interface was supposed to complete the checksum, but the packet did not pass through an interface."""
    SHORT_FRAME = 9
    LAST_HOP = 10
    """The hop limit is 1."""
    NO_ROOM = 11
    """The driver's headroom is too small for longer headers."""
    WRONG_WAY = 12
    """The source is an address of this machine, or its route is unknown or by another interface."""


TOTALS: Final = struct.Struct(f"={2 + 2 + 2 * SIZES + len(PassReason) + DEVICES}Q")
"""The entry of `totals` for one CPU: packets, bytes, sizes, by direction; passed packets, by reason; frames, by device."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The program's counters since it was loaded. Bytes are of payload."""

    packets: dict[str, int]
    bytes: dict[str, int]
    sizes: dict[str, tuple[int, ...]]
    """Packets by size of payload, in steps of `SIZE_STEP` bytes. The last step has no upper bound."""
    passed: dict[PassReason, int]
    """Datagrams left to the relay's sockets, by reason."""
    frames: tuple[int, ...] = ()
    """All frames that the program has received, by place of the interface in `SETTINGS`."""


class Own(NamedTuple):
    """An address of this machine."""

    address: bytes
    """16 bytes, IPv4 addresses mapped."""
    vlan: int = 0
    """The VLAN tag of packets for the address; 0 for none."""


@dataclass(frozen=True, slots=True)
class NextHop:
    """The next hop of a destination. IP addresses have 16 bytes, IPv4 addresses mapped; MAC addresses have 6."""

    ifindex: int
    """The sending interface."""
    source: bytes
    to_mac: bytes
    from_mac: bytes
    vlan: int = 0
    """The VLAN tag to insert; 0 for none."""
    mtu: int = 0
    """Bytes of the longest IP packet."""
    stale: bool = False

    def packed(self, destination: bytes) -> bytes:
        """Return the value of `next_hops` for a destination."""
        vlan, mtu, flags = self.vlan.to_bytes(2, "big"), min(self.mtu, _LARGEST_MTU), STALE if self.stale else 0
        fields = (self.ifindex, self.source, self.to_mac, self.from_mac, vlan, mtu, flags)
        return NEXT_HOP.pack(*fields, _weighted(_words_of_next_hop(_NEXT_HOP_SUMMED.pack(destination, *fields))), 0)


def packed_channel(client: bytes, peer: bytes, expires: int, slot: int, places: tuple[int, int]) -> tuple[bytes, bytes]:
    """Return the values of `clients` and of `peers` for a channel.

    Args:
        client: the key of the client.
        peer: the key of the peer.
        expires: nanoseconds of the monotonic clock.
        slot: the slot of the counters, with flags.
        places: in `ways`, of the hosts of both ends.
    """
    sum_ = _weighted(_words_of_channel(_CHANNEL_SUMMED.pack(client, peer, expires, slot)))
    weight, (of_client, of_peer) = _WEIGHTS[-1], places
    return (
        CHANNEL.pack(expires, sum_ + of_client * weight & _BITS, peer, slot, of_client),
        CHANNEL.pack(expires, sum_ + of_peer * weight & _BITS, client, slot, of_peer),
    )


def _weighted(words: tuple[int, ...]) -> int:
    """Return the sum of an entry: see `weighted` in program.c."""
    total: int = sum(map(mul, words, _WEIGHTS))
    return total & _BITS


def packed_address(host: str) -> bytes:
    """Return an address in the tables' format: 16 bytes, IPv4 addresses mapped (RFC 4291 §2.5.5.2)."""
    if ":" in host:
        return socket.inet_pton(socket.AF_INET6, host)
    return V4_MAPPED + socket.inet_aton(host)
