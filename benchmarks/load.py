"""The load: flows through a server, and a paced generator that sends into them and counts what comes out.

The generator wakes up once a millisecond. It sends a burst (20 packets at 20,000/s: one into each of 20 flows), then reads
all that has arrived, until its next wake-up. Mind this pattern when reading the results: what arrives in a burst is cheaper
for a server than what arrives alone, since it wakes up once for many packets. It is the same for every server.

It never waits in a read, so that the server does not pay for waking a receiver up: in earnest it would send to a network
card. Sender and receivers are one process for the same reason, and because they have one CPU to themselves anyway.

A burst that comes late is not lumped together with the next, which would cost the server less for each packet, or overflow
its socket buffers: those that follow come twice as often until all is made up for. So a busy machine changes neither the
rate, unless it is too busy, nor the size of the bursts.
"""

import contextlib
import functools
import itertools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from benchmarks.servers import Server
from relay.core.addresses import SocketAddress
from tests.turn_client import TurnClient

CLIENT_HOST = "127.83.0.3"
PEER_HOST = "127.83.0.4"
CHANNEL = 0x4000

TICK_SECONDS = 0.001
_CATCH_UP_SECONDS = TICK_SECONDS / 2
"""Between bursts that are late."""

_CHANNEL_HEADER_LENGTH = 4
_RECEIVE_BUFFER = 4 * 1024 * 1024
_QUIET_SECONDS = 0.2
_LARGEST = 65535


class Direction(StrEnum):
    """Which way packets go."""

    TO_PEER = "client→peer"
    TO_CLIENT = "peer→client"


class Flow(NamedTuple):
    """An allocation with one channel, and the peer at its other end."""

    client: socket.socket
    peer: socket.socket


class Traffic(NamedTuple):
    """What went in, and what came out."""

    sent: int
    arrived: int
    seconds: float
    """Of sending."""
    late: int
    """Bursts that came more than a millisecond late."""
    busy: float
    """The share of a CPU that the generator itself used."""

    @property
    def rate(self) -> float:
        """Packets offered in a second."""
        return self.sent / self.seconds

    @property
    def loss(self) -> float:
        """The share that did not arrive, in percent."""
        return 100 * (self.sent - self.arrived) / self.sent


class Route:
    """One direction of some flows, for payloads of one size."""

    def __init__(self, flows: Sequence[Flow], direction: Direction, size: int) -> None:
        payload = bytes(size)
        frame = CHANNEL.to_bytes(2, "big") + size.to_bytes(2, "big") + payload
        to_peer = direction is Direction.TO_PEER
        ends = [(flow.client, flow.peer) if to_peer else (flow.peer, flow.client) for flow in flows]
        self._sends = itertools.cycle([functools.partial(each.send, frame if to_peer else payload) for each, _ in ends])
        self._receives: list[Callable[[bytearray], int]] = [each.recv_into for _, each in ends]
        self._expected = size if to_peer else size + _CHANNEL_HEADER_LENGTH
        self._buffer = bytearray(_LARGEST)

    def send(self, count: int) -> None:
        """Send packets, one into each flow in turn."""
        sends = self._sends
        for _ in range(count):
            next(sends)()

    def drain(self) -> int:
        """Read all that has arrived, and give how many packets of the expected size there were."""
        buffer, expected, arrived = self._buffer, self._expected, 0
        for receive in self._receives:
            try:
                while True:
                    arrived += receive(buffer) == expected
            except BlockingIOError:
                continue
        return arrived


def offer(route: Route, rate: int, seconds: float) -> Traffic:
    """Send at a rate for some time, and read until nothing more comes."""
    ticks, sent, arrived, late = round(seconds / TICK_SECONDS), 0, 0, 0
    own = time.process_time()
    start = time.perf_counter()
    last = 0.0
    for tick in range(ticks):
        due = start + tick * TICK_SECONDS
        wait = max(due, last + _CATCH_UP_SECONDS) - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        last = time.perf_counter()
        late += last - due > TICK_SECONDS
        burst = round((tick + 1) * rate * TICK_SECONDS) - sent
        route.send(burst)
        sent += burst
        arrived += route.drain()
    elapsed = time.perf_counter() - start
    busy = (time.process_time() - own) / elapsed
    return Traffic(sent, arrived + _drain_the_rest(route), elapsed, late, busy)


def _drain_the_rest(route: Route) -> int:
    arrived, quiet_at = 0, time.perf_counter() + _QUIET_SECONDS
    while time.perf_counter() < quiet_at:
        more = route.drain()
        if more:
            arrived += more
            quiet_at = time.perf_counter() + _QUIET_SECONDS
        time.sleep(TICK_SECONDS)
    return arrived


@contextlib.contextmanager
def opened_flows(server: Server, count: int) -> Iterator[list[Flow]]:
    """Make allocations, each with one channel to a peer socket of its own.

    Raises:
        RuntimeError: the server refused a channel.
    """
    with contextlib.ExitStack() as stack:
        yield [_open_flow(stack, server, number) for number in range(count)]


def _open_flow(stack: contextlib.ExitStack, server: Server, number: int) -> Flow:
    client = stack.enter_context(TurnClient(server.address, server.credential(number), CLIENT_HOST))
    peer = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    peer.bind((PEER_HOST, 0))
    relayed: SocketAddress = client.allocate()[0]
    error = client.bind_channel(CHANNEL, peer.getsockname())
    if error is not None:
        raise RuntimeError(f"{server.name} refused a channel with {error}")
    client.socket.connect(server.address)
    peer.connect(relayed)
    for each in (client.socket, peer):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        each.settimeout(0)
    return Flow(client.socket, peer)


def allocate(stack: contextlib.ExitStack, server: Server, numbers: range) -> float:
    """Make allocations one after another, which live as long as the stack, and give the seconds that took."""
    start = time.perf_counter()
    for number in numbers:
        stack.enter_context(TurnClient(server.address, server.credential(number), CLIENT_HOST)).allocate()
    return time.perf_counter() - start
