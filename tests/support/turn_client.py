"""A minimal TURN client over a real socket: no retransmissions, one request at a time."""

import contextlib
import os
import socket
from typing import Any, Self

from relay.core.addresses import SocketAddress, socket_address
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
from tests.support.udp import SO_RCVBUFFORCE

UDP = 17
TIMEOUT = 30.0
"""Seconds for a response or a packet, on a busy machine."""
PACKETS = 200
"""Packets of `send_behind_a_bind`."""


# An allocation outlives the client closed by a test. If the kernel reused the port, an Allocate request from the port
# would get 437.
_given: set[tuple[str, int]] = set()


def udp_socket(host: str) -> socket.socket:
    """Return a socket bound to a new port, with a read timeout."""
    while True:
        opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind((host, 0))
        address = opened.getsockname()[:2]
        if address not in _given:
            _given.add(address)
            opened.settimeout(TIMEOUT)
            # A test that gets no CPU for half a second must not lose packets itself. Root only.
            with contextlib.suppress(PermissionError):
                opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
            return opened
        opened.close()


class TurnClient:
    """A client of a relay. A context manager."""

    def __init__(self, server: tuple[str, int], credential: Credential, host: str | None = None) -> None:
        self.socket = udp_socket(host or server[0])
        self.server = server
        self.credential = credential
        self._key = integrity_key(credential.username, "firezone", credential.password)
        self.nonce: bytes | None = None
        """The nonce of the server's latest challenge."""
        self.relayed: SocketAddress = ("", 0)
        """The first relayed address of the latest allocation."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def address(self) -> tuple[str, int]:
        host, port, *_ = self.socket.getsockname()
        return host, port

    def request(self, method: Method, *attributes: tuple[Attribute[Any], Any]) -> Message:
        """Send a request; respond to a challenge with the credential."""
        answer = self._exchange(method, attributes)
        if code_of(answer) in (401, 438):
            self.nonce = answer.get(NONCE)
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
        relayed = list(answer.get_all(XOR_RELAYED_ADDRESS))
        self.relayed = relayed[0]
        return relayed

    def refresh(self, lifetime: int) -> int | None:
        """Return the error code; None for a success."""
        return code_of(self.request(Method.REFRESH, (LIFETIME, lifetime)))

    def bind_channel(self, number: int, peer: SocketAddress) -> int | None:
        """Return the error code; None for a success."""
        return code_of(self.request(Method.CHANNEL_BIND, (CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer)))

    def start_binding(self, number: int, peer: SocketAddress) -> bytes:
        """Send a ChannelBind with the latest nonce, and return its transaction id without waiting for the response."""
        return self._send(Method.CHANNEL_BIND, ((CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer)))

    def wait_for(self, transaction_id: bytes) -> Message:
        """Wait for the response to a request."""
        while True:
            answer = decode(self.socket.recv(65535))
            if isinstance(answer, Message) and answer.transaction_id == transaction_id:
                return answer

    def send(self, number: int, payload: bytes) -> None:
        frame = number.to_bytes(2, "big") + len(payload).to_bytes(2, "big") + payload
        self.socket.sendto(frame, self.server)

    def receive(self) -> tuple[int, bytes]:
        """Wait for ChannelData."""
        data = self.socket.recv(65535)
        assert int.from_bytes(data[2:4], "big") == len(data) - 4
        return int.from_bytes(data[:2], "big"), data[4:]

    def _exchange(self, method: Method, attributes: tuple[tuple[Attribute[Any], Any], ...]) -> Message:
        return self.wait_for(self._send(method, attributes))

    def _send(self, method: Method, attributes: tuple[tuple[Attribute[Any], Any], ...]) -> bytes:
        transaction_id = os.urandom(12)
        key = None
        if self.nonce is not None:
            login = ((USERNAME, self.credential.username), (REALM, "firezone"), (NONCE, self.nonce))
            attributes, key = (*attributes, *login), self._key
        self.socket.sendto(encode(MessageClass.REQUEST, method, transaction_id, attributes, key=key), self.server)
        return transaction_id


def send_behind_a_bind(client: TurnClient, number: int, peer: socket.socket, behind: int = 0) -> list[int]:
    """Bind a channel to a peer, send packets at once, and return the numbers of those that the peer receives.

    Args:
        client: a client with an allocation.
        number: the channel.
        peer: the peer.
        behind: the number of packets before the ChannelBind.
    """
    peer_address = socket_address(*peer.getsockname()[:2])
    request = None
    for n in range(PACKETS):
        if n == behind:
            request = client.start_binding(number, peer_address)
        client.send(number, n.to_bytes(2, "big") + bytes(98))
    assert request is not None
    assert code_of(client.wait_for(request)) is None
    received: list[int] = []
    peer.settimeout(10)
    with contextlib.suppress(TimeoutError):
        while len(received) < PACKETS:
            received.append(int.from_bytes(peer.recv(2000)[:2], "big"))
    return received


def code_of(answer: Message) -> int | None:
    """Return the error code of a response; None for a success."""
    error = answer.get(ERROR_CODE)
    return None if error is None else error.code
