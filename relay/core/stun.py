"""STUN messages: bytes to `Message` and back (RFC 8489 §5, §14).

`decode` never raises: the result is a `Message` or the kind of error. `decode` checks the form of the message and the
FINGERPRINT. `Message.get` checks the value of an attribute, because the server chooses the reaction (silence, 400, 401).
"""

import functools
import hashlib
import hmac
import operator
import struct
import zlib
from collections.abc import Iterable, Iterator
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, TypeVar

from relay.core.attributes import (
    COMPREHENSION_OPTIONAL,
    FINGERPRINT,
    KNOWN_TYPES,
    MAGIC_COOKIE,
    MESSAGE_INTEGRITY,
    Attribute,
)

T = TypeVar("T")

HEADER_LENGTH = 20
TRANSACTION_ID_LENGTH = 12
FINGERPRINT_MASK = 0x5354554E
"""XORed into the CRC, to differ from the CRC of a multiplexed protocol (RFC 8489 §14.7)."""

MOST_ATTRIBUTES = 64
"""Attributes in a message, including ignored attributes. Some clients send all peers, at most dozens, in one
CreatePermission. A datagram has room for 370 empty attributes, which would take four times the time of a
Refresh."""

_FIRST_BYTE_BELOW = 4
_INTEGRITY_LENGTH = 4 + 20
_FINGERPRINT_LENGTH = 4 + 4
_HEAD = struct.Struct("!HH")
_INTEGRITY_HEAD = _HEAD.pack(MESSAGE_INTEGRITY.type, 20)
_TYPE_OF = operator.itemgetter(0)
_PADDING = (b"", bytes(3), bytes(2), bytes(1))

_BLOCK = 64
"""Bytes in a block of SHA-1, for HMAC (RFC 2104)."""

_INNER_PAD, _OUTER_PAD = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))


def is_stun(data: bytes) -> bool:
    """Return whether the first byte of a datagram is STUN's (RFC 7983 §7)."""
    return bool(data) and data[0] < _FIRST_BYTE_BELOW


class Method(IntEnum):
    """The methods of a TURN server (RFC 8489 §18.2, RFC 8656 §17)."""

    BINDING = 0x001
    ALLOCATE = 0x003
    REFRESH = 0x004
    SEND = 0x006
    DATA = 0x007
    CREATE_PERMISSION = 0x008
    CHANNEL_BIND = 0x009

    def __str__(self) -> str:
        return self.name.lower()


class MessageClass(IntEnum):
    """The four message classes (RFC 8489 §5)."""

    REQUEST = 0
    INDICATION = 1
    SUCCESS = 2
    ERROR = 3


_CLASSES = tuple(MessageClass)
"""Classes by number. A look-up takes a tenth of the time of ``MessageClass(number)``."""


class Malformed(StrEnum):
    """The reason why bytes are not a STUN message. `relay.core.counters.DropReason` has the same values."""

    HEADER = "malformed_header"
    COOKIE = "malformed_cookie"
    LENGTH = "malformed_length"
    ATTRIBUTE = "malformed_attribute"
    FINGERPRINT = "malformed_fingerprint"
    TOO_MANY_ATTRIBUTES = "too_many_attributes"


class Message(NamedTuple):
    """A well-formed message, without the attributes after MESSAGE-INTEGRITY (RFC 8489 §14.5)."""

    message_class: MessageClass
    method: int
    transaction_id: bytes
    attributes: tuple[tuple[int, bytes], ...]
    raw: bytes
    integrity_at: int | None
    """The offset of MESSAGE-INTEGRITY in ``raw``. None without MESSAGE-INTEGRITY."""
    integrity: bytes
    has_fingerprint: bool

    def get(self, attribute: Attribute[T]) -> T | None:
        """Return the value of the first occurrence of an attribute (RFC 8489 §14), or None.

        Raises:
            MalformedAttributeError: the value is malformed.
        """
        wanted = attribute.type
        for type_, value in self.attributes:
            if type_ == wanted:
                return attribute.unpack(value, self.transaction_id)
        return None

    def get_all(self, attribute: Attribute[T]) -> Iterator[T]:
        """Return the values of all occurrences of an attribute, in order. Raise as `get` does."""
        return (attribute.unpack(value, self.transaction_id) for type_, value in self.attributes if type_ == attribute.type)

    def has(self, attribute: Attribute[Any]) -> bool:
        """Return whether the message has an attribute, with any value."""
        return attribute.type in map(_TYPE_OF, self.attributes)

    def unknown_attributes(self) -> tuple[int, ...]:
        """Return the unknown types that must be understood, without repetitions."""
        unknown = [t for t, _ in self.attributes if t < COMPREHENSION_OPTIONAL and t not in KNOWN_TYPES]
        return tuple(dict.fromkeys(unknown)) if unknown else ()

    def integrity_holds(self, key: bytes) -> bool:
        """Check MESSAGE-INTEGRITY in constant time. Return False without MESSAGE-INTEGRITY.

        The HMAC covers the message up to MESSAGE-INTEGRITY, with a length that includes this attribute (RFC 8489 §14.5).
        """
        if self.integrity_at is None:
            return False
        expected = _mac(_with_length(self.raw[: self.integrity_at], _INTEGRITY_LENGTH), key)
        return hmac.compare_digest(expected, self.integrity)


def decode(data: bytes) -> Message | Malformed:
    """Decode a message that fills a datagram, or return the reason of a failure."""
    fault = _header_fault(data)
    if fault is not None:
        return fault
    message_type = int.from_bytes(data[:2], "big")
    attributes: list[tuple[int, bytes]] = []
    integrity_at = None
    integrity = b""
    has_fingerprint = False
    at, end = HEADER_LENGTH, len(data)
    left = MOST_ATTRIBUTES
    while at < end:
        if not left:
            return Malformed.TOO_MANY_ATTRIBUTES
        left -= 1
        type_, size = _HEAD.unpack_from(data, at)
        value = data[at + 4 : at + 4 + size]
        if len(value) != size:
            return Malformed.ATTRIBUTE
        if type_ == FINGERPRINT.type:
            if at + _FINGERPRINT_LENGTH != end or _fingerprint(data[:at]) != value:
                return Malformed.FINGERPRINT
            has_fingerprint = True
        elif integrity_at is None:
            if type_ == MESSAGE_INTEGRITY.type:
                integrity_at, integrity = at, value
            else:
                attributes.append((type_, value))
        at += 4 + (size + 3 & ~3)
    return Message(
        _CLASSES[(message_type >> 4 & 1) | (message_type >> 7 & 2)],
        (message_type & 0x000F) | (message_type >> 1 & 0x0070) | (message_type >> 2 & 0x0F80),
        data[8:HEADER_LENGTH],
        tuple(attributes),
        data,
        integrity_at,
        integrity,
        has_fingerprint,
    )


def _header_fault(data: bytes) -> Malformed | None:
    if len(data) < HEADER_LENGTH or data[0] & 0xC0:
        return Malformed.HEADER
    if data[4:8] != MAGIC_COOKIE:
        return Malformed.COOKIE
    length = int.from_bytes(data[2:4], "big")
    return Malformed.LENGTH if length % 4 or length != len(data) - HEADER_LENGTH else None


def encode(
    message_class: MessageClass,
    method: int,
    transaction_id: bytes,
    attributes: Iterable[tuple[Attribute[Any], Any]],
    *,
    key: bytes | None = None,
    fingerprint: bool = False,
) -> bytes:
    """Return an encoded message.

    Args:
        message_class: one of the four.
        method: 0–0xFFF.
        transaction_id: 12 bytes.
        attributes: rows of the attribute table with their values, in order, without MESSAGE-INTEGRITY and FINGERPRINT.
        key: signs the message with MESSAGE-INTEGRITY.
        fingerprint: appends FINGERPRINT.
    """
    parts: list[bytes] = []
    for attribute, value in attributes:
        packed = attribute.pack(value, transaction_id)
        size = len(packed)
        parts += (_HEAD.pack(attribute.type, size), packed, _PADDING[size & 3])
    body = b"".join(parts)
    message_type = (
        (method & 0x000F) | (method & 0x0070) << 1 | (method & 0x0F80) << 2
        | (message_class & 1) << 4 | (message_class & 2) << 7
    )  # fmt: skip
    # The length under MESSAGE-INTEGRITY includes MESSAGE-INTEGRITY, but no FINGERPRINT (RFC 8489 §14.5).
    length = len(body) + (0 if key is None else _INTEGRITY_LENGTH)
    message = b"".join((_HEAD.pack(message_type, length), MAGIC_COOKIE, transaction_id, body))
    if key is not None:
        message = b"".join((message, _INTEGRITY_HEAD, _mac(message, key)))
    if fingerprint:
        message = _with_length(message, _FINGERPRINT_LENGTH)
        message += _HEAD.pack(FINGERPRINT.type, 4) + _fingerprint(message)
    return message


def _mac(message: bytes, key: bytes) -> bytes:
    """Return HMAC-SHA1 (RFC 2104)."""
    begun_inner, begun_outer = _begun(key)
    inner, outer = begun_inner.copy(), begun_outer.copy()
    inner.update(message)
    outer.update(inner.digest())
    return outer.digest()


# A request and its response have the same key, and each client has one key. A hash from this cached state takes half the
# time of hmac.digest, and a quarter with OpenSSL outside the CPU cache.
@functools.lru_cache(maxsize=2048)
def _begun(key: bytes) -> tuple["hashlib._Hash", "hashlib._Hash"]:
    """Return the inner and the outer hash of HMAC-SHA1, with the padded key as their input."""
    block = (key if len(key) <= _BLOCK else hashlib.sha1(key, usedforsecurity=False).digest()).ljust(_BLOCK, b"\0")
    return (
        hashlib.sha1(block.translate(_INNER_PAD), usedforsecurity=False),
        hashlib.sha1(block.translate(_OUTER_PAD), usedforsecurity=False),
    )


def _fingerprint(covered: bytes) -> bytes:
    return (zlib.crc32(covered) ^ FINGERPRINT_MASK).to_bytes(4, "big")


def _with_length(message: bytes, more: int) -> bytes:
    """Return a message with ``more`` bytes added to its length field."""
    return message[:2] + (len(message) - HEADER_LENGTH + more).to_bytes(2, "big") + message[4:]
