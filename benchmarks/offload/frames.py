"""Frames as they come to the relay: Ethernet, IPv4, UDP and perhaps ChannelData, with all checksums. No IO."""

import socket
import struct
from typing import Final, NamedTuple

HEADERS: Final = 46
"""Bytes in front of a frame that a relay changes, at the most; `load.h` has the same."""

_ETHERNET: Final = 14
_IPV4: Final = 20
_UDP: Final = 8
_CHANNEL_DATA: Final = 4
_TTL: Final = 64
_UDP_PROTOCOL: Final = 17


class Link(NamedTuple):
    """Where frames go from and to."""

    source_mac: bytes
    source: str
    destination_mac: bytes
    destination: str


class Flow(NamedTuple):
    """What distinguishes the packets of one flow, as they come to the relay."""

    source_port: int
    destination_port: int
    channel: int
    """0: no ChannelData."""


def payload(size: int) -> bytes:
    """Give a payload whose parts all differ; size is in bytes."""
    return b"".join(number.to_bytes(2, "big") for number in range(7, 7 + (size + 1) // 2))[:size]


def frame(link: Link, flow: Flow, data: bytes) -> bytes:
    """Build a whole frame.

    Args:
        link: its way to the relay.
        flow: its ports and channel.
        data: what is relayed.
    """
    header = struct.pack(">HH", flow.channel, len(data)) if flow.channel else b""
    content = header + data
    length = _UDP + len(content)
    addresses = socket.inet_aton(link.source) + socket.inet_aton(link.destination)
    ports = struct.pack(">HHH", flow.source_port, flow.destination_port, length)
    pseudo_header = addresses + struct.pack(">HH", _UDP_PROTOCOL, length)
    checksum = internet_checksum(pseudo_header + ports + content) or 0xFFFF
    start = struct.pack(">BBHHHBB", 0x45, 0, _IPV4 + length, 0, 0x4000, _TTL, _UDP_PROTOCOL)
    ip = start + struct.pack(">H", internet_checksum(start + addresses)) + addresses
    ethernet = link.destination_mac + link.source_mac + b"\x08\x00"
    return ethernet + ip + ports + checksum.to_bytes(2, "big") + content


def frame_length(size: int, *, channel: bool) -> int:
    """Give the bytes of a frame with a payload of some bytes."""
    return _ETHERNET + _IPV4 + _UDP + _CHANNEL_DATA * channel + size


def internet_checksum(data: bytes) -> int:
    """Give the checksum of RFC 1071."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
