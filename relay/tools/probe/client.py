"""A client of STUN and TURN on a real socket (RFC 8489 §6.2.1, §9.2), and its errors, with advice for the operator."""

import contextlib
import errno
import secrets
import socket
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

from relay.core.addresses import Family, SocketAddress, family_of, show
from relay.core.attributes import ERROR_CODE, NONCE, REALM, USERNAME, Attribute, ErrorValue, MalformedAttributeError
from relay.core.credentials import Credential, integrity_key
from relay.core.errors import ErrorCode
from relay.core.stun import TRANSACTION_ID_LENGTH, Malformed, Message, MessageClass, Method, decode, encode
from relay.tools.probe.icmp import Rejection, read_rejection, report_icmp_errors

T = TypeVar("T")
AttributeValue: TypeAlias = tuple[Attribute[Any], Any]

_ADVICE = {
    300: "the server redirects its clients: probe the other server",
    400: "the server rejects the request as malformed: see its log",
    401: "wrong or expired credentials: check username and password (or the relay secret), and both machines' clocks",
    403: "the server's policy forbids this: see its allowed and denied peers",
    420: "the server lacks a part of TURN that clients need: update the server",
    437: "the allocation is missing, or an old allocation is in the way: probe again",
    438: "the server rejects its own nonces: do several servers share this address?",
    440: "the server does not support the requested address family: see its addresses",
    441: "the allocation belongs to another username: probe again",
    442: "the server does not relay UDP: enable UDP",
    443: "the server's allocation lacks the address family of the peer: see its addresses",
    486: "the quota of allocations is used up: wait until some end, or raise the quota",
    500: "internal error of the server: see its log",
    508: "the server is full or drains: probe later, widen its port range, raise its limit of open files, or add a server",
}

RTO = 0.5
"""Seconds to the first retransmission. Each later interval doubles (RFC 8489 §6.2.1)."""

TIMEOUT = 8.0
"""Seconds per step. The RFC's seven transmissions take 39.5 s, too long for an interactive command."""

_LONGEST_DATAGRAM = 0xFFFF
_NONCES_TRIED = 3
_LONGEST_TEXT = 100
_NO_ROUTE = frozenset((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL))


class Challenge(NamedTuple):
    """A server's realm and nonce."""

    realm: str
    nonce: bytes


class ProbeError(Exception):
    """A step failed: the problem as part of a sentence, the fix, and the error code of the server's response."""

    def __init__(self, finding: str, advice: str = "", code: int | None = None) -> None:
        super().__init__(finding)
        self.advice = advice
        self.code = code


class SkippedError(ProbeError):
    """A step is impossible here, which is no failure."""


class NoRouteError(ProbeError):
    """This machine has no address or route of the family. The server may work."""


class RefusedError(ProbeError):
    """The server responded with an error (RFC 8489 §14.8), or with a challenge for credentials or a new nonce (§9.2.4)."""

    def __init__(self, method: Method, error: ErrorValue, challenge: Challenge | None) -> None:
        words = f"{error.code} {printable(error.phrase)}".rstrip()
        advice = _ADVICE.get(error.code, "see the server's log")
        super().__init__(f"{title(method)} answered with {words}", advice, error.code)
        self.code: int = error.code
        self.challenge = challenge


class Answer(NamedTuple):
    """A success response."""

    message: Message
    rtt: float
    """Seconds since the first transmission."""
    transmissions: int
    """Number of transmissions; above 1, datagrams were lost."""


class TurnClient:
    """Client of a server, with long-term credentials, on a connected socket, which reports ICMP errors.

    Args:
        server: address of the server.
        timeout: seconds per request.
        credential: the credential, if any.

    Raises:
        NoRouteError: this machine has no route to the server.
    """

    def __init__(self, server: SocketAddress, timeout: float, credential: Credential | None = None) -> None:
        self.server = server
        self.timeout = timeout
        self.credential = credential
        self.challenge: Challenge | None = None
        """The latest challenge; None before the first."""
        with contextlib.ExitStack() as stack:
            try:
                family = socket.AF_INET if family_of(server) is Family.IPV4 else socket.AF_INET6
                self.socket = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                report_icmp_errors(self.socket)
                self.socket.connect(server)
            except OSError as error:
                raise unreachable(server, error) from error
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def request(self, method: Method, attributes: Iterable[AttributeValue], *, within: float | None = None) -> Answer:
        """Send a request with the latest nonce, and again if the server requests another nonce: see `exchange`.

        Args:
            method: the method.
            attributes: attributes without credentials.
            within: seconds for all attempts; None for the timeout of a step.
        """
        deadline = time.perf_counter() + (self.timeout if within is None else within)
        attributes, tried = tuple(attributes), 0
        while True:
            key, proof = None, tuple[AttributeValue, ...]()
            if self.challenge is not None and self.credential is not None:
                (username, password), (realm, nonce) = self.credential, self.challenge
                proof = ((USERNAME, username), (REALM, realm), (NONCE, nonce))
                key = integrity_key(username, realm, password)
            tried += 1
            try:
                return self.exchange(method, (*attributes, *proof), key=key, deadline=deadline)
            except RefusedError as error:
                # 401 to a request with a nonce means wrong credentials: another attempt would also fail.
                is_final = self.credential is None or (key is not None and error.code == ErrorCode.UNAUTHENTICATED)
                if error.challenge is None or is_final or tried == _NONCES_TRIED:
                    raise
                self.challenge = error.challenge

    def exchange(
        self,
        method: Method,
        attributes: Iterable[AttributeValue] = (),
        *,
        key: bytes | None = None,
        deadline: float | None = None,
    ) -> Answer:
        """Send a request and return the success response.

        Args:
            method: the method.
            attributes: attributes without MESSAGE-INTEGRITY and FINGERPRINT.
            key: signs the request and verifies the response. Responses with an invalid signature are ignored, except errors
                that request other credentials.
            deadline: deadline on `time.perf_counter`; None for the timeout of a step.

        Raises:
            RefusedError: the response is an error.
            ProbeError: there was no valid response, the port is closed, or this machine can't send.
        """
        started = resend_at = time.perf_counter()
        deadline = started + self.timeout if deadline is None else deadline
        transaction_id = secrets.token_bytes(TRANSACTION_ID_LENGTH)
        data = encode(MessageClass.REQUEST, method, transaction_id, attributes, key=key, fingerprint=True)
        transmissions = unrelated = unverified = 0
        while (now := time.perf_counter()) < deadline:
            try:
                if now >= resend_at:
                    self.socket.send(data)
                    resend_at = now + RTO * 2**transmissions
                    transmissions += 1
                # A timeout of 0 would make the socket non-blocking.
                self.socket.settimeout(max(min(resend_at, deadline) - time.perf_counter(), 0.0001))
                message = decode(self.socket.recv(_LONGEST_DATAGRAM))
            except TimeoutError:
                continue
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    # About an earlier packet: a large one.
                    continue
                raise unreachable(self.server, error, read_rejection(self.socket)) from error
            if (
                isinstance(message, Malformed)
                or message.message_class not in (MessageClass.SUCCESS, MessageClass.ERROR)
                or (message.method, message.transaction_id) != (method, transaction_id)
            ):
                unrelated += 1
            elif key is not None and not (_asks_for_credentials(message) or message.integrity_holds(key)):
                unverified += 1
            elif message.message_class is MessageClass.ERROR:
                challenge = None
                if _asks_for_credentials(message):
                    challenge = Challenge(demand(message, REALM), demand(message, NONCE))
                raise RefusedError(method, demand(message, ERROR_CODE), challenge)
            else:
                return Answer(message, time.perf_counter() - started, transmissions)
        raise self._no_answer(method, unrelated, unverified)

    def _no_answer(self, method: Method, unrelated: int, unverified: int) -> ProbeError:
        where = f"{show(self.server)}/udp"
        if unverified:
            finding = f"the response to {title(method)} has no valid MESSAGE-INTEGRITY"
            return ProbeError(finding, f"{where} may be an impostor, or derives its key differently: see its log")
        finding = f"no response to {title(method)} from {where} in {self.timeout:g} s"
        if unrelated:
            return ProbeError(f"{finding}, only unrelated datagrams", f"is {where} a TURN server?")
        return ProbeError(finding, "is the server started (with a portal: connected)? does a firewall block this port?")


def unreachable(server: SocketAddress, error: OSError, rejection: Rejection | None = None) -> ProbeError:
    """Return the error for a failed send, or for a packet that another machine rejected."""
    where = f"{show(server)}/udp"
    if rejection is not None and rejection.is_by_firewall(server):
        return ProbeError(f"{rejection} to {where}", rejection.advice)
    if isinstance(error, ConnectionRefusedError):
        advice = "start the server, check the port, or open it in the server's firewall; the machine itself is reachable"
        return ProbeError(f"nothing listens on {where} (ICMP port unreachable)", advice)
    finding = f"this machine can't send to {show(server)}: {error.strerror or error}"
    if error.errno in _NO_ROUTE:
        return NoRouteError(finding, f"probe from a machine that has {family_of(server)}, or fix the route")
    return ProbeError(finding, "check this machine's own firewall and network")


def read(message: Message, attribute: Attribute[T]) -> T | None:
    """Return the value of an attribute; None if missing or malformed."""
    try:
        return message.get(attribute)
    except MalformedAttributeError:
        return None


def title(method: Method) -> str:
    """Return the name of a method in the RFC."""
    return method.name.title().replace("_", "")


def printable(text: str) -> str:
    """Return a server's text without control characters, which could control the terminal."""
    shown = ascii(text)[1:-1].replace("\\'", "'").replace("\\\\", "\\")
    return shown if len(shown) <= _LONGEST_TEXT else f"{shown[:_LONGEST_TEXT]}..."


def _asks_for_credentials(message: Message) -> bool:
    """Check whether a message is an error that servers may leave unsigned, before they know the client."""
    error = read(message, ERROR_CODE) if message.message_class is MessageClass.ERROR else None
    return error is not None and error.code in (ErrorCode.UNAUTHENTICATED, ErrorCode.STALE_NONCE)


def demand(message: Message, attribute: Attribute[T]) -> T:
    """Return the value of a required attribute.

    Raises:
        ProbeError: the attribute is missing or malformed.
    """
    value = read(message, attribute)
    if value is None:
        finding = f"the response to {title(Method(message.method))} has no valid {attribute.name}"
        raise ProbeError(finding, "no client can use it: see the server's log")
    return value
