"""The known STUN attributes: a table of types, names, and functions that encode and decode values.

Sources: RFC 8489 §14 (STUN), RFC 8656 §18 (TURN).
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from relay.core.addresses import IPV4_LENGTH, IPV6_LENGTH, Family, SocketAddress, family_of, pack_host, unpack_address

T = TypeVar("T")

MAGIC_COOKIE = b"\x21\x12\xa4\x42"
"""Bytes 4–7 of every STUN message (RFC 8489 §5)."""

COMPREHENSION_OPTIONAL = 0x8000
"""A receiver may ignore unknown types from this number up (RFC 8489 §14)."""

USERNAME_LIMIT = 508
"""Longest USERNAME in bytes (RFC 8489 §14.3)."""

_HEAD = struct.Struct("!xBH")
_IPV4 = Family.IPV4
_unpack_ipv4 = struct.Struct("!HHI").unpack
_COOKIE = int.from_bytes(MAGIC_COOKIE, "big")

AddressNumber: TypeAlias = tuple[Family, int, int]
"""An address as numbers: family, host and port. To decode it takes a fifth of the time of a `SocketAddress`."""


class MalformedAttributeError(ValueError):
    """The value of an attribute is malformed."""


@dataclass(frozen=True, slots=True)
class Attribute(Generic[T]):
    """One row of the table.

    The transaction id is an argument of ``pack`` and ``unpack``, because the XOR of an IPv6 address depends on the id.
    ``unpack`` raises no exception but `MalformedAttributeError`.
    """

    type: int
    name: str
    pack: Callable[[T, bytes], bytes]
    unpack: Callable[[bytes, bytes], T]


class ErrorValue(NamedTuple):
    """The value of ERROR-CODE (RFC 8489 §14.8)."""

    code: int
    phrase: str


class AddressErrorValue(NamedTuple):
    """The value of ADDRESS-ERROR-CODE (RFC 8656 §18.12)."""

    family: Family
    code: int


def _pack_address(address: SocketAddress, transaction_id: bytes) -> bytes:
    """XOR an address with the magic cookie, followed by the transaction id (RFC 8489 §14.2)."""
    host = pack_host(address)
    mask = int.from_bytes((MAGIC_COOKIE + transaction_id)[: len(host)], "big")
    masked = (int.from_bytes(host, "big") ^ mask).to_bytes(len(host), "big")
    return _HEAD.pack(family_of(address), address[1] ^ 0x2112) + masked


def address_of(number: AddressNumber) -> SocketAddress:
    """Return an address from its numbers."""
    family, host, port = number
    return unpack_address(host.to_bytes(IPV4_LENGTH if family is Family.IPV4 else IPV6_LENGTH, "big"), port)


def _unpack_address(value: bytes, transaction_id: bytes) -> SocketAddress:
    return address_of(unpack_number(value, transaction_id))


def unpack_number(value: bytes, transaction_id: bytes) -> AddressNumber:
    """Decode the value of an XOR address."""
    if len(value) == 8 and value[1] == _IPV4:  # noqa: PLR2004 - 4 bytes and an IPv4 host
        _, port, host = _unpack_ipv4(value)
        return _IPV4, host ^ _COOKIE, port ^ 0x2112
    if len(value) == 4 + IPV6_LENGTH and value[1] == Family.IPV6:
        mask = int.from_bytes(MAGIC_COOKIE + transaction_id, "big")
        return Family.IPV6, int.from_bytes(value[4:], "big") ^ mask, int.from_bytes(value[2:4], "big") ^ 0x2112
    raise MalformedAttributeError("an XOR address has 8 or 20 bytes, by its family")


def _as_is(value: bytes, _: bytes) -> bytes:
    return value


def _pack_text(text: str, _: bytes) -> bytes:
    return text.encode()


def _unpack_text(value: bytes, _: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise MalformedAttributeError("text is UTF-8") from error


def _unpack_username(value: bytes, transaction_id: bytes) -> str:
    if len(value) > USERNAME_LIMIT:
        raise MalformedAttributeError("a username has at most 508 bytes")
    return _unpack_text(value, transaction_id)


def _number(form: str) -> tuple[Callable[[int, bytes], bytes], Callable[[bytes, bytes], int]]:
    """Return the functions for a number in the form of a struct."""
    number = struct.Struct(form)

    def unpack(value: bytes, _: bytes) -> int:
        return int(number.unpack(_of_length(value, number.size))[0])

    return lambda value, _: number.pack(value), unpack


def _pack_even_port(reserve: bool, _: bytes) -> bytes:  # noqa: FBT001 - the value of the attribute is a boolean
    return b"\x80" if reserve else b"\0"


def _unpack_even_port(value: bytes, _: bytes) -> bool:
    return bool(_of_length(value, 1)[0] & 0x80)


def _pack_error(error: ErrorValue, _: bytes) -> bytes:
    return bytes((0, 0, error.code // 100, error.code % 100)) + error.phrase.encode()


def _unpack_error(value: bytes, transaction_id: bytes) -> ErrorValue:
    if len(value) < 4:  # noqa: PLR2004 - reserved 16 bits, class, number
        raise MalformedAttributeError("an error code has at least 4 bytes")
    return ErrorValue(_unpack_code(value), _unpack_text(value[4:], transaction_id))


def _pack_address_error(error: AddressErrorValue, _: bytes) -> bytes:
    return bytes((error.family, 0, error.code // 100, error.code % 100))


def _unpack_address_error(value: bytes, _: bytes) -> AddressErrorValue:
    if len(value) < 4 or value[0] not in tuple(Family):  # noqa: PLR2004 - family, reserved, class, number
        raise MalformedAttributeError("an address error code has a family and a code")
    return AddressErrorValue(Family(value[0]), _unpack_code(value))


def _unpack_code(value: bytes) -> int:
    hundreds, number = value[2] & 7, value[3]
    if number > 99:  # noqa: PLR2004 - RFC 8489 §14.8
        raise MalformedAttributeError("the number of an error code is its value modulo 100")
    return hundreds * 100 + number


def _pack_types(types: Iterable[int], _: bytes) -> bytes:
    return b"".join(type_.to_bytes(2, "big") for type_ in types)


def _unpack_types(value: bytes, _: bytes) -> tuple[int, ...]:
    if len(value) % 2:
        raise MalformedAttributeError("a list of types has an even number of bytes")
    return tuple(int.from_bytes(value[at : at + 2], "big") for at in range(0, len(value), 2))


def _of_length(value: bytes, length: int) -> bytes:
    if len(value) != length:
        raise MalformedAttributeError(f"{length} bytes expected, not {len(value)}")
    return value


_ADDRESS = (_pack_address, _unpack_address)
_BYTES = (_as_is, _as_is)
_TEXT = (_pack_text, _unpack_text)
_U8 = _number("!B3x")
_U32 = _number("!I")

MAPPED_ADDRESS = Attribute(0x0001, "MAPPED-ADDRESS", *_BYTES)
USERNAME = Attribute(0x0006, "USERNAME", _pack_text, _unpack_username)
MESSAGE_INTEGRITY = Attribute(0x0008, "MESSAGE-INTEGRITY", *_BYTES)
ERROR_CODE = Attribute(0x0009, "ERROR-CODE", _pack_error, _unpack_error)
UNKNOWN_ATTRIBUTES = Attribute(0x000A, "UNKNOWN-ATTRIBUTES", _pack_types, _unpack_types)
CHANNEL_NUMBER = Attribute(0x000C, "CHANNEL-NUMBER", *_number("!H2x"))
LIFETIME = Attribute(0x000D, "LIFETIME", *_U32)
XOR_PEER_ADDRESS = Attribute(0x0012, "XOR-PEER-ADDRESS", *_ADDRESS)
DATA = Attribute(0x0013, "DATA", *_BYTES)
REALM = Attribute(0x0014, "REALM", *_TEXT)
NONCE = Attribute(0x0015, "NONCE", *_BYTES)
XOR_RELAYED_ADDRESS = Attribute(0x0016, "XOR-RELAYED-ADDRESS", *_ADDRESS)
REQUESTED_ADDRESS_FAMILY = Attribute(0x0017, "REQUESTED-ADDRESS-FAMILY", *_U8)
EVEN_PORT = Attribute(0x0018, "EVEN-PORT", _pack_even_port, _unpack_even_port)
REQUESTED_TRANSPORT = Attribute(0x0019, "REQUESTED-TRANSPORT", *_U8)
DONT_FRAGMENT = Attribute(0x001A, "DONT-FRAGMENT", *_BYTES)
XOR_MAPPED_ADDRESS = Attribute(0x0020, "XOR-MAPPED-ADDRESS", *_ADDRESS)
RESERVATION_TOKEN = Attribute(0x0022, "RESERVATION-TOKEN", *_BYTES)
ADDITIONAL_ADDRESS_FAMILY = Attribute(0x8000, "ADDITIONAL-ADDRESS-FAMILY", *_U8)
ADDRESS_ERROR_CODE = Attribute(0x8001, "ADDRESS-ERROR-CODE", _pack_address_error, _unpack_address_error)
SOFTWARE = Attribute(0x8022, "SOFTWARE", *_TEXT)
FINGERPRINT = Attribute(0x8028, "FINGERPRINT", *_U32)

KNOWN_TYPES = frozenset(row.type for row in tuple(globals().values()) if isinstance(row, Attribute))
