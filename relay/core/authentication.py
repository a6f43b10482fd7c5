"""Authentication of requests: every request but Binding passes these checks, in this order."""

from typing import TypeVar

from relay.core.addresses import ClientAddress
from relay.core.attributes import NONCE, REALM, USERNAME, Attribute, MalformedAttributeError
from relay.core.counters import NonceOutcome
from relay.core.credentials import KeyCache, UserKey
from relay.core.errors import ErrorCode, Reason
from relay.core.nonces import Nonces
from relay.core.responses import RequestError
from relay.core.stun import Message
from relay.core.timestamp import Timestamp

T = TypeVar("T")


def claimed_user(message: Message, keys: KeyCache) -> UserKey | None:
    """Return the key for the USERNAME of a request, or None if USERNAME is absent or malformed.

    The key signs every response, whether or not the request was authenticated: deployed Firezone clients and aioice ignore a
    response without MESSAGE-INTEGRITY. The signature reveals nothing, because the relay signs only its own text.
    """
    username = _read(message, USERNAME)
    return None if username is None else keys(username)


def authenticate(message: Message, client: ClientAddress, now: Timestamp, nonces: Nonces, keys: KeyCache) -> UserKey:
    """Return the username and the key of an authentic request.

    The order of the checks matters to clients: after 401 for a request with a NONCE a client drops its credentials for good;
    after 438 it retries. Expensive checks come last: the relay derives a key and computes an HMAC only after a valid nonce
    has proven that the client receives packets at its source address.

    Raises:
        RequestError: the request is not authentic.
    """
    if message.integrity_at is None:
        raise RequestError(ErrorCode.UNAUTHENTICATED, Reason.NO_CREDENTIALS)
    nonce = _read(message, NONCE)
    # A Firezone client's first Allocate has USERNAME, REALM and MESSAGE-INTEGRITY but no NONCE. RFC 8489 §9.2.4 demands 400,
    # from which that client can't recover.
    if nonce is None:
        raise RequestError(ErrorCode.UNAUTHENTICATED, Reason.NO_NONCE)
    if not (message.has(USERNAME) and message.has(REALM)):
        raise RequestError(ErrorCode.BAD_REQUEST, Reason.INCOMPLETE_CREDENTIALS)
    outcome = nonces.check(nonce, client, now.monotonic)
    if outcome is not NonceOutcome.OURS:
        raise RequestError(ErrorCode.STALE_NONCE, Reason.OLD_NONCE if outcome is NonceOutcome.EXPIRED else None)
    user = claimed_user(message, keys)
    if user is None:
        raise RequestError(ErrorCode.UNAUTHENTICATED, Reason.NO_CREDENTIAL_OF_OURS)
    if user.username.is_expired(now.unix):
        raise RequestError(ErrorCode.UNAUTHENTICATED, Reason.CREDENTIAL_EXPIRED, about=str(user.username.expiry))
    if not message.integrity_holds(user.key):
        raise RequestError(ErrorCode.UNAUTHENTICATED, Reason.WRONG_PASSWORD)
    return user


def _read(message: Message, attribute: Attribute[T]) -> T | None:
    """Return the value of an attribute, or None if the attribute is absent or malformed: neither proves anything."""
    try:
        return message.get(attribute)
    except MalformedAttributeError:
        return None
