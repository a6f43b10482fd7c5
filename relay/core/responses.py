"""Responses to requests: how an error is raised, and how responses are signed and sent."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from relay.core.addresses import ClientAddress, show
from relay.core.attributes import ERROR_CODE, NONCE, REALM, SOFTWARE, Attribute, ErrorValue
from relay.core.commands import Commands, SendToClient
from relay.core.config import ServerConfig
from relay.core.counters import Counters
from relay.core.credentials import KeyCache
from relay.core.errors import ErrorCode, Reason
from relay.core.events import Answered, Limit, LimitReached, PeerRefused, RequestRefused
from relay.core.history import History
from relay.core.nonces import Nonces
from relay.core.stun import MessageClass, Method, encode

AttributeValues: TypeAlias = Iterable[tuple[Attribute[Any], Any]]

_QUOTAS = (Limit.ALLOCATIONS, Limit.ALLOCATIONS_OF_ADDRESS)

_LIMITS = (ErrorCode.ALLOCATION_QUOTA_REACHED, ErrorCode.INSUFFICIENT_CAPACITY)
"""The codes for valid requests."""


class RequestError(Exception):
    """The error response to a request. Every check of a request raises this exception; only `Responder.reject` sends errors.

    Args:
        code: the error code.
        reason: for the log, where the code has several reasons.
        event: reported instead of `RequestRefused`.
        about: the expiry of the credential, for `relay.core.history`.
        attributes: sent after ERROR-CODE.
    """

    def __init__(
        self,
        code: ErrorCode,
        reason: Reason | None = None,
        event: PeerRefused | LimitReached | None = None,
        attributes: tuple[tuple[Attribute[Any], Any], ...] = (),
        about: str = "",
    ) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.event = event
        self.attributes = attributes
        self.about = show(event.peer) if isinstance(event, PeerRefused) else about

    @property
    def cause(self) -> str:
        """The most exact reason: of the code, the limit or the rule; else the name of the code."""
        if self.reason is not None:
            return self.reason
        if self.event is not None:
            return self.event.rule if isinstance(self.event, PeerRefused) else self.event.limit
        return self.code.name.lower()


def limit_error(client: ClientAddress, limit: Limit) -> RequestError:
    """Return the error for a valid request that exceeds a limit: 486 for a quota, 508 otherwise (RFC 8656 §7.2, §12.2)."""
    code = ErrorCode.ALLOCATION_QUOTA_REACHED if limit in _QUOTAS else ErrorCode.INSUFFICIENT_CAPACITY
    return RequestError(code, event=LimitReached(client, limit, code))


class ResponseContext(NamedTuple):
    """The properties of a request that its response depends on."""

    client: ClientAddress
    method: Method
    now: float
    """The monotonic time of the request."""
    transaction_id: bytes
    fingerprint: bool
    """Whether the request has a FINGERPRINT. The response then has a FINGERPRINT too."""
    key: bytes | None = None
    """Signs the response. None if the request has no valid username."""
    username: str = ""
    """Empty if the key is not proven. The response is then as short as possible: the source address may be forged."""


class Responder:
    """Encodes and signs responses, counts and records them, and appends them to the commands."""

    def __init__(
        self,
        config: ServerConfig,
        keys: KeyCache,
        nonces: Nonces,
        counters: Counters,
        history: History,
        commands: Commands,
    ) -> None:
        self.keys = keys
        self._config = config
        self._nonces = nonces
        self._counters = counters
        self._history = history
        self._commands = commands

    def succeed(self, context: ResponseContext, attributes: AttributeValues) -> bytes:
        """Send a success response, and return its bytes."""
        if context.username:
            attributes = (*attributes, (SOFTWARE, self._config.software))
        self._history.note(context.client, context.method, context.now)
        data = _encode(MessageClass.SUCCESS, context, attributes)
        self.send(context, data)
        return data

    def reject(self, context: ResponseContext, error: RequestError) -> None:
        """Send an error response. Report the event of the error, or the refusal of an authenticated request."""
        client, method, code, event = context.client, context.method, error.code, error.event
        is_known = bool(context.username)
        self._history.note(client, method, context.now, code, error.cause, error.about, authenticated=is_known)
        watched = self._commands.watched
        if event is not None and type(event) in watched:
            self._commands.append(event)
        phrase = code.phrase if is_known else ""
        if code in _LIMITS:
            self._counters.refusals[error.cause] += 1
            # For an operator who tests the relay with a client.
            phrase += f": {error.cause}"
        attributes = ((ERROR_CODE, ErrorValue(code, phrase)), *error.attributes)
        if code.is_challenge:
            attributes += ((REALM, self._config.realm), (NONCE, self._nonces.issue(client, context.now)))
        self.send(context, _encode(MessageClass.ERROR, context, attributes), code, error.reason)
        # 437 is an expected response: clients probe for their allocation with a Refresh or an Allocate.
        is_unexpected = event is None and code is not ErrorCode.ALLOCATION_MISMATCH
        if is_known and is_unexpected and RequestRefused in watched:
            self._commands.append(RequestRefused(client, method, code, error.reason))

    def send(
        self, context: ResponseContext, data: bytes, code: ErrorCode | None = None, reason: Reason | None = None
    ) -> None:
        """Send an encoded response, such as a former response to a retransmitted request."""
        if code is None:
            self._counters.successes[context.method] += 1
        else:
            self._counters.errors[context.method, code] += 1
        self._commands.append(SendToClient(data, context.client))
        if Answered in self._commands.watched:
            self._commands.append(Answered(context.client, context.method, code, reason))


def _encode(message_class: MessageClass, context: ResponseContext, attributes: AttributeValues) -> bytes:
    method, transaction_id = context.method, context.transaction_id
    return encode(message_class, method, transaction_id, attributes, key=context.key, fingerprint=context.fingerprint)
