"""A flood of requests does not affect channels in the kernel."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import memory
from relay.core.addresses import Family
from tests.support.machine import put_first
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import SERVICE, Talk, running, talk
from tests.support.offload.topology import CLIENT, RELAY, row
from tests.support.turn_client import TIMEOUT

COUNT = 400
MIB = 1024


def arrived(sock: socket.socket, of: str) -> int:
    """Count packets until all have arrived or no more arrive."""
    found = 0
    sock.settimeout(2)
    with contextlib.suppress(TimeoutError):
        while found < COUNT:
            found += sock.recv(65535).endswith(of.encode() + bytes(100))
    sock.settimeout(TIMEOUT)
    return found


def exchanged(way: Talk) -> tuple[int, int]:
    """Send packets in both directions, and return the number of packets received by the peer and the client."""
    for _ in range(COUNT):
        way.client.send(way.number, b"to peer" + bytes(100))
        way.peer.sendto(b"to client" + bytes(100), way.relayed[:2])
    return arrived(way.peer, "to peer"), arrived(way.client.socket, "to client")


def refreshed(way: Talk) -> bool:
    """Refresh with retransmissions, as clients do."""
    way.client.socket.settimeout(3)
    for _ in range(20):
        with contextlib.suppress(TimeoutError):
            return way.client.refresh(600) is None
    return False


@needs_bpf
def test_the_kernel_relays_without_loss_during_a_flood(tmp_path: Path, object_file: bytes) -> None:
    assert object_file
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(row())
        network.know_all()
        network.client.ip("addr add 10.78.0.0/16 dev lo")
        network.relay.ip(f"route add 10.78.0.0/16 via {CLIENT[Family.IPV4]}")
        relay = stack.enter_context(running(network.relay, tmp_path, "driver"))
        way = stack.enter_context(talk(relay, network))
        # An uninterruptible relay would not fall behind.
        put_first(relay.program.process.pid, first=False)
        before = memory(relay.program.process.pid).resident
        with network.client.entered():
            flood = subprocess.Popen(
                [
                    *(sys.executable, "-m", "benchmarks.flooding", RELAY[Family.IPV4], str(SERVICE)),
                    *("10.78.0.0", "65000", "0", "110"),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
        stack.callback(flood.wait)
        stack.callback(flood.kill)
        assert flood.stdout is not None
        stack.enter_context(flood.stdout)
        assert flood.stdout.readline() == "under way\n"
        # Until the relay has fallen behind, when its sockets would lose packets.
        while not relay.dropped():
            assert flood.poll() is None
        by_kernel = way.by_kernel()
        arrivals = exchanged(way)
        # Such a busy link may lose packets before the program gets them.
        assert min(arrivals) >= 0.9 * COUNT
        relayed = [later - earlier for earlier, later in zip(by_kernel, way.by_kernel(), strict=True)]
        assert all(least <= count <= COUNT for least, count in zip(arrivals, relayed, strict=True))
        assert refreshed(way)
        assert flood.poll() is None
        assert memory(relay.program.process.pid).resident - before < 16 * MIB
