"""Time-limited credentials: the holder of the relay secret can mint credentials, and the relay checks them without a table.

The username is ``{unix_expiry}:{salt}``, the password the unpadded Base64 of SHA-256 over ``{unix_expiry}:{secret}:{salt}``.
The key of MESSAGE-INTEGRITY follows from both as in RFC 8489 §9.2.2 (long-term credentials).
"""

import base64
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from relay.core.attributes import USERNAME_LIMIT
from relay.core.secret import Secret

FIREZONE_REALM = "firezone"

CACHED_KEYS = 2048
"""The most recent usernames keep their keys. Deriving a key takes 3 µs, an eighth of a Refresh."""

SECRET_LENGTH = 32
"""Random bytes in a generated relay secret."""

SALT_BYTES = 12
"""Random bytes in the salt of a generated username."""


class RelaySecret(Secret):
    """The secret from which passwords are derived. The portal knows the secret and mints credentials."""

    __slots__ = ()


class Username(NamedTuple):
    """A parsed username."""

    text: str
    expiry: int
    """Unix time in seconds. The username is expired afterwards."""

    def is_expired(self, unix: float) -> bool:
        """Return whether the username is expired. The username is still valid in the second of its expiry."""
        return self.expiry < unix


class Credential(NamedTuple):
    """A username and its password, as clients receive them."""

    username: str
    password: str


def parse_username(text: str) -> Username | None:
    """Parse a username. Return None unless the text is a decimal expiry and a salt, separated by one colon."""
    expiry, colon, salt = text.partition(":")
    # Python refuses to parse numbers with thousands of digits.
    is_number = expiry.isascii() and expiry.isdigit() and len(expiry) <= USERNAME_LIMIT
    if not colon or ":" in salt or not is_number:
        return None
    return Username(text, int(expiry))


def password_of(username: Username, secret: RelaySecret) -> str:
    """Return the password of a username."""
    expiry, _, salt = username.text.partition(":")
    digest = hashlib.sha256(f"{expiry}:{secret.expose()}:{salt}".encode()).digest()
    return base64.b64encode(digest).rstrip(b"=").decode()


def integrity_key(username: str, realm: str, password: str) -> bytes:
    """Return the key of MESSAGE-INTEGRITY (RFC 8489 §9.2.2)."""
    return hashlib.md5(f"{username}:{realm}:{password}".encode(), usedforsecurity=False).digest()


class UserKey(NamedTuple):
    """A username and its MESSAGE-INTEGRITY key."""

    username: Username
    key: bytes


KeyCache: TypeAlias = Callable[[str], UserKey | None]
"""Returns the key of a username, or None if the username is malformed."""


def key_cache(realm: str, secret: RelaySecret) -> KeyCache:
    """Return the only function with which the relay derives a key from a username. It caches keys, since clients return."""

    @functools.lru_cache(CACHED_KEYS)
    def key_of(text: str) -> UserKey | None:
        username = parse_username(text)
        return None if username is None else UserKey(username, integrity_key(text, realm, password_of(username, secret)))

    return key_of


def mint(secret: RelaySecret, expiry: int, salt: str) -> Credential:
    """Return a new credential.

    Args:
        secret: the relay's secret.
        expiry: unix time in seconds, not negative.
        salt: any text without a colon. Each salt allows one allocation.

    Raises:
        ValueError: the expiry is negative or the salt has a colon.
    """
    username = parse_username(f"{expiry}:{salt}")
    if username is None:
        raise ValueError("an expiry is not negative, and a salt has no colon")
    return Credential(username.text, password_of(username, secret))
