"""Packets built from scratch, with complete checksums."""

import struct
from typing import Final

from relay.offload.layout import packed_address

IPV4: Final = 0x0800
IPV6: Final = 0x86DD
VLAN: Final = 0x8100
UDP: Final = 17

RIGHT: Final = -1
"""Stands for the correct checksum or length."""

_MAPPED: Final = packed_address("0.0.0.0")[:12]


def is_ipv4(address: bytes) -> bool:
    """Whether 16 bytes are an IPv4 address."""
    return address.startswith(_MAPPED)


def sum_of(*parts: bytes) -> int:
    """Return the ones' complement sum of all 16-bit words, with 0 for 65535."""
    return sum(int.from_bytes(part + bytes(len(part) % 2), "big") for part in parts) % 0xFFFF


def checksum_of(*parts: bytes) -> int:
    """Return the checksum, 1 to 65535."""
    return 0xFFFF - sum_of(*parts)


def pseudo_header(source: bytes, destination: bytes, length: int) -> bytes:
    """Return the pseudo header of a UDP checksum."""
    if is_ipv4(source):
        return source[12:] + destination[12:] + struct.pack(">xBH", UDP, length)
    return source + destination + struct.pack(">I3xB", length, UDP)


def udp(
    source: tuple[bytes, int], destination: tuple[bytes, int], payload: bytes, checksum: int = RIGHT, length: int = RIGHT
) -> bytes:
    """Return a UDP datagram, optionally with a wrong checksum or length."""
    length = 8 + len(payload) if length == RIGHT else length
    header = struct.pack(">HHH", source[1], destination[1], length)
    if checksum == RIGHT:
        checksum = checksum_of(pseudo_header(source[0], destination[0], 8 + len(payload)), header, payload)
    return header + checksum.to_bytes(2, "big") + payload


def ipv4(  # noqa: PLR0913 - these are its fields
    source: bytes,
    destination: bytes,
    payload: bytes,
    *,
    traffic_class: int = 0,
    hop_limit: int = 64,
    protocol: int = UDP,
    identification: int = 0,
    fragment: int = 0x4000,
    options: bytes = b"",
    checksum: int = RIGHT,
    length: int = RIGHT,
) -> bytes:
    """An IPv4 packet; addresses are 16 bytes."""
    words = 5 + len(options) // 4
    length = 4 * words + len(payload) if length == RIGHT else length
    front = struct.pack(">BBHHHBB", 0x40 | words, traffic_class, length, identification, fragment, hop_limit, protocol)
    rest = source[12:] + destination[12:] + options
    # A sum of all words that is not 0 has one checksum only; and none of these is 0.
    checksum = checksum_of(front, rest) % 0xFFFF if checksum == RIGHT else checksum
    return front + checksum.to_bytes(2, "big") + rest + payload


def ipv6(  # noqa: PLR0913 - these are its fields
    source: bytes,
    destination: bytes,
    payload: bytes,
    *,
    traffic_class: int = 0,
    hop_limit: int = 64,
    flow_label: int = 0,
    next_header: int = UDP,
    length: int = RIGHT,
) -> bytes:
    """An IPv6 packet."""
    length = len(payload) if length == RIGHT else length
    front = struct.pack(">IHBB", 6 << 28 | traffic_class << 20 | flow_label, length, next_header, hop_limit)
    return front + source + destination + payload


def ethernet(to: bytes, source: bytes, kind: int, payload: bytes, tags: tuple[int, ...] = ()) -> bytes:
    """A frame, with VLAN tags in front of the payload."""
    front = b"".join(struct.pack(">HH", VLAN, tag) for tag in tags)
    return to + source + front + kind.to_bytes(2, "big") + payload


def channel_data(number: int, payload: bytes, length: int = RIGHT) -> bytes:
    """A ChannelData message without padding."""
    return struct.pack(">HH", number, len(payload) if length == RIGHT else length) + payload


def with_right_header(frame: bytes) -> bytes:
    """Return the packet with a correct IPv4 header checksum, so that the program reads the rest."""
    start = 18 if frame[12:14] == VLAN.to_bytes(2, "big") else 14
    header = frame[start : start + 20]
    if len(header) < 20 or header[0] >> 4 != 4:
        return frame
    checksum = checksum_of(header[:10], header[12:])
    return frame[: start + 10] + checksum.to_bytes(2, "big") + frame[start + 12 :]
