"""The memory in which the XDP program finds channels: written by `Channels`, read by `find` of program.c.

A channel is an entry of an array, at an index that is its own while it is there; and two hash tables, one for each of its
ends, say at which. All are memory that both sides have: so a channel comes and goes by plain stores, without a system call.

Nobody locks anything. The entry of a channel has a version, which is odd while there is a channel, and another one for each:
it is written when all of the rest is, and an even one before anything is written over. The program looks at the version,
compares the end that it came by, takes what it needs, and looks at the version again. That takes a machine on which others
see stores in the order in which they are made, as x86 does.

Each end has one bucket of eight places in its hash table. With four times as many places as there may be channels, one in
20,000 finds its bucket full even if there are as many; then it isn't entered, and the sockets relay.
"""

import struct
from collections.abc import Sequence
from typing import Final

from relay.offload.layout import CHANNEL_SIZE, PLACE_SIZE, PLACES

FULL: Final = -1
"""A place that there is not."""

WORDS: Final = CHANNEL_SIZE // 4
EXPIRES, FLAGS, VERSION = 12, 14, 15
"""Of the words of a channel."""

LOWER_HALF: Final = 0xFFFFFFFF
UPPER_HALF: Final = 0xFFFFFFFF00000000
BOTH_HALVES: Final = 0xFFFFFFFFFFFFFFFF
"""Of 64 bits."""

BUCKET_SHIFT: Final = 13
"""From the bits of a hash that are above its lowest 16 to the first place of a bucket: `EndTable.mask` has the rest."""

MIX: Final = 0x9E3779B97F4A7C15
"""2⁶⁴ over the golden ratio: an odd number with bits all over."""

_words = struct.Struct("=4I").unpack


class HashKeys:
    """What the tables are hashed with: 64-bit numbers at random, so that nobody can choose addresses that meet in a bucket.

    An end's sum is the first number and each of the end's five words times one of the others. So what an address adds to it
    can be kept, and is worked out once for all of its channels. The hash is that sum with its bits mixed, modulo 2⁶⁴: in
    the sum alone, addresses that follow each other would sometimes meet by the dozen. A bucket is given by 16 bits above the
    lowest 16, and the upper half is in the place.

    Args:
        numbers: six of them.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        self.last = self.numbers[5]
        """Times the port and the channel number, or relayed port, as they stand in packets: what those add."""
        first, *_, mapped, host, _ = self.numbers
        self.of_ipv4 = first + mapped * 0xFFFF0000
        """What all IPv4 addresses add, with the first number."""
        self.of_ipv4_host = host
        """Times an IPv4 address as it stands in packets: what that adds."""

    def of_host(self, address: bytes) -> int:
        """Give what an address, as the tables have it, adds with the first number to the sum of each of its ends."""
        first, one, two, three, four, _ = self.numbers
        words: tuple[int, int, int, int] = _words(address)
        return first + one * words[0] + two * words[1] + three * words[2] + four * words[3]


class EndTable:
    """The hash table of one of the two ends of channels. One thread writes it.

    Args:
        memory: of the kernel's array: a power of two of buckets, all 0.
    """

    def __init__(self, memory: memoryview) -> None:
        self.places = memory.cast("Q")
        self.buckets = len(memory) // (PLACES * PLACE_SIZE)
        self.mask = (self.buckets - 1) * PLACES
        """Of the place at which a bucket begins."""
        self._memory = memory

    def close(self) -> None:
        """Let go of the memory."""
        self.places.release()
        self._memory.release()

    def beside(self, place: int, entry: int) -> int:
        """Give a free place in a bucket whose first is taken, or `FULL`.

        Two entries that have the same of the hash could not be told apart, so the second finds no place.
        """
        bucket = self.places[place : place + PLACES].tolist()
        for each in bucket:
            if each and not (each ^ entry) & UPPER_HALF:
                return FULL
        return place + bucket.index(0) if 0 in bucket else FULL


class ChannelTable:
    """The channels themselves. One thread writes it.

    Args:
        memory: of the kernel's array, all 0.
    """

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.words = memory.cast("I")

    def close(self) -> None:
        """Let go of the memory."""
        self.words.release()
        self.memory.release()
