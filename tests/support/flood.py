"""Floods beyond the relay's capacity, sent by processes, and clients beside the flood."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest

from benchmarks.servers import RELAY, Endpoints, Server
from relay.core.addresses import SocketAddress
from relay.core.credentials import RelaySecret, mint
from tests.support.program import Program
from tests.support.turn_client import TIMEOUT, TurnClient, udp_socket

SECRET = RelaySecret("secret of the floods")
END = b"the end"

floods = pytest.mark.parametrize(("sender", "count"), [("client", 1), ("client", 50), ("peer", 1), ("peer", 50)])
"""The sender of a flood, and the number of datagrams per GSO batch."""

# Sends through an inherited socket at full speed, until killed or until a timeout.
FLOOD = """
import socket, struct, sys, time
descriptor, host, port, length, count, begin = sys.argv[1:]
sock = socket.socket(fileno=int(descriptor))
datagram = bytes.fromhex(begin).ljust(int(length), b"\\0")
train = [(17, 103, struct.pack("=H", len(datagram)))] if int(count) > 1 else []
data, to, until = datagram * int(count), (host, int(port)), time.monotonic() + 100
said = False
while time.monotonic() < until:
    for _ in range(100):
        try:
            sock.sendmsg([data], train, 0, to)
        except OSError:
            pass
    said = said or not print("under way", flush=True)
"""


class Flood:
    """A process that sends a datagram repeatedly at full speed, separately or in GSO batches."""

    def __init__(self, through: socket.socket, to: SocketAddress, begin: bytes, *, count: int) -> None:
        """Start the process, and wait for the flood to begin."""
        numbers = (through.fileno(), to[0], to[1], 1200, count)
        self._process = subprocess.Popen(
            # Without site packages the start takes half the time.
            [sys.executable, "-I", "-S", "-c", FLOOD, *(str(each) for each in numbers), begin.hex()],
            pass_fds=[through.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "under way\n"

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Flow:
    """A client with a channel to a peer."""

    def __init__(self, program: Program, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._server = (program.host, 3478)
        credential = mint(SECRET, int(time.time()) + 600, os.urandom(8).hex())
        self.client = stack.enter_context(TurnClient(self._server, credential, "127.0.0.1"))
        self.peer = stack.enter_context(udp_socket("127.0.0.1"))
        (relayed,) = self.client.allocate()
        self.relayed: SocketAddress = relayed
        assert self.client.bind_channel(0x4000, self.peer.getsockname()) is None

    def flood(self, sender: str, count: int) -> Flood:
        """Send more than the relay's capacity, until stopped."""
        if sender == "client":
            # ChannelData of 1200 bytes including its header.
            flood = Flood(self.client.socket, self._server, b"\x40\x00" + (1196).to_bytes(2, "big"), count=count)
        else:
            flood = Flood(self.peer, self.relayed, b"", count=count)
        self._stack.callback(flood.stop)
        return flood

    def pass_through(self) -> None:
        """Send packets each way until a packet arrives. Earlier data is left over from a flood."""
        packet = os.urandom(8)
        _send_until(packet, lambda: self.client.send(0x4000, packet), self.peer)
        _send_until(packet, lambda: self.peer.sendto(packet, self.relayed[:2]), self.client.socket)

    def exchange(self, count: int) -> tuple[int, int]:
        """Send packets both ways, 100 per second; return the numbers received by the peer and by the client."""
        with ThreadPoolExecutor(2) as pool:
            at_peer = pool.submit(_count, self.peer)
            at_client = pool.submit(_count, self.client.socket)
            for _ in range(count):
                self.client.send(0x4000, b"packet")
                self.peer.sendto(b"packet", self.relayed[:2])
                # The rate is part of the test: a few packets beside a flood.
                time.sleep(0.01)
            # The end marker may be lost: then reading ends after a timeout.
            self.client.send(0x4000, END)
            self.peer.sendto(END, self.relayed[:2])
            return at_peer.result(), at_client.result()


def _send_until(packet: bytes, send: Callable[[], object], arrives_at: socket.socket) -> None:
    until = time.monotonic() + TIMEOUT
    arrives_at.settimeout(0.02)
    arrived = b""
    while not arrived.endswith(packet):
        assert time.monotonic() < until, "no packet passed through"
        send()
        with contextlib.suppress(TimeoutError):
            while not (arrived := arrives_at.recv(65535)).endswith(packet):
                pass
    arrives_at.settimeout(TIMEOUT)


def _count(sock: socket.socket) -> int:
    """Count packets until the end marker."""
    found = 0
    sock.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while not sock.recv(65535).endswith(END):
            found += 1
    sock.settimeout(TIMEOUT)
    return found


FlowMaker: TypeAlias = Callable[[], Flow]


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Program]:
    """Run a relay in a separate process, so that a flood takes no CPU time from the test's process."""
    secret = directory / "secret"
    secret.write_text(SECRET.expose())
    started = Program("--allow-peer", "127.0.0.0/8", "--relay-secret-file", str(secret))
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def flooded_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(tmp_path_factory.mktemp("relay")) as started:
        yield started


@pytest.fixture
def make_flow(flooded_program: Program) -> Iterator[FlowMaker]:
    with contextlib.ExitStack() as stack:
        yield lambda: Flow(flooded_program, stack)


def server_of(program: Program) -> Server:
    """Return a program as a server of the benchmarks."""
    expiry = int(time.time()) + 600
    endpoints = Endpoints(program.host, ("127.83.0.4", 5001), "127.83.0.3")
    return Server(RELAY, endpoints, credential=lambda number: mint(SECRET, expiry, str(number)))


def seconds_for(ask: Callable[[], object]) -> float:
    before = time.monotonic()
    ask()
    return time.monotonic() - before
