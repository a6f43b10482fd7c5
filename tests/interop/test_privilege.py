"""The user of the program, and the privacy of its memory."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.process import run
from tests.support.program import Program
from tests.support.requirements import AS_NOBODY, NOBODY, is_root, needs_nobody
from tests.support.turn_client import TurnClient, udp_socket


@pytest.fixture(scope="module")
def unprivileged() -> Iterator[Program]:
    """A relay of an unprivileged user without capabilities and groups."""
    program = Program("--allow-peer", "127.0.0.0/8", by=AS_NOBODY)
    with closing(program):
        program.wait_until_ready()
        yield program
        assert program.stop() == 0


def start_as_root(**environment: str) -> "subprocess.CompletedProcess[str]":
    """Start a relay that exits at once, because its health address is not of this machine."""
    kept = {name: value for name, value in os.environ.items() if name != "ALLOW_ROOT"}
    done = run(
        *("--standalone", "--public-ip4-addr", "127.82.0.2", "--max-allocations", "10"),
        *("--health-check-addr", "192.0.2.1:80", "--control-endpoint", "127.0.0.1:0"),
        env=kept | environment,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done


@is_root
@pytest.mark.parametrize("environment", [{}, {"ALLOW_ROOT": "0"}])
def test_root_is_rejected_with_reason_and_fix(environment: dict[str, str]) -> None:
    done = start_as_root(**environment)
    (line,) = done.stderr.splitlines()
    assert "a vulnerability in the relay" in line
    assert "would compromise the whole machine" in line
    assert "run it as an unprivileged user" in line
    assert "--allow-root" in line


@is_root
def test_allow_root_allows_root() -> None:
    assert "192.0.2.1" in start_as_root(ALLOW_ROOT="1").stderr, "the next error is reported"


@is_root
@needs_nobody
def test_packets_are_relayed_without_root_and_capabilities(unprivileged: Program) -> None:
    told = Path(f"/proc/{unprivileged.process.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in told if ":\t" in line)
    assert status["Uid"].split() == [str(NOBODY)] * 4
    assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    with (
        TurnClient((unprivileged.host, 3478), unprivileged.credential, "127.0.0.1") as client,
        udp_socket("127.0.0.1") as peer,
    ):
        client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        client.send(0x4000, b"relayed")
        assert peer.recv(100) == b"relayed"


@is_root
@needs_nobody
def test_processes_of_the_same_user_cannot_read_memory_or_environment(unprivileged: Program) -> None:
    """The environment may have contained the token."""
    pid = unprivileged.process.pid
    for name in ("mem", "environ", "maps"):
        look = (sys.executable, "-c", f"open('/proc/{pid}/{name}', 'rb').read(1)")
        done = subprocess.run([*AS_NOBODY, *look], capture_output=True, text=True, timeout=60, check=False)
        assert "PermissionError" in done.stderr, name
        # Root may read these files, to debug a hanging relay.
        Path(f"/proc/{pid}/{name}").open("rb").close()


@is_root
@needs_nobody
def test_dumps_work_without_privileges(unprivileged: Program) -> None:
    """The kernel hides files in /proc of a process with protected memory. Dumps must not need these files."""
    assert unprivileged.dump()
    unprivileged.dump(signal.SIGQUIT)


@pytest.fixture
def crashed(tmp_path: Path) -> Iterator[Path]:
    """The working directory of a crashed relay, started by a shell with core dumps enabled."""
    program = Program(by=("sh", "-c", 'cd "$0" && ulimit -c unlimited 2>/dev/null; exec "$@"', str(tmp_path)))
    try:
        program.wait_until_ready()
        limits = Path(f"/proc/{program.process.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert line.split()[4:6] == ["0", "0"]
        assert program.stop(signal.SIGSEGV) == -signal.SIGSEGV
        yield tmp_path
    finally:
        program.close()


def test_a_crash_leaves_no_core_dump(crashed: Path) -> None:
    assert list(crashed.iterdir()) == []
