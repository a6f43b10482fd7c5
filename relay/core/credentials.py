"""Time-limited credentials: anyone who knows the relay secret can mint them, and the relay can check them without a table.

The username is ``{unix_expiry}:{salt}``, the password the unpadded Base64 of SHA-256 over ``{unix_expiry}:{secret}:{salt}``.
The key of MESSAGE-INTEGRITY follows from both as in RFC 8489 §9.2.2 (long-term credentials).
"""

import base64
import hashlib
from typing import NamedTuple

from relay.core.concealed import Concealed

FIREZONE_REALM = "firezone"
_LONGEST = 508
"""Characters in a username (RFC 8489 §14.3 has bytes); a number of many thousand digits is one that Python won't read."""

SECRET_LENGTH = 32
"""Random bytes in a relay secret that the relay makes itself."""

SALT_BYTES = 12
"""Random bytes in the salt of a username that is made here."""


class RelaySecret(Concealed):
    """The secret that passwords are derived from; the portal is told it, since it mints them."""

    __slots__ = ()


class Username(NamedTuple):
    """A well-formed username, taken apart."""

    text: str
    expiry: int
    """Unix time in seconds after which it is expired."""

    def is_expired(self, unix: float) -> bool:
        """Tell whether the wall clock is past the expiry; in that very second it is still valid."""
        return self.expiry < unix


class Credential(NamedTuple):
    """What a client is given."""

    username: str
    password: str


def parse_username(text: str) -> Username | None:
    """Take a username apart; None if it is not a decimal expiry and a salt with one colon between them."""
    expiry, colon, salt = text.partition(":")
    if not colon or ":" in salt or not (expiry.isascii() and expiry.isdigit()) or len(expiry) > _LONGEST:
        return None
    return Username(text, int(expiry))


def password_of(username: Username, secret: RelaySecret) -> str:
    """Derive the password that belongs to a username."""
    expiry, _, salt = username.text.partition(":")
    digest = hashlib.sha256(f"{expiry}:{secret.reveal()}:{salt}".encode()).digest()
    return base64.b64encode(digest).rstrip(b"=").decode()


def integrity_key(username: str, realm: str, password: str) -> bytes:
    """Derive the key of MESSAGE-INTEGRITY (RFC 8489 §9.2.2)."""
    return hashlib.md5(f"{username}:{realm}:{password}".encode(), usedforsecurity=False).digest()


def mint(secret: RelaySecret, expiry: int, salt: str) -> Credential:
    """Make a credential.

    Args:
        secret: the relay's secret.
        expiry: unix time in seconds, not negative.
        salt: any text without a colon; one salt is one allocation.

    Raises:
        ValueError: the expiry is negative or the salt has a colon.
    """
    username = parse_username(f"{expiry}:{salt}")
    if username is None:
        raise ValueError("an expiry is not negative, and a salt has no colon")
    return Credential(username.text, password_of(username, secret))
