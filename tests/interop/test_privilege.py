"""As whom the program runs, and who may look into it."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.interop.conftest import Program
from tests.turn_client import TurnClient, udp_socket

NOBODY: Final = 65534
AS_NOBODY: Final = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
)


def works(*command: str) -> bool:
    """Whether a command can be run here, and says that all went well."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can tell what happens to root")
needs_nobody = pytest.mark.skipif(
    not works(*AS_NOBODY, sys.executable, "-c", "import relay.process"), reason="this tree can't be run as another user"
)


@pytest.fixture
def unprivileged() -> Iterator[Program]:
    """A relay of a user without any capability, started with all of it but a group of its own."""
    with ExitStack() as stack:
        program = Program("--allow-peer", "127.0.0.0/8", by=AS_NOBODY)
        stack.callback(program.close)
        program.wait_until_ready()
        yield program


def start_as_root(*by: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Start a relay that ends by itself, since its health address is none of this machine's."""
    command = [*by, sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", "127.82.0.2"]
    command += ["--max-allocations", "10", "--health-address", "192.0.2.1:80", "--control-address", "127.0.0.1:0"]
    kept = {name: value for name, value in os.environ.items() if name != "ALLOW_ROOT"}
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done


@is_root
@pytest.mark.parametrize("environment", [{}, {"ALLOW_ROOT": "0"}])
def test_it_does_not_run_as_root_and_says_in_one_line_why_that_matters_and_what_to_do(environment: dict[str, str]) -> None:
    done = start_as_root(**environment)
    (line,) = done.stderr.splitlines()
    assert "a flaw in the relay" in line
    assert "would then be one of the whole machine" in line
    assert "run it as another user" in line
    assert "--allow-root" in line


@is_root
def test_it_runs_as_root_where_that_is_said_to_be_meant() -> None:
    assert "192.0.2.1" in start_as_root(ALLOW_ROOT="1").stderr, "the next thing is complained of"


@is_root
@needs_nobody
def test_it_relays_without_root_and_without_any_capability(unprivileged: Program) -> None:
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
    assert unprivileged.stop() == 0


@is_root
@needs_nobody
def test_other_processes_of_its_user_can_not_look_into_it(unprivileged: Program) -> None:
    """Neither at its memory nor at its environment, which may have had the token in it."""
    pid = unprivileged.process.pid
    for name in ("mem", "environ", "maps"):
        look = (sys.executable, "-c", f"open('/proc/{pid}/{name}', 'rb').read(1)")
        done = subprocess.run([*AS_NOBODY, *look], capture_output=True, text=True, timeout=60, check=False)
        assert "PermissionError" in done.stderr, name
        # Whoever rules the machine may: to find out why a relay hangs.
        Path(f"/proc/{pid}/{name}").open("rb").close()


@is_root
@needs_nobody
def test_without_privileges_it_still_tells_of_itself(unprivileged: Program) -> None:
    """The kernel shows less of a process whose memory is nobody's business; its own dumps need none of that."""
    unprivileged.process.send_signal(signal.SIGUSR1)
    unprivileged.wait_for_log("--- end of dump")
    unprivileged.process.send_signal(signal.SIGQUIT)
    unprivileged.wait_for_log("--- end of stacks")
    assert unprivileged.stop() == 0


@pytest.fixture
def crashed(tmp_path: Path) -> Iterator[Path]:
    """A directory in which a relay crashed that would have left a core dump there."""
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
