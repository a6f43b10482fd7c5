"""The XDP program, loaded, and its tables: the one place that reads and writes them."""

import contextlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from relay.offload import elf, ticks
from relay.offload.bpf import Link, Map, Program, XdpMode
from relay.offload.channel_tables import ChannelTable, EndTable, HashKeys
from relay.offload.layout import (
    DEVICE,
    DEVICES,
    DIRECTIONS,
    HASH_KEYS,
    NEXT_HOP_SIZE,
    OWN,
    OWN_ADDRESSES,
    PLACES,
    SEND_BACK,
    SETTINGS,
    SIZES,
    TOTALS,
    USAGE,
    NextHop,
    Own,
    PassReason,
)

MOST_BINDINGS: Final = 1 << 16
"""Channels that the kernel relays at once; further ones are relayed by the sockets. They take 16 MB of the kernel's memory,
and 4 MB for each CPU there may be."""

CHANNELS_EACH: Final = 4
"""Channels there is room for, for each allocation there may be; most clients have two or three."""

PLACES_EACH: Final = 4
"""Places in each hash table for each channel there is room for: so that a bucket is hardly ever full."""

_VERSION: Final = 4
"""Bytes in front of an entry of `next_hops`: a number that is odd while the entry is being written."""


class Device(NamedTuple):
    """An interface with the program."""

    ifindex: int
    mac: bytes
    send_back: bool
    """Whether its driver can be relied on to send from where it receives (XDP_TX)."""


class Usage(NamedTuple):
    """What was relayed in one direction of a channel."""

    packets: int
    bytes: int
    last_used: float | None
    """Monotonic seconds, up to a tick early; None if it never was."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What the program has counted since it was loaded. Bytes are of payload, without any header."""

    packets: dict[str, int]
    bytes: dict[str, int]
    sizes: dict[str, tuple[int, ...]]
    """Packets by payload, in steps of `layout.SIZE_STEP` bytes; the last one is open."""
    passed: dict[PassReason, int]
    """Datagrams for the relay that were left to its sockets, by reason."""


class XdpProgram:
    """The program and its tables. Only the server actor writes channels, and only the offload actor the rest.

    Args:
        bindings: how many channels there is room for.

    Raises:
        NotBuiltError: the package has no object.
        BrokenObjectError: it has something else.
        OSError: the kernel does not take it.
    """

    def __init__(self, bindings: int) -> None:
        self.bindings = bindings
        self.next_hops = 2 * bindings
        entries = {
            "channels": bindings,
            **dict.fromkeys(("clients", "peers"), max(1, PLACES_EACH * bindings // PLACES)),
            **dict.fromkeys(("next_hops", "usage"), 2 * bindings),
        }
        self.hash_keys = HashKeys([secrets.randbits(64) for _ in range(HASH_KEYS)])
        parsed = elf.parse(elf.packaged())
        with contextlib.ExitStack() as stack:
            maps = {
                each.name: stack.enter_context(Map(each._replace(max_entries=entries.get(each.name, each.max_entries))))
                for each in parsed.maps
            }
            instructions = parsed.linked({name: each.fd for name, each in maps.items()})
            self._program = stack.enter_context(Program(instructions, license=parsed.license, name="firezone_relay"))
            self._usage, self._totals = maps["usage"], maps["totals"]
            self.ticks = ticks.measure()
            # Written by plain stores: no system call, and none of these 8 bytes is ever seen half written.
            self._next_hops, self._settings, channels, clients, peers = (
                stack.enter_context(memoryview(stack.enter_context(contextlib.closing(maps[name].mapped()))))
                for name in ("next_hops", "settings", "channels", "clients", "peers")
            )
            self.channels = stack.enter_context(contextlib.closing(ChannelTable(channels)))
            self.clients, self.peers = (stack.enter_context(contextlib.closing(EndTable(each))) for each in (clients, peers))
            self._versions = stack.enter_context(self._next_hops.cast("I"))
            self._opened = stack.pop_all()
        self._settled: tuple[int, range] = (0, range(0))

    def close(self) -> None:
        """Give everything back, the tables' memory too; links go on until they are closed."""
        self._opened.close()

    def attach(self, ifindex: int, mode: XdpMode) -> Link:
        """Have the program run for what an interface receives, until the link is closed.

        Raises:
            OSError: the kernel or the driver won't.
        """
        return Link(self._program, ifindex, mode)

    def clear(self, slots: list[int]) -> None:
        """Have the usage of channels begin at 0."""
        keys = [entry.to_bytes(4, "little") for slot in slots for entry in (2 * slot, 2 * slot + 1)]
        self._usage.update_batch(keys, [bytes(self._usage.size)] * len(keys))

    def write_next_hop(self, entry: int, hop: NextHop) -> None:
        """Write where packets for a destination go next."""
        at = entry * NEXT_HOP_SIZE
        version = at // _VERSION
        packed = hop.packed()
        # Whoever reads it meanwhile sees an odd number, or another one afterwards, and leaves the packet to the sockets.
        self._versions[version] |= 1
        self._next_hops[at + _VERSION : at + _VERSION + len(packed)] = packed
        self._versions[version] = (self._versions[version] + 1) & 0xFFFFFFFF

    def listen_to(self, service_port: int, relayed_ports: range) -> None:
        """Set the ports whose packets are the relay's."""
        self._settled = (service_port, relayed_ports)

    def write_settings(self, own: Sequence[Own], devices: Sequence[Device]) -> None:
        """Set whose packets the relay's are: at which of its addresses and interfaces they arrive.

        Args:
            own: addresses of this machine, `layout.OWN_ADDRESSES` at most.
            devices: those with the program, `layout.DEVICES` at most.
        """
        own, devices = own[:OWN_ADDRESSES], devices[:DEVICES]
        service_port, relayed_ports = self._settled
        second = round(self.ticks.per_second)
        ports = (service_port, relayed_ports[0], relayed_ports[-1])
        addresses = b"".join(OWN.pack(each.address, each.vlan.to_bytes(2, "big")) for each in own)
        packed = b"".join(DEVICE.pack(each.ifindex, each.mac, SEND_BACK * each.send_back) for each in devices)
        # The counts last, so that none is looked at that is half written.
        for own_count, device_count in ((0, 0), (len(own), len(devices))):
            self._settings[: SETTINGS.size] = SETTINGS.pack(
                *(*ports, own_count, *self.hash_keys.numbers, self.clients.buckets - 1, second),
                *(addresses, device_count, packed),
            )

    def totals(self) -> Totals:
        """Read what was counted."""
        by_cpu = [TOTALS.unpack(each) for each in self._totals.lookup_per_cpu(bytes(4)) or ()]
        sums = [sum(each) for each in zip(*by_cpu, strict=True)]
        count = len(DIRECTIONS)
        sizes = sums[2 * count : 2 * count + count * SIZES]
        return Totals(
            dict(zip(DIRECTIONS, sums, strict=False)),
            dict(zip(DIRECTIONS, sums[count:], strict=False)),
            {name: tuple(sizes[at * SIZES : (at + 1) * SIZES]) for at, name in enumerate(DIRECTIONS)},
            dict(zip(PassReason, sums[-len(PassReason) :], strict=True)),
        )

    def usage(self, first: int, count: int) -> list[tuple[Usage, Usage]]:
        """Read what channels relayed, to the peer and to the client.

        Args:
            first: the first slot.
            count: how many from there.
        """
        values = self._usage.lookup_array(2 * first, 2 * count)
        size = self._usage.size
        entries = [self._sum(values[at : at + size]) for at in range(0, len(values), size)]
        return list(zip(entries[::2], entries[1::2], strict=True))

    def _sum(self, value: bytes) -> Usage:
        by_cpu = [USAGE.unpack_from(value, at) for at in range(0, len(value), self._usage.stride)]
        packets, bytes_, last_used = (tuple(each) for each in zip(*by_cpu, strict=True))
        tick = max(last_used)
        return Usage(sum(packets), sum(bytes_), self.ticks.seconds(tick) if tick else None)


def bindings_for(capacity: int) -> int:
    """Give how many channels to make room for: a power of two, as the kernel rounds up to one."""
    return min(MOST_BINDINGS, 1 << math.ceil(math.log2(max(1024, CHANNELS_EACH * capacity))))
