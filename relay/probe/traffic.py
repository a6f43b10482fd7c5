"""Packets through an allocation: sent at a steady rate, counted and timed at both ends.

Both ends are in this process, so each packet's fate is known. The client's packets go out as ChannelData and are echoed by
the peer; the peer's own go straight to the relayed address. Without a peer (the allocation's channel leads to its own
relayed address) each of the client's packets comes back by itself.
"""

import contextlib
import math
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Is told how many packets have been sent each way, and how many there will be."""

_CHANNEL_HEADER = struct.Struct("!HH")
_PACKET = struct.Struct("!8sBIQ")
_TOKEN_LENGTH = 8
_LONGEST_DATAGRAM = 0xFFFF
_READ_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Pace:
    """How many packets are sent, and how fast."""

    count: int = 50
    """Packets each way."""
    rate: float = 50.0
    """Packets a second, each way."""
    settle: float = 2.0
    """Seconds after the last packet in which a late one still counts."""
    silence: float = 3.0
    """Seconds from the start after which the path counts as closed, if nothing at all has come through."""


class Direction(NamedTuple):
    """The packets of one way."""

    sent: int
    received: int

    @property
    def lost(self) -> int:
        """How many never came."""
        return self.sent - self.received

    @property
    def loss(self) -> float:
        """The share that never came, 0–1."""
        return self.lost / self.sent if self.sent else 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What became of the packets of one relayed address."""

    to_peer: Direction | None
    """Client to peer; None if the packets were looped."""
    to_client: Direction | None
    """Peer to client, the peer's own packets; None if the packets were looped."""
    round_trip: Direction
    """The client's packets that came back to it."""
    rtts: tuple[float, ...]
    """Seconds of each round trip, the shortest first."""

    @property
    def is_silent(self) -> bool:
        """Tell whether nothing came through, either way."""
        return not any(way.received for way in self.directions)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The ways that were measured."""
        return tuple(way for way in (self.to_peer, self.to_client, self.round_trip) if way is not None)

    def rtt_at(self, share: float) -> float | None:
        """Give the round-trip time in seconds that a share (0–1) of the packets did not exceed; None if none came back."""
        if not self.rtts:
            return None
        return self.rtts[max(math.ceil(share * len(self.rtts)) - 1, 0)]


class _Kind(IntEnum):
    FROM_CLIENT = 1
    ECHO = 2
    FROM_PEER = 3


class Exchange:
    """One run of packets.

    Args:
        client: a socket connected to the server.
        channel: the number of a channel that is bound to the peer, or to the allocation's own relayed address.
        peer: the peer's socket, connected to the relayed address; None if packets are looped.
        pace: how many and how fast.
    """

    def __init__(self, client: socket.socket, channel: int, peer: socket.socket | None, pace: Pace) -> None:
        self._client = client
        self._channel = channel
        self._peer = peer
        self._pace = pace
        # Datagrams without this, say of an earlier probe, are not counted.
        self._token = secrets.token_bytes(_TOKEN_LENGTH)
        self._sent = 0
        self._at_peer: set[int] = set()
        self._at_client: set[int] = set()
        self._rtts: dict[int, float] = {}

    def run(self, progress: Progress) -> Traffic:
        """Send all packets, wait for the late ones, and say what became of them."""
        with selectors.DefaultSelector() as selector:
            for end, receive in ((self._client, self._receive_at_client), (self._peer, self._receive_at_peer)):
                if end is not None:
                    end.settimeout(0)
                    selector.register(end, selectors.EVENT_READ, (end, receive))
            started = time.perf_counter()
            while (wait := self._send_due(started)) > 0 and not self._is_complete():
                progress(self._sent, self._pace.count)
                for key, _ in selector.select(wait):
                    _drain(*key.data)
        sent = self._sent
        looped = self._peer is None
        return Traffic(
            None if looped else Direction(sent, len(self._at_peer)),
            None if looped else Direction(sent, len(self._at_client)),
            Direction(sent, len(self._rtts)),
            tuple(sorted(self._rtts.values())),
        )

    def _send_due(self, started: float) -> float:
        """Send what is due, and give the seconds until something is; 0 or less when the run is over."""
        count, rate = self._pace.count, self._pace.rate
        now = time.perf_counter()
        while self._sent < count and now >= started + self._sent / rate:
            self._send_to_peer()
            if self._peer is not None:
                _send(self._peer, self._pack(_Kind.FROM_PEER, self._sent))
            self._sent += 1
        over = started + (count - 1) / rate + self._pace.settle
        if not (self._at_peer or self._at_client or self._rtts):
            over = min(over, started + self._pace.silence)
        due = over if self._sent == count else min(over, started + self._sent / rate)
        remaining = due - time.perf_counter()
        # A packet that has just come due must not be taken for the end of the run.
        return remaining if due == over else max(remaining, 0.0001)

    def _send_to_peer(self) -> None:
        packet = self._pack(_Kind.FROM_CLIENT, self._sent)
        _send(self._client, _CHANNEL_HEADER.pack(self._channel, len(packet)) + packet)

    def _is_complete(self) -> bool:
        count = self._pace.count
        ways = (self._rtts,) if self._peer is None else (self._rtts, self._at_peer, self._at_client)
        return self._sent == count and all(len(way) == count for way in ways)

    def _receive_at_client(self, data: bytes) -> None:
        if len(data) < _CHANNEL_HEADER.size:
            return
        number, length = _CHANNEL_HEADER.unpack_from(data)
        packet = data[_CHANNEL_HEADER.size :][:length]
        if number != self._channel or len(packet) != length:
            return
        kind, sequence, sent_at = self._unpack(packet)
        if kind is _Kind.FROM_PEER and self._peer is not None:
            self._at_client.add(sequence)
        elif kind is (_Kind.ECHO if self._peer is not None else _Kind.FROM_CLIENT):
            self._rtts.setdefault(sequence, (time.perf_counter_ns() - sent_at) / 1e9)

    def _receive_at_peer(self, data: bytes) -> None:
        kind, sequence, sent_at = self._unpack(data)
        if kind is _Kind.FROM_CLIENT and sequence not in self._at_peer and self._peer is not None:
            self._at_peer.add(sequence)
            _send(self._peer, _PACKET.pack(self._token, _Kind.ECHO, sequence, sent_at))

    def _pack(self, kind: _Kind, sequence: int) -> bytes:
        return _PACKET.pack(self._token, kind, sequence, time.perf_counter_ns())

    def _unpack(self, packet: bytes) -> tuple[_Kind | None, int, int]:
        """Read kind, sequence number and time; the kind of what is not a packet of this run is None."""
        if len(packet) != _PACKET.size or packet[:_TOKEN_LENGTH] != self._token:
            return None, 0, 0
        _, kind, sequence, sent_at = _PACKET.unpack(packet)
        if kind not in tuple(_Kind) or sequence >= self._sent:
            return None, 0, 0
        return _Kind(kind), sequence, sent_at


def _send(end: socket.socket, data: bytes) -> None:
    """Send a datagram; one that this machine does not take counts as lost."""
    for _ in range(2):
        # The error may be an ICMP message's that an earlier datagram drew, so the second try has no less of a chance.
        with contextlib.suppress(OSError):
            end.send(data)
            return


def _drain(end: socket.socket, receive: Callable[[bytes], None]) -> None:
    """Take what has come; not more than so much at once, lest a flood holds up sending."""
    with contextlib.suppress(OSError):
        for _ in range(_READ_AT_ONCE):
            receive(end.recv(_LONGEST_DATAGRAM))
