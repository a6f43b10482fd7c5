"""Who sent a request, and how its answer is signed: the checks that every request but Binding passes, in order."""

import functools
from enum import IntEnum, StrEnum
from typing import NamedTuple, TypeVar

from relay.core.addresses import ClientAddress
from relay.core.attributes import NONCE, REALM, USERNAME, Attribute, MalformedAttributeError
from relay.core.credentials import RelaySecret, Username, integrity_key, parse_username, password_of
from relay.core.instant import Instant
from relay.core.nonces import Nonces
from relay.core.stun import Message

T = TypeVar("T")

MOST_KNOWN = 2048
"""The latest claims are kept. To derive one again costs 3 µs, an eighth of a Refresh."""


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


class Reason(StrEnum):
    """Why a request is refused, where its code stands for several things. For the log; no client is told."""

    NO_CREDENTIALS = "no_credentials"
    """401: no MESSAGE-INTEGRITY, as when a client begins."""
    NO_NONCE = "no_nonce"
    """401: likewise, as when a Firezone client does."""
    NO_CREDENTIAL_OF_OURS = "no_credential_of_ours"
    """401: the username has not the form that the portal gives it."""
    CREDENTIAL_EXPIRED = "credential_expired"
    """401, by this machine's clock."""
    WRONG_PASSWORD = "wrong_password"  # noqa: S105
    """401: MESSAGE-INTEGRITY does not hold. The credential is another relay's, or from before this one's start."""
    INCOMPLETE_CREDENTIALS = "incomplete_credentials"
    """400: MESSAGE-INTEGRITY and NONCE, but no USERNAME or no REALM."""
    MALFORMED_ATTRIBUTE = "malformed_attribute"
    """400."""
    NO_TRANSPORT = "no_transport"
    """400: no REQUESTED-TRANSPORT."""
    CONTRADICTING_FAMILIES = "contradicting_families"
    """400: ADDITIONAL-ADDRESS-FAMILY with REQUESTED-ADDRESS-FAMILY, or of IPv4."""
    NO_PEER = "no_peer"
    """400: no XOR-PEER-ADDRESS, or port 0."""
    NO_CHANNEL_NUMBER = "no_channel_number"
    """400: no CHANNEL-NUMBER, or one that is none."""
    CHANNEL_TAKEN = "channel_taken"
    """400: the channel is bound to another peer, or was in the last five minutes."""
    PEER_TAKEN = "peer_taken"
    """400: the peer is bound to another channel, or was."""
    RESERVATION = "reservation"
    """508: the next port was to be reserved (EVEN-PORT, RESERVATION-TOKEN), which this relay does not do."""


class Unproven(NamedTuple):
    """The error for a request that does not prove who sent it."""

    code: ErrorCode
    reason: Reason | None = None


_NO_CREDENTIALS = Unproven(ErrorCode.UNAUTHENTICATED, Reason.NO_CREDENTIALS)
_NO_NONCE = Unproven(ErrorCode.UNAUTHENTICATED, Reason.NO_NONCE)
_INCOMPLETE = Unproven(ErrorCode.BAD_REQUEST, Reason.INCOMPLETE_CREDENTIALS)
_STALE = Unproven(ErrorCode.STALE_NONCE)
_NOT_OURS = Unproven(ErrorCode.UNAUTHENTICATED, Reason.NO_CREDENTIAL_OF_OURS)
_EXPIRED = Unproven(ErrorCode.UNAUTHENTICATED, Reason.CREDENTIAL_EXPIRED)
_WRONG_PASSWORD = Unproven(ErrorCode.UNAUTHENTICATED, Reason.WRONG_PASSWORD)


class Claim(NamedTuple):
    """The username that a request bears, and the key that belongs to it."""

    username: Username
    key: bytes


class Claims:
    """Reads what requests claim. It keeps what followed from a username, since clients come back with theirs.

    Args:
        realm: of all usernames.
        secret: what passwords are derived from.
    """

    def __init__(self, realm: str, secret: RelaySecret) -> None:
        self._of_username = functools.lru_cache(MOST_KNOWN)(functools.partial(_claim, realm, secret))

    def of(self, message: Message) -> Claim | None:
        """Give the claim of a request; None if there is no username in it that is well-formed.

        Every answer to a request with a claim is signed with its key, whether or not the request proved it: deployed
        Firezone clients, and aioice, ignore an answer without MESSAGE-INTEGRITY. It gives nothing away, as the relay signs
        nothing but its own words.
        """
        text = _read(message, USERNAME)
        return None if text is None else self._of_username(text)


def authenticate(message: Message, client: ClientAddress, now: Instant, nonces: Nonces, claims: Claims) -> Claim | Unproven:
    """Check that a request is from who it claims; give that, or the error to answer.

    The order matters to clients: one that gets 401 for a request with a NONCE drops its credentials for good, where 438
    makes it try again. And what is dear comes last: no key is derived and no HMAC computed for whoever has not shown, by a
    nonce, that they get what is sent to their address.
    """
    if message.integrity_at is None:
        return _NO_CREDENTIALS
    nonce = _read(message, NONCE)
    # A Firezone client's first Allocate has USERNAME, REALM and MESSAGE-INTEGRITY but no NONCE; RFC 8489 §9.2.4 would have
    # 400 for it, which that client can't recover from.
    if nonce is None:
        return _NO_NONCE
    if not (message.has(USERNAME) and message.has(REALM)):
        return _INCOMPLETE
    if not nonces.is_valid(nonce, client, now):
        return _STALE
    claim = claims.of(message)
    if claim is None or claim.username.is_expired(now.unix):
        return _NOT_OURS if claim is None else _EXPIRED
    return claim if message.integrity_holds(claim.key) else _WRONG_PASSWORD


def _claim(realm: str, secret: RelaySecret, text: str) -> Claim | None:
    username = parse_username(text)
    return None if username is None else Claim(username, integrity_key(text, realm, password_of(username, secret)))


def _read(message: Message, attribute: Attribute[T]) -> T | None:
    """Read a value that proves nothing if it is malformed: so it counts as absent."""
    try:
        return message.get(attribute)
    except MalformedAttributeError:
        return None
