"""coturn's clients against the running program."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.program import Program
from tests.support.requirements import HAS_IPV6, needs_ipv6
from tests.support.turn_client import udp_socket
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("turnutils_uclient") is None, reason="coturn's clients are not installed (apt-get install coturn)"
)

SECONDS = 60


def run(*command: str) -> str:
    """Run a client to its end, and return its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False)
    return done.stdout


def wait_until_echoed(port: int) -> None:
    """Wait until a port of loopback responds."""
    with udp_socket("127.0.0.1") as asking:
        asking.settimeout(0.1)
        asking.connect(("127.0.0.1", port))

        def is_echoed() -> bool:
            try:
                asking.send(b"is anyone there?")
                return bool(asking.recv(100))
            except (TimeoutError, ConnectionRefusedError):
                return False

        wait_until(is_echoed)


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """A relay that allows peers on loopback. Tests do not change its state."""
    ipv6 = ("--public-ip6-addr", "::1") if HAS_IPV6 else ()
    relay = Program("--allow-peer", "127.0.0.0/8,::1/128", *ipv6)
    with contextlib.closing(relay):
        relay.wait_until_ready()
        yield relay


@pytest.fixture(scope="module")
def peer_port() -> Iterator[str]:
    """The port of coturn's echo peer."""
    with udp_socket("127.0.0.1") as chosen:
        port = str(chosen.getsockname()[1])
    peer = subprocess.Popen(
        ["turnutils_peer", "-p", port, "-L", "127.0.0.1", "-L", "::1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_echoed(int(port))
        yield port
    finally:
        peer.kill()
        peer.wait()


def test_stunclient_gets_its_reflexive_address(program: Program) -> None:
    assert re.search(r"UDP reflexive addr: 127\.0\.0\.1:\d+", run("turnutils_stunclient", program.host))


def test_natdiscovery_gets_responses(program: Program) -> None:
    assert "UDP reflexive addr: 127.0.0.1" in run("turnutils_natdiscovery", "-m", "-f", program.host)


@pytest.mark.parametrize(
    ("options", "length"),
    [((), "172"), ((), "1200"), pytest.param(("-x",), "172", marks=needs_ipv6)],
    ids=["172", "1200", "IPv6"],
)
def test_uclient_relays_every_packet(program: Program, peer_port: str, options: tuple[str, ...], length: str) -> None:
    # In sequence: clients that start in the same second choose the same port.
    said = run(
        *("turnutils_uclient", "-u", program.credential.username, "-w", program.credential.password, *options),
        *("-e", "::1" if options else "127.0.0.1", "-r", peer_port, "-c", "-n", "50", "-l", length, "-m", "1", program.host),
    )
    # The exit code is 0 even if all packets are lost.
    assert re.search(r"Total lost packets 0 \(0\.0+%\)", said), said
    assert "tot_send_msgs=50, tot_recv_msgs=50" in said, said
