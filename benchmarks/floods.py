"""What a flood does to who has an allocation, and to memory: ``python -m benchmarks.floods``.

A relay of this checkout is flooded by processes that send in the name of many sources: Bindings, unauthenticated and wrongly
authenticated requests, and ChannelData of no channel. Meanwhile a client that was there before sends and gets packets and
refreshes its allocation, and new ones come, as RFC 8489 §6.2.1 says: a request that is not answered is repeated.
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
from typing import Any, NamedTuple, Self

import click
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import RESULTS
from benchmarks.command_line import run as run_command
from benchmarks.failure import FailedError
from benchmarks.handshake import CHANNEL, AttributeValues, Client, udp_socket
from benchmarks.measure import machine, memory
from benchmarks.pinning import on, places
from benchmarks.servers import PEER_HOST, RELAY, Server, relay_server, started
from relay.core.attributes import CHANNEL_NUMBER, LIFETIME, REQUESTED_TRANSPORT, XOR_PEER_ADDRESS, XOR_RELAYED_ADDRESS
from relay.core.stun import Message, MessageClass, Method, decode

SOURCES = 200_000
FIRST_SOURCE = "127.90.0.0"
PACE = 0.005
"""Seconds between two packets of the client, and two of its peer."""

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 8.0)
"""Seconds for which an answer is waited for before the request is sent again: RTO 500 ms, Rc 7, Rm 16 (RFC 8489 §6.2.1)."""

CALM = 2.0
"""Seconds after a flood until memory is looked at again: what was dropped for it has come back by then."""

_ROOT = Path(__file__).parent.parent
_UDP = 17


class Outcome(NamedTuple):
    """What came of asking something several times."""

    asked: int
    answered: int
    longest: float
    """Seconds until an answer."""


class Packets(NamedTuple):
    """What came of packets."""

    sent: int
    at_peer: float
    """The share that arrived there."""
    at_client: float


class Report(NamedTuple):
    """One flood."""

    sent: int
    """Datagrams of the flood."""
    seconds: float
    before: Packets
    during: Packets
    refreshes: Outcome
    newcomers: Outcome
    after: Packets
    memory_before: int
    """Resident KB."""
    memory_most: int
    memory_after: int


class Bystander:
    """A client with a channel to a peer, that only wants to go on. Use it as a context."""

    def __init__(self, server: Server, number: int) -> None:
        self._server = server
        self._client = Client(server, number)
        self._peer = udp_socket(PEER_HOST)
        self._answers: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._at_peer: set[bytes] = set()
        self._at_client: set[bytes] = set()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._read_client, self._read_peer)]

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for each in self._threads:
            each.join()
        self._client.close()
        self._peer.close()

    def begin(self) -> float | None:
        """Get an allocation and a channel; give the seconds that took, or None if that was in vain."""
        began = time.monotonic()
        transport = ((REQUESTED_TRANSPORT, _UDP),)
        challenge = self.ask(Method.ALLOCATE, transport)
        if challenge is None:
            return None
        self._client.learn_nonce(challenge)
        answer = self.ask(Method.ALLOCATE, transport)
        if answer is None:
            return None
        self._client.relayed = self._client.take(answer, XOR_RELAYED_ADDRESS)
        answer = self.ask(Method.CHANNEL_BIND, ((CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, self._peer.getsockname())))
        if answer is None:
            return None
        self._client.demand_success(answer)
        return time.monotonic() - began

    def refresh(self) -> float | None:
        """Refresh the allocation; give the seconds that took, or None if that was in vain."""
        began = time.monotonic()
        answer = self.ask(Method.REFRESH, ((LIFETIME, 600),))
        return None if answer is None or answer.message_class is not MessageClass.SUCCESS else time.monotonic() - began

    def ask(self, method: Method, attributes: AttributeValues) -> Message | None:
        """Send a request until it is answered, or for as long as the RFC says."""
        request = self._client.request(method, attributes)
        for wait in WAITS:
            self._client.socket.send(request.data)
            until = time.monotonic() + wait
            with contextlib.suppress(queue.Empty):
                while True:
                    answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
                    if answer.transaction_id == request.transaction_id:
                        return answer
        return None

    def exchange(self, seconds: float) -> Packets:
        """Send packets both ways, at a steady pace, and count what arrives."""
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
        # What is under way.
        time.sleep(0.5)
        return Packets(count, len(self._at_peer) / count, len(self._at_client) / count)

    def _read_client(self) -> None:
        for data in self._arriving(self._client.socket):
            if data[0] < 4:
                message = decode(data)
                if isinstance(message, Message):
                    self._answers.put(message)
            else:
                self._at_client.add(data[4:8])

    def _read_peer(self) -> None:
        for data in self._arriving(self._peer):
            self._at_peer.add(data[:4])

    def _arriving(self, sock: socket.socket) -> Iterator[bytes]:
        sock.settimeout(0.2)
        while not self._is_over.is_set():
            with contextlib.suppress(TimeoutError):
                yield sock.recv(2048)


class Tries:
    """Asks over and over in a thread, for as long as the context lasts."""

    def __init__(self, ask: Callable[[], float | None], pause: float) -> None:
        self._ask = ask
        self._pause = pause
        self._is_over = threading.Event()
        self._times: list[float | None] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def outcome(self) -> Outcome:
        """What came of it."""
        answered = [each for each in self._times if each is not None]
        return Outcome(len(self._times), len(answered), max(answered, default=0.0))

    def _run(self) -> None:
        while not self._is_over.wait(self._pause):
            self._times.append(self._ask())


class Watch:
    """Looks at the memory of a process, for as long as the context lasts."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self.most = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0.1):
            self.most = max(self.most, memory(self._pid).resident)


def limited_relay(directory: Path) -> Server:
    """Describe the relay as it is by default: other benchmarks take a limit from it."""
    server = relay_server(directory)
    command = [*server.command]
    at = command.index("--unauthenticated-rate")
    return Server(RELAY, "", (*command[:at], *command[at + 2 :]), server.log, server.credential)


@contextlib.contextmanager
def flooding(to: tuple[str, int], sources: int, rate: float, seconds: float, processes: int) -> Iterator[Callable[[], int]]:
    """Have processes flood an address; what is given ends it, and tells how many datagrams were sent."""
    arguments = (to[0], str(to[1]), FIRST_SOURCE, str(sources), str(rate / processes), str(seconds))
    command = [sys.executable, "-m", "benchmarks.flooding", *arguments]
    with contextlib.ExitStack() as stack:
        running = []
        for _ in range(processes):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None  # noqa: S101 - as asked for
            stack.enter_context(process.stdout)
            running.append(process.stdout)
        for output in running:
            if not output.readline():
                raise FailedError("a process of the flood did not begin")
        yield lambda: sum(json.loads(output.readline()) for output in running)


def measure(server: Server, pid: int, sources: int, rate: float, seconds: float, processes: int = 1) -> Report:
    """Flood a relay, and tell what came of it.

    Args:
        server: the relay.
        pid: of its process.
        sources: addresses that the flood seems to come from.
        rate: datagrams a second; 0 is all that the processes of the flood can send.
        seconds: for which it lasts.
        processes: that send.

    Raises:
        FailedError: the relay has ended, or nobody could begin.
    """
    numbers = itertools.count(1)
    with Bystander(server, 0) as bystander:
        if bystander.begin() is None:
            raise FailedError("the relay gave no allocation before there was any flood")

        def come_new() -> float | None:
            with Bystander(server, next(numbers)) as newcomer:
                return newcomer.begin()

        before = bystander.exchange(seconds / 4)
        with contextlib.ExitStack() as stack:
            ended = stack.enter_context(flooding(server.address, sources, rate, seconds + 1.0, processes))
            memory_before = memory(pid).resident
            watch = stack.enter_context(Watch(pid))
            refreshes, newcomers = Tries(bystander.refresh, 0.1), Tries(come_new, 0.2)
            with refreshes, newcomers:
                during = bystander.exchange(seconds)
            sent = ended()
        time.sleep(CALM)
        after = bystander.exchange(seconds / 4)
        return Report(
            sent,
            seconds,
            before,
            during,
            refreshes.outcome,
            newcomers.outcome,
            after,
            memory_before,
            watch.most,
            memory(pid).resident,
        )


def rows(report: Report) -> Sequence[tuple[str, str]]:
    """Say it in words."""

    def share(packets: Packets) -> str:
        return f"{packets.at_peer:.1%} to the peer, {packets.at_client:.1%} to the client"

    def asked(outcome: Outcome) -> str:
        return f"{outcome.answered} of {outcome.asked}, the slowest after {outcome.longest * 1000:.0f} ms"

    return (
        ("datagrams of the flood, a second", f"{report.sent / (report.seconds + 1):,.0f}"),
        ("packets relayed before", share(report.before)),
        ("packets relayed during", share(report.during)),
        ("packets relayed after", share(report.after)),
        ("refreshes answered", asked(report.refreshes)),
        ("new clients with a channel", asked(report.newcomers)),
        ("memory before, MB", f"{report.memory_before / 1024:.1f}"),
        ("memory during, at most, MB", f"{report.memory_most / 1024:.1f}"),
        ("memory after, MB", f"{report.memory_after / 1024:.1f}"),
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--sources", default=SOURCES, type=click.IntRange(1, 1 << 22), help="Addresses that it seems to come from.")
@click.option(
    "--rate", "rates", default=(5000, 20000, 0), multiple=True, type=float, help="Datagrams a second; 0: all it can."
)
@click.option("--seconds", default=15.0, type=click.FloatRange(1, 600), help="For each rate.")
def main(*, sources: int, rates: Sequence[float], seconds: float) -> None:
    """Flood a relay of this checkout in the name of many, at several rates, and see what others notice."""
    where, reports = places(), {}
    with tempfile.TemporaryDirectory(prefix="relay-floods-") as name, on(where.load):
        server = limited_relay(Path(name))
        for rate in rates:
            with started(server, where.server) as relay:
                reports[f"{rate:,.0f}/s" if rate else "all there is"] = measure(server, relay.pid, sources, rate, seconds)
    table = Table("", *reports)
    for cells in zip(*(rows(each) for each in reports.values()), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    Console(width=150, highlight=False).print(table)
    written = {
        "machine": machine(None),
        "sources": sources,
        "floods": {rate: _plain(each) for rate, each in reports.items()},
    }
    (RESULTS / "floods.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:  # noqa: ANN401 - numbers, and tuples with names of them
    if isinstance(value, Report | Packets | Outcome):
        return {name: _plain(each) for name, each in value._asdict().items()}
    return value


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.floods")
