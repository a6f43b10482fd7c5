import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result

from relay.core.addresses import Family
from relay.core.credentials import Credential, mint
from relay.core.stun import Method
from relay.net.endpoint import Endpoint
from relay.tools.probe import steps
from relay.tools.probe.client import ProbeError, TurnClient
from relay.tools.probe.command import probe
from relay.tools.probe.report import Report
from relay.tools.probe.traffic import PacketPlan
from tests.support.requirements import HAS_IPV6
from tests.support.shell import HOSTS, SECRET, Shell, open_udp
from tests.support.waiting import wait_until

PATIENT = 30.0
"""Timeout for a responding server on a busy machine."""
IMPATIENT = 1.0
QUICK = PacketPlan(count=20, rate=500, settle=30, silence=30)
"""A plan that ends once all packets have arrived."""
LOSSY = replace(QUICK, settle=1, silence=1, max_loss=0.1)
"""A plan for lost packets."""
SILENT = replace(QUICK, silence=0.05)
"""A plan for a peer path without any packets."""


def unwatched(*_: object) -> None:
    pass


class Coturn(NamedTuple):
    port: int
    username: str = "alice"
    password: str = "wonder"
    realm: str = "example.org"


@pytest.fixture
def credential() -> Credential:
    return mint(SECRET, int(time.time()) + 600, "salt")


@pytest.fixture
def families() -> tuple[Family, ...]:
    return (Family.IPV4, Family.IPV6) if HAS_IPV6 else (Family.IPV4,)


@pytest.fixture
def ipv6() -> None:
    if not HAS_IPV6:
        pytest.skip("this machine has no IPv6")


@pytest.fixture
def run(credential: Credential) -> Callable[..., Report]:
    """Probes a shell or a local port."""

    def run(
        at: Shell | int,
        credential: Credential | None = credential,
        plan: PacketPlan = QUICK,
        timeout: float = PATIENT,
        family: Family = Family.IPV4,
    ) -> Report:
        port = at if isinstance(at, int) else at.port
        address = (HOSTS[family], port) if family is Family.IPV4 else (HOSTS[family], port, 0, 0)
        return steps.probe(Endpoint(HOSTS[family], port), [address], credential, plan, timeout, unwatched)

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command like an operator, without environment variables of this machine."""
    for name in ("FIREZONE_RELAY_PASSWORD", "RELAY_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: object, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(probe, [str(each) for each in arguments], env=env)

    return command


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port without responses."""
    with open_udp(Family.IPV4) as silent:
        yield silent.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A closed port."""
    with open_udp(Family.IPV4) as opened:
        port: int = opened.getsockname()[1]
    return port


@pytest.fixture
def start_coturn(tmp_path: Path) -> Iterator[Callable[..., Coturn]]:
    if shutil.which("turnserver") is None:
        pytest.skip("coturn's turnserver is NOT INSTALLED: the probe is not tried against it (apt-get install coturn)")
    started: list[subprocess.Popen[bytes]] = []

    def start(*more: str) -> Coturn:
        with open_udp(Family.IPV4) as free:
            coturn = Coturn(free.getsockname()[1])
        arguments = (
            "turnserver", "-n", "--lt-cred-mech", f"--user={coturn.username}:{coturn.password}",
            f"--realm={coturn.realm}", "--no-tls", "--no-dtls", "--no-cli", "-L", "127.0.0.1",
            "--listening-port", str(coturn.port), "--simple-log", "--no-stdout-log",
            "--pidfile", str(tmp_path / "pid"), "--log-file", str(tmp_path / "log"), "--db", str(tmp_path / "db"), *more,
        )  # fmt: skip
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        started.append(
            subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path)
        )
        wait_until(lambda: _answers(coturn.port), 60)
        return coturn

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with TurnClient(("127.0.0.1", port), 1) as client:
        try:
            client.exchange(Method.BINDING)
        except ProbeError:
            return False
    return True
