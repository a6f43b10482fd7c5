"""Frames as they arrive at the relay: Ethernet, IPv4, UDP and optional ChannelData, with all checksums. No IO."""

import socket
import struct
from typing import Final, NamedTuple

HEADERS: Final = 46
"""Most bytes that a relay changes at the front of a frame, as in `load.h`."""

_IPV4: Final = 20
_UDP: Final = 8
_TTL: Final = 64
_UDP_PROTOCOL: Final = 17


class Hop(NamedTuple):
    """Source and destination hosts of frames, with their MAC addresses."""

    source_mac: bytes
    source: str
    destination_mac: bytes
    destination: str


class Ports(NamedTuple):
    """Fields that differ between flows, as packets arrive at the relay."""

    source: int
    destination: int
    channel: int
    """0: no ChannelData."""


def frame(hop: Hop, ports: Ports, data: bytes) -> bytes:
    """Build a whole frame with a payload."""
    header = struct.pack(">HH", ports.channel, len(data)) if ports.channel else b""
    content = header + data
    length = _UDP + len(content)
    addresses = socket.inet_aton(hop.source) + socket.inet_aton(hop.destination)
    udp = struct.pack(">HHH", ports.source, ports.destination, length)
    pseudo_header = addresses + struct.pack(">HH", _UDP_PROTOCOL, length)
    checksum = internet_checksum(pseudo_header + udp + content) or 0xFFFF
    start = struct.pack(">BBHHHBB", 0x45, 0, _IPV4 + length, 0, 0x4000, _TTL, _UDP_PROTOCOL)
    ip = start + struct.pack(">H", internet_checksum(start + addresses)) + addresses
    ethernet = hop.destination_mac + hop.source_mac + b"\x08\x00"
    return ethernet + ip + udp + checksum.to_bytes(2, "big") + content


def internet_checksum(data: bytes) -> int:
    """Return the checksum of RFC 1071."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
