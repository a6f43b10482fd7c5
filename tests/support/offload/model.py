"""A model of the XDP program in Python: simple, slow, and independent of the program's implementation.

The model parses a packet, and builds the relayed packet from scratch with complete checksums. The error of a wrong checksum
is preserved.
"""

import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final, NamedTuple

from relay.offload.layout import (
    DEVICE,
    DEVICES,
    DIRECTIONS,
    HAIRPIN,
    OWN,
    OWN_ADDRESSES,
    SEND_BACK,
    SETTINGS,
    SIZE_STEP,
    SIZES,
    STRICT,
    TOTALS,
    NextHop,
    Own,
    PassReason,
)
from tests.support.offload.packets import (
    IPV4,
    IPV6,
    UDP,
    VLAN,
    channel_data,
    ethernet,
    ipv4,
    ipv6,
    is_ipv4,
    pseudo_header,
    sum_of,
    udp,
)

SECOND: Final = 1_000_000_000
NEVER: Final = 1 << 62
SHORTEST: Final = 60
LONGEST_PADDED: Final = 64
TO_PEER, TO_CLIENT = range(len(DIRECTIONS))

LONG_TIME: Final = 1000 * SECOND

MIX: Final = 0x9E3779B97F4A7C15

Endpoint = tuple[bytes, int]
End = tuple[bytes, int, int]
"""Of a channel: address, port, and channel number or relayed port."""


class Verdict(IntEnum):
    """Return values of an XDP program."""

    DROP = 1
    PASS = 2
    TX = 3
    REDIRECT = 4


class Channel(NamedTuple):
    """A channel. No expiry means a distant expiry."""

    client: End
    peer: End
    expires: int | None = None
    is_hairpin: bool = False


def sum_of_words(*parts: bytes) -> int:
    """Return the sum that an entry has: of the words of the key and of the value, weighted."""
    words = b"".join(parts)
    numbers = [int.from_bytes(words[at : at + 4], "little") for at in range(0, len(words), 4)]
    return int(sum(number * MIX ** (place + 1) for place, number in enumerate(numbers)) % (1 << 64))


class Entry(NamedTuple):
    """An entry of `clients` or `peers`: a channel with the slot of its counters.

    Attributes:
        flipped: the bit of the packed entry that is wrong, as during a change; None for a whole entry.
    """

    channel: Channel
    slot: int
    flipped: int | None = None

    def packed(self, place: int, *, of_peer: bool, now: int) -> bytes:
        client, peer, expires, is_hairpin = self.channel
        other = key_of(client if of_peer else peer)
        until = (now + LONG_TIME if expires is None else expires).to_bytes(8, "little")
        slot = (self.slot | (HAIRPIN if is_hairpin else 0)).to_bytes(4, "little")
        ending = slot + place.to_bytes(4, "little")
        total = sum_of_words(key_of(client), key_of(peer), until, ending).to_bytes(8, "little")
        return flipped(until + total + other + ending + bytes(4), self.flipped)

    @property
    def flow_label(self) -> int:
        return (self.slot + 1) * MIX % (1 << 20)


def flipped(packed: bytes, bit: int | None) -> bytes:
    """Return the bytes with a wrong bit, if any."""
    if bit is None:
        return packed
    return (int.from_bytes(packed, "little") ^ 1 << bit).to_bytes(len(packed), "little")


class Hop(NamedTuple):
    """An entry of `next_hops` with the program's own field.

    Attributes:
        nudged: the time of the last packet left to the sockets.
        flipped: the bit of the packed entry that is wrong, as during a change; None for a whole entry.
    """

    hop: NextHop
    nudged: int = 0
    flipped: int | None = None

    def packed(self, destination: bytes) -> bytes:
        hop = self.hop
        packed = struct.pack("<I16s6s6s", hop.ifindex, hop.source, hop.to_mac, hop.from_mac)
        packed += struct.pack(">H", hop.vlan) + struct.pack("<HI", min(hop.mtu, 0xFFFF), int(hop.stale))
        packed += sum_of_words(destination, packed).to_bytes(8, "little")
        return flipped(packed, self.flipped) + self.nudged.to_bytes(8, "little")


class Device(NamedTuple):
    ifindex: int
    mac: bytes
    sends_back: bool = False
    is_strict: bool = False
    upper: int = 0
    """The bond of a port; 0 for none."""


class Settings(NamedTuple):
    own: tuple[Own, ...]
    devices: tuple[Device, ...]
    service_port: int = 3478
    lowest_port: int = 49152
    highest_port: int = 65535

    def packed(self) -> bytes:
        devices = b"".join(
            DEVICE.pack(
                each.ifindex,
                each.mac,
                (SEND_BACK if each.sends_back else 0) | (STRICT if each.is_strict else 0),
                each.upper or each.ifindex,
            )
            for each in self.devices
        )
        return SETTINGS.pack(
            self.service_port,
            self.lowest_port,
            self.highest_port,
            min(len(self.own), OWN_ADDRESSES),
            b"".join(OWN.pack(each.address, each.vlan.to_bytes(2, "big")) for each in self.own),
            min(len(self.devices), DEVICES),
            devices,
        )

    def device(self, ifindex: int) -> Device | None:
        return next((each for each in self.devices if each.ifindex == ifindex), None)

    def vlan_of(self, address: bytes) -> int | None:
        """Return the VLAN tag of packets for an address, or None for an address of another machine."""
        return next((each.vlan for each in self.own[:OWN_ADDRESSES] if each.address == address), None)


class Way(NamedTuple):
    """The interface of a route, with the VLAN tag of its packets."""

    ifindex: int
    vlan: int = 0

    def packed(self) -> bytes:
        return struct.pack(">H", self.vlan) + struct.pack("<I2x", self.ifindex)


@dataclass(frozen=True)
class Tables:
    """The program's tables, as written by the relay. Tests of wrong tables change single entries."""

    settings: Settings
    clients: dict[End, Entry]
    peers: dict[End, Entry]
    next_hops: dict[bytes, Hop]
    """By destination."""
    ways: Mapping[bytes, Way | None] = field(default_factory=dict)
    """The routes to hosts; by default the usual route. None: there is no route to another machine."""

    def way_of(self, host: bytes) -> Way | None:
        return self.ways.get(host, Way(1))

    @classmethod
    def of(cls, settings: Settings, channels: dict[int, Channel], next_hops: dict[bytes, Hop]) -> "Tables":
        """Return tables with entries for all channels, which are given by the slots of their counters."""
        clients = {each.client: Entry(each, slot) for slot, each in channels.items()}
        peers = {each.peer: Entry(each, slot) for slot, each in channels.items()}
        return cls(settings, clients, peers, next_hops)

    def places(self) -> dict[bytes, int]:
        """Return a place in `ways` for each host."""
        return {host: place for place, host in enumerate(sorted({end[0] for end in (*self.clients, *self.peers)}))}

    @property
    def channels(self) -> dict[int, Channel]:
        """The channels of clients by slot."""
        return {each.slot: each.channel for each in self.clients.values()}

    def with_channels(self, *slots: int, **changes: object) -> "Tables":
        """The same with some channels changed in some fields; without any named, all."""
        changed = {
            slot: each._replace(**changes) if not slots or slot in slots else each  # type: ignore[arg-type]
            for slot, each in self.channels.items()
        }
        return Tables.of(self.settings, changed, self.next_hops)

    def with_flipped(self, bit: int) -> "Tables":
        """The same with a wrong bit in each entry of a channel."""
        clients, peers = (
            {end: each._replace(flipped=bit) for end, each in table.items()} for table in (self.clients, self.peers)
        )
        return replace(self, clients=clients, peers=peers)

    def with_next_hops(self, **changes: object) -> "Tables":
        """Return tables with changed next hops, in fields of either part."""
        own = {name: value for name, value in changes.items() if name in Hop._fields}
        rest = {name: value for name, value in changes.items() if name not in own}
        hops = {key: each._replace(hop=replace(each.hop, **rest))._replace(**own) for key, each in self.next_hops.items()}  # type: ignore[arg-type]
        return replace(self, next_hops=hops)

    def with_settings(self, **changes: object) -> "Tables":
        return replace(self, settings=self.settings._replace(**changes))  # type: ignore[arg-type]

    def in_vlan(self, vlan: int) -> "Tables":
        """The same with all addresses of this machine in a VLAN."""
        return self.with_settings(own=tuple(each._replace(vlan=vlan) for each in self.settings.own))


def key_of(end: End) -> bytes:
    """Return an end in the packets' format."""
    return struct.pack(">16sHH", *end)


class Usage(NamedTuple):
    packets: int = 0
    octets: int = 0
    last_used: int = 0


@dataclass
class Totals:
    packets: list[int] = field(default_factory=lambda: [0, 0])
    octets: list[int] = field(default_factory=lambda: [0, 0])
    sizes: list[list[int]] = field(default_factory=lambda: [[0] * SIZES, [0] * SIZES])
    passed: list[int] = field(default_factory=lambda: [0] * len(PassReason))
    frames: list[int] = field(default_factory=lambda: [0] * DEVICES)

    @classmethod
    def of(cls, packed: bytes) -> "Totals":
        numbers = list(TOTALS.unpack(packed))
        sizes, others = numbers[4 : 4 + 2 * SIZES], numbers[4 + 2 * SIZES :]
        passed, frames = others[: len(PassReason)], others[len(PassReason) :]
        return cls(numbers[:2], numbers[2:4], [sizes[:SIZES], sizes[SIZES:]], passed, frames)


class Outcome(NamedTuple):
    """The result for a packet.

    Attributes:
        reason: the counted reason for leaving the packet to the sockets.
        ifindex: the interface to which the packet is redirected.
    """

    verdict: Verdict
    frame: bytes
    ifindex: int = 0
    reason: PassReason | None = None


class _Passed(Exception):  # noqa: N818 - no error
    def __init__(self, reason: PassReason | None = None) -> None:
        self.reason = reason


class _Packet(NamedTuple):
    source: Endpoint
    destination: Endpoint
    payload: bytes
    trailing: bytes
    checksum: int
    wrong_by: int
    traffic_class: int
    hop_limit: int


class _Plan(NamedTuple):
    source_port: int
    destination: Endpoint
    flow_label: int
    payload: bytes
    put: bytes
    counted: tuple[tuple[int, int], ...]
    """Direction, and index into usage."""


class Model:
    """The program's double: the tables, and the counters and next hops as packets change them."""

    def __init__(self, tables: Tables, headroom: int = 256) -> None:
        self._tables = tables
        self._headroom = headroom
        self.next_hops = dict(tables.next_hops)
        self.usage: defaultdict[int, Usage] = defaultdict(Usage)
        self.totals = Totals()

    def run(self, frame: bytes, ifindex: int, now: int) -> Outcome:
        """Relay a packet, or leave the packet unchanged."""
        try:
            return self._relay(frame, ifindex, now)
        except _Passed as passed:
            if passed.reason is not None:
                self.totals.passed[passed.reason] += 1
            return Outcome(Verdict.PASS, frame, reason=passed.reason)

    def _relay(self, frame: bytes, ifindex: int, now: int) -> Outcome:
        tables = self._tables
        device = tables.settings.device(ifindex)
        if device is None or len(frame) < 14:
            raise _Passed
        self.totals.frames[tables.settings.devices.index(device)] += 1
        if frame[:6] != device.mac:
            raise _Passed
        vlan, packet = _read(frame)
        address, port = packet.destination
        if tables.settings.vlan_of(address) != vlan:
            raise _Passed
        if packet.trailing and len(frame) > LONGEST_PADDED:
            raise _Passed
        if port == tables.settings.service_port:
            plan = self._from_client(packet, now)
        elif tables.settings.lowest_port <= port <= tables.settings.highest_port:
            plan = self._from_peer(packet, now)
        else:
            raise _Passed
        self._check_way(packet, device, Way(device.upper or ifindex, vlan))
        _check_sum(packet)
        if packet.hop_limit < 2:
            raise _Passed(PassReason.LAST_HOP)
        hop = self._route(plan, now)
        relayed = _built(packet, plan, hop)
        if len(relayed) - len(frame) > self._headroom:
            raise _Passed(PassReason.NO_ROOM)
        self._count(plan, now)
        if hop.ifindex == ifindex and device.sends_back:
            return Outcome(Verdict.TX, relayed)
        return Outcome(Verdict.REDIRECT, relayed, hop.ifindex)

    def _check_way(self, packet: _Packet, device: Device, here: Way) -> None:
        way = self._tables.way_of(packet.source[0])
        if way is None or (device.is_strict and is_ipv4(packet.source[0]) and way != here):
            raise _Passed(PassReason.WRONG_WAY)

    def _from_client(self, packet: _Packet, now: int) -> _Plan:
        message = packet.payload
        if len(message) < 4 or not 0x4000 <= int.from_bytes(message[:2], "big") <= 0x7FFF:
            raise _Passed(PassReason.NO_CHANNEL_DATA)
        number, length = struct.unpack(">HH", message[:4])
        if length != len(message) - 4:
            raise _Passed(PassReason.ODD_LENGTH)
        entry = self._standing(self._tables.clients, (*packet.source, number), now)
        counted = (TO_PEER, 2 * entry.slot + TO_PEER)
        address, port, relayed = entry.channel.peer
        if entry.channel.is_hairpin:
            return self._to_client((address, relayed, port), message[4:], now, counted)
        return _Plan(relayed, (address, port), entry.flow_label, message[4:], b"", (counted,))

    def _from_peer(self, packet: _Packet, now: int) -> _Plan:
        return self._to_client((*packet.source, packet.destination[1]), packet.payload, now)

    def _to_client(self, end: End, payload: bytes, now: int, *counted: tuple[int, int]) -> _Plan:
        entry = self._standing(self._tables.peers, end, now)
        client = entry.channel.client
        put = channel_data(client[2], b"", len(payload))
        service, counted = self._tables.settings.service_port, (*counted, (TO_CLIENT, 2 * entry.slot + TO_CLIENT))
        return _Plan(service, client[:2], entry.flow_label, payload, put, counted)

    def _standing(self, table: dict[End, Entry], end: End, now: int) -> Entry:
        entry = table.get(end)
        if entry is None or entry.flipped is not None:
            raise _Passed(PassReason.UNBOUND)
        if end != (entry.channel.client if table is self._tables.clients else entry.channel.peer):
            raise _Passed(PassReason.UNBOUND)
        if entry.channel.expires is not None and now >= entry.channel.expires:
            raise _Passed(PassReason.EXPIRED)
        return entry

    def _route(self, plan: _Plan, now: int) -> NextHop:
        destination = plan.destination[0]
        entry = self.next_hops.get(destination)
        if entry is None or entry.flipped is not None:
            raise _Passed(PassReason.NO_NEXT_HOP)
        if entry.hop.stale and (now - entry.nudged) % (1 << 64) >= SECOND:
            self.next_hops[destination] = entry._replace(nudged=now)
            raise _Passed(PassReason.STALE_NEIGHBOUR)
        return entry.hop

    def _count(self, plan: _Plan, now: int) -> None:
        length = len(plan.payload)
        for direction, index in plan.counted:
            self.totals.packets[direction] += 1
            self.totals.octets[direction] += length
            self.totals.sizes[direction][min(length // SIZE_STEP, SIZES - 1)] += 1
            before = self.usage[index]
            self.usage[index] = Usage(before.packets + 1, before.octets + length, now)


def _read(frame: bytes) -> tuple[int, _Packet]:
    vlan, kind, rest = 0, int.from_bytes(frame[12:14], "big"), frame[14:]
    if kind == VLAN and len(rest) >= 4:
        # The 16 bits of a tag include three bits of priority and the drop eligible bit.
        vlan, kind, rest = int.from_bytes(rest[:2], "big") % 4096, int.from_bytes(rest[2:4], "big"), rest[4:]
    if kind == IPV4:
        return vlan, _read_ipv4(rest)
    if kind == IPV6:
        return vlan, _read_ipv6(rest)
    raise _Passed


def _read_ipv4(packet: bytes) -> _Packet:
    header = packet[:20]
    if len(header) < 20 or header[0] != 0x45 or header[9] != UDP or sum_of(header):
        raise _Passed
    length, fragment = int.from_bytes(header[2:4], "big"), int.from_bytes(header[6:8], "big")
    if fragment & 0x3FFF:
        raise _Passed
    mapped = bytes(10) + b"\xff\xff"
    return _read_udp(mapped + header[12:16], mapped + header[16:20], packet[20:], length - 20, (header[1], header[8]))


def _read_ipv6(packet: bytes) -> _Packet:
    header = packet[:40]
    if len(header) < 40 or header[0] >> 4 != 6 or header[6] != UDP:
        raise _Passed
    source, destination = header[8:24], header[24:40]
    if is_ipv4(source) or is_ipv4(destination):
        raise _Passed
    length = int.from_bytes(header[4:6], "big")
    return _read_udp(source, destination, packet[40:], length, ((header[0] & 15) << 4 | header[1] >> 4, header[7]))


def _read_udp(source: bytes, destination: bytes, rest: bytes, length: int, carried: tuple[int, int]) -> _Packet:
    if len(rest) < 8 or not 8 <= length <= len(rest):
        raise _Passed
    source_port, destination_port, stated, checksum = struct.unpack(">HHHH", rest[:8])
    if stated != length:
        raise _Passed
    wrong_by = sum_of(pseudo_header(source, destination, length), rest[:length])
    ends = (source, source_port), (destination, destination_port)
    return _Packet(*ends, rest[8:length], rest[length:], checksum, wrong_by, *carried)


def _check_sum(packet: _Packet) -> None:
    if not packet.checksum:
        raise _Passed(PassReason.NO_CHECKSUM)
    # An incomplete checksum is the sum of the pseudo header alone.
    pseudo = pseudo_header(packet.source[0], packet.destination[0], 8 + len(packet.payload))
    if packet.checksum == (sum_of(pseudo) or 0xFFFF):
        raise _Passed(PassReason.PARTIAL_CHECKSUM)


def _built(packet: _Packet, plan: _Plan, hop: NextHop) -> bytes:
    source, destination = (hop.source, plan.source_port), plan.destination
    datagram = udp(source, destination, plan.put + plan.payload)
    right = int.from_bytes(datagram[6:8], "big")
    datagram = datagram[:6] + ((right + packet.wrong_by) % 0xFFFF or 0xFFFF).to_bytes(2, "big") + datagram[8:]
    marks, hop_limit = packet.traffic_class, packet.hop_limit - 1
    if is_ipv4(destination[0]):
        kind, inner = IPV4, ipv4(source[0], destination[0], datagram, traffic_class=marks, hop_limit=hop_limit)
    else:
        fields = {"traffic_class": marks, "hop_limit": hop_limit, "flow_label": plan.flow_label}
        kind, inner = IPV6, ipv6(source[0], destination[0], datagram, **fields)
    if len(inner) > hop.mtu:
        raise _Passed(PassReason.TOO_LONG)
    if 14 + len(inner) < SHORTEST:
        raise _Passed(PassReason.SHORT_FRAME)
    tags = (hop.vlan,) if hop.vlan else ()
    return ethernet(hop.to_mac, hop.from_mac, kind, inner + packet.trailing, tags)
