"""The command healthcheck, which a container's health check runs: the result is its exit code."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from relay.net.endpoint import Endpoint
from relay.tools.healthcheck import healthcheck
from tests.support.process import run
from tests.support.program import Program
from tests.support.requirements import needs_ipv6
from tests.support.scripted_portal import Script, ScriptedPortal

TOKEN = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_throw.away~token"
DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


def ask(at: object, *options: str) -> Result:
    return CliRunner().invoke(healthcheck, ["--health-check-addr", f"{at}", *options])


@contextlib.contextmanager
def answering(
    *pieces: bytes, host: str = "127.0.0.1", pause: float = 0, asked: list[bytes] | None = None
) -> Iterator[Endpoint]:
    """Serve one connection with a fixed response, and a pause before each piece."""

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


def test_localhost_is_an_address() -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as at:
        done = ask(f"localhost:{at.port}")
    assert (done.exit_code, done.stdout) == (0, f"http://{at}/livez answered 200\n")


@pytest.mark.parametrize(
    ("status", "code"), [(b"200 OK", 0), (b"503 Service Unavailable", 1), (b"404 Not Found", 1), (b"200", 0)]
)
def test_the_exit_code_is_0_only_for_status_200(status: bytes, code: int) -> None:
    with answering(b"HTTP/1.1 " + status + b"\r\n\r\n") as at:
        done = ask(at)
    assert (done.exit_code, done.output) == (code, f"http://{at}/livez answered {status[:3].decode()}\n")


@needs_ipv6
def test_a_wildcard_address_is_checked_on_loopback() -> None:
    for host, loopback in (("0.0.0.0", "127.0.0.1"), ("::", "::1")):
        asked: list[bytes] = []
        with answering(b"HTTP/1.1 200 OK\r\n\r\n", host=loopback, asked=asked) as at:
            assert ask(Endpoint(host, at.port)).exit_code == 0
        assert f"\r\nHost: {at}\r\n".encode() in asked[0], "all addresses are the name of none"


def test_a_stopped_relay_is_unhealthy() -> None:
    with socket.socket() as taken:
        # Bound without listen, which reserves the port and refuses connections.
        taken.bind(("127.0.0.1", 0))
        done = ask(Endpoint(*taken.getsockname()))
    assert done.exit_code == 1
    assert "Connection refused" in done.output


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "the server closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the server closed the connection"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "invalid HTTP response: illegal status line"),
        (b"x" * 100_000, "the server sent more than 65536 bytes"),
    ],
)
def test_a_server_without_http_is_unhealthy(answer: bytes, reason: str) -> None:
    with answering(answer) as at:
        done = ask(at)
    assert (done.exit_code, done.output) == (1, f"http://{at}/livez can't be asked: {reason}\n")


def test_the_timeout_limits_a_response_that_trickles() -> None:
    began = time.monotonic()
    with answering(*[b"H"] * 1000, pause=0.05) as at:
        done = ask(at, "--timeout", "0.3")
    assert (done.exit_code, done.output) == (1, f"http://{at}/livez did not answer within 0.3 s\n")
    assert time.monotonic() - began < 40, "it would have trickled for 50 s"


def test_an_invalid_address_is_a_usage_error() -> None:
    done = ask("8080")
    assert done.exit_code == 2
    assert "use 127.0.0.1:8080" in done.output


def test_a_relay_waiting_for_its_portal_is_alive_but_not_ready() -> None:
    """Run the health check of the Dockerfile against the program."""
    command = DOCKERFILE.read_text().partition("\nHEALTHCHECK")[2].partition("CMD ")[2].splitlines()[0]
    path, *arguments = json.loads(command)
    assert path == "firezone-relay"
    with (
        ScriptedPortal(script=Script(sends_init=False)) as portal,
        contextlib.closing(Program(network={"FIREZONE_TOKEN": TOKEN, "FIREZONE_API_URL": portal.url})) as program,
    ):

        def check(*more: str) -> int:
            return run(*arguments, *more, env=os.environ | {"HEALTH_CHECK_ADDR": f"{program.host}:8080"}).returncode

        joined = portal.wait_until_joined()
        assert check() == 0
        assert check("--ready") == 1
        joined.send_init()
        program.wait_until_ready()
        assert check("--ready") == 0
