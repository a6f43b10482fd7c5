"""The decoder of STUN and ChannelData: bytes are read or refused, as another decoder does; what is read can be written."""

from random import Random
from typing import Any

from relay.core import attributes
from relay.core.attributes import Attribute, MalformedAttributeError
from relay.core.commands import SendToPeer
from relay.core.server import Server
from relay.core.stun import Malformed, Message, decode, encode, is_stun
from relay.core.trains import Arrival, cut
from tests.fuzz.relays import CHANNEL, CLIENT, CONFIG, START, established
from tests.simulation import wire

MODULES = ("relay.core.stun", "relay.core.attributes", "relay.core.addresses", "relay.core.trains")

_ROWS: list[Attribute[Any]] = [row for row in vars(attributes).values() if isinstance(row, Attribute)]
_MOST_ATTRIBUTES = 32

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
    """Read each value that has a meaning; what can be read can be written, and means the same then."""
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
    """Have a relay with one channel take it alone, in a batch, and as a train: the same must come out."""
    segment = data[-1] & 0x3F
    pieces = list(cut(data, segment))
    assert _relayed([(data, CLIENT, 0, 0)]) == _payloads([data])
    assert _relayed([(piece, CLIENT, 0, 0) for piece in pieces]) == _payloads(pieces)
    assert _relayed([(data, CLIENT, segment, 0)]) == _payloads(pieces)
    for batch in ([data], pieces):
        forwarded = _server().forward_to_peer([(piece, CLIENT, 0, 0) for piece in batch], START.monotonic)
        if forwarded is not None:
            _, payload, _, length, _ = forwarded
            assert list(cut(payload, length)) == _payloads(batch)


def _payloads(pieces: list[bytes]) -> list[bytes]:
    return [payload for payload in map(_payload, pieces) if payload is not None]


def _payload(data: bytes) -> bytes | None:
    """Give what a datagram holds for the only channel there is."""
    if len(data) < 4 or int.from_bytes(data[:2], "big") != CHANNEL:
        return None
    length = int.from_bytes(data[2:4], "big")
    return data[4 : 4 + length] if 4 + length <= len(data) else None


def _relayed(arrivals: list[Arrival]) -> list[bytes]:
    server = _server()
    if len(arrivals) == 1:
        server.handle_client_arrival(arrivals[0], START)
    else:
        server.handle_client_arrivals(iter(arrivals), START)
    return [
        datagram
        for command in server.drain()
        if isinstance(command, SendToPeer)
        for datagram in (cut(command.data, command.segment))
    ]


_made: list[Server] = []


def _server() -> Server:
    """Give a server on which `CHANNEL` is bound; nothing that is sent on it changes that."""
    if not _made:
        _made.append(established(Server(CONFIG, Random(1))))
    return _made[0]
