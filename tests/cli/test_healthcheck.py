"""Asking a relay how it is, as a container's health check does: the answer is the exit code."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from relay.config import Endpoint
from relay.healthcheck import healthcheck
from tests.conftest import needs_ipv6
from tests.interop.conftest import Program
from tests.scripted_portal import Script, ScriptedPortal

TOKEN = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_throw.away~token"
DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


def ask(at: object, *options: str) -> Result:
    return CliRunner().invoke(healthcheck, ["--health-address", f"{at}", *options])


@contextlib.contextmanager
def answering(
    *pieces: bytes, host: str = "127.0.0.1", pause: float = 0, asked: list[bytes] | None = None
) -> Iterator[Endpoint]:
    """Something that answers whatever it is asked with the same bytes, a pause before each piece."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                (asked if asked is not None else []).append(connection.recv(4096))
                for piece in pieces:
                    if stopped.wait(pause):
                        break
                    connection.sendall(piece)

    stopped = threading.Event()
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.settimeout(30)
        thread = threading.Thread(target=serve)
        thread.start()
        yield Endpoint(host, listening.getsockname()[1])
        stopped.set()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code"), [(b"200 OK", 0), (b"503 Service Unavailable", 1), (b"404 Not Found", 1), (b"200", 0)]
)
def test_the_exit_code_says_whether_it_is_well(status: bytes, code: int) -> None:
    with answering(b"HTTP/1.1 " + status + b"\r\n\r\n") as at:
        done = ask(at)
    assert (done.exit_code, done.output) == (code, f"http://{at}/livez answered {status[:3].decode()}\n")


@needs_ipv6
def test_a_relay_that_listens_at_all_addresses_is_asked_at_loopback() -> None:
    for host, loopback in (("0.0.0.0", "127.0.0.1"), ("::", "::1")):
        asked: list[bytes] = []
        with answering(b"HTTP/1.1 200 OK\r\n\r\n", host=loopback, asked=asked) as at:
            assert ask(Endpoint(host, at.port)).exit_code == 0
        assert f"\r\nHost: {at}\r\n".encode() in asked[0], "all addresses are the name of none"


def test_a_relay_that_does_not_run_is_not_well() -> None:
    with socket.socket() as taken:
        # Bound, and not listened at: nobody else gets it, and whoever connects is refused.
        taken.bind(("127.0.0.1", 0))
        done = ask(Endpoint(*taken.getsockname()))
    assert done.exit_code == 1
    assert "Connection refused" in done.output


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 2000 OK\r\n", b"x" * 100_000])
def test_what_speaks_no_http_is_no_relay(answer: bytes) -> None:
    with answering(answer) as at:
        done = ask(at)
    assert (done.exit_code, done.output) == (1, f"http://{at}/livez can't be asked: what answers there is no relay\n")


def test_an_answer_that_trickles_is_waited_for_no_longer_than_was_said() -> None:
    began = time.monotonic()
    with answering(*[b"H"] * 1000, pause=0.05) as at:
        done = ask(at, "--timeout", "0.3")
    assert (done.exit_code, done.output) == (1, f"http://{at}/livez did not answer within 0.3 s\n")
    assert time.monotonic() - began < 40, "it would have trickled for 50 s"


def test_an_address_that_is_none_is_bad_use() -> None:
    done = ask("8080")
    assert done.exit_code == 2
    assert "write 127.0.0.1:8080" in done.output


def test_a_relay_that_waits_for_its_portal_is_well_but_not_ready() -> None:
    """The check of the image, as it stands in the Dockerfile, against the program itself."""
    command = DOCKERFILE.read_text().partition("\nHEALTHCHECK")[2].partition("CMD ")[2].splitlines()[0]
    path, *arguments = json.loads(command)
    assert path.endswith("/bin/firezone-relay")
    with (
        ScriptedPortal(script=Script(sends_init=False)) as portal,
        contextlib.closing(Program(network={"FIREZONE_TOKEN": TOKEN, "FIREZONE_API_URL": portal.url})) as program,
    ):

        def check(*more: str) -> int:
            environment = os.environ | {"HEALTH_CHECK_ADDR": f"{program.host}:8080"}
            command = [sys.executable, "-m", "relay", *arguments, *more]
            return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode

        joined = portal.wait_until_joined()
        assert check() == 0
        assert check("--ready") == 1
        joined.send_init()
        program.wait_until_ready()
        assert check("--ready") == 0
