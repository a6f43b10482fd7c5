"""coturn's clients against the running program."""

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import needs_ipv6, wait_until
from tests.interop.conftest import Program, ProgramStarter
from tests.turn_client import udp_socket

pytestmark = pytest.mark.skipif(
    shutil.which("turnutils_uclient") is None, reason="coturn's clients are not installed (apt-get install coturn)"
)

SECONDS = 60


def run(*command: str) -> str:
    """Run a client to its end and give all it says."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False)
    return done.stdout


def wait_until_echoed(port: int) -> None:
    """Wait until someone answers at a port of loopback."""
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


@pytest.fixture
def peer_port() -> Iterator[str]:
    """The port of coturn's echoing peer."""
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


def test_stunclient_learns_its_address(program: Program) -> None:
    assert re.search(r"UDP reflexive addr: 127\.0\.0\.1:\d+", run("turnutils_stunclient", program.host))


def test_natdiscovery_gets_its_answers(program: Program) -> None:
    assert "UDP reflexive addr: 127.0.0.1" in run("turnutils_natdiscovery", "-m", "-f", program.host)


@pytest.mark.parametrize("length", ["172", "1200"])
def test_uclient_relays_every_packet(program: Program, peer_port: str, length: str) -> None:
    said = run(
        *("turnutils_uclient", "-u", program.credential.username, "-w", program.credential.password),
        *("-e", "127.0.0.1", "-r", peer_port, "-c", "-n", "50", "-l", length, "-m", "1", program.host),
    )
    # It ends with 0 even if everything is lost.
    assert re.search(r"Total lost packets 0 \(0\.0+%\)", said), said
    assert "tot_send_msgs=50, tot_recv_msgs=50" in said, said


@needs_ipv6
def test_uclient_relays_to_ipv6_peers(start_program: ProgramStarter, peer_port: str) -> None:
    program = start_program("--allow-peer", "::1/128", "--public-ip6-addr", "::1")
    said = run(
        *("turnutils_uclient", "-x", "-u", program.credential.username, "-w", program.credential.password),
        *("-e", "::1", "-r", peer_port, "-c", "-n", "50", "-l", "172", "-m", "1", program.host),
    )
    assert re.search(r"Total lost packets 0 \(0\.0+%\)", said), said
