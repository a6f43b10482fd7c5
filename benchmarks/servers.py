"""The servers under test: command lines, start and stop.

Each server has an address of its own, because all use port 3478 and the same port range for allocations.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.measure import ROOT, MeasurementError
from benchmarks.pinning import on
from relay.config import HIGHEST_PORT, LOWEST_PORT, SERVICE_PORT
from relay.core.credentials import FIREZONE_REALM, Credential, RelaySecret, mint
from relay.core.stun import MessageClass, Method, encode

RELAY: Final = "relay"
COTURN: Final = "coturn"
PLAIN: Final = "plain C"
DIRECT: Final = "direct"
"""No server: client and peer send to each other."""

PLAIN_FIRST_PORT = 20000
PLAIN_FLOWS = 1000
PLAIN_FIRST_CHANNEL = 0x4000

START_TIMEOUT = 20.0
STOP_TIMEOUT = 60.0
_RETRY_SECONDS = 0.001
"""Interval between Binding requests to a starting server: the precision of the start time."""

_ANSWER_SECONDS = 0.5
_CONTROL_SECONDS = 5
_KILL_SECONDS = 10.0
_CREDENTIAL_SECONDS = 86400
_END_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""Prefix of each command: the kernel kills the server if this process dies."""


class Endpoints(NamedTuple):
    """Addresses around one server."""

    host: str
    """Address of the server."""
    peer: tuple[str, int]
    """Socket address of all peers of its clients."""
    client_host: str


@dataclass(frozen=True)
class Server:
    """A program to measure."""

    name: str
    endpoints: Endpoints
    command: tuple[str, ...] = ()
    """Empty if there is no program to start."""
    log: Path = Path(os.devnull)
    credential: Callable[[int], Credential] | None = None
    """Returns the credential of a client by its number; None if the server does not speak TURN."""
    control_port: int = 0

    @property
    def address(self) -> tuple[str, int]:
        """Return the socket address for clients."""
        return self.endpoints.host, SERVICE_PORT

    def control(self, path: str, method: str = "GET") -> str:
        """Send a request to the control address of the relay, and return the response."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.control_port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=_CONTROL_SECONDS) as response:  # noqa: S310
                return str(response.read(), "utf-8")
        except OSError as error:
            raise MeasurementError(f"{self.name} does not respond at its control address: {error}") from error

    def log_tail(self) -> str:
        """Return the last lines of the log, as a part of an error message."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return f"its log ends: {' | '.join(lines[-3:]) or '(empty)'}"


def loopback(name: str) -> Endpoints:
    """Return the loopback addresses for one of the servers."""
    number = (DIRECT, RELAY, COTURN, PLAIN).index(name)
    return Endpoints(f"127.83.0.{10 + number}", ("127.83.0.4", 5000 + number), "127.83.0.3")


def relay_server(directory: Path, endpoints: Endpoints, *options: str, name: str = RELAY, control_port: int = 0) -> Server:
    """Describe the relay of this checkout, run by this interpreter. Its files go into ``directory``."""
    secret, secret_file = RelaySecret(os.urandom(32).hex()), directory / f"{name}.secret"
    secret_file.write_text(secret.expose(), encoding="utf-8")
    expiry = int(time.time()) + _CREDENTIAL_SECONDS
    command = (
        *(sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", endpoints.host),
        *("--relay-secret-file", str(secret_file), "--health-check-addr", "127.0.0.1:0", "--allow-root"),
        *("--control-endpoint", f"127.0.0.1:{control_port}", "--allow-peer", f"{endpoints.peer[0]}/32", *options),
    )

    def credential(number: int) -> Credential:
        # An allocation replaces an older allocation with the same username, so each client has a username of its own.
        return mint(secret, expiry, f"client{number}")

    return Server(name, endpoints, command, directory / f"{name}.log", credential, control_port)


def coturn_server(directory: Path, endpoints: Endpoints, *options: str) -> Server | None:
    """Describe coturn with one relay thread; return None if coturn is not installed."""
    program = shutil.which("turnserver")
    if program is None:
        return None
    command = (
        *(program, "-n", "--lt-cred-mech", "--user=u:p", f"--realm={FIREZONE_REALM}", "-m", "1"),
        *("--no-tls", "--no-dtls", "--no-cli", "--no-tcp", "--no-tcp-relay", *options),
        *("-L", endpoints.host, "-E", endpoints.host, "--listening-port", str(SERVICE_PORT)),
        *("--min-port", str(LOWEST_PORT), "--max-port", str(HIGHEST_PORT)),
        *("--pidfile", str(directory / "coturn.pid"), "--db", str(directory / "coturn.db")),
        *("--simple-log", "--no-stdout-log", "--log-file", str(directory / "coturn.log")),
    )
    return Server(COTURN, endpoints, command, directory / "coturn.log", lambda _: Credential("u", "p"))


def coturn_version() -> str:
    """Return the version of coturn, or "not installed"."""
    if shutil.which("turnserver") is None:
        return "not installed"
    done = subprocess.run(["turnserver", "--version"], capture_output=True, text=True, timeout=10, check=False)
    return next((word for word in (done.stdout + done.stderr).split() if word[:1].isdigit()), "unknown")


def plain_server(directory: Path, endpoints: Endpoints, program: Path) -> Server:
    """Describe the relay of ``plain.c``, compiled to ``program``."""
    ports = (str(SERVICE_PORT), str(PLAIN_FIRST_PORT), str(PLAIN_FLOWS))
    peer_host, peer_port = endpoints.peer
    command = (str(program), endpoints.host, *ports, peer_host, str(peer_port))
    return Server(PLAIN, endpoints, command, directory / "plain.log")


class Running:
    """A server process after its first response."""

    def __init__(self, server: Server, process: subprocess.Popen[bytes], start_ms: float) -> None:
        self.pid = process.pid
        self.start_ms = start_ms
        """From process creation to the first response."""
        self._server = server
        self._process = process

    def check(self) -> None:
        """Check that the process still runs."""
        if self._process.poll() is not None:
            raise MeasurementError(f"{self._server.name} ended; {self._server.log_tail()}")

    def stop(self) -> float:
        """Stop the process with SIGTERM, and return the duration in ms."""
        self.check()
        before = time.perf_counter()
        self._process.terminate()
        self.wait()
        return (time.perf_counter() - before) * 1000

    def wait(self) -> None:
        """Wait for the end of the process."""
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            name, tail = self._server.name, self._server.log_tail()
            raise MeasurementError(f"{name} did not end within {STOP_TIMEOUT:.0f} s; {tail}") from error


@contextlib.contextmanager
def started(server: Server, cpus: Iterable[int]) -> Iterator[Running]:
    """Run a server on some CPUs."""
    with server.log.open("ab") as log, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(server.address)
        before = time.perf_counter()
        with on(cpus):
            # With a session of its own, the server gets no CPU time of the generator from sched_autogroup, and no SIGINT
            # from Ctrl-C: the suite ends the servers.
            process = subprocess.Popen(
                (*_END_WITH_PARENT, *server.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=server.log.parent,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        try:
            _wait_for_response(server, process, probe)
            yield Running(server, process, (time.perf_counter() - before) * 1000)
        finally:
            _end(process)


def _wait_for_response(server: Server, process: subprocess.Popen[bytes], probe: socket.socket) -> None:
    """Send Binding requests until a response arrives. An unbound port rejects at once; a bound socket queues the request."""
    request = encode(MessageClass.REQUEST, Method.BINDING, os.urandom(12), ())
    probe.settimeout(_ANSWER_SECONDS)
    end = time.perf_counter() + START_TIMEOUT
    while time.perf_counter() < end and process.poll() is None:
        try:
            probe.send(request)
            probe.recv(2048)
        except ConnectionRefusedError:
            time.sleep(_RETRY_SECONDS)
        except TimeoutError:
            continue
        else:
            return
    reason = "did not respond" if process.poll() is None else f"ended with {process.returncode}"
    raise MeasurementError(f"{server.name} {reason}; {server.log_tail()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process in any state. A second Ctrl-C must leave no process behind."""
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)
    finally:
        process.kill()
        process.wait(_KILL_SECONDS)
