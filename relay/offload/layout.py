"""The tables that the relay shares with the XDP program: what `program.c` has as C structures."""

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

_LARGEST_MTU: Final = 0xFFFF
V4_MAPPED: Final = bytes(10) + b"\xff\xff"
"""In front of an IPv4 address."""

CHANNEL: Final = struct.Struct("=16sI16sIIIIII")
"""An entry of `channels`, before its version: address of the client; its port, and in the upper half the channel number;
address of the peer; its port, and in the upper half the relayed port; indices into next_hops, for the client and for the
peer; expiry (tick, its lower half); flow label; flags. What packets have too (ports, numbers, label) as it stands there: see
`in_packet`."""

CHANNEL_SIZE: Final = 64
"""With its version behind."""

PLACES: Final = 8
"""In a bucket of `clients` and `peers`, the hash tables of the ends of channels."""

PLACE_SIZE: Final = 8
"""Its lower half is the index of a channel, + 1; the upper one is of the hash. 0 if it is empty."""

in_packet = socket.htons
"""Turns a port or a channel number into the number that has its bytes in the order that packets have them in."""

HAIRPIN: Final = 1
"""A flag of `CHANNEL`: the peer is a relayed address of this relay."""

NEXT_HOP: Final = struct.Struct("=I16s16s6s6s2sHHxx")
"""An entry of `next_hops`, after its version: interface, destination, source, MAC addresses to and from, VLAN tag, MTU,
flags."""

NEXT_HOP_SIZE: Final = 64
"""With its version in front, and what only the kernel writes behind."""

STALE: Final = 1
"""A flag of `NEXT_HOP`: a packet a second goes through the kernel, which then asks for the neighbour again."""

OWN_ADDRESSES: Final = 16
DEVICES: Final = 8
"""How many of each there is room for in `SETTINGS`."""

HASH_KEYS: Final = 6
"""Numbers that keys are hashed with."""

SETTINGS: Final = struct.Struct(f"=HHHH{HASH_KEYS}QII{20 * OWN_ADDRESSES}s4xI{12 * DEVICES}s")
"""The service port, the lowest and the highest relayed port, the count of own addresses; keys of the hash; buckets less one;
ticks a second; own addresses; the count of devices, and they."""

OWN: Final = struct.Struct("=16s2sxx")
"""An own address in `SETTINGS`: address, and the VLAN tag by which packets for it come."""

DEVICE: Final = struct.Struct("=I6sH")
"""A device in `SETTINGS`: interface, MAC address, flags."""

SEND_BACK: Final = 1
"""A flag of `DEVICE`: may send from where it receives (XDP_TX)."""

DIRECTIONS: Final = ("to_peer", "to_client")
SIZES: Final = 16
SIZE_STEP: Final = 128
"""Bytes from one bound of the histogram of sizes to the next; the last one is open."""

USAGE: Final = struct.Struct("=QQQ8x")
"""An entry of `usage`, for one CPU: packets, bytes of payload, and the tick at which it was used last."""


class PassReason(IntEnum):
    """Why a datagram for the relay was left to its sockets, in the order of the program's."""

    NO_CHANNEL_DATA = 0
    """A request, or nothing the relay knows."""
    ODD_LENGTH = 1
    """ChannelData with padding behind it, or cut off."""
    UNBOUND = 2
    EXPIRED = 3
    NO_NEXT_HOP = 4
    """Where to send it is not known, or not through an interface with the program."""
    STALE_NEIGHBOUR = 5
    """Has the kernel ask whether the next hop is still where it was."""
    TOO_LONG = 6
    """For the path's MTU."""
    NO_CHECKSUM = 7
    PARTIAL_CHECKSUM = 8
    """To be completed by an interface that it never went through."""
    SHORT_FRAME = 9
    LAST_HOP = 10
    """Its hop limit is used up."""
    NO_ROOM = 11
    """The driver leaves no space for longer headers."""


TOTALS: Final = struct.Struct(f"={2 + 2 + 2 * SIZES + len(PassReason)}Q")
"""The entry of `totals`, for one CPU: packets, bytes, sizes, each by direction; and passed, by reason."""


class Own(NamedTuple):
    """An address of this machine."""

    address: bytes
    """16 bytes, IPv4 ones mapped."""
    vlan: int = 0
    """The tag by which packets for it come; 0 for none."""


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where packets for a destination go next.

    Addresses are 16 bytes, IPv4 ones mapped; MAC addresses 6.
    """

    ifindex: int
    """The interface to send from; 0 if the next hop is not known."""
    destination: bytes
    source: bytes = bytes(16)
    to_mac: bytes = bytes(6)
    from_mac: bytes = bytes(6)
    vlan: int = 0
    """The tag to put in front; 0 for none."""
    mtu: int = 0
    """Bytes of the longest IP packet."""
    stale: bool = False

    def packed(self) -> bytes:
        """Give the entry of `next_hops`, after its version."""
        return NEXT_HOP.pack(
            self.ifindex,
            self.destination,
            self.source,
            self.to_mac,
            self.from_mac,
            self.vlan.to_bytes(2, "big"),
            min(self.mtu, _LARGEST_MTU),
            STALE if self.stale else 0,
        )


def packed_address(host: str) -> bytes:
    """Give an address as the tables have it: 16 bytes, IPv4 ones mapped (RFC 4291 §2.5.5.2)."""
    if ":" in host:
        return socket.inet_pton(socket.AF_INET6, host)
    return V4_MAPPED + socket.inet_aton(host)
