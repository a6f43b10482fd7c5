"""More than the relay can do: whoever sends it takes no more from others than what comes too late anyway."""

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

from relay.actors.departure import STOP_TIMEOUT
from relay.core.addresses import SocketAddress
from relay.core.credentials import RelaySecret, mint
from relay.core.stun import Method
from tests.interop.conftest import Program
from tests.turn_client import TIMEOUT, TurnClient, code_of, udp_socket

SECRET = "secret of the overload"
END = b"the end"

# Sends through a socket that it inherits, as fast as it can, until it is ended or its time is over.
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
    """A process that sends one datagram over and over, as fast as it can, one by one or in trains."""

    def __init__(self, through: socket.socket, to: SocketAddress, begin: bytes, *, count: int) -> None:
        """Start it, and wait until it is under way."""
        numbers = (through.fileno(), to[0], to[1], 1200, count)
        self._process = subprocess.Popen(
            [sys.executable, "-c", FLOOD, *(str(each) for each in numbers), begin.hex()],
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
        credential = mint(RelaySecret(SECRET), int(time.time()) + 600, os.urandom(8).hex())
        self.client = stack.enter_context(TurnClient(self._server, credential, "127.0.0.1"))
        self.peer = stack.enter_context(udp_socket("127.0.0.1"))
        (relayed,) = self.client.allocate()
        self.relayed: SocketAddress = relayed
        assert self.client.bind_channel(0x4000, self.peer.getsockname()) is None

    def flood(self, sender: str, count: int) -> Flood:
        """Send far more than can be relayed, until stopped."""
        if sender == "client":
            # ChannelData of 1200 bytes, its header included.
            flood = Flood(self.client.socket, self._server, b"\x40\x00" + (1196).to_bytes(2, "big"), count=count)
        else:
            flood = Flood(self.peer, self.relayed, b"", count=count)
        self._stack.callback(flood.stop)
        return flood

    def discard(self) -> None:
        """Read what a flood left behind, until there is no more."""
        for each in (self.peer, self.client.socket):
            with contextlib.suppress(TimeoutError):
                each.settimeout(0.3)
                while each.recv(65535):
                    pass
            each.settimeout(TIMEOUT)

    def exchange(self, count: int) -> tuple[int, int]:
        """Send packets both ways, 100 a second; give how many arrived at the peer and at the client."""
        with ThreadPoolExecutor(2) as pool:
            at_peer = pool.submit(_count, self.peer)
            at_client = pool.submit(_count, self.client.socket)
            for _ in range(count):
                self.client.send(0x4000, b"packet")
                self.peer.sendto(b"packet", self.relayed[:2])
                # The pace is what is tested: a few packets beside a flood.
                time.sleep(0.01)
            # This might be lost like any other: then no more comes for a while.
            self.client.send(0x4000, END)
            self.peer.sendto(END, self.relayed[:2])
            return at_peer.result(), at_client.result()


def _count(sock: socket.socket) -> int:
    """Count packets until the end of them."""
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
    """Run a relay in a process of its own, so that a flood takes no time from those who look on."""
    secret = directory / "secret"
    secret.write_text(SECRET)
    started = Program("--allow-peer", "127.0.0.0/8", "--relay-secret-file", str(secret))
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(tmp_path_factory.mktemp("relay")) as started:
        yield started


@pytest.fixture
def make_flow(program: Program) -> Iterator[FlowMaker]:
    with contextlib.ExitStack() as stack:
        yield lambda: Flow(program, stack)


def seconds_for(ask: Callable[[], object]) -> float:
    before = time.monotonic()
    ask()
    return time.monotonic() - before


floods = pytest.mark.parametrize(("sender", "count"), [("client", 1), ("client", 50), ("peer", 1), ("peer", 50)])


@floods
def test_requests_are_answered_under_a_flood(make_flow: FlowMaker, sender: str, count: int) -> None:
    flooding, other = make_flow(), make_flow()
    # What a flooded client is answered, it may not find any more among all the data.
    asking = (flooding, other) if sender == "client" else (other,)

    def refresh() -> None:
        for each in asking:
            assert each.client.refresh(600) is None

    def ask_for_own_address() -> None:
        for each in asking:
            assert code_of(each.client.request(Method.BINDING)) is None

    flood = flooding.flood(sender, count)
    waits = []
    for _ in range(20):
        waits += [seconds_for(refresh), seconds_for(ask_for_own_address)]
        # Spread over half a second of the flood: in a row, all of them might fit its first moment.
        time.sleep(0.02)
    # Whoever is new has to ask for an allocation twice, and for a channel.
    waits.append(seconds_for(make_flow) / 3)
    assert not flood.is_over
    # It takes some 7 ms where nothing else is to be done.
    assert max(waits) < 10


@pytest.mark.parametrize("count", [1, 50])
def test_a_flood_from_one_allocations_peer_leaves_others_their_packets(make_flow: FlowMaker, count: int) -> None:
    flooded, other = make_flow(), make_flow()
    flood = flooded.flood("peer", count)
    at_peer, at_client = other.exchange(100)
    assert not flood.is_over
    # All do, if nothing else keeps this machine busy.
    assert at_peer >= 50
    assert at_client >= 50


@floods
def test_after_a_flood_packets_arrive_as_before(make_flow: FlowMaker, sender: str, count: int) -> None:
    """Those of the flow that it was in, of another one, and of a new one."""
    flooded, other = make_flow(), make_flow()
    flood = flooded.flood(sender, count)
    other.exchange(50)
    flood.stop()
    flooded.discard()
    other.discard()
    for flow in (flooded, other, make_flow()):
        at_peer, at_client = flow.exchange(50)
        assert at_peer >= 25
        assert at_client >= 25
        assert flow.client.refresh(0) is None


@floods
def test_the_relay_ends_in_time_under_a_flood(tmp_path: Path, sender: str, count: int) -> None:
    with running(tmp_path) as program, contextlib.ExitStack() as stack:
        flood = Flow(program, stack).flood(sender, count)
        assert seconds_for(program.stop) < STOP_TIMEOUT, "as a supervisor is told"
        assert program.process.returncode == 0
        assert not flood.is_over
