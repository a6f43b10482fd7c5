"""Relays on a failing machine, and checks of their recovery."""

import contextlib
import errno
import mmap
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from relay.core.credentials import Credential, RelaySecret, mint
from tests.support.program import Program
from tests.support.system import Relay, make_relay, relay
from tests.support.turn_client import TurnClient, udp_socket

__all__ = ["make_relay", "relay"]

SECRET: Final = "secret of those that fail"
CHANNEL: Final = 0x4000
PATIENCE: Final = 30.0
"""Seconds for an action started by the relay."""


def exchange(client: TurnClient, host: str = "127.0.0.1") -> None:
    """Allocate, and check relaying both ways."""
    (relayed,) = client.allocate()
    with udp_socket(host) as peer:
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        client.send(CHANNEL, b"to the peer")
        assert peer.recv(100) == b"to the peer"
        peer.sendto(b"to the client", relayed[:2])
        assert client.receive() == (CHANNEL, b"to the client")
    assert client.refresh(0) is None


def assert_serves(served: Relay, host: str = "127.0.0.1") -> None:
    """Check service for a new client, after a failure."""
    exchange(served.client(), host)


class Failing(Program):
    """A relay in a separate process. A test selects system calls that fail."""

    def __init__(
        self, directory: Path, library: Path | None = None, by: tuple[str, ...] = (), *, reads_log: bool = True
    ) -> None:
        secret = directory / "secret"
        secret.write_text(SECRET)
        self._path = directory / "faults"
        self._path.write_bytes(bytes(mmap.PAGESIZE))
        with self._path.open("r+b") as file:
            self._table = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        shim = () if library is None else ("env", f"LD_PRELOAD={library}", f"FAULTS={self._path}")
        super().__init__(
            "--allow-peer", "127.0.0.0/8", "--relay-secret-file", str(secret), by=(*by, *shim), reads_log=reads_log
        )

    def close(self) -> None:
        super().close()
        self._table.close()

    def client(self, ttl: int = 864000) -> TurnClient:
        """Return a new client, with a credential for ten days."""
        return TurnClient((self.host, 3478), self.credential_for(ttl), "127.0.0.1")

    @staticmethod
    def credential_for(seconds: int) -> Credential:
        return mint(RelaySecret(SECRET), int(time.time()) + seconds, str(time.monotonic_ns()))

    def fail(self, what: "Call", number: int, calls: int) -> None:
        """Make the next calls fail, and reset their count. A negative ``calls`` is unlimited."""
        struct.pack_into("=i4xi", self._table, what, number, 0)
        struct.pack_into("=i", self._table, what + 4, calls)

    def hits(self, what: "Call") -> int:
        """Number of failed calls."""
        hits: int = struct.unpack_from("=i", self._table, what + 8)[0]
        return hits

    def step_wall_clock(self, seconds: int) -> None:
        """Set the relay's clock, as an offset from its initial time."""
        struct.pack_into("=q", self._table, 48, seconds)

    def assert_serves(self) -> None:
        """Check service for a new client."""
        with self.client() as client:
            exchange(client)


Call: TypeAlias = int
SEND: Final[Call] = 0
RECEIVE: Final[Call] = 16
BIND: Final[Call] = 32


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library with failing system calls."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build what makes system calls fail")
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).parent / "shim.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(path), str(source)], check=True, timeout=60
    )
    return path


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Iterator[Failing]:
    """A relay with failing system calls, for failures that do not end the relay."""
    with running(tmp_path_factory.mktemp("relay"), library) as started:
        yield started


@contextlib.contextmanager
def running(
    directory: Path, library: Path | None = None, by: tuple[str, ...] = (), *, reads_log: bool = True
) -> Iterator[Failing]:
    """Run a relay in a separate process."""
    started = Failing(directory, library, by, reads_log=reads_log)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.close()


def name_of(number: int) -> str:
    return errno.errorcode[number]
