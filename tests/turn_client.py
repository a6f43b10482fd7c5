"""A TURN client over a real socket, as plain as can be: each request is sent once and its answer waited for."""

import os
import socket
from typing import Any, Self

from relay.core.addresses import SocketAddress
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    ERROR_CODE,
    LIFETIME,
    NONCE,
    REALM,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    USERNAME,
    XOR_PEER_ADDRESS,
    XOR_RELAYED_ADDRESS,
    Attribute,
)
from relay.core.credentials import Credential, integrity_key
from relay.core.stun import Message, MessageClass, Method, decode, encode

UDP = 17
TIMEOUT = 30.0
"""Seconds for an answer, or a packet, on a machine that has other work."""


# An allocation outlives the client that a test closes: a port that the system gives out a second time would find it, and
# an Allocate from there is rightly answered 437.
_given: set[tuple[str, int]] = set()


def udp_socket(host: str) -> socket.socket:
    """A socket bound to a port that none had before, whose reads end in an error rather than never."""
    while True:
        opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind((host, 0))
        address = opened.getsockname()[:2]
        if address not in _given:
            _given.add(address)
            opened.settimeout(TIMEOUT)
            return opened
        opened.close()


class TurnClient:
    """One client of a relay. Use it as a context."""

    def __init__(self, server: tuple[str, int], credential: Credential, host: str | None = None) -> None:
        self.socket = udp_socket(host or server[0])
        self._server = server
        self._credential = credential
        self._key = integrity_key(credential.username, "firezone", credential.password)
        self._nonce: bytes | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def address(self) -> tuple[str, int]:
        host, port, *_ = self.socket.getsockname()
        return host, port

    def request(self, method: Method, *attributes: tuple[Attribute[Any], Any]) -> Message:
        """Send a request; a challenge is met with the credential."""
        answer = self._exchange(method, attributes)
        if code_of(answer) in (401, 438):
            self._nonce = answer.get(NONCE)
            answer = self._exchange(method, attributes)
        return answer

    def allocate(self, *, dual: bool = False, family: int | None = None) -> list[SocketAddress]:
        attributes: list[tuple[Attribute[Any], Any]] = [(REQUESTED_TRANSPORT, UDP)]
        if dual:
            attributes.append((ADDITIONAL_ADDRESS_FAMILY, 2))
        if family is not None:
            attributes.append((REQUESTED_ADDRESS_FAMILY, family))
        answer = self.request(Method.ALLOCATE, *attributes)
        assert code_of(answer) is None, f"Allocate was answered {code_of(answer)}"
        return list(answer.get_all(XOR_RELAYED_ADDRESS))

    def refresh(self, lifetime: int) -> int | None:
        """Give the error code; None for a success."""
        return code_of(self.request(Method.REFRESH, (LIFETIME, lifetime)))

    def bind_channel(self, number: int, peer: SocketAddress) -> int | None:
        """Give the error code; None for a success."""
        return code_of(self.request(Method.CHANNEL_BIND, (CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer)))

    def send(self, number: int, payload: bytes) -> None:
        frame = number.to_bytes(2, "big") + len(payload).to_bytes(2, "big") + payload
        self.socket.sendto(frame, self._server)

    def receive(self) -> tuple[int, bytes]:
        """Wait for ChannelData."""
        data = self.socket.recv(65535)
        assert int.from_bytes(data[2:4], "big") == len(data) - 4
        return int.from_bytes(data[:2], "big"), data[4:]

    def _exchange(self, method: Method, attributes: tuple[tuple[Attribute[Any], Any], ...]) -> Message:
        transaction_id = os.urandom(12)
        key = None
        if self._nonce is not None:
            login = ((USERNAME, self._credential.username), (REALM, "firezone"), (NONCE, self._nonce))
            attributes, key = (*attributes, *login), self._key
        self.socket.sendto(encode(MessageClass.REQUEST, method, transaction_id, attributes, key=key), self._server)
        while True:
            answer = decode(self.socket.recv(65535))
            if isinstance(answer, Message) and answer.transaction_id == transaction_id:
                return answer


def code_of(answer: Message) -> int | None:
    """The error code of an answer; None for a success."""
    error = answer.get(ERROR_CODE)
    return None if error is None else error.code
