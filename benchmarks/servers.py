"""The servers under test: how each is started, found ready, and stopped.

Each has a loopback address of its own, since both answer at port 3478, and the same range of ports for allocations.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from relay.config import HIGHEST_PORT, LOWEST_PORT, SERVICE_PORT
from relay.core.credentials import FIREZONE_REALM, Credential, RelaySecret, mint
from relay.core.stun import MessageClass, Method, encode

RELAY_HOST = "127.83.0.1"
COTURN_HOST = "127.83.0.2"

START_SECONDS = 20.0
STOP_SECONDS = 5.0
_RETRY_SECONDS = 0.001
"""How often a server is asked whether it is there: as exact as the time to its first answer is."""

_ANSWER_SECONDS = 0.5
_CREDENTIAL_SECONDS = 86400
_ROOT = Path(__file__).parent.parent


class NotReadyError(Exception):
    """A server ended, or did not answer in time. The message has the end of its log."""


@dataclass(frozen=True)
class Server:
    """A program to measure."""

    name: str
    host: str
    version: str
    command: tuple[str, ...]
    log: Path
    credential: Callable[[int], Credential]
    """What the client with some number logs in with."""

    @property
    def address(self) -> tuple[str, int]:
        """Where clients talk to it."""
        return self.host, SERVICE_PORT


class Running(NamedTuple):
    """A server that has answered."""

    pid: int
    start_ms: float
    """From just before its process was made until its first answer arrived."""


def relay_server(directory: Path) -> Server:
    """Describe the relay of this checkout, as run by this interpreter; its files go into ``directory``."""
    secret, secret_file = RelaySecret(os.urandom(32).hex()), directory / "secret"
    secret_file.write_text(secret.reveal(), encoding="utf-8")
    expiry = int(time.time()) + _CREDENTIAL_SECONDS
    command = (
        *(sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", RELAY_HOST),
        *("--relay-secret-file", str(secret_file), "--allow-peer", "127.0.0.0/8", "--max-allocations", "2000"),
        *("--health-address", "127.0.0.1:0", "--control-address", "127.0.0.1:0"),
    )
    # One username is one allocation: a second one with it would take the place of the first.
    return Server(
        "relay", RELAY_HOST, "", command, directory / "relay.log", lambda number: mint(secret, expiry, f"client{number}")
    )


def coturn_server(directory: Path) -> Server | None:
    """Describe coturn with one relay thread; None if it is not installed."""
    program = shutil.which("turnserver")
    if program is None:
        return None
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    command = (
        *(program, "-n", "--lt-cred-mech", "--user=u:p", f"--realm={FIREZONE_REALM}", "-m", "1"),
        *("--no-tls", "--no-dtls", "--no-cli", "--no-tcp", "--no-tcp-relay", "--allow-loopback-peers"),
        *("-L", COTURN_HOST, "-E", COTURN_HOST, "--listening-port", str(SERVICE_PORT)),
        *("--min-port", str(LOWEST_PORT), "--max-port", str(HIGHEST_PORT)),
        *("--pidfile", str(directory / "coturn.pid"), "--db", str(directory / "coturn.db")),
        *("--simple-log", "--no-stdout-log", "--log-file", str(directory / "coturn.log")),
    )
    words = (version.stdout + version.stderr).split()
    number = next((word for word in words if word[:1].isdigit()), "unknown")
    return Server("coturn", COTURN_HOST, number, command, directory / "coturn.log", lambda _: Credential("u", "p"))


@contextlib.contextmanager
def started(server: Server, cpu: int) -> Iterator[Running]:
    """Run a server on one CPU for as long as the context lasts.

    Raises:
        NotReadyError: it did not come up.
    """
    with server.log.open("ab") as log, contextlib.ExitStack() as stack:
        probe = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        probe.bind((server.host, 0))
        probe.connect(server.address)
        before = time.perf_counter()
        with _pinned(cpu):
            process = subprocess.Popen(
                server.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_ROOT if server.name == "relay" else server.log.parent,
            )
        stack.callback(_stop, process)
        _wait_for_answer(server, process, probe)
        yield Running(process.pid, (time.perf_counter() - before) * 1000)


@contextlib.contextmanager
def _pinned(cpu: int) -> Iterator[None]:
    """Be on one CPU; a process made meanwhile stays there, with all its threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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
    raise NotReadyError(f"{server.name} gave no answer at {server.host}; its log ends: {_last_lines(server.log)}")


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return " | ".join(lines[-5:]) or "(empty)"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)
