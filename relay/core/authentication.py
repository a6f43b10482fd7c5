"""Who sent a request, and how its answer is signed: the checks that every request but Binding passes, in order."""

from enum import IntEnum
from typing import NamedTuple, TypeVar

from relay.core.addresses import ClientAddress
from relay.core.attributes import NONCE, REALM, USERNAME, Attribute, MalformedAttributeError
from relay.core.credentials import RelaySecret, Username, integrity_key, parse_username, password_of
from relay.core.instant import Instant
from relay.core.nonces import Nonces
from relay.core.stun import Message

T = TypeVar("T")


class ErrorCode(IntEnum):
    """The error codes that the relay gives (RFC 8489 §14.8, RFC 8656 §19)."""

    BAD_REQUEST = 400
    UNAUTHENTICATED = 401
    FORBIDDEN = 403
    UNKNOWN_ATTRIBUTE = 420
    ALLOCATION_MISMATCH = 437
    STALE_NONCE = 438
    ADDRESS_FAMILY_NOT_SUPPORTED = 440
    WRONG_CREDENTIALS = 441
    UNSUPPORTED_TRANSPORT_PROTOCOL = 442
    PEER_ADDRESS_FAMILY_MISMATCH = 443
    ALLOCATION_QUOTA_REACHED = 486
    INSUFFICIENT_CAPACITY = 508

    __hash__ = int.__hash__

    @property
    def phrase(self) -> str:
        """The reason in words, for people."""
        return self.name.replace("_", " ").capitalize()

    @property
    def is_challenge(self) -> bool:
        """Tell whether its answer carries REALM and NONCE (RFC 8489 §9.2.4)."""
        return self in (ErrorCode.UNAUTHENTICATED, ErrorCode.STALE_NONCE)


class Claim(NamedTuple):
    """The username that a request bears, and the key that belongs to it."""

    username: Username
    key: bytes


def claim_of(message: Message, realm: str, secret: RelaySecret) -> Claim | None:
    """Read the username of a request; None if there is none that is well-formed.

    Every answer to a request with a claim is signed with its key, whether or not the request proved it: deployed Firezone
    clients, and aioice, ignore an answer without MESSAGE-INTEGRITY. It gives nothing away, as the relay signs nothing but
    its own words.
    """
    username = _username_of(message)
    return None if username is None else _claim(username, realm, secret)


def authenticate(
    message: Message, client: ClientAddress, now: Instant, nonces: Nonces, realm: str, secret: RelaySecret
) -> Claim | ErrorCode:
    """Check that a request is from who it claims; give that, or the error to answer.

    The order matters to clients: one that gets 401 for a request with a NONCE drops its credentials for good, where 438
    makes it try again. And what is dear comes last: no key is derived and no HMAC computed for whoever has not shown, by a
    nonce, that they get what is sent to their address.
    """
    if message.integrity_at is None:
        return ErrorCode.UNAUTHENTICATED
    nonce = _read(message, NONCE)
    # A Firezone client's first Allocate has USERNAME, REALM and MESSAGE-INTEGRITY but no NONCE; RFC 8489 §9.2.4 would have
    # 400 for it, which that client can't recover from.
    if nonce is None:
        return ErrorCode.UNAUTHENTICATED
    if not (message.has(USERNAME) and message.has(REALM)):
        return ErrorCode.BAD_REQUEST
    if not nonces.is_valid(nonce, client, now):
        return ErrorCode.STALE_NONCE
    username = _username_of(message)
    if username is None or username.is_expired(now.unix):
        return ErrorCode.UNAUTHENTICATED
    claim = _claim(username, realm, secret)
    return claim if message.integrity_holds(claim.key) else ErrorCode.UNAUTHENTICATED


def _username_of(message: Message) -> Username | None:
    text = _read(message, USERNAME)
    return None if text is None else parse_username(text)


def _claim(username: Username, realm: str, secret: RelaySecret) -> Claim:
    return Claim(username, integrity_key(username.text, realm, password_of(username, secret)))


def _read(message: Message, attribute: Attribute[T]) -> T | None:
    """Read a value that proves nothing if it is malformed: so it counts as absent."""
    try:
        return message.get(attribute)
    except MalformedAttributeError:
        return None
