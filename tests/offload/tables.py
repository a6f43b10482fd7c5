"""The tables in which the XDP program finds channels, read back."""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from relay.offload.layout import CHANNEL, CHANNEL_SIZE, PLACES, in_packet
from tests.offload.model import End, hash_of


class Read(NamedTuple):
    """A channel, as the tables have it."""

    client: End
    peer: End
    client_hop: int
    peer_hop: int
    expires: int
    label: int
    is_hairpin: bool


def read(channels: bytes, ends: tuple[bytes, bytes], keys: Sequence[int]) -> dict[int, Read]:
    """Give the channels by their index, each of which both of its ends lead to, and nothing else does."""
    found = {}
    for index in range(len(channels) // CHANNEL_SIZE):
        entry = channels[index * CHANNEL_SIZE : (index + 1) * CHANNEL_SIZE]
        fields, (version,) = CHANNEL.unpack(entry[: CHANNEL.size]), struct.unpack("=I", entry[CHANNEL.size :])
        if version % 2:
            client, peer = (
                (host, in_packet(rest & 0xFFFF), in_packet(rest >> 16)) for host, rest in (fields[:2], fields[2:4])
            )
            client_hop, peer_hop, expires, label, flags = fields[4:]
            label = int.from_bytes(label.to_bytes(4, "little"), "big")
            found[index] = Read(client, peer, client_hop, peer_hop, expires, label, bool(flags))
    for table, of_peers in zip(ends, (False, True), strict=True):
        places = struct.unpack(f"={len(table) // 8}Q", table)
        expected = {}
        for index, channel in found.items():
            hash_ = hash_of(channel.peer if of_peers else channel.client, keys)
            expected[hash_ >> 32 << 32 | index + 1] = (hash_ >> 16) % (len(places) // PLACES)
        assert {each: at // PLACES for at, each in enumerate(places) if each} == expected
    return found
