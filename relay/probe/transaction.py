"""STUN requests over UDP: sent, repeated, and matched with their answers (RFC 8489 §6.2.1, §6.3, §9.2)."""

import errno
import secrets
import socket
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias, TypeVar

from relay.core.addresses import Family, SocketAddress, family_of, show
from relay.core.attributes import ERROR_CODE, NONCE, REALM, USERNAME, Attribute, ErrorValue, MalformedAttributeError
from relay.core.credentials import Credential, integrity_key
from relay.core.stun import TRANSACTION_ID_LENGTH, Malformed, Message, MessageClass, Method, decode, encode
from relay.probe.errors import TITLES, BadAnswerError, NoAnswerError, NoRouteError, RefusedError, UnreachableError

T = TypeVar("T")
AttributeValues: TypeAlias = Iterable[tuple[Attribute[Any], Any]]

UNAUTHENTICATED = 401
STALE_NONCE = 438

_LONGEST_DATAGRAM = 0xFFFF
_NONCES_TRIED = 3
_NO_ROUTE = frozenset((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL))


class Patience(NamedTuple):
    """For how long an answer is waited for."""

    rto: float = 0.5
    """Seconds to the first retransmission; the time to each later one doubles (RFC 8489 §6.2.1)."""
    total: float = 8.0
    """Seconds for one step. The RFC's seven transmissions take 39.5 s, too long for a person who waits for a finding."""


class Answer(NamedTuple):
    """A success answer."""

    message: Message
    rtt: float
    """Seconds since the request was first sent."""
    transmissions: int
    """How often the request was sent; above 1, some datagrams were lost."""

    def demand(self, attribute: Attribute[T]) -> T:
        """Give the value of an attribute that this answer must have.

        Raises:
            BadAnswerError: it is missing or malformed.
        """
        value = read(self.message, attribute)
        if value is None:
            raise _lacks(Method(self.message.method), attribute)
        return value


class Challenge(NamedTuple):
    """What a server wants credentials to be proven with."""

    realm: str
    nonce: bytes


def read(message: Message, attribute: Attribute[T]) -> T | None:
    """Read an attribute; None if it is missing or malformed."""
    try:
        return message.get(attribute)
    except MalformedAttributeError:
        return None


def open_socket(server: SocketAddress) -> socket.socket:
    """Open a UDP socket that sends to one server, takes datagrams from it alone, and learns of its ICMP errors.

    Raises:
        NoRouteError: this machine has no way to that address.
    """
    try:
        opened = socket.socket(socket.AF_INET if family_of(server) is Family.IPV4 else socket.AF_INET6, socket.SOCK_DGRAM)
    except OSError as error:
        raise unreachable(server, error) from error
    try:
        opened.connect(server)
    except OSError as error:
        opened.close()
        raise unreachable(server, error) from error
    return opened


def unreachable(server: SocketAddress, error: OSError) -> UnreachableError:
    """Say why nothing can be sent to a server."""
    if isinstance(error, ConnectionRefusedError):
        advice = "start the server, or check the port; the machine itself can be reached"
        return UnreachableError(f"nothing listens on {show(server)}/udp (ICMP port unreachable)", advice)
    finding = f"this machine can't send to {show(server)}: {error.strerror or error}"
    if error.errno in _NO_ROUTE:
        return NoRouteError(finding, f"probe from a machine that has {family_of(server)}, or mend the route")
    return UnreachableError(finding, "check this machine's own firewall and network")


class StunClient:
    """Makes requests of one server, on a socket of `open_socket`, which stays the caller's."""

    def __init__(self, connected: socket.socket, server: SocketAddress, patience: Patience) -> None:
        self.socket = connected
        self.server = server
        self.patience = patience

    def deadline(self) -> float:
        """Give the time on `time.perf_counter` by which a step that begins now must end."""
        return time.perf_counter() + self.patience.total

    def request(
        self, method: Method, attributes: AttributeValues, *, key: bytes | None = None, deadline: float | None = None
    ) -> Answer:
        """Send a request until it is answered with success.

        Args:
            method: of the request.
            attributes: of the request, without MESSAGE-INTEGRITY and FINGERPRINT.
            key: signs the request, and proves its answer: one without a signature that holds is as good as none, but for
                an error that asks for other credentials.
            deadline: on `time.perf_counter`; None for that of a step of its own.

        Raises:
            RefusedError: the answer is an error; as `ChallengedError` if it bears REALM and NONCE.
            BadAnswerError: no answer came, but some whose signature did not hold.
            NoAnswerError: no answer came.
            UnreachableError: nothing listens, or this machine can't send.
        """
        deadline = self.deadline() if deadline is None else deadline
        transaction_id = secrets.token_bytes(TRANSACTION_ID_LENGTH)
        data = encode(MessageClass.REQUEST, method, transaction_id, attributes, key=key, fingerprint=True)
        try:
            answer = self._exchange(data, Method(method), transaction_id, key, deadline)
        except OSError as error:
            raise unreachable(self.server, error) from error
        if answer.message.message_class is MessageClass.ERROR:
            raise _refusal(method, answer.message)
        return answer

    def _exchange(self, data: bytes, method: Method, transaction_id: bytes, key: bytes | None, deadline: float) -> Answer:
        started = time.perf_counter()
        resend_at = started
        transmissions = 0
        strangers = unproven = 0
        while (now := time.perf_counter()) < deadline:
            if now >= resend_at:
                self.socket.send(data)
                resend_at = now + self.patience.rto * 2**transmissions
                transmissions += 1
            received = self._receive(min(resend_at, deadline))
            if received is None:
                continue
            message = decode(received)
            if isinstance(message, Malformed) or not _answers(message, method, transaction_id):
                strangers += 1
            elif key is not None and not (_asks_for_credentials(message) or message.integrity_holds(key)):
                unproven += 1
            else:
                return Answer(message, time.perf_counter() - started, transmissions)
        raise self._nothing(method, strangers, unproven)

    def _receive(self, until: float) -> bytes | None:
        """Wait for a datagram up to a time on `time.perf_counter`; None if none came."""
        # A timeout of 0 would make the socket non-blocking.
        self.socket.settimeout(max(until - time.perf_counter(), 0.0001))
        try:
            return self.socket.recv(_LONGEST_DATAGRAM)
        except TimeoutError:
            return None

    def _nothing(self, method: Method, strangers: int, unproven: int) -> NoAnswerError | BadAnswerError:
        """Say what came instead of an answer."""
        where = f"{show(self.server)}/udp"
        if unproven:
            finding = f"{TITLES[method]} was answered without a MESSAGE-INTEGRITY that holds"
            return BadAnswerError(finding, f"{where} may be an impostor, or derives its key in another way: see its log")
        finding = f"no answer to {TITLES[method]} from {where} in {self.patience.total:g} s"
        if strangers:
            return NoAnswerError(f"{finding}, only datagrams that are none", f"is it a TURN server that has {where}?")
        advice = (
            "is the server started (and, if it has a portal, connected)? does a firewall let this port through, both ways?"
        )
        return NoAnswerError(finding, advice)


class ChallengedError(RefusedError):
    """The server asks for credentials, or for a proof with a new nonce (RFC 8489 §9.2.4)."""

    def __init__(self, method: Method, code: int, phrase: str, challenge: Challenge) -> None:
        super().__init__(method, code, phrase)
        self.challenge = challenge


class TurnClient:
    """Makes requests that are proven with long-term credentials (RFC 8489 §9.2)."""

    def __init__(self, stun: StunClient, credential: Credential | None) -> None:
        self.stun = stun
        self._credential = credential
        self.challenge: Challenge | None = None
        """The server's last; None as long as it has not asked for credentials."""

    def request(self, method: Method, attributes: AttributeValues, *, within: float | None = None) -> Answer:
        """Make a request, with the server's newest nonce; a server that wants another one gets the request again.

        Args:
            method: of the request.
            attributes: of the request, without those that prove it.
            within: seconds for all of it; None for what the client's patience says.

        Raises:
            ProbeError: as `StunClient.request` does.
        """
        deadline = self.stun.deadline() if within is None else time.perf_counter() + within
        attributes = tuple(attributes)
        for _ in range(_NONCES_TRIED - 1):
            proven = self.challenge is not None
            try:
                return self._attempt(method, attributes, deadline)
            except ChallengedError as error:
                self.challenge = error.challenge
                # 401 to a request that had a nonce means the credentials themselves: another try would fail alike.
                if self._credential is None or (proven and error.code == UNAUTHENTICATED):
                    raise
        return self._attempt(method, attributes, deadline)

    def _attempt(self, method: Method, attributes: AttributeValues, deadline: float) -> Answer:
        if self.challenge is None or self._credential is None:
            return self.stun.request(method, attributes, deadline=deadline)
        username, password = self._credential
        realm, nonce = self.challenge
        proof = ((USERNAME, username), (REALM, realm), (NONCE, nonce))
        key = integrity_key(username, realm, password)
        return self.stun.request(method, (*attributes, *proof), key=key, deadline=deadline)


def _answers(message: Message, method: Method, transaction_id: bytes) -> bool:
    """Tell whether a message is an answer to a request."""
    return (
        message.message_class in (MessageClass.SUCCESS, MessageClass.ERROR)
        and message.method == method
        and message.transaction_id == transaction_id
    )


def _asks_for_credentials(message: Message) -> bool:
    """Tell whether a message is an error that servers may leave unsigned, as they don't know the client yet."""
    error = _error(message)
    return error is not None and error.code in (UNAUTHENTICATED, STALE_NONCE)


def _refusal(method: Method, message: Message) -> RefusedError | BadAnswerError:
    error = _error(message)
    if error is None:
        return _lacks(method, ERROR_CODE)
    if error.code in (UNAUTHENTICATED, STALE_NONCE):
        realm, nonce = read(message, REALM), read(message, NONCE)
        if realm is None or nonce is None:
            return _lacks(method, REALM if realm is None else NONCE)
        return ChallengedError(method, error.code, error.phrase, Challenge(realm, nonce))
    return RefusedError(method, error.code, error.phrase)


def _error(message: Message) -> ErrorValue | None:
    return read(message, ERROR_CODE) if message.message_class is MessageClass.ERROR else None


def _lacks(method: Method, attribute: Attribute[Any]) -> BadAnswerError:
    return BadAnswerError(
        f"the answer to {TITLES[method]} has no valid {attribute.name}", "no client can use this: see the server's log"
    )
