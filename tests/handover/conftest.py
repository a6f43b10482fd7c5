"""Relays that one process hands over to another."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.handover import HOST, SECRET, Allocator, Starter, credential_of
from tests.support.program import Program
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "handover.sock"


@pytest.fixture
def start(tmp_path: Path, path: Path) -> Iterator[Starter]:
    """Start processes of one relay; they end with the test."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    with ExitStack() as stack:
        programs: list[Program] = []

        def started(*options: str, real: bool = False, by: tuple[str, ...] = (), **variables: str) -> Program:
            if programs and "--take-over" in options:
                # The relay listens there shortly after it is ready.
                wait_until(lambda: path.exists() or programs[-1].process.poll() is not None)
            program = Program(
                *("--handover-socket", str(path), "--relay-secret-file", str(secret), "--allow-peer", "127.0.0.0/8"),
                *options,
                hosts=(HOST,),
                real=real,
                by=by,
                variables=variables,
            )
            stack.callback(program.close)
            programs.append(program)
            return program

        yield started


@pytest.fixture
def allocated() -> Iterator[Allocator]:
    """Return clients with an allocation each."""
    with ExitStack() as stack:
        number = iter(range(1000))

        def allocate() -> TurnClient:
            client = stack.enter_context(TurnClient((HOST, 3478), credential_of(f"user{next(number)}"), "127.0.0.1"))
            client.allocate()
            return client

        yield allocate


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with udp_socket("127.0.0.1") as opened:
        yield opened
