"""A client's STUN implementation, independent of the relay's implementation to detect its errors."""

import base64
import functools
import hashlib
import hmac
import socket
import zlib
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

Address: TypeAlias = tuple[str, int, *tuple[int, ...]]
Attributes: TypeAlias = Iterable[tuple[int, bytes]]

BINDING, ALLOCATE, REFRESH, CREATE_PERMISSION, CHANNEL_BIND = 1, 3, 4, 8, 9
REQUEST, INDICATION, SUCCESS, ERROR = 0x000, 0x010, 0x100, 0x110

USERNAME, INTEGRITY, ERROR_CODE, CHANNEL_NUMBER, LIFETIME = 0x0006, 0x0008, 0x0009, 0x000C, 0x000D
PEER_ADDRESS, REALM, NONCE, RELAYED_ADDRESS = 0x0012, 0x0014, 0x0015, 0x0016
REQUESTED_FAMILY, EVEN_PORT, TRANSPORT, MAPPED_ADDRESS = 0x0017, 0x0018, 0x0019, 0x0020
ADDITIONAL_FAMILY, ADDRESS_ERROR, FINGERPRINT = 0x8000, 0x8001, 0x8028

UDP = (TRANSPORT, b"\x11\0\0\0")
DUAL = (ADDITIONAL_FAMILY, b"\2\0\0\0")
IPV6_ONLY = (REQUESTED_FAMILY, b"\2\0\0\0")
EVEN = (EVEN_PORT, b"\0")

_COOKIE = b"\x21\x12\xa4\x42"


class Wire(NamedTuple):
    """A parsed message."""

    kind: int
    method: int
    transaction: bytes
    attributes: list[tuple[int, bytes]]
    covered: bytes
    """The bytes covered by MESSAGE-INTEGRITY, with the adjusted length field."""
    mac: bytes | None
    fingerprint: bool

    def get(self, type_: int) -> bytes | None:
        for each, value in self.attributes:
            if each == type_:
                return value
        return None

    def get_all(self, type_: int) -> list[bytes]:
        return [value for each, value in self.attributes if each == type_]

    def number(self, type_: int) -> int | None:
        value = self.get(type_)
        return None if value is None else int.from_bytes(value, "big")

    @property
    def code(self) -> int:
        """The error code; 0 for a success."""
        value = self.get(ERROR_CODE)
        return 0 if value is None else value[2] * 100 + value[3]

    def is_signed_with(self, key: bytes) -> bool:
        return self.mac is not None and self.mac == _sign(key, self.covered)


def write(
    kind: int,
    method: int,
    transaction: bytes,
    attributes: Attributes,
    key: bytes | None = None,
    *,
    fingerprint: bool = False,
) -> bytes:
    body = bytearray()
    for type_, value in attributes:
        body += type_.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)
    head = (kind | method).to_bytes(2, "big")
    if key is not None:
        covered = head + (len(body) + 24).to_bytes(2, "big") + _COOKIE + transaction + bytes(body)
        body += b"\0\x08\0\x14" + _sign(key, covered)
    if fingerprint:
        covered = head + (len(body) + 8).to_bytes(2, "big") + _COOKIE + transaction + bytes(body)
        body += b"\x80\x28\0\4" + (zlib.crc32(covered) ^ 0x5354554E).to_bytes(4, "big")
    return head + len(body).to_bytes(2, "big") + _COOKIE + transaction + bytes(body)


# The sender, the referee and the receiver parse the same message in sequence.
@functools.lru_cache(maxsize=512)
def read(data: bytes) -> Wire | None:
    """Parse a message; return None for an invalid message."""
    if len(data) < 20 or data[0] & 0xC0 or data[4:8] != _COOKIE or len(data) % 4 or len(data) != 20 + _u16(data, 2):
        return None
    attributes: list[tuple[int, bytes]] = []
    covered, mac, fingerprint = b"", None, False
    at = 20
    while at < len(data):
        type_, size = _u16(data, at), _u16(data, at + 2)
        value = data[at + 4 : at + 4 + size]
        if len(value) < size:
            return None
        if type_ == FINGERPRINT:
            checksum = (zlib.crc32(data[:at]) ^ 0x5354554E).to_bytes(4, "big")
            if at + 8 != len(data) or value != checksum:
                return None
            fingerprint = True
        elif mac is None and type_ == INTEGRITY:
            covered, mac = data[:2] + (at + 4).to_bytes(2, "big") + data[4:at], value
        elif mac is None:
            attributes.append((type_, value))
        at += 4 + size + (-size % 4)
    type_ = _u16(data, 0)
    method = type_ & 0xF | (type_ & 0xE0) >> 1 | (type_ & 0x3E00) >> 2
    return Wire(type_ & 0x110, method, data[8:20], attributes, covered, mac, fingerprint)


def address(of: Address, transaction: bytes) -> bytes:
    """Encode the value of an attribute with an XORed address."""
    is_ipv6 = ":" in of[0]
    host = socket.inet_pton(socket.AF_INET6 if is_ipv6 else socket.AF_INET, of[0])
    port = bytes(a ^ b for a, b in zip(of[1].to_bytes(2, "big"), _COOKIE, strict=False))
    return (b"\0\2" if is_ipv6 else b"\0\1") + port + bytes(a ^ b for a, b in zip(host, _COOKIE + transaction, strict=False))


def read_address(value: bytes, transaction: bytes) -> Address:
    port = int.from_bytes(value[2:4], "big") ^ 0x2112
    host = bytes(a ^ b for a, b in zip(value[4:], _COOKIE + transaction, strict=False))
    if value[1] == 2:
        return (socket.inet_ntop(socket.AF_INET6, host), port, 0, 0)
    return (socket.inet_ntop(socket.AF_INET, host), port)


def channel_data(number: int, payload: bytes, padding: bytes = b"") -> bytes:
    return number.to_bytes(2, "big") + len(payload).to_bytes(2, "big") + payload + padding


def password(username: str, secret: str) -> str:
    """Derive the password of a username, as the portal does."""
    expiry, salt = username.split(":")
    digest = hashlib.sha256(f"{expiry}:{secret}:{salt}".encode()).digest()
    return base64.b64encode(digest).decode().rstrip("=")


def long_term_key(username: str, secret: str) -> bytes:
    text = f"{username}:firezone:{password(username, secret)}"
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


@functools.lru_cache(maxsize=512)
def _sign(key: bytes, covered: bytes) -> bytes:
    return hmac.digest(key, covered, "sha1")


def _u16(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]
