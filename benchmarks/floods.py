"""Effect of a flood on a client and on memory: ``python -m benchmarks.floods``.

A process floods a relay of this checkout from many source addresses: Binding requests, requests without or with wrong
credentials, and ChannelData without a channel. Meanwhile a client sends and receives packets, another refreshes, and new
clients connect, with the retransmissions of RFC 8489 §6.2.1.
"""

import contextlib
import itertools
import select
import socket
import struct
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

from benchmarks.clients import CHANNEL, Client, allocate, bind_channels, udp_socket
from benchmarks.measure import ROOT, MeasurementError, memory
from benchmarks.pinning import on, places
from benchmarks.servers import RELAY, Server, loopback, relay_server, started

FIRST_SOURCE = "127.90.0.0"
PACE = 0.005
"""Seconds between two packets of the client, and of its peer."""

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 8.0)
"""Seconds until a retransmission: RTO 500 ms, Rc 7, Rm 16 (RFC 8489 §6.2.1)."""

CALM = 2.0
"""Seconds after a flood until the next reading of memory: buffers have their normal size again."""


class Packets(NamedTuple):
    """Shares of packets that arrived."""

    at_peer: float
    at_client: float


class Report(NamedTuple):
    """Outcome of one flood."""

    rate: float
    """Datagrams of the flood per second."""
    before: Packets
    during: Packets
    after: Packets
    refreshes: list[float | None]
    """Seconds until the response to each; None without a response."""
    newcomers: list[float | None]
    memory_before: int
    """Resident KB."""
    memory_most: int
    memory_after: int


class Bystander:
    """A client with a channel to a peer, not part of the flood. Use it as a context."""

    def __init__(self, server: Server, number: int) -> None:
        self._client = Client(server, number, WAITS)
        self._peer = udp_socket(server.endpoints.peer[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._peer.close()

    def begin(self) -> float | None:
        """Allocate and bind a channel; return the duration in seconds, or None without success."""
        return _timed(lambda: allocate([self._client]), lambda: bind_channels([self._client], self._peer.getsockname()))

    def refresh(self) -> float | None:
        """Refresh the allocation; return the duration in seconds, or None without success."""
        return _timed(lambda: self._client.check_success(self._client.ask(self._client.refresh())))

    def exchange(self, seconds: float) -> Packets:
        """Send packets both ways at a steady pace, and count arrivals."""
        arrived: dict[socket.socket, set[bytes]] = {self._peer: set(), self._client.socket: set()}
        count, sent, began = int(seconds / PACE), 0, time.monotonic()
        # Half a second later, no packet is in flight.
        while (now := time.monotonic()) < began + seconds + 0.5:
            if sent < count and now >= began + sent * PACE:
                payload = sent.to_bytes(4, "big").ljust(172, b"\0")
                with contextlib.suppress(BlockingIOError):
                    self._client.socket.send(struct.pack("!HH", CHANNEL, len(payload)) + payload, socket.MSG_DONTWAIT)
                with contextlib.suppress(BlockingIOError):
                    self._peer.sendto(payload, socket.MSG_DONTWAIT, self._client.relayed)
                sent += 1
            for sock in select.select(tuple(arrived), (), (), PACE / 5)[0]:
                # Not a late response.
                if len(data := sock.recv(2048)) >= 172:
                    arrived[sock].add(data[-172:])
        return Packets(*(len(each) / count for each in arrived.values()))


def _timed(*actions: Callable[[], object]) -> float | None:
    """Return the seconds for some actions; None after a failure."""
    began = time.monotonic()
    with contextlib.suppress(MeasurementError):
        for action in actions:
            action()
        return time.monotonic() - began
    return None


@contextlib.contextmanager
def _repeated(action: Callable[[], object], pause: float) -> Iterator[None]:
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
def flooding(to: tuple[str, int], sources: int, rate: float, seconds: float) -> Iterator[Callable[[], int]]:
    """Flood an address from a process. The result waits for its end, and returns the number of datagrams."""
    arguments = map(str, (*to, FIRST_SOURCE, sources, rate, seconds))
    command = (sys.executable, "-m", "benchmarks.flooding", *arguments)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None  # noqa: S101 - PIPE above
        output = process.stdout
        try:
            if not output.readline():
                raise MeasurementError("the process of the flood did not start")
            yield lambda: int(output.readline())
        finally:
            process.kill()


def measure(server: Server, pid: int, sources: int, rate: float, seconds: float) -> Report:
    """Flood a relay from some source addresses at a rate, and return the effect. A rate of 0 is full speed."""
    numbers = itertools.count(1)
    refreshes: list[float | None] = []
    newcomers: list[float | None] = []
    memories = [memory(pid).resident]
    with Bystander(server, 0) as bystander, Bystander(server, -1) as refreshing:
        if bystander.begin() is None or refreshing.begin() is None:
            raise MeasurementError("the relay did not respond before the flood")

        def connect() -> None:
            with Bystander(server, next(numbers)) as newcomer:
                newcomers.append(newcomer.begin())

        before = bystander.exchange(seconds / 4)
        with flooding(server.address, sources, rate, seconds + 1.0) as ended:
            memory_before = memory(pid).resident
            with (
                _repeated(lambda: memories.append(memory(pid).resident), 0.1),
                _repeated(lambda: refreshes.append(refreshing.refresh()), 0.1),
                _repeated(connect, 0.2),
            ):
                during = bystander.exchange(seconds)
            flooded = ended() / (seconds + 1)
        time.sleep(CALM)
        after = bystander.exchange(seconds / 4)
        memory_after = memory(pid).resident
    return Report(*(flooded, before, during, after, refreshes, newcomers), memory_before, max(memories), memory_after)


def rows(report: Report) -> dict[str, str]:
    """Return the cells of a column by title."""
    cells = {"datagrams of the flood, a second": f"{report.rate:,.0f}"}
    for when, packets in (("before", report.before), ("during", report.during), ("after", report.after)):
        cells[f"packets relayed {when}"] = f"{packets.at_peer:.1%} to the peer, {packets.at_client:.1%} to the client"
    for title, times in (("refreshes answered", report.refreshes), ("new clients with a channel", report.newcomers)):
        answered = [each for each in times if each is not None]
        slowest = 1000 * max(answered, default=0.0)
        cells[title] = f"{len(answered)} of {len(times)}, the slowest after {slowest:.0f} ms"
    memories = (report.memory_before, report.memory_most, report.memory_after)
    return cells | {"memory before, peak, after, MB": ", ".join(f"{each / 1024:.1f}" for each in memories)}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--sources", default=200_000, type=click.IntRange(1, 1 << 22), help="Source addresses.")
@click.option("--rate", "rates", default=(5000, 20000, 0), multiple=True, help="Datagrams a second; 0: full speed.")
@click.option("--seconds", default=15.0, type=click.FloatRange(1, 600), help="Duration for each rate.")
def main(*, sources: int, rates: Sequence[float], seconds: float) -> None:
    """Flood a relay of this checkout at several rates, and print the effect on other clients."""
    where, reports = places(), {}
    with tempfile.TemporaryDirectory(prefix="relay-floods-") as name, on(where.load):
        # The relay's default limits stay in force.
        server = relay_server(Path(name), loopback(RELAY))
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
