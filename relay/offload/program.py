"""The loaded XDP program and its tables. All access to the tables goes through this module."""

import contextlib
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from relay.offload import elf
from relay.offload.bpf import Map, Program, XdpLink, XdpMode
from relay.offload.layout import (
    DEVICE,
    DEVICES,
    DIRECTIONS,
    OWN,
    OWN_ADDRESSES,
    SEND_BACK,
    SETTINGS,
    SIZES,
    STRICT,
    TOTALS,
    USAGE,
    NextHop,
    Own,
    PassReason,
    Totals,
)

MOST_BINDINGS: Final = 1 << 16
"""Maximum of channels in the kernel; the sockets relay further channels. The tables take 27 MB of kernel memory, and 4 MB
per possible CPU: they are allocated at the start, so that no later change fails for lack of memory."""

CHANNELS_EACH: Final = 4
"""Capacity in channels per possible allocation. Most clients have two or three channels."""

_INDEX: Final = struct.Struct("=I")


class Device(NamedTuple):
    """An interface with the program."""

    ifindex: int
    mac: bytes
    send_back: bool
    """Whether the driver reliably sends from the receiving interface (XDP_TX)."""
    strict: bool
    """Whether the kernel accepts packets only by the interface of the route to their source."""
    upper: int
    """The interface in routes: the bond of a port, else the same interface."""
    name: str = ""
    """The configured interface to which it belongs."""


class Usage(NamedTuple):
    """The traffic of one direction of a channel."""

    packets: int
    bytes: int
    last_used: float | None
    """Monotonic seconds, up to a kernel tick early; None if never used."""


class XdpProgram:
    """The program and its tables. The server actor writes the channels, and the offload actor writes everything else.

    Args:
        bindings: capacity in channels.
        compiled: the object file of the program.
        service_port: the port for clients.
        relayed_ports: the port range of allocations.

    Raises:
        BrokenObjectError: the object file is invalid.
        OSError: the kernel rejects the program.
    """

    def __init__(self, bindings: int, compiled: bytes, service_port: int = 0, relayed_ports: range = range(1)) -> None:
        self.bindings = bindings
        entries = {**dict.fromkeys(("clients", "peers", "next_hops", "ways"), bindings), "usage": 2 * bindings}
        parsed = elf.parse(compiled)
        with contextlib.ExitStack() as stack:
            self.maps: Mapping[str, Map] = {
                each.name: stack.enter_context(Map(each._replace(max_entries=entries.get(each.name, each.max_entries))))
                for each in parsed.maps
            }
            instructions = parsed.linked({name: each.fd for name, each in self.maps.items()})
            self._program = stack.enter_context(Program(instructions, license=parsed.license, name="firezone_relay"))
            self._opened = stack.pop_all()
        self._ports = (service_port, relayed_ports[0], relayed_ports[-1])

    def close(self) -> None:
        """Release everything except links, which stay attached until they are closed."""
        self._opened.close()

    def attach(self, ifindex: int, mode: XdpMode) -> XdpLink:
        """Attach the program to an interface until the link is closed. Errors are as for `XdpLink.create`."""
        return XdpLink.create(self._program, ifindex, mode)

    def replace(self, link: XdpLink) -> None:
        """Replace another program on its interface. Errors are as for `XdpLink.update`."""
        link.update(self._program)

    def write_channels(self, clients: Mapping[bytes, bytes], peers: Mapping[bytes, bytes]) -> None:
        """Add or replace channels, as entries of both their ends."""
        self.maps["clients"].update(clients)
        self.maps["peers"].update(peers)

    def delete_channels(self, clients: Sequence[bytes], peers: Sequence[bytes], slots: Sequence[int]) -> None:
        """Delete channels, and reset their usage counters.

        Raises:
            OSError: the kernel rejects the change. It may still relay some of the channels.
        """
        self.maps["clients"].delete(clients)
        self.maps["peers"].delete(peers)
        usage = self.maps["usage"]
        unused = bytes(usage.size)
        usage.update({_INDEX.pack(entry): unused for slot in slots for entry in (2 * slot, 2 * slot + 1)})

    def write_next_hops(self, hops: Mapping[bytes, NextHop | None]) -> None:
        """Write next hops by destination, or delete them: None."""
        # Deleted first, because the map may be full.
        self.maps["next_hops"].delete([each for each, hop in hops.items() if hop is None])
        self.maps["next_hops"].update({each: hop.packed(each) for each, hop in hops.items() if hop is not None})

    def write_ways(self, ways: Mapping[int, bytes]) -> None:
        """Write the ways to hosts by their places.

        Raises:
            OSError: the kernel rejects the change.
        """
        self.maps["ways"].update({_INDEX.pack(place): way for place, way in ways.items()})

    def write_settings(self, own: Sequence[Own], devices: Sequence[Device]) -> None:
        """Set this machine's addresses and interfaces for which the program relays, up to the capacity of `SETTINGS`."""
        own, devices = own[:OWN_ADDRESSES], devices[:DEVICES]
        addresses = b"".join(OWN.pack(each.address, each.vlan.to_bytes(2, "big")) for each in own)
        packed = b"".join(
            DEVICE.pack(each.ifindex, each.mac, SEND_BACK * each.send_back | STRICT * each.strict, each.upper)
            for each in devices
        )
        # A packet of this moment may see a part of the change, but still needs a channel and a next hop.
        self.maps["settings"].update(
            {_INDEX.pack(0): SETTINGS.pack(*self._ports, len(own), addresses, len(devices), packed)}
        )

    def totals(self) -> Totals:
        """Return the program's counters."""
        sums = [sum(each) for each in zip(*TOTALS.iter_unpack(self.maps["totals"].lookup()), strict=True)]
        count = len(DIRECTIONS)
        sizes = sums[2 * count : 2 * count + count * SIZES]
        others = sums[2 * count + count * SIZES :]
        return Totals(
            dict(zip(DIRECTIONS, sums, strict=False)),
            dict(zip(DIRECTIONS, sums[count:], strict=False)),
            {name: tuple(sizes[at * SIZES : (at + 1) * SIZES]) for at, name in enumerate(DIRECTIONS)},
            dict(zip(PassReason, others, strict=False)),
            tuple(others[len(PassReason) :]),
        )

    def usage(self, first: int, count: int) -> list[tuple[Usage, Usage]]:
        """Return the traffic of consecutive channels, to the peer and to the client."""
        usage = self.maps["usage"]
        values, size = usage.lookup(2 * first, 2 * count), usage.size
        entries = [self._sum(values[at : at + size]) for at in range(0, len(values), size)]
        return list(zip(entries[::2], entries[1::2], strict=True))

    def _sum(self, value: bytes) -> Usage:
        packets, bytes_, last_used = zip(*USAGE.iter_unpack(value), strict=True)
        last = max(last_used)
        return Usage(sum(packets), sum(bytes_), last / 1e9 if last else None)


def bindings_for(capacity: int) -> int:
    """Return the capacity in channels: a power of two, because the kernel rounds up to a power of two."""
    return min(MOST_BINDINGS, 1 << math.ceil(math.log2(max(1024, CHANNELS_EACH * capacity))))
