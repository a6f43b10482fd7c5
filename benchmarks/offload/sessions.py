"""A subject that runs, the flows through it, and their packets as they come to it."""

import contextlib
import socket
from collections.abc import Iterable, Iterator

from benchmarks.failure import FailedError
from benchmarks.flows import Flow, Flows
from benchmarks.measure import cpu_ns
from benchmarks.offload import frames
from benchmarks.offload.network import CLIENT_HOST, PEER_HOST, Interface, Network
from benchmarks.offload.subjects import OFFLOADED, Offload, Subject
from benchmarks.servers import DIRECT, Running, started
from relay.core.addresses import SocketAddress

_LONGEST = 65535


class Way:
    """From where to where packets go in one direction."""

    def __init__(self, network: Network, *, up: bool) -> None:
        places = (network.client, network.peer)
        self.source, self.sink = places if up else places[::-1]
        """The namespaces."""
        self.relay_end = network.RELAY_ENDS[not up]
        """The interface by which the relay receives."""
        self.up = up
        self.source_interface = self.source.interface(network.FAR_END)
        self.relay_interface = network.relay.interface(self.relay_end)

    def ends(self) -> tuple[Interface, Interface]:
        """Give the interfaces of the first cable, the sender's first."""
        return self.source_interface, self.relay_interface


class Session:
    """A subject that runs, with its flows. Close it to end both."""

    def __init__(self, subject: Subject, network: Network, cpus: Iterable[int]) -> None:
        self.subject = subject
        self._network = network
        self._running: Running | None = None
        self._offload = Offload(subject, network.relay) if subject.name in OFFLOADED else None
        with contextlib.ExitStack() as stack:
            with network.peer.entered():
                self._flows = Flows(subject)
            stack.callback(self._flows.close)
            if subject.name != DIRECT:
                with network.relay.entered():
                    self._running = stack.enter_context(started(subject, cpus))
            if self._offload is not None:
                self._offload.detach()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End the subject, and close all sockets."""
        self._stack.close()

    def check(self) -> None:
        """Make sure that the subject is still there.

        Raises:
            FailedError: it has ended.
        """
        if self._running is not None:
            self._running.check()

    def cpu_ns(self) -> int:
        """Give the CPU time of the subject's process so far."""
        return 0 if self._running is None else cpu_ns(self._running.pid)

    def flows(self, count: int) -> list[Flow]:
        """Give some flows; those that are not there yet are made.

        Raises:
            FailedError: the subject refused, or did not answer.
        """
        with self._network.client.entered():
            return self._flows.first(count)

    @property
    def peer(self) -> int:
        """The descriptor of the socket that is all peers."""
        return self._flows.peer.fileno()

    @contextlib.contextmanager
    def relaying(self, direction: str) -> Iterator[None]:
        """Have the kernel relay meanwhile, if that is what the subject is about.

        Raises:
            FailedError: it relayed nothing.
        """
        if self._offload is None:
            yield
            return
        self._offload.attach()
        try:
            before = self._offload.packets(direction)
            yield
            if self._offload.packets(direction) == before:
                raise FailedError("the kernel relayed nothing: all was left to the sockets")
        finally:
            self._offload.detach()

    def frames(self, way: Way, count: int, data: bytes) -> list[bytes]:
        """Give the first packet of some flows."""
        mine, relays = way.ends()
        if way.up:
            host, port = self.subject.address
            link = frames.Link(mine.mac, CLIENT_HOST, relays.mac, host)
            return [
                frames.frame(link, frames.Flow(flow.client.getsockname()[1], port, flow.channel), data)
                for flow in self.flows(count)
            ]
        return [
            frames.frame(
                frames.Link(mine.mac, PEER_HOST, relays.mac, flow.relayed[0]),
                frames.Flow(self.subject.peer[1], flow.relayed[1], 0),
                data,
            )
            for flow in self.flows(count)
        ]

    def drain(self, way: Way, count: int) -> None:
        """Throw away what is left over from an earlier measurement."""
        sockets = [self._flows.peer] if way.up else [flow.client for flow in self.flows(count)]
        for each in sockets:
            for _ in _waiting(each):
                pass

    def arrivals(self, way: Way, flows: Iterable[Flow], data: bytes) -> int:
        """Take what has arrived at the sockets for some flows, each of which was sent one packet; tell how many came.

        Raises:
            FailedError: one is not as it was sent, or of no such flow.
        """
        if way.up:
            return self._at_peer({flow.relayed for flow in flows}, data)
        return sum(_at_client(flow, data) for flow in flows)

    def _at_peer(self, senders: set[SocketAddress], data: bytes) -> int:
        arrived = 0
        for got, sender in _waiting(self._flows.peer):
            _compare(got, data)
            if sender not in senders:
                raise FailedError(f"a packet came from {sender}, which is no relayed address of these flows")
            arrived += 1
        return arrived


def _at_client(flow: Flow, data: bytes) -> int:
    arrived = 0
    header = flow.channel.to_bytes(2, "big") + len(data).to_bytes(2, "big")
    for got, _ in _waiting(flow.client):
        _compare(got, header + data)
        arrived += 1
    return arrived


def _waiting(receiver: socket.socket) -> Iterator[tuple[bytes, SocketAddress]]:
    """Take what waits at a socket, and wait for nothing."""
    before = receiver.gettimeout()
    receiver.settimeout(0)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                yield receiver.recvfrom(_LONGEST)
    finally:
        receiver.settimeout(before)


def _compare(got: bytes, expected: bytes) -> None:
    if got != expected:
        raise FailedError(f"a packet of {len(expected)} bytes arrived as {len(got)} others: {got[:32].hex()}…")
