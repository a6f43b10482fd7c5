"""The decoder of STUN and ChannelData: equal to a second decoder, and inverse to the encoder."""

from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Any

from relay.core import attributes
from relay.core.allocation import CHANNEL_LIFETIME
from relay.core.attributes import Attribute, MalformedAttributeError
from relay.core.commands import HandIn, SendToPeer, cut
from relay.core.data import Datagram
from relay.core.overload import MIXED_INTERVAL, MIXED_SENDS
from relay.core.server import Server
from relay.core.stun import Malformed, Message, decode, encode, is_stun
from relay.core.timestamp import Timestamp
from relay.net.grouping import grouped
from tests.fuzz.relays import CHANNEL, CLIENT, CONFIG, START, established
from tests.simulation import wire

MODULES = ("relay.core.stun", "relay.core.attributes", "relay.core.addresses")

_ROWS: list[Attribute[Any]] = [row for row in vars(attributes).values() if isinstance(row, Attribute)]
_MOST_ATTRIBUTES = 32
_STEP = 2 * MIXED_INTERVAL
"""Seconds between two runs: longer than the interval of a share in spite of rounding."""

SEEDS = (
    wire.write(wire.REQUEST, wire.BINDING, bytes(12), ()),
    wire.write(
        wire.REQUEST,
        wire.ALLOCATE,
        bytes(range(12)),
        (wire.UDP, wire.DUAL, wire.EVEN, (wire.LIFETIME, bytes(4)), (wire.USERNAME, b"1:a"), (wire.REALM, b"firezone")),
        b"key",
        fingerprint=True,
    ),
    wire.write(
        wire.ERROR,
        wire.CHANNEL_BIND,
        bytes(12),
        (
            (wire.ERROR_CODE, b"\0\0\4\1no"),
            (wire.PEER_ADDRESS, wire.address(("192.0.2.1", 5), bytes(12))),
            (wire.MAPPED_ADDRESS, wire.address(("2001:db8::1", 5, 0, 0), bytes(12))),
            (wire.ADDRESS_ERROR, b"\2\0\4\x28"),
            (0x000A, b"\0\1\0\2"),
            (0x8022, b"software"),
        ),
        fingerprint=True,
    ),
    wire.channel_data(CHANNEL, b"payload", b"\0"),
    wire.channel_data(CHANNEL, b"") + wire.channel_data(CHANNEL, b"abc"),
)


def run(data: bytes) -> None:
    if data and 64 <= data[0] < 128:
        _run_channel_data(data)
        return
    message = decode(data)
    read = wire.read(data)
    if isinstance(message, Malformed):
        many = message is Malformed.TOO_MANY_ATTRIBUTES
        assert read is None or (many and data.count(b"\0") >= _MOST_ATTRIBUTES)
        assert not is_stun(data) or len(data) < 20 or message is not Malformed.HEADER
        return
    assert read is not None
    assert (message.message_class << 4 & 0x10 | message.message_class << 7 & 0x100, message.method) == read[:2]
    assert (message.transaction_id, list(message.attributes)) == (read.transaction, read.attributes)
    assert (message.integrity_at is not None, message.has_fingerprint) == (read.mac is not None, read.fingerprint)
    assert message.integrity_holds(b"key") is read.is_signed_with(b"key")
    _check_values(message)
    _write_again(message)


def _check_values(message: Message) -> None:
    """Decode each known attribute, and check that encoding and decoding return the same value."""
    for row in _ROWS:
        try:
            values = list(message.get_all(row))
        except MalformedAttributeError:
            continue
        assert message.has(row) is bool(values)
        for value in values:
            packed = row.pack(value, message.transaction_id)
            assert row.unpack(packed, message.transaction_id) == value
    assert set(message.unknown_attributes()) <= {type_ for type_, _ in message.attributes}


def _write_again(message: Message) -> None:
    opaque = [(Attribute(type_, "", lambda v, _: v, lambda v, _: v), value) for type_, value in message.attributes]
    written = encode(
        message.message_class,
        message.method,
        message.transaction_id,
        opaque,
        key=None if message.integrity_at is None else b"key",
        fingerprint=message.has_fingerprint,
    )
    again = decode(written)
    assert isinstance(again, Message)
    assert again[:4] == message[:4]
    assert (again.integrity_at is None, again.has_fingerprint) == (message.integrity_at is None, message.has_fingerprint)
    assert again.integrity_at is None or again.integrity_holds(b"key")


def _run_channel_data(data: bytes) -> None:
    """Relay a datagram alone, in a batch and as a GRO batch, and compare the results.

    A batch has no more datagrams than a client's share of separate sends.
    """
    segment = data[-1] & 0x3F
    data = data[: MIXED_SENDS * segment] or data
    pieces = list(cut(data, segment))
    assert _relayed([(data, CLIENT, 0, 0)]) == _payloads([data])
    assert _relayed([(piece, CLIENT, 0, 0) for piece in pieces]) == _payloads(pieces)
    assert _relayed([(data, CLIENT, segment, 0)]) == _payloads(pieces)


def _payloads(pieces: list[bytes]) -> list[bytes]:
    return [payload for payload in map(_payload, pieces) if payload is not None]


def _payload(data: bytes) -> bytes | None:
    """Return the payload of a datagram for the only channel, or None."""
    if len(data) < 4 or int.from_bytes(data[:2], "big") != CHANNEL:
        return None
    length = int.from_bytes(data[2:4], "big")
    return data[4 : 4 + length] if 4 + length <= len(data) else None


def _relayed(batch: list[Datagram]) -> list[bytes]:
    server, now = next(_relays)
    relayed: list[bytes] = []
    waiting = deque(grouped(batch))
    while waiting:
        returned = server.handle_client_datagram(waiting.popleft(), now)
        for command in [*([] if returned is None else [returned]), *server.drain()]:
            match command:
                case SendToPeer():
                    relayed += cut(command.data, command.segment_size)
                case HandIn():
                    waiting += command.datagrams
                case _:
                    pass
    return relayed


def _relays_over_time() -> Iterator[tuple[Server, Timestamp]]:
    """Return a server with a binding of `CHANNEL`, and a time at which its client has a new share of separate sends.

    A server is used as long as the binding lives, because its making takes as long as 100 runs.
    """
    while True:
        server = established(Server(CONFIG, Random(1)))
        for n in range(1, int(CHANNEL_LIFETIME / _STEP)):
            yield server, Timestamp(START.monotonic + n * _STEP, START.unix)


_relays = _relays_over_time()
