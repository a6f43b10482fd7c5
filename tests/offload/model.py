"""What the XDP program has to do, said once more: slowly, in Python, and without looking at how the program does it.

A packet is read, and one that is relayed is built anew with all its checksums summed from the first byte to the last. What
a wrong checksum was wrong by stays.
"""

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final, NamedTuple

from relay.offload.layout import (
    CHANNEL,
    DEVICE,
    DEVICES,
    DIRECTIONS,
    HAIRPIN,
    HASH_KEYS,
    OWN,
    OWN_ADDRESSES,
    PLACES,
    SEND_BACK,
    SETTINGS,
    SIZE_STEP,
    SIZES,
    TOTALS,
    NextHop,
    Own,
    PassReason,
    in_packet,
)
from tests.offload.packets import (
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

SECOND: Final = 250
"""Ticks, in which all times here are. A kernel may have other ones: it is told so."""
TICKS: Final = 1 << 32
"""How many of them a next hop can count; then it begins anew."""
NEVER: Final = 1 << 62
SHORTEST: Final = 60
LONGEST_PADDED: Final = 64
TO_PEER, TO_CLIENT = range(len(DIRECTIONS))

LONG_TIME: Final = 1 << 30
"""Ticks, within what a channel's 32 bits can tell."""

KEYS: Final = tuple(0x9FB21C651E98DF25 * (each + 3) % (1 << 64) for each in range(HASH_KEYS))
"""Of the hash. Any numbers do."""
BUCKETS: Final = 8
"""So few that some are shared."""

Endpoint = tuple[bytes, int]
End = tuple[bytes, int, int]
"""Of a channel: address, port, and channel number or relayed port."""


def tick_of(now: int) -> int:
    """A time as next hops have it."""
    return now % TICKS


class Verdict(IntEnum):
    """What the kernel is to do with the packet."""

    PASS = 2
    TX = 3
    REDIRECT = 4


class Channel(NamedTuple):
    """An entry of `channels`. None is an expiry that is far away."""

    client: End
    peer: End
    client_hop: int = 0
    peer_hop: int = 0
    flow_label: int = 0
    expires: int | None = None
    is_hairpin: bool = False
    version: int = 1

    def packed(self, now: int) -> bytes:
        client, peer = ((address, in_packet(tag) << 16 | in_packet(port)) for address, port, tag in (self.client, self.peer))
        label = int.from_bytes(self.flow_label.to_bytes(4, "big"), "little")
        expires = tick_of(now + LONG_TIME if self.expires is None else self.expires)
        flags = HAIRPIN if self.is_hairpin else 0
        fields = CHANNEL.pack(*client, *peer, self.client_hop, self.peer_hop, expires, label, flags)
        return fields + struct.pack("=I", self.version)


def hash_of(end: End, keys: Sequence[int] = KEYS) -> int:
    """The 64 bits that an end is hashed to."""
    total = keys[0] + sum(key * word for key, word in zip(keys[1:], struct.unpack("<5I", key_of(end)), strict=True))
    total %= 1 << 64
    mixed: int = (total ^ total >> 32) * 0x9E3779B97F4A7C15 % (1 << 64)
    return mixed


def buckets(ends: dict[End, int]) -> list[bytes]:
    """A hash table, as the program has it."""
    places: list[list[int]] = [[] for _ in range(BUCKETS)]
    for end, index in ends.items():
        hash_ = hash_of(end)
        places[(hash_ >> 16) % BUCKETS].append(hash_ >> 32 << 32 | index + 1)
    return [struct.pack(f"={PLACES}Q", *(each + [0] * (PLACES - len(each)))) for each in places]


class Hop(NamedTuple):
    """An entry of `next_hops` with what is not the relay's alone.

    Attributes:
        nudged: the tick at which a packet was left to the sockets.
    """

    hop: NextHop
    version: int = 2
    nudged: int = 0

    def packed(self) -> bytes:
        return struct.pack("=I", self.version) + self.hop.packed() + struct.pack("=I", self.nudged)


class Device(NamedTuple):
    ifindex: int
    mac: bytes
    sends_back: bool = False


class Settings(NamedTuple):
    own: tuple[Own, ...]
    devices: tuple[Device, ...]
    service_port: int = 3478
    lowest_port: int = 49152
    highest_port: int = 65535

    def packed(self) -> bytes:
        devices = b"".join(DEVICE.pack(each.ifindex, each.mac, SEND_BACK if each.sends_back else 0) for each in self.devices)
        return SETTINGS.pack(
            self.service_port,
            self.lowest_port,
            self.highest_port,
            min(len(self.own), OWN_ADDRESSES),
            *KEYS,
            BUCKETS - 1,
            SECOND,
            b"".join(OWN.pack(each.address, each.vlan.to_bytes(2, "big")) for each in self.own),
            min(len(self.devices), DEVICES),
            devices,
        )

    def device(self, ifindex: int) -> Device | None:
        return next((each for each in self.devices if each.ifindex == ifindex), None)

    def vlan_of(self, address: bytes) -> int | None:
        """The tag by which packets for an address come; None if it isn't ours."""
        return next((each.vlan for each in self.own[:OWN_ADDRESSES] if each.address == address), None)


@dataclass(frozen=True)
class Tables:
    """All that the relay writes for the program. What it makes of channels' ends is said by whoever wants it wrong."""

    settings: Settings
    channels: dict[int, Channel]
    next_hops: dict[int, Hop]
    clients: dict[End, int]
    peers: dict[End, int]

    @classmethod
    def of(cls, settings: Settings, channels: dict[int, Channel], next_hops: dict[int, Hop]) -> "Tables":
        """Those in which all channels are found."""
        clients = {each.client: index for index, each in channels.items()}
        peers = {each.peer: index for index, each in channels.items()}
        return cls(settings, channels, next_hops, clients, peers)

    def with_channels(self, *indices: int, **changes: object) -> "Tables":
        """The same with some channels changed in some fields; without any named, all."""
        changed = {
            index: each._replace(**changes) if not indices or index in indices else each  # type: ignore[arg-type]
            for index, each in self.channels.items()
        }
        return Tables.of(self.settings, changed, self.next_hops)

    def with_next_hops(self, **changes: object) -> "Tables":
        """The same with all next hops changed, in fields of either part."""
        own = {name: value for name, value in changes.items() if name in Hop._fields}
        rest = {name: value for name, value in changes.items() if name not in own}
        hops = {key: Hop(replace(each.hop, **rest), *each[1:])._replace(**own) for key, each in self.next_hops.items()}  # type: ignore[arg-type]
        return replace(self, next_hops=hops)

    def with_settings(self, **changes: object) -> "Tables":
        return replace(self, settings=self.settings._replace(**changes))  # type: ignore[arg-type]

    def in_vlan(self, vlan: int) -> "Tables":
        """The same with all addresses of this machine in a VLAN."""
        return self.with_settings(own=tuple(each._replace(vlan=vlan) for each in self.settings.own))


def key_of(end: End) -> bytes:
    """An end as packets have it."""
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

    @classmethod
    def of(cls, packed: bytes) -> "Totals":
        numbers = list(TOTALS.unpack(packed))
        sizes = numbers[4 : 4 + 2 * SIZES]
        return cls(numbers[:2], numbers[2:4], [sizes[:SIZES], sizes[SIZES:]], numbers[4 + 2 * SIZES :])


class Outcome(NamedTuple):
    """What becomes of a packet.

    Attributes:
        reason: why it was left to the sockets, if that is counted.
        ifindex: where it is sent, if to another interface.
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
    next_hop: int
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
        """Relay it, or leave it as it is."""
        try:
            return self._relay(frame, ifindex, now)
        except _Passed as passed:
            if passed.reason is not None:
                self.totals.passed[passed.reason] += 1
            return Outcome(Verdict.PASS, frame, reason=passed.reason)

    def _relay(self, frame: bytes, ifindex: int, now: int) -> Outcome:
        tables = self._tables
        device = tables.settings.device(ifindex)
        if device is None or frame[:6] != device.mac or len(frame) < 14:
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

    def _from_client(self, packet: _Packet, now: int) -> _Plan:
        message = packet.payload
        if len(message) < 4 or not 0x4000 <= int.from_bytes(message[:2], "big") <= 0x7FFF:
            raise _Passed(PassReason.NO_CHANNEL_DATA)
        number, length = struct.unpack(">HH", message[:4])
        if length != len(message) - 4:
            raise _Passed(PassReason.ODD_LENGTH)
        index, channel = self._standing(self._tables.clients, (*packet.source, number), now)
        counted = (TO_PEER, 2 * index + TO_PEER)
        if channel.is_hairpin:
            address, port, relayed = channel.peer
            return self._to_client((address, relayed, port), message[4:], now, counted)
        destination, source_port = channel.peer[:2], channel.peer[2]
        return _Plan(source_port, destination, channel.peer_hop, channel.flow_label, message[4:], b"", (counted,))

    def _from_peer(self, packet: _Packet, now: int) -> _Plan:
        return self._to_client((*packet.source, packet.destination[1]), packet.payload, now)

    def _to_client(self, end: End, payload: bytes, now: int, *counted: tuple[int, int]) -> _Plan:
        index, channel = self._standing(self._tables.peers, end, now)
        put = channel_data(channel.client[2], b"", len(payload))
        service, counted = self._tables.settings.service_port, (*counted, (TO_CLIENT, 2 * index + TO_CLIENT))
        return _Plan(service, channel.client[:2], channel.client_hop, channel.flow_label, payload, put, counted)

    def _standing(self, table: dict[End, int], end: End, now: int) -> tuple[int, Channel]:
        index = table.get(end, -1)
        channel = self._tables.channels.get(index)
        mine = None if channel is None else channel.client if table is self._tables.clients else channel.peer
        if channel is None or channel.version % 2 == 0 or mine != end:
            raise _Passed(PassReason.UNBOUND)
        if channel.expires is not None and (now - channel.expires) % TICKS < TICKS // 2:
            raise _Passed(PassReason.EXPIRED)
        return index, channel

    def _route(self, plan: _Plan, now: int) -> NextHop:
        entry = self.next_hops.get(plan.next_hop)
        if entry is None or entry.version % 2 or not entry.hop.ifindex or entry.hop.destination != plan.destination[0]:
            raise _Passed(PassReason.NO_NEXT_HOP)
        if entry.hop.stale and (tick_of(now) - entry.nudged) % TICKS >= SECOND:
            self.next_hops[plan.next_hop] = entry._replace(nudged=tick_of(now))
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
        # Of the tag's 16 bits, three are a priority and one says what may be lost.
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
    # What a kernel puts there for the interface to complete: the sum of the pseudo header alone.
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
