"""Answers to requests: how they are signed and sent."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from relay.core.addresses import ClientAddress
from relay.core.attributes import ERROR_CODE, SOFTWARE, Attribute, ErrorValue
from relay.core.authentication import ErrorCode, Reason
from relay.core.commands import Commands, SendToClient
from relay.core.counters import Counters
from relay.core.events import Answered, RequestRefused
from relay.core.stun import MessageClass, Method, encode

AttributeValues: TypeAlias = Iterable[tuple[Attribute[Any], Any]]

_TELLING_CODES = frozenset(
    (
        ErrorCode.BAD_REQUEST,
        ErrorCode.UNKNOWN_ATTRIBUTE,
        ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED,
        ErrorCode.WRONG_CREDENTIALS,
        ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL,
        ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH,
    )
)
"""What no client should get if all is well. 401, 437 and 438 are how clients find out; the rest have events of their own."""


class Recipient(NamedTuple):
    """The request that an answer is for, as far as the answer depends on it."""

    client: ClientAddress
    method: Method
    transaction_id: bytes
    fingerprint: bool
    """The request had a FINGERPRINT, so the answer gets one."""
    key: bytes | None = None
    """Signs the answer; None if the request claimed no username."""
    authenticated: bool = False
    """The claim is proven. Answers to others stay as small as they can: their sender's address may be a victim's."""


class Answers:
    """Writes answers, counts them, and puts them among the commands."""

    def __init__(self, software: str, counters: Counters, commands: Commands) -> None:
        self._software = software
        self._counters = counters
        self._commands = commands

    def succeed(self, to: Recipient, attributes: AttributeValues) -> bytes:
        """Answer a request with success, and give the bytes of the answer."""
        if to.authenticated:
            attributes = (*attributes, (SOFTWARE, self._software))
        return self._send(to, MessageClass.SUCCESS, attributes, None)

    def refuse(self, to: Recipient, code: ErrorCode, attributes: AttributeValues = (), reason: Reason | None = None) -> None:
        """Answer a request with an error; the reason is told to who watches, and not to the client."""
        error = ErrorValue(code, code.phrase if to.authenticated else "")
        self._send(to, MessageClass.ERROR, ((ERROR_CODE, error), *attributes), code, reason)
        tells = code in _TELLING_CODES or reason is not None
        if to.authenticated and tells and RequestRefused in self._commands.watched:
            self._commands.append(RequestRefused(to.client, to.method, code, reason))

    def repeat(self, to: Recipient, answer: bytes) -> None:
        """Answer a repeated request with the very bytes of the success it had."""
        self._note(to, None, answer)

    def _send(
        self,
        to: Recipient,
        message_class: MessageClass,
        attributes: AttributeValues,
        code: ErrorCode | None,
        reason: Reason | None = None,
    ) -> bytes:
        answer = encode(message_class, to.method, to.transaction_id, attributes, key=to.key, fingerprint=to.fingerprint)
        self._note(to, code, answer, reason)
        return answer

    def _note(self, to: Recipient, code: ErrorCode | None, answer: bytes, reason: Reason | None = None) -> None:
        """Send an answer, and count it."""
        self._counters.count_answer(to.method, code)
        self._commands.append(SendToClient(answer, to.client))
        if Answered in self._commands.watched:
            self._commands.append(Answered(to.client, to.method, code, reason))
