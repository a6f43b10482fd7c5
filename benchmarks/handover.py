"""Packets and requests while successors take a relay over: ``python -m benchmarks.handover``.

A process sends numbered packets through a channel of each client, both ways in turn, and requests without retransmissions.
It shares all CPUs with the relay and its successors. All are in a network namespace of their own.
"""

import contextlib
import os
import re
import selectors
import signal
import socket
import struct
import tempfile
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import Value
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.allocations import open_clients, raise_descriptor_limit
from benchmarks.clients import CHANNEL, Client, allocate, bind_channels, udp_socket
from benchmarks.greedy import forked
from benchmarks.measure import receive_buffer_drops
from benchmarks.offload.network import Namespace
from benchmarks.servers import RELAY, loopback, relay_server, started

BURST, STEP, ASKING, CALM, MOST_SECONDS, CONTROL_PORT, STOP = 64, 0.001, 0.01, 1.0, 60, 8090, -1
"""Packets between two reads; seconds between two looks, two requests, two handovers; most seconds of a handover."""

_HEAD, _PAYLOAD = struct.pack("!HH", CHANNEL, 172), struct.Struct("!Q164x")


class Traffic:
    """Packets and requests of some clients, at a rate. The numbers of packets go through the flows in turn."""

    def __init__(self, clients: list[Client], peer: socket.socket, rate: int) -> None:
        self._clients, self._peer, self._rate = clients, peer, rate
        self._expected = list(range(2 * len(clients)))
        """The next number of each flow. Even numbers are for the peer."""
        self._missing: set[int] = set()
        self._asked_at: dict[bytes, float] = {}
        self._arrived, self.handover = 0.0, Value("i", 0, lock=False)
        """The time of the last arrival, and the number of the last handover, set by the parent. STOP stops the traffic."""
        self.longest: dict[tuple[str, int], float] = {}
        """Seconds by title and handover."""
        self.counts = Counter({"packets": 0, "lost": 0, "repeated": 0, "out of order": 0, "requests": 0, "answered": 0})

    def run(self) -> tuple[Counter[str], dict[tuple[str, int], float]]:
        """Send and receive until the parent stops it, and return the counts and longest times."""
        selector, parent = selectors.EpollSelector(), os.getppid()
        for each in (self._peer, *(client.socket for client in self._clients)):
            each.settimeout(None)
            selector.register(each, selectors.EVENT_READ, each)
        began = now = self._arrived = time.monotonic()
        while os.getppid() == parent and (self.handover.value != STOP or now - self._arrived < CALM):
            if self.handover.value != STOP:
                self._send(now - began, now)
            ready, before, now = selector.select(STEP), now, time.monotonic()
            self._note("longest pause of this benchmark", now - before)
            for key, _ in ready:
                self._receive(key.data, now)
        return self.counts, self.longest

    def _note(self, title: str, seconds: float) -> None:
        key = title, self.handover.value
        self.longest[key] = max(seconds, self.longest.get(key, 0.0))

    def _send(self, passed: float, now: float) -> None:
        sent, asked = self.counts["packets"], self.counts["requests"]
        for number in range(sent, min(int(passed * self._rate), sent + BURST)):
            client, data = self._clients[number // 2 % len(self._clients)], _PAYLOAD.pack(number)
            if number % 2:
                self._peer.sendto(data, client.relayed)
            else:
                client.socket.send(_HEAD + data)
            self.counts.update(("packets", "lost"))
        if asked < passed / ASKING:
            client = self._clients[asked // 2 % len(self._clients)]
            request = client.bind(self._peer.getsockname()) if asked % 2 else client.refresh()
            self._asked_at[request.transaction_id] = now
            client.socket.send(request.data)
            self.counts["requests"] += 1

    def _receive(self, sock: socket.socket, now: float) -> None:
        at, before = 0 if sock is self._peer else len(_HEAD), self.counts["lost"]
        with contextlib.suppress(BlockingIOError):
            for _ in range(BURST):
                data = sock.recv(2048, socket.MSG_DONTWAIT)
                if data[:at] == _HEAD[:at]:
                    self.count(*_PAYLOAD.unpack_from(data, at))
                elif data[:2] in (b"\x01\x04", b"\x01\x09") and data[8:20] in self._asked_at:
                    # A success response to Refresh or ChannelBind.
                    self.counts["answered"] += 1
                    self._note("longest time to a response", now - self._asked_at.pop(data[8:20]))
        if self.counts["lost"] < before:
            self._note("longest time without any packet", now - self._arrived)
            self._arrived = now

    def count(self, number: int) -> None:
        """Count an arrived packet."""
        flows, expected = len(self._expected), self._expected[number % len(self._expected)]
        if number >= expected:
            self._missing.update(range(expected, number, flows))
            self._expected[number % flows] = number + flows
        elif number in self._missing:
            self._missing.remove(number)
            self.counts["out of order"] += 1
        else:
            self.counts.update(("repeated", "lost"))
        self.counts["lost"] -= 1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--allocations", default=500, type=click.IntRange(1, 16384), help="Clients with a channel each.")
@click.option("--rate", default=20_000, type=click.IntRange(1), help="Packets per second, both ways together.")
@click.option("--handovers", default=10, type=click.IntRange(1, 100), help="Successors, one after another.")
def main(*, allocations: int, rate: int, handovers: int) -> None:
    """Take a relay of this checkout over repeatedly, and print the effect on packets and requests."""
    raise_descriptor_limit()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(MOST_SECONDS * (1 + handovers))
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-handover-")), "socket")
        place, cpus = stack.enter_context(contextlib.closing(Namespace())), os.sched_getaffinity(0)
        place.run("ip", "link", "set", "lo", "up")
        stack.enter_context(place.entered())
        options = ("--unauthenticated-rate", "0", "--handover-socket", str(path))
        server = relay_server(path.parent, loopback(RELAY), *options, control_port=CONTROL_PORT)
        successor = replace(server, command=(*server.command, "--take-over"))
        relay = stack.enter_context(started(server, cpus))
        peer, clients = stack.enter_context(udp_socket(*server.endpoints.peer)), open_clients(stack, server, allocations)
        allocate(clients)
        bind_channels(clients, peer.getsockname())
        traffic = Traffic(clients, peer, rate)
        result = forked(traffic.run)
        for number in (*range(1, handovers + 1), STOP):
            time.sleep(CALM)
            found = re.findall(r'(?m)^relay_drops_total{reason="(\w+)"} ([1-9]\d*)', server.control("/metrics"))
            traffic.counts.update({f"dropped by the relay, {reason}": int(count) for reason, count in found})
            traffic.handover.value, began, at, former = number, time.monotonic(), path.stat().st_ino, relay
            if number == STOP:
                break
            relay = stack.enter_context(started(successor, cpus))
            former.wait()
            traffic.longest["start of the successor to end of the former", number] = time.monotonic() - began
            # The successor listens there for its own successor.
            while path.stat().st_ino == at:
                relay.check()
                time.sleep(STEP)
        counts, longest = result()
        of_relay, own = receive_buffer_drops(server.endpoints.host)
        traffic.counts.update({**counts, "lost in buffers of the relay": of_relay, "lost in buffers of this benchmark": own})
        waits = re.findall(r" handed over .* requests_waited=(\S+)", server.log.read_text(encoding="utf-8"))
    longest |= traffic.longest | {("requests waited", number): float(each) for number, each in enumerate(waits, 1)}
    table = Table("", "all", "before", *(str(number) for number in range(1, handovers + 1)))
    for title, count in traffic.counts.items():
        table.add_row(title, f"{count:,}")
    for title in dict.fromkeys(title for title, _ in longest):
        row = [1000 * longest.get((title, number), 0) for number in range(handovers + 1)]
        table.add_row(f"{title}, ms", *(f"{each:.0f}" for each in (max(row), *row)))
    Console(width=150, highlight=False).print(table)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.handover")
