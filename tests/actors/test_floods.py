"""Floods in the name of many, and datagrams that arrive while a relay is stopped: a real process, over real sockets."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.floods import measure
from benchmarks.servers import RELAY, Server
from relay.core.credentials import RelaySecret, mint
from tests.conftest import wait_until
from tests.interop.conftest import Program
from tests.turn_client import TIMEOUT, TurnClient, udp_socket

SECRET = RelaySecret("secret of the floods")
MIB = 1024


@dataclass(frozen=True)
class Flooded(Server):
    """A relay of these tests, as benchmarks know servers."""

    host: str = ""

    @property
    def address(self) -> tuple[str, int]:
        return self.host, 3478


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    secret = tmp_path / "secret"
    secret.write_text(SECRET.reveal())
    started = Program("--allow-peer", "127.0.0.0/8", "--relay-secret-file", str(secret))
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.close()


def test_a_flood_in_the_name_of_thousands_costs_no_memory_and_nobodys_session(program: Program) -> None:
    expiry = int(time.time()) + 600
    server = Flooded(RELAY, credential=lambda number: mint(SECRET, expiry, str(number)), host=program.host)
    report = measure(server, program.process.pid, sources=200_000, rate=10_000, seconds=4)
    assert report.sent > 4000, "a flood, even on a busy machine"
    assert report.memory_most - report.memory_before < 16 * MIB
    assert report.memory_after - report.memory_before < 4 * MIB
    assert report.refreshes.answered == report.refreshes.asked > 0
    assert report.newcomers.answered == report.newcomers.asked > 0
    # Far more do get through (`python -m benchmarks.floods`), if nothing else keeps this machine busy.
    assert min(report.during.at_peer, report.during.at_client) > 0.5
    assert min(report.after.at_peer, report.after.at_client) > 0.9
    assert report.before.sent > 0


def summary(program: Program) -> dict[str, str]:
    """Have it dump its counters, and read them."""
    dumps = program.log.count("--- end of dump")
    program.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: program.log.count("--- end of dump") > dumps)
    return dict(re.findall(r"^(\w+): (.*)$", program.log.rpartition("--- relay state")[2], re.MULTILINE))


@pytest.mark.parametrize("sender", ["client", "peer"])
def test_what_arrived_while_it_was_stopped_and_found_no_room_is_shown_afterwards(program: Program, sender: str) -> None:
    credential = mint(SECRET, int(time.time()) + 600, "stopped")
    with TurnClient((program.host, 3478), credential, "127.0.0.1") as client, udp_socket("127.0.0.1") as peer:
        ((host, port, *_),) = client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        assert summary(program)["kernel_drops"] == "0"
        os.kill(program.process.pid, signal.SIGSTOP)
        try:
            for _ in range(12_000):
                if sender == "client":
                    client.send(0x4000, bytes(1000))
                else:
                    peer.sendto(bytes(1000), (host, port))
        finally:
            os.kill(program.process.pid, signal.SIGCONT)
        # 4 MiB of room, or what the kernel gives, are less than half of it.
        assert 1000 < int(summary(program)["kernel_drops"]) < 12_000
        with contextlib.suppress(TimeoutError):
            while True:
                client.socket.settimeout(0.3)
                client.socket.recv(2048)
        client.socket.settimeout(TIMEOUT)
        assert client.refresh(600) is None
