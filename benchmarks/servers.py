"""The servers under test: how each is started, found ready, and stopped.

Each has a loopback address of its own, since all answer at port 3478, and the same range of ports for allocations.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.failure import FailedError
from benchmarks.pinning import on
from relay.config import HIGHEST_PORT, LOWEST_PORT, SERVICE_PORT
from relay.core.credentials import FIREZONE_REALM, Credential, RelaySecret, mint
from relay.core.stun import MessageClass, Method, encode

RELAY: Final = "relay"
COTURN: Final = "coturn"
PLAIN: Final = "plain C"
DIRECT: Final = "direct"
"""No server at all: client and peer send to each other."""

CLIENT_HOST = "127.83.0.3"
PEER_HOST = "127.83.0.4"
_HOSTS = {RELAY: "127.83.0.1", COTURN: "127.83.0.2", PLAIN: "127.83.0.5", DIRECT: PEER_HOST}
_PEER_PORTS = {RELAY: 5001, COTURN: 5002, PLAIN: 5003, DIRECT: 5004}

PLAIN_FIRST_PORT = 20000
PLAIN_FLOWS = 1000
PLAIN_FIRST_CHANNEL = 0x4000

START_SECONDS = 20.0
STOP_SECONDS = 60.0
_RETRY_SECONDS = 0.001
"""How often a server is asked whether it is there: as exact as the time to its first answer is."""

_ANSWER_SECONDS = 0.5
_KILL_SECONDS = 10.0
_CREDENTIAL_SECONDS = 86400
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Server:
    """A program to measure."""

    name: str
    version: str = ""
    command: tuple[str, ...] = ()
    log: Path = Path(os.devnull)
    credential: Callable[[int], Credential] | None = None
    """What the client with some number logs in with; None if it knows no TURN."""

    @property
    def address(self) -> tuple[str, int]:
        """Where clients talk to it."""
        return _HOSTS[self.name], SERVICE_PORT

    @property
    def peer(self) -> tuple[str, int]:
        """Where all peers of its clients are."""
        return PEER_HOST, _PEER_PORTS[self.name]

    @property
    def client_host(self) -> str:
        """Where all its clients are."""
        return CLIENT_HOST

    def last_words(self) -> str:
        """Give the end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return f"its log ends: {' | '.join(lines[-3:]) or '(empty)'}"


def relay_server(directory: Path) -> Server:
    """Describe the relay of this checkout, as run by this interpreter; its files go into ``directory``."""
    secret, secret_file = RelaySecret(os.urandom(32).hex()), directory / "secret"
    secret_file.write_text(secret.reveal(), encoding="utf-8")
    expiry = int(time.time()) + _CREDENTIAL_SECONDS
    command = (
        *(sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", _HOSTS[RELAY]),
        *("--relay-secret-file", str(secret_file), "--allow-peer", "127.0.0.0/8"),
        *("--health-address", "127.0.0.1:0", "--control-address", "127.0.0.1:0", "--allow-root"),
        # All clients of a benchmark have one address.
        *("--unauthenticated-rate", "0"),
    )
    # One username is one allocation: a second one with it would take the place of the first.
    return Server(RELAY, "", command, directory / "relay.log", lambda number: mint(secret, expiry, f"client{number}"))


def coturn_server(directory: Path) -> Server | None:
    """Describe coturn with one relay thread; None if it is not installed."""
    program = shutil.which("turnserver")
    if program is None:
        return None
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    command = (
        *(program, "-n", "--lt-cred-mech", "--user=u:p", f"--realm={FIREZONE_REALM}", "-m", "1"),
        *("--no-tls", "--no-dtls", "--no-cli", "--no-tcp", "--no-tcp-relay", "--allow-loopback-peers"),
        *("-L", _HOSTS[COTURN], "-E", _HOSTS[COTURN], "--listening-port", str(SERVICE_PORT)),
        *("--min-port", str(LOWEST_PORT), "--max-port", str(HIGHEST_PORT)),
        *("--pidfile", str(directory / "coturn.pid"), "--db", str(directory / "coturn.db")),
        *("--simple-log", "--no-stdout-log", "--log-file", str(directory / "coturn.log")),
    )
    words = (version.stdout + version.stderr).split()
    number = next((word for word in words if word[:1].isdigit()), "unknown")
    return Server(COTURN, number, command, directory / "coturn.log", lambda _: Credential("u", "p"))


def plain_server(directory: Path, program: Path) -> Server:
    """Describe the relay of ``plain.c``, compiled to ``program``."""
    ports = (str(SERVICE_PORT), str(PLAIN_FIRST_PORT), str(PLAIN_FLOWS))
    command = (str(program), _HOSTS[PLAIN], *ports, PEER_HOST, str(_PEER_PORTS[PLAIN]))
    return Server(PLAIN, "", command, directory / "plain.log")


class Running:
    """A server that has answered."""

    def __init__(self, server: Server, process: subprocess.Popen[bytes], start_ms: float) -> None:
        self.pid = process.pid
        self.start_ms = start_ms
        """From just before its process was made until its first answer arrived."""
        self._server = server
        self._process = process

    def check(self) -> None:
        """Make sure that it is still there.

        Raises:
            FailedError: it has ended.
        """
        if self._process.poll() is not None:
            raise _ended(self._server, self._process)

    def stop(self) -> float:
        """Ask it to end, and give the milliseconds until it has.

        Raises:
            FailedError: it had ended before, or does not end.
        """
        self.check()
        before = time.perf_counter()
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"{self._server.name} did not end within {STOP_SECONDS:.0f} s of SIGTERM") from error
        return (time.perf_counter() - before) * 1000


@contextlib.contextmanager
def started(server: Server, cpus: Iterable[int]) -> Iterator[Running]:
    """Run a server on some CPUs for as long as the context lasts.

    Raises:
        FailedError: it did not come up.
    """
    with server.log.open("ab") as log, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((server.client_host, 0))
        probe.connect(server.address)
        where = _ROOT if server.name == RELAY else server.log.parent
        before = time.perf_counter()
        with on(cpus):
            # In a session of its own, so that a kernel that divides CPUs by session (sched_autogroup) takes nothing from it
            # for the load; and so that Ctrl-C ends the suite, which then ends the servers.
            process = subprocess.Popen(
                server.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=where, start_new_session=True
            )
        try:
            _wait_for_answer(server, process, probe)
            yield Running(server, process, (time.perf_counter() - before) * 1000)
        finally:
            _end(process)


def _wait_for_answer(server: Server, process: subprocess.Popen[bytes], probe: socket.socket) -> None:
    """Ask until there is an answer. While nothing is bound the kernel refuses at once; afterwards the question waits."""
    question = encode(MessageClass.REQUEST, Method.BINDING, os.urandom(12), ())
    probe.settimeout(_ANSWER_SECONDS)
    end = time.perf_counter() + START_SECONDS
    while time.perf_counter() < end and process.poll() is None:
        try:
            probe.send(question)
            probe.recv(2048)
        except ConnectionRefusedError:
            time.sleep(_RETRY_SECONDS)
        except TimeoutError:
            continue
        else:
            return
    if process.poll() is not None:
        raise _ended(server, process)
    raise FailedError(f"{server.name} gave no answer at {server.address[0]}; {server.last_words()}")


def _ended(server: Server, process: subprocess.Popen[bytes]) -> FailedError:
    return FailedError(f"{server.name} ended with {process.returncode}; {server.last_words()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, whatever state it is in."""
    if process.poll() is None:
        process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)
    finally:
        # Nothing is left running, not even if somebody presses Ctrl-C once more.
        if process.poll() is None:
            process.kill()
            process.wait(_KILL_SECONDS)
