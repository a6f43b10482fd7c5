"""What is measured: the relay with the kernel's help and without, coturn, and the plain relay, all in one namespace.

They run side by side, each at an address of its own; those that wait for their turn have nothing to do.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.failure import FailedError
from benchmarks.offload.network import CLIENT_HOST, PEER_HOST, RELAY_HOSTS, Namespace, Network
from benchmarks.servers import COTURN, DIRECT, PLAIN, PLAIN_FIRST_PORT, PLAIN_FLOWS, Server
from relay.config import HIGHEST_PORT, LOWEST_PORT, SERVICE_PORT
from relay.core.credentials import FIREZONE_REALM, Credential, RelaySecret, mint

NATIVE: Final = "native"
GENERIC: Final = "generic"
USERSPACE: Final = "userspace"

ALL: Final = (NATIVE, GENERIC, USERSPACE, COTURN, PLAIN)
OFFLOADED: Final = frozenset({NATIVE, GENERIC})

_MODES: Final = {NATIVE: "driver", GENERIC: "generic"}
_FIRST_CONTROL_PORT: Final = 9001
_FIRST_PEER_PORT: Final = 5001
_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
"""In front of a command: nothing is left running, nor its namespace, if this process dies."""

_CREDENTIAL_SECONDS: Final = 86400
_ANSWER_SECONDS: Final = 5


@dataclass(frozen=True)
class Subject(Server):
    """A program to measure, in the relay's namespace."""

    @property
    def address(self) -> tuple[str, int]:
        """Where clients talk to it; of none at all, an address of the relay's machine at which nobody is."""
        return RELAY_HOSTS[self._number], SERVICE_PORT

    @property
    def peer(self) -> tuple[str, int]:
        """Where all peers of its clients are."""
        return PEER_HOST, _FIRST_PEER_PORT + self._number

    @property
    def client_host(self) -> str:
        """Where its clients are."""
        return CLIENT_HOST

    @property
    def control_port(self) -> int:
        """Where it is told to attach and to detach, on the loopback interface of its namespace."""
        return _FIRST_CONTROL_PORT + self._number

    @property
    def _number(self) -> int:
        return (*ALL, DIRECT).index(self.name)


def subjects(directory: Path, plain: Path) -> dict[str, Subject]:
    """Describe all that there are; their files go into ``directory``."""
    found = {DIRECT: Subject(DIRECT)} | {name: _relay(directory, name) for name in (NATIVE, GENERIC, USERSPACE)}
    turnserver = shutil.which("turnserver")
    if turnserver is not None:
        found[COTURN] = _coturn(directory, turnserver)
    found[PLAIN] = _plain(directory, plain)
    return found


class Offload:
    """The control address of a relay, as far as it is about the kernel's part."""

    def __init__(self, subject: Subject, place: Namespace) -> None:
        self._url = f"http://127.0.0.1:{subject.control_port}/offload"
        self._name = subject.name
        self._place = place

    def attach(self) -> None:
        """Have the kernel relay.

        Raises:
            FailedError: it does not.
        """
        attached = self._ask("POST", "/attach").get("xdp_attached")
        if not attached or not all(mode == _MODES[self._name] for mode in attached.values()):
            raise FailedError(f"{self._name} is not attached as told: {attached}")

    def detach(self) -> None:
        """Have the kernel relay no more.

        Raises:
            FailedError: it does not answer.
        """
        self._ask("POST", "/detach")

    def packets(self, direction: str) -> int:
        """Tell how many packets the kernel has relayed.

        Raises:
            FailedError: it does not answer.
        """
        return int(self._ask("GET")["xdp_packets"][{"up": "to_peer", "down": "to_client"}[direction]])

    def _ask(self, method: str, path: str = "") -> dict[str, Any]:
        request = urllib.request.Request(self._url + path, method=method)  # noqa: S310 - ours, on loopback
        try:
            with self._place.entered(), urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310
                document: dict[str, Any] = json.load(answer)
                return document
        except (OSError, urllib.error.URLError, ValueError) as error:
            raise FailedError(f"{self._name} does not answer at its control address: {error}") from error


def _relay(directory: Path, name: str) -> Subject:
    shape = Subject(name)
    secret, secret_file = RelaySecret(os.urandom(32).hex()), directory / f"{name}.secret"
    secret_file.write_text(secret.reveal(), encoding="utf-8")
    expiry = int(time.time()) + _CREDENTIAL_SECONDS
    command = (
        *(*_WITH_US, sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", shape.address[0]),
        *("--relay-secret-file", str(secret_file), "--allow-peer", f"{PEER_HOST}/32"),
        *("--health-address", "127.0.0.1:0", "--control-address", f"127.0.0.1:{shape.control_port}"),
        "--allow-root",
        # All clients of a benchmark have one address.
        *("--unauthenticated-rate", "0"),
        *_offloading(name),
    )
    return Subject(name, "", command, directory / f"{name}.log", lambda number: mint(secret, expiry, f"client{number}"))


def _offloading(name: str) -> Iterator[str]:
    if name in OFFLOADED:
        yield from ("--ebpf-offloading", ",".join(Network.RELAY_ENDS), "--ebpf-attach-mode", _MODES[name])


def _coturn(directory: Path, program: str) -> Subject:
    shape = Subject(COTURN)
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    version = next((word for word in (said.stdout + said.stderr).split() if word[:1].isdigit()), "unknown")
    command = (
        *(*_WITH_US, program, "-n", "--lt-cred-mech", "--user=u:p", f"--realm={FIREZONE_REALM}", "-m", "1"),
        *("--no-tls", "--no-dtls", "--no-cli", "--no-tcp", "--no-tcp-relay"),
        *("-L", shape.address[0], "-E", shape.address[0], "--listening-port", str(SERVICE_PORT)),
        *("--min-port", str(LOWEST_PORT), "--max-port", str(HIGHEST_PORT)),
        *("--pidfile", str(directory / "coturn.pid"), "--db", str(directory / "coturn.db")),
        *("--simple-log", "--no-stdout-log", "--log-file", str(directory / "coturn.log")),
    )
    return Subject(COTURN, version, command, directory / "coturn.log", lambda _: Credential("u", "p"))


def _plain(directory: Path, program: Path) -> Subject:
    shape = Subject(PLAIN)
    ports = (str(SERVICE_PORT), str(PLAIN_FIRST_PORT), str(PLAIN_FLOWS))
    command = (str(program), shape.address[0], *ports, PEER_HOST, str(shape.peer[1]))
    return Subject(PLAIN, "", command, directory / "plain.log")
