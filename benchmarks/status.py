"""What `GET /status` costs with as many allocations as there can be: its time, and how long others wait for the interpreter.

``python -m benchmarks.status``; half a minute.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from random import Random
from statistics import median

from relay.config import Config, Endpoint
from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, Family, PeerAddress, RelayedPort
from relay.core.allocations import Allocation, Allocations, AllocationState
from relay.core.counters import Counters
from relay.core.instant import Instant
from relay.net.udp import UdpCounters
from relay.ops.http.endpoint import HttpEndpoint, Page, Query
from relay.ops.threads import current_cpu, pinned, shared_fairly
from relay.status.answer import Sources, StatusPage
from relay.status.pace import Pace

ALLOCATIONS, CHANNELS = 16384, 2
ROUNDS = 9
NAP = 0.00005
"""Seconds that the thread sleeps that wants the interpreter, before it wants it."""

CASES = (
    ("nothing is asked", None, 0.3),
    ("100 allocations, after a look at all", "", 1.1),
    ("100 allocations, of that look", "", 0.1),
    ("the 20 busiest, without channels", "sort=rate&limit=20&channels=0", 1.1),
    ("the last 500, by client", "sort=client&limit=500&offset=15884", 1.1),
    ("none", "limit=0", 1.1),
)

_CLIENT = """
import http.client, sys, time
began = time.perf_counter()
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("GET", "/status?" + sys.argv[2])
size = len(connection.getresponse().read())
print(time.perf_counter() - began, size)
"""


class Waiting:
    """A thread that wants the interpreter time and again, as those that relay packets do."""

    def __init__(self) -> None:
        self.longest = 0.0
        """Seconds that it had to wait for it."""
        threading.Thread(target=self._want, daemon=True).start()

    def _want(self) -> None:
        while True:
            began = time.perf_counter()
            time.sleep(NAP)
            self.longest = max(self.longest, time.perf_counter() - began - NAP)


class Stretches:
    """How long an answer is worked on in one go: CPU time, so that a machine with other work does not count."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._since = 0.0

    def begin(self) -> Pace:
        """Begin an answer."""
        self._since = time.thread_time()
        return Pace(rest=self._rest)

    def end(self) -> None:
        """End a stretch."""
        self.longest = max(self.longest, time.thread_time() - self._since)

    def _rest(self, seconds: float) -> None:
        self.end()
        time.sleep(seconds)
        self._since = time.thread_time()


def tables(now: float) -> Allocations:
    """Make as many allocations as there can be."""
    made, random = Allocations(), Random(1)
    for number in range(ALLOCATIONS):
        client = ClientAddress((f"203.0.{number >> 8}.{number & 255}", 40000))
        allocation = Allocation(
            AllocationId(number),
            client,
            f"{1_800_000_000 + number}:salt{number}",
            b"",
            (Family.IPV4,),
            (),
            RelayedPort(49152 + number),
            even_port=False,
            lifetime=600,
            fingerprint=False,
            made_at=now,
            state=AllocationState.ESTABLISHED,
        )
        made.add(allocation, now + 600)
        for channel in range(CHANNELS):
            made.bind_channel(allocation, ChannelNumber(0x4000 + channel), PeerAddress(("198.51.100.9", channel)), now)
            allocation.channels[ChannelNumber(0x4000 + channel)].to_peer_bytes = random.randrange(1 << 40)
    return made


def rows(port: int, waiting: Waiting, stretches: Stretches) -> Iterator[str]:
    """Measure each case."""
    figures = "page, ms | kB | longest stretch of CPU, ms | longest wait of another thread, ms"
    yield f"| {ALLOCATIONS} allocations, {CHANNELS} channels each | {figures} |"
    yield "| --- | --- | --- | --- | --- |"
    for title, query, gap in CASES:
        times, waits, worked, size = [], [], [], 0
        for _ in range(ROUNDS):
            time.sleep(gap)
            waiting.longest = stretches.longest = 0.0
            if query is None:
                time.sleep(gap)
            else:
                command = (sys.executable, "-c", _CLIENT, str(port), query)
                took, length = subprocess.check_output(command, text=True).split()
                times.append(float(took) * 1e3)
                worked.append(stretches.longest * 1e3)
                size = int(length)
            waits.append(waiting.longest * 1e3)
        page = (
            f"{median(times):.0f} | {size / 1e3:.0f} | {median(worked):.2f}, at worst {max(worked):.2f}"
            if times
            else " | | "
        )
        yield f"| {title} | {page} | {median(waits):.2f}, at worst {max(waits):.2f} |"


def main() -> None:
    """Measure, on one CPU and with the switch interval that a relay has."""
    with shared_fairly(0.5), pinned(current_cpu()):
        made, counters = tables(time.monotonic()), Counters()
        sources = Sources(
            config=Config(public_ip4=IPv4Address("192.0.2.1")),
            bind_hosts={},
            tables=made,
            counters=counters,
            udp=UdpCounters(),
            kernel=None,
            now=lambda: Instant(time.monotonic(), time.time()),
            is_ready=lambda: True,
            portal=lambda: None,
            clients=list,
            kernel_drops=lambda: 0,
        )
        stretches = Stretches()
        status = StatusPage(sources, stretches.begin)

        def page(query: Query) -> Page:
            answer = status(query)
            stretches.end()
            return answer

        endpoint = HttpEndpoint("control", Endpoint("127.0.0.1", 0), {"/status": page})
        try:
            for row in rows(endpoint.port, Waiting(), stretches):
                print(row, flush=True)
        finally:
            endpoint.stop()


if __name__ == "__main__":
    main()
