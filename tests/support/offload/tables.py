"""The tables in which the XDP program finds channels, read back."""

import ctypes
import errno
from typing import NamedTuple

from relay.offload import syscall
from relay.offload.layout import CHANNEL, END, HAIRPIN
from relay.offload.syscall import Command
from tests.support.offload.model import End, sum_of_words

_MOST: int = 1 << 16


class Read(NamedTuple):
    """A channel in the tables."""

    client: End
    peer: End
    expires: int
    is_hairpin: bool


def entries(fd: int, key_size: int, value_size: int, most: int = _MOST) -> dict[bytes, bytes]:
    """Return the content of a hash map of the kernel, with values of a multiple of 8 bytes."""
    keys, values = ctypes.create_string_buffer(most * key_size), ctypes.create_string_buffer(most * value_size)
    last = ctypes.c_uint64()
    batch = syscall.Batch(
        last=ctypes.addressof(last),
        keys=ctypes.addressof(keys),
        values=ctypes.addressof(values),
        count=most,
        map=fd,
    )
    try:
        syscall.call(Command.MAP_LOOKUP_BATCH, batch, "map")
    except OSError as error:
        # The end of the map.
        if error.errno != errno.ENOENT:
            raise
    return {
        keys.raw[at * key_size : (at + 1) * key_size]: values.raw[at * value_size : (at + 1) * value_size]
        for at in range(batch.count)
    }


def read(clients: dict[bytes, bytes], peers: dict[bytes, bytes]) -> dict[int, Read]:
    """Return the channels by the slots of their counters, and check that each has exactly its two entries."""
    found = {}
    places: dict[bytes, int] = {}
    for client, value in clients.items():
        expires, sum_, peer, slot, place = CHANNEL.unpack(value)
        its_value = peers[peer]
        its_expires, its_sum, its_other, its_slot, its_place = CHANNEL.unpack(its_value)
        assert (its_expires, its_other, its_slot) == (expires, client, slot)
        assert sum_ == sum_of_words(client, peer, value[:8], value[36:44])
        assert its_sum == sum_of_words(client, peer, value[:8], its_value[36:44])
        # Each host has one place.
        assert places.setdefault(client[:16], place) == place
        assert places.setdefault(peer[:16], its_place) == its_place
        assert slot & ~HAIRPIN not in found
        found[slot & ~HAIRPIN] = Read(END.unpack(client), END.unpack(peer), expires, bool(slot & HAIRPIN))
    assert len(peers) == len(found)
    assert len(set(places.values())) == len(places)
    return found
