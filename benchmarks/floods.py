"""Effect of a flood on a client and on memory: ``python -m benchmarks.floods``.

Processes flood a relay of this checkout from many source addresses: Binding requests, requests without or with wrong
credentials, and ChannelData without a channel. Meanwhile a client with an allocation sends, receives and refreshes, and new
clients connect with the retransmissions of RFC 8489 §6.2.1.
"""

import contextlib
import itertools
import json
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import click
from rich.console import Console
from rich.table import Table

from benchmarks.clients import CHANNEL, UDP, AttributeValues, Client, udp_socket
from benchmarks.errors import MeasurementError
from benchmarks.measure import memory
from benchmarks.pinning import on, places
from benchmarks.servers import RELAY, Server, loopback, relay_server, started
from relay.core.attributes import CHANNEL_NUMBER, LIFETIME, REQUESTED_TRANSPORT, XOR_PEER_ADDRESS, XOR_RELAYED_ADDRESS
from relay.core.stun import Message, MessageClass, Method, decode

FIRST_SOURCE = "127.90.0.0"
PACE = 0.005
"""Seconds between two packets of the client, and of its peer."""

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 8.0)
"""Seconds until a retransmission: RTO 500 ms, Rc 7, Rm 16 (RFC 8489 §6.2.1)."""

CALM = 2.0
"""Seconds after a flood until the next reading of memory: buffers have their normal size again."""

_ROOT = Path(__file__).parent.parent


class Requests(NamedTuple):
    """Outcome of repeated requests."""

    asked: int
    answered: int
    longest: float
    """Longest time to a response, in seconds."""

    @classmethod
    def of(cls, times: list[float | None]) -> Self:
        """Count the requests with a time as answered."""
        answered = [each for each in times if each is not None]
        return cls(len(times), len(answered), max(answered, default=0.0))


class Packets(NamedTuple):
    """Outcome of packets both ways."""

    sent: int
    at_peer: float
    """Share received by the peer."""
    at_client: float


class Report(NamedTuple):
    """Outcome of one flood."""

    sent: int
    """Datagrams of the flood."""
    seconds: float
    before: Packets
    during: Packets
    refreshes: Requests
    newcomers: Requests
    after: Packets
    memory_before: int
    """Resident KB."""
    memory_most: int
    memory_after: int


class Bystander:
    """A client with a channel to a peer, not part of the flood. Use it as a context."""

    def __init__(self, server: Server, number: int) -> None:
        self._server = server
        self._client = Client(server, number)
        self._peer = udp_socket(server.endpoints.peer[0])
        self._responses: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._at_peer: set[bytes] = set()
        self._at_client: set[bytes] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.callback(self._client.close)
        self._stack.enter_context(self._peer)
        self._stack.enter_context(_repeated(self._read_client))
        self._stack.enter_context(_repeated(self._read_peer))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self) -> float | None:
        """Allocate and bind a channel; return the duration in seconds, or None without a response."""
        began = time.monotonic()
        transport = ((REQUESTED_TRANSPORT, UDP),)
        if (challenge := self.ask(Method.ALLOCATE, transport)) is None:
            return None
        self._client.learn_nonce(challenge)
        if (response := self.ask(Method.ALLOCATE, transport)) is None:
            return None
        self._client.relayed = self._client.required(response, XOR_RELAYED_ADDRESS)
        channel = ((CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, self._peer.getsockname()))
        if (response := self.ask(Method.CHANNEL_BIND, channel)) is None:
            return None
        self._client.check_success(response)
        return time.monotonic() - began

    def refresh(self) -> float | None:
        """Refresh the allocation; return the duration in seconds, or None without a success response."""
        began = time.monotonic()
        response = self.ask(Method.REFRESH, ((LIFETIME, 600),))
        return None if response is None or response.message_class is not MessageClass.SUCCESS else time.monotonic() - began

    def ask(self, method: Method, attributes: AttributeValues) -> Message | None:
        """Send a request with the retransmissions of the RFC, and return the response."""
        request = self._client.request(method, attributes)
        for wait in WAITS:
            self._client.socket.send(request.data)
            until = time.monotonic() + wait
            with contextlib.suppress(queue.Empty):
                while True:
                    response = self._responses.get(timeout=max(0.0, until - time.monotonic()))
                    if response.transaction_id == request.transaction_id:
                        return response
        return None

    def exchange(self, seconds: float) -> Packets:
        """Send packets both ways at a steady pace, and count arrivals."""
        self._at_peer.clear()
        self._at_client.clear()
        count = int(seconds / PACE)
        began = time.monotonic()
        for number in range(count):
            payload = number.to_bytes(4, "big") + bytes(168)
            frame = CHANNEL.to_bytes(2, "big") + len(payload).to_bytes(2, "big") + payload
            for sock, data, to in (
                (self._client.socket, frame, self._server.address),
                (self._peer, payload, self._client.relayed),
            ):
                with contextlib.suppress(BlockingIOError):
                    sock.sendto(data, socket.MSG_DONTWAIT, to)
            time.sleep(max(0.0, began + (number + 1) * PACE - time.monotonic()))
        # Wait for packets in flight.
        time.sleep(0.5)
        return Packets(count, len(self._at_peer) / count, len(self._at_client) / count)

    def _read_client(self) -> None:
        data = _received(self._client.socket)
        if data[:1] >= b"\x04":
            self._at_client.add(data[4:8])
        elif data and isinstance(message := decode(data), Message):
            self._responses.put(message)

    def _read_peer(self) -> None:
        if data := _received(self._peer):
            self._at_peer.add(data[:4])


def _received(sock: socket.socket) -> bytes:
    """Receive a datagram; return b"" after a timeout."""
    sock.settimeout(0.2)
    try:
        return sock.recv(2048)
    except TimeoutError:
        return b""


@contextlib.contextmanager
def _repeated(action: Callable[[], object], pause: float = 0) -> Iterator[None]:
    """Repeat an action in a thread meanwhile."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(pause):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def flooding(to: tuple[str, int], sources: int, rate: float, seconds: float, processes: int) -> Iterator[Callable[[], int]]:
    """Flood an address from some processes. The result waits for their end, and returns the number of datagrams."""
    arguments = (to[0], str(to[1]), FIRST_SOURCE, str(sources), str(rate / processes), str(seconds))
    command = [sys.executable, "-m", "benchmarks.flooding", *arguments]
    with contextlib.ExitStack() as stack:
        running = []
        for _ in range(processes):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None  # noqa: S101 - PIPE above
            stack.enter_context(process.stdout)
            running.append(process.stdout)
        for output in running:
            if not output.readline():
                raise MeasurementError("a process of the flood did not start")
        yield lambda: sum(json.loads(output.readline()) for output in running)


def measure(server: Server, pid: int, sources: int, rate: float, seconds: float) -> Report:
    """Flood a relay from some source addresses at a rate, and return the effect. A rate of 0 is full speed."""
    numbers = itertools.count(1)
    refreshes: list[float | None] = []
    newcomers: list[float | None] = []
    memories = [memory(pid).resident]
    with Bystander(server, 0) as bystander:
        if bystander.begin() is None:
            raise MeasurementError("the relay did not respond before the flood")

        def connect() -> None:
            with Bystander(server, next(numbers)) as newcomer:
                newcomers.append(newcomer.begin())

        before = bystander.exchange(seconds / 4)
        with flooding(server.address, sources, rate, seconds + 1.0, 1) as ended:
            memory_before = memory(pid).resident
            with (
                _repeated(lambda: memories.append(memory(pid).resident), 0.1),
                _repeated(lambda: refreshes.append(bystander.refresh()), 0.1),
                _repeated(connect, 0.2),
            ):
                during = bystander.exchange(seconds)
            sent = ended()
        time.sleep(CALM)
        after = bystander.exchange(seconds / 4)
        return Report(
            *(sent, seconds, before, during, Requests.of(refreshes), Requests.of(newcomers), after),
            *(memory_before, max(memories), memory(pid).resident),
        )


def rows(report: Report) -> dict[str, str]:
    """Return the cells of a column by title."""
    cells = {"datagrams of the flood, a second": f"{report.sent / (report.seconds + 1):,.0f}"}
    for when, packets in (("before", report.before), ("during", report.during), ("after", report.after)):
        cells[f"packets relayed {when}"] = f"{packets.at_peer:.1%} to the peer, {packets.at_client:.1%} to the client"
    for title, requests in (("refreshes answered", report.refreshes), ("new clients with a channel", report.newcomers)):
        slowest = f"the slowest after {requests.longest * 1000:.0f} ms"
        cells[title] = f"{requests.answered} of {requests.asked}, {slowest}"
    memories = (report.memory_before, report.memory_most, report.memory_after)
    return cells | {"memory before, peak, after, MB": ", ".join(f"{each / 1024:.1f}" for each in memories)}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--sources", default=200_000, type=click.IntRange(1, 1 << 22), help="Source addresses.")
@click.option(
    "--rate", "rates", default=(5000, 20000, 0), multiple=True, type=float, help="Datagrams a second; 0: full speed."
)
@click.option("--seconds", default=15.0, type=click.FloatRange(1, 600), help="Duration for each rate.")
def main(*, sources: int, rates: Sequence[float], seconds: float) -> None:
    """Flood a relay of this checkout at several rates, and print the effect on other clients."""
    where, reports = places(), {}
    with tempfile.TemporaryDirectory(prefix="relay-floods-") as name, on(where.load):
        # The relay's default limits stay in force.
        server = relay_server(Path(name), loopback(RELAY), "--allow-peer", "127.0.0.0/8")
        for rate in rates:
            with started(server, where.server) as relay:
                reports[f"{rate:,.0f}/s" if rate else "full speed"] = measure(server, relay.pid, sources, rate, seconds)
    table = Table("", *reports)
    columns = [rows(report) for report in reports.values()]
    for title in columns[0]:
        table.add_row(title, *(column[title] for column in columns))
    Console(width=150, highlight=False).print(table)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.floods")
