"""One process that sends what nobody wants, each datagram in the name of another: ``python -m benchmarks.flooding``.

A process may send from any address of its machine, without privileges (ip(7), IP_PKTINFO), and all of 127.0.0.0/8 are. Some
sources have asked for nonces before, as an attacker with addresses of their own could.
"""

import contextlib
import itertools
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from relay.core.attributes import LIFETIME, NONCE, REALM, REQUESTED_TRANSPORT, USERNAME
from relay.core.credentials import FIREZONE_REALM
from relay.core.stun import Message, MessageClass, Method, decode, encode

SOURCES_WITH_NONCES = 500
BURST = 64
"""Datagrams between two looks at the clock."""

_IP_PKTINFO = 8
"""Linux (linux/in.h); the socket module has no name for it."""

_PKTINFO = struct.Struct("=i4s4s")
_ANSWER_SECONDS = 3.0

Control: TypeAlias = list[tuple[int, int, bytes]]


class Flood(NamedTuple):
    """What to send."""

    to: tuple[str, int]
    first: int
    """The first of the IPv4 addresses that it comes from."""
    sources: int
    rate: float
    """Datagrams a second; 0 is as many as this process can."""
    seconds: float


def control_of(address: int) -> Control:
    """Give what has a datagram sent from an IPv4 address."""
    return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(0, address.to_bytes(4, "big"), bytes(4)))]


def from_strangers() -> list[bytes]:
    """Give a datagram of each kind that anybody can write."""
    username = (USERNAME, f"{int(time.time()) + 600}:flood")
    old = (username, (REALM, FIREZONE_REALM), (NONCE, b"A" * 16))
    return [
        encode(MessageClass.REQUEST, Method.BINDING, os.urandom(12), []),
        encode(MessageClass.REQUEST, Method.ALLOCATE, os.urandom(12), [(REQUESTED_TRANSPORT, 17)]),
        encode(MessageClass.REQUEST, Method.ALLOCATE, os.urandom(12), [username, (REQUESTED_TRANSPORT, 17)]),
        encode(MessageClass.REQUEST, Method.REFRESH, os.urandom(12), [(LIFETIME, 600), *old], key=b"wrong"),
        b"\x40\x00\x00\xac" + bytes(172),
    ]


def with_nonces(sock: socket.socket, flood: Flood) -> list[tuple[bytes, Control]]:
    """Get nonces for some sources, and give a request of each that all is right with but the password."""
    ask = encode(MessageClass.REQUEST, Method.ALLOCATE, os.urandom(12), [(REQUESTED_TRANSPORT, 17)])
    sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    sock.settimeout(_ANSWER_SECONDS)
    written = []
    for address in range(flood.first, flood.first + min(flood.sources, SOURCES_WITH_NONCES)):
        sock.sendmsg([ask], control_of(address), 0, flood.to)
        with contextlib.suppress(TimeoutError):
            data, control, *_ = sock.recvmsg(2000, 64)
            answer = decode(data)
            nonce = answer.get(NONCE) if isinstance(answer, Message) else None
            _, _, at = _PKTINFO.unpack(control[0][2])
            proof = ((USERNAME, f"{int(time.time()) + 600}:flood"), (REALM, FIREZONE_REALM), (NONCE, nonce or b""))
            data = encode(MessageClass.REQUEST, Method.REFRESH, os.urandom(12), proof, key=b"wrong")
            written.append((data, control_of(int.from_bytes(at, "big"))))
    return written


def datagrams(flood: Flood, sock: socket.socket) -> Iterator[tuple[bytes, Control]]:
    """Give what to send, for ever: each source sends each kind in turn, and every sixth one has a nonce."""
    proven = itertools.cycle(with_nonces(sock, flood))
    strangers = [control_of(address) for address in range(flood.first, flood.first + flood.sources)]
    kinds = from_strangers()
    print("under way", flush=True)
    while True:
        for first in range(len(kinds)):
            for number, control in enumerate(strangers, first):
                yield kinds[number % len(kinds)], control
                if number % len(kinds) == 0:
                    yield next(proven)


def run(flood: Flood) -> int:
    """Send, and give how many datagrams that were."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        source = datagrams(flood, sock)
        first = next(source)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        began = time.monotonic()
        for sent, (data, control) in enumerate(itertools.chain((first,), source), 1):
            # A full buffer or an ICMP error: the next one.
            with contextlib.suppress(OSError):
                sock.sendmsg([data], control, socket.MSG_DONTWAIT, flood.to)
            if sent % BURST == 0:
                elapsed = time.monotonic() - began
                if elapsed > flood.seconds:
                    return sent
                if flood.rate and sent > flood.rate * elapsed:
                    time.sleep(sent / flood.rate - elapsed)
    raise AssertionError("it goes on until its time is over")


if __name__ == "__main__":
    host, port, first_host, *numbers = sys.argv[1:]
    sources, rate, seconds = (float(each) for each in numbers)
    beginning = int.from_bytes(socket.inet_aton(first_host), "big")
    print(json.dumps(run(Flood((host, int(port)), beginning, int(sources), rate, seconds))), flush=True)
