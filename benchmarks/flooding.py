"""A process of the flood: requests that need no response, from many source addresses: ``python -m benchmarks.flooding``.

A process may send from any address of its machine without privileges (ip(7), IP_PKTINFO), for example from 127.0.0.0/8. Some
sources have nonces, like an attacker with addresses of its own.
"""

import contextlib
import itertools
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import TypeAlias

from relay.core.attributes import LIFETIME, NONCE, REALM, REQUESTED_TRANSPORT, USERNAME
from relay.core.credentials import FIREZONE_REALM
from relay.core.stun import Message, MessageClass, Method, decode, encode

SOURCES_WITH_NONCES = 500
BURST = 64
"""Datagrams between two clock readings."""

_IP_PKTINFO = 8
"""From linux/in.h; the socket module does not define it."""

_PKTINFO = struct.Struct("=i4s4s")
_ANSWER_SECONDS = 3.0

Control: TypeAlias = list[tuple[int, int, bytes]]


def source(address: int) -> Control:
    """Return the control message that sets the source address."""
    return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(0, address.to_bytes(4, "big"), bytes(4)))]


def request(method: Method, *attributes: object, key: bytes | None = None) -> bytes:
    """Encode a request."""
    return encode(MessageClass.REQUEST, method, os.urandom(12), attributes, key=key)  # type: ignore[arg-type]


def unauthenticated() -> list[bytes]:
    """Return a datagram of each kind that needs no nonce."""
    username, transport = (USERNAME, f"{int(time.time()) + 600}:flood"), (REQUESTED_TRANSPORT, 17)
    return [
        request(Method.BINDING),
        request(Method.ALLOCATE, transport),
        request(Method.ALLOCATE, username, transport),
        request(Method.REFRESH, (LIFETIME, 600), username, (REALM, FIREZONE_REALM), (NONCE, b"A" * 16), key=b"wrong"),
        b"\x40\x00\x00\xac" + bytes(172),
    ]


def with_nonces(sock: socket.socket, to: tuple[str, int], addresses: range) -> list[tuple[bytes, Control]]:
    """Request a nonce from each address, and return requests with these nonces and a wrong password."""
    sock.settimeout(_ANSWER_SECONDS)
    made = []
    for address in addresses:
        sock.sendmsg([request(Method.ALLOCATE, (REQUESTED_TRANSPORT, 17))], source(address), 0, to)
        with contextlib.suppress(TimeoutError):
            response = decode(sock.recv(2000))
            nonce = (response.get(NONCE) if isinstance(response, Message) else None) or b""
            proof = ((USERNAME, f"{int(time.time()) + 600}:flood"), (REALM, FIREZONE_REALM), (NONCE, nonce))
            made.append((request(Method.REFRESH, *proof, key=b"wrong"), source(address)))
    return made


def datagrams(sock: socket.socket, to: tuple[str, int], addresses: range) -> Iterator[tuple[bytes, Control]]:
    """Return datagrams without end: each source sends each kind in turn, and every sixth datagram has a nonce."""
    authenticating = itertools.cycle(with_nonces(sock, to, addresses[:SOURCES_WITH_NONCES]))
    controls = [source(address) for address in addresses]
    kinds = unauthenticated()
    print("under way", flush=True)
    while True:
        for first in range(len(kinds)):
            for number, control in enumerate(controls, first):
                yield kinds[number % len(kinds)], control
                if number % len(kinds) == 0:
                    yield next(authenticating)


def run(to: tuple[str, int], addresses: range, rate: float, seconds: float) -> int:
    """Send for some time, and return the number of datagrams. A rate of 0 is full speed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        made = datagrams(sock, to, addresses)
        first = next(made)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        began = time.monotonic()
        sent = 0
        for sent, (data, control) in enumerate(itertools.chain((first,), made), 1):
            # Ignore a full buffer or an ICMP error.
            with contextlib.suppress(OSError):
                sock.sendmsg([data], control, socket.MSG_DONTWAIT, to)
            if sent % BURST == 0:
                elapsed = time.monotonic() - began
                if elapsed > seconds:
                    break
                if rate and sent > rate * elapsed:
                    time.sleep(sent / rate - elapsed)
        return sent


if __name__ == "__main__":
    host, port, first_host, count, rate, seconds = sys.argv[1:]
    beginning = int.from_bytes(socket.inet_aton(first_host), "big")
    print(run((host, int(port)), range(beginning, beginning + int(count)), float(rate), float(seconds)), flush=True)
