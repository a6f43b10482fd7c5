"""Packets through an allocation: sent at a constant rate, counted and timed at both ends.

Both ends are in this process, so the fate of each packet is known. The client sends ChannelData, which the peer echoes. The
peer also sends packets of its own to the relayed address. Without a peer, the channel leads to the allocation's own relayed
address, and each packet returns to the client.
"""

import contextlib
import math
import secrets
import select
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from relay.tools.probe.icmp import Rejection, read_rejection

CHANNEL_HEADER = struct.Struct("!HH")
"""Channel number and length of ChannelData, before the payload (RFC 8656 §12.4)."""
_PACKET = struct.Struct("!8sBIQ")
SHORTEST = _PACKET.size
"""Bytes of the shortest packet."""
_TOKEN_LENGTH = 8
_LONGEST_DATAGRAM = 0xFFFF
_READ_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PacketPlan:
    """Number, rate and size of packets."""

    count: int = 50
    """Packets in each direction."""
    rate: float = 50.0
    """Packets per second in each direction."""
    sizes: tuple[int, ...] = (160,)
    """Bytes of payload of each packet in turn. A packet of voice has about 160."""
    max_loss: float = 0.02
    """Share of lost packets, 0–1, above which the step fails."""
    settle: float = 2.0
    """Seconds after the last send in which late packets still count."""
    silence: float = 3.0
    """Seconds after which the run ends if no packet at all has arrived."""


class Direction(NamedTuple):
    """Packets in a direction."""

    sent: int
    received: int

    @property
    def lost(self) -> int:
        """Number of lost packets."""
        return self.sent - self.received

    @property
    def loss(self) -> float:
        """Share of lost packets, 0–1."""
        return self.lost / self.sent if self.sent else 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Packets sent for a relayed address."""

    to_peer: Direction | None
    """From client to peer; None if packets were looped."""
    to_client: Direction | None
    """From peer to client, without echoes; None if packets were looped."""
    round_trip: Direction
    """From client to peer and back."""
    rtts: tuple[float, ...]
    """Round-trip times in seconds, shortest first."""
    largest: int = 0
    """Bytes of payload of the largest packet that made the round trip."""
    rejection: Rejection | None = None
    """The last ICMP error in response to a packet of this machine."""

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The measured directions."""
        return tuple(way for way in (self.to_peer, self.to_client, self.round_trip) if way is not None)

    def rtt_at(self, share: float) -> float | None:
        """Return a quantile (0–1) of the round-trip times in seconds; None without packets."""
        if not self.rtts:
            return None
        return self.rtts[max(math.ceil(share * len(self.rtts)) - 1, 0)]

    def words(self) -> str:
        """Return a summary for people."""
        names = ("looped",) if self.to_peer is None else ("to peer", "to client", "round trip")
        ways = ", ".join(f"{name} {way.received}/{way.sent}" for name, way in zip(names, self.directions, strict=True))
        shares = ((share, self.rtt_at(share / 100)) for share in (50, 90, 99))
        rtts = ", ".join(f"p{share} {rtt * 1e3:.2f}" for share, rtt in shares if rtt is not None)
        return f"{ways}; RTT {rtts} ms" if rtts else ways


class _Kind(IntEnum):
    FROM_CLIENT = 1
    FROM_PEER = 2
    ECHO = 3


class Exchange:
    """A run of packets.

    Args:
        client: the client's socket, connected to the server.
        channel: number of a channel to the peer, or to the allocation's own relayed address.
        peer: the peer's socket, connected to the relayed address; None to loop packets.
        plan: number and rate of packets.
    """

    def __init__(self, client: socket.socket, channel: int, peer: socket.socket | None, plan: PacketPlan) -> None:
        self._client = client
        self._channel = channel
        self._peer = peer
        self._plan = plan
        # Marks the packets of this run.
        self._token = secrets.token_bytes(_TOKEN_LENGTH)
        self._sent = 0
        self._rejection: Rejection | None = None
        self._arrived: dict[int, dict[int, float]] = {kind: {} for kind in (_Kind if peer else [_Kind.FROM_CLIENT])}
        """By kind and sequence number: seconds since the packet, or the packet that was echoed, was sent."""

    def run(self) -> Traffic:
        """Send all packets, wait for late packets, and return the counts."""
        count, rate = self._plan.count, self._plan.rate
        ends = [end for end in (self._client, self._peer) if end is not None]
        for end in ends:
            end.settimeout(0)
        started = time.perf_counter()
        while self._sent < count or any(len(times) < count for times in self._arrived.values()):
            elapsed = time.perf_counter() - started
            limit = (count - 1) / rate + self._plan.settle
            if not any(self._arrived.values()):
                limit = min(limit, self._plan.silence)
            if elapsed >= limit:
                break
            while self._sent < count and elapsed >= self._sent / rate:
                self._send_next()
            due = limit if self._sent == count else min(limit, self._sent / rate)
            for end in select.select(ends, (), (), due - elapsed)[0]:
                self._drain(end)
        *peer_ways, round_trip = (Direction(self._sent, len(times)) for times in self._arrived.values())
        to_peer, to_client = peer_ways or (None, None)
        rtts = self._arrived[_Kind.FROM_CLIENT if self._peer is None else _Kind.ECHO]
        largest = max(map(self._size, rtts), default=0)
        return Traffic(to_peer, to_client, round_trip, tuple(sorted(rtts.values())), largest, self._rejection)

    def _send_next(self) -> None:
        """Send a packet from each end."""
        packet = self._pack(_Kind.FROM_CLIENT)
        _send(self._client, CHANNEL_HEADER.pack(self._channel, len(packet)) + packet)
        if self._peer is not None:
            _send(self._peer, self._pack(_Kind.FROM_PEER))
        self._sent += 1

    def _drain(self, end: socket.socket) -> None:
        """Receive waiting datagrams, up to a limit, so that a flood does not delay sending, and all ICMP errors."""
        with contextlib.suppress(OSError):
            for _ in range(_READ_AT_ONCE):
                self._receive(end, end.recv(_LONGEST_DATAGRAM))
        self._rejection = read_rejection(end) or self._rejection

    def _receive(self, end: socket.socket, data: bytes) -> None:
        if end is self._client:
            channel, length = CHANNEL_HEADER.unpack_from(data) if len(data) >= CHANNEL_HEADER.size else (0, 0)
            # Padding may follow.
            data = data[CHANNEL_HEADER.size :][:length]
            if channel != self._channel or len(data) != length:
                return
        if len(data) < SHORTEST:
            return
        token, kind, sequence, sent_at = _PACKET.unpack_from(data)
        sent_by_client = end is self._peer or self._peer is None
        times = self._arrived.get(kind) if (kind == _Kind.FROM_CLIENT) is sent_by_client else None
        if times is None or token != self._token or sequence >= self._sent or sequence in times:
            return
        times[sequence] = (time.perf_counter_ns() - sent_at) / 1e9
        if end is self._peer:
            _send(end, _PACKET.pack(token, _Kind.ECHO, sequence, sent_at) + data[SHORTEST:])

    def _pack(self, kind: _Kind) -> bytes:
        header = _PACKET.pack(self._token, kind, self._sent, time.perf_counter_ns())
        return header + bytes(self._size(self._sent) - SHORTEST)

    def _size(self, sequence: int) -> int:
        return self._plan.sizes[sequence % len(self._plan.sizes)]


def _send(end: socket.socket, data: bytes) -> None:
    """Send a datagram. A datagram that can't be sent counts as lost."""
    for _ in range(2):
        # The error may be an ICMP error of an earlier datagram; then the second attempt succeeds.
        with contextlib.suppress(OSError):
            end.send(data)
            return
