"""The command without a terminal, and without a relay."""

import json
import re
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import pytest
from click.testing import CliRunner, Result

from relay.cli import cli
from relay.net.endpoint import Endpoint
from relay.status.model import Status
from relay.tools.control import NoAnswerError, StatusQuery, fetch, read
from relay.tools.top.command import write_once
from relay.tools.top.terminal import Screen
from tests.support.process import run
from tests.support.terminal import HOST, Stage, Terminal, running, watching


@pytest.fixture
def top(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command without a terminal. The command waits for a second between its requests."""
    monkeypatch.delenv("CONTROL_ENDPOINT", raising=False)

    def top(*arguments: str, port: int = stage.port) -> Result:
        return CliRunner().invoke(cli, ["top", "--control-endpoint", f"{HOST}:{port}", *arguments])

    return top


def table(stage: Stage, charset: str = "utf-8") -> Result:
    """Write the table, after two requests at once."""

    def write() -> None:
        write_once(Endpoint(HOST, stage.port), StatusQuery(), apart=0)

    return CliRunner(charset).invoke(click.Command("table", callback=write))


def test_a_single_report_is_a_plain_table(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(9, 4)
    stage.meanwhile = (1, 2)
    done = top("--once")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert lines[0].startswith("firezone-relay 0.1.0")
    (header,) = [at for at, line in enumerate(lines) if line.startswith("CLIENT")]
    assert " ".join(lines[header].split()) == "CLIENT PORT CH TO PEER TO CLIENT TOTAL AGE LEFT ID DROPS PEERS USER"
    assert [line.split()[0] for line in lines[header + 1 :]] == ["203.0.113.5:40002", "203.0.113.5:40001"]
    assert "16.0kb/s" in lines[header + 1], "two looks make a rate"


def test_a_single_report_works_in_ascii(stage: Stage) -> None:
    stage.relay(1)
    done = table(stage, "ascii")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_a_single_report_can_be_sorted_and_limited(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(*[1] * 30)
    done = top("--once", "--sort", "client", "--limit", "2")
    assert re.findall(r"^203\.0\.113\.5:(\d+)", done.stdout, re.MULTILINE) == ["40001", "40002"]


def test_a_single_report_without_rows_has_the_totals_only(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(1, 1)
    done = top("--once", "--limit", "0")
    assert done.stdout.splitlines()[-1].startswith("allocations 2 of ")


def test_a_single_json_report_is_the_relays_response(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(3)
    stage.meanwhile = ()
    done = top("--once", "--json")
    status = read(Status, json.loads(done.stdout))
    assert status["allocations"][0]["to_peer"]["bytes"] == 3000
    assert status["totals"]["rates_over"] == 1.0


def test_a_report_can_be_limited_to_a_client_or_a_port(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(1, 1, 1)
    port = next(iter(stage.watched.relay.server.allocations.by_port))
    for arguments, count in ((("--client", "203.0.113.0/24"), 3), (("--client", "::/0"), 0), (("--port", str(port)), 1)):
        done = top("--once", "--json", *arguments)
        assert done.exit_code == 0
        assert json.loads(done.stdout)["matching"] == count


def test_a_relay_without_allocations_is_reported(stage: Stage) -> None:
    assert table(stage).stdout.splitlines()[-1] == "no allocations"


@pytest.mark.parametrize("arguments", [("--once",), ("--once", "--json")])
def test_a_missing_relay_is_one_line_and_exit_code_1(closed_port: int, arguments: tuple[str, ...]) -> None:
    done = run("top", "--control-endpoint", f"{HOST}:{closed_port}", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"firezone-relay: no answer from {HOST}:{closed_port}: connection refused; "
        "is the relay running, and is this its --control-endpoint?\n"
    )


def test_a_missing_relay_leaves_the_terminal_unchanged(closed_port: int) -> None:
    terminal = Terminal(watching(closed_port), width=200)
    try:
        assert terminal.ends() == 1
        assert b"\x1b" not in terminal.raw
        assert b"connection refused" in terminal.raw
    finally:
        terminal.close()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "top needs a terminal: use --once for a single table"),
        (("--json",), "--json requires --once: use both"),
        (("--interval", "0.5"), "Invalid value for '--interval': 0.5 is not in the range 1<=x<=60."),
        (("--sort", "name"), "Invalid value for '--sort': 'name' is not one of 'rate', 'traffic', "),
        (("--control-endpoint", "localhost"), "'localhost' is not an address and port"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(arguments: tuple[str, ...], line: str) -> None:
    done = run("top", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wildcard_address_uses_loopback_and_shows_20_allocations(stage: Stage) -> None:
    stage.relay(*[1] * 30)
    done = CliRunner().invoke(cli, ["top", "--once"], env={"CONTROL_ENDPOINT": f"0.0.0.0:{stage.port}"})
    assert done.exit_code == 0
    assert len(re.findall(r"^203\.0\.113\.5:(\d+)", done.stdout, re.MULTILINE)) == 20


def test_the_command_imports_no_relaying_modules() -> None:
    heavy = ("relay.actors", "relay.offload", "relay.core.server", "pykka", "waitress", "websocket")
    script = (
        "import sys, relay.cli, relay.tools.top.command; "
        f"print([name for name in sys.modules if name.startswith({heavy!r})])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_failure_restores_the_terminal() -> None:
    # The terminal closes with its program.
    terminal = Terminal(running("sleep", "600"))

    def fail() -> None:
        with Screen(terminal.line, terminal.line):
            assert termios.tcgetattr(terminal.line) != terminal.before
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        terminal.until(lambda: b"\x1b[?1049l" in terminal.raw)
        assert terminal.is_as_before()
    finally:
        terminal.close()


@contextmanager
def answering(*pieces: bytes, ends: bool = True) -> Iterator[Endpoint]:
    """Send some bytes to the first connection, and optionally close the connection."""
    over = threading.Event()
    with socket.create_server((HOST, 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                try:
                    for piece in pieces:
                        connection.sendall(piece)
                except OSError:
                    return
                if not ends:
                    over.wait(30)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Endpoint(HOST, listening.getsockname()[1])
        over.set()
        thread.join(30)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ((b"",), "the server closed the connection"),
        ((b"SSH-2.0-OpenSSH_9.2\r\n",), "the server closed the connection"),
        ((b"SSH-2.0-OpenSSH_9.2\r\n\r\n",), "invalid http response: illegal status line"),
        ((HEAD, b"{}"), "is no relay of this version"),
        ((HEAD, b"<html>"), "is no relay of this version"),
        ((HEAD, b"[" * 100_000), "is no relay of this version"),
        ((HEAD, b"\xff\xfe"), "is no relay of this version"),
        ((HEAD, b'{"version": ' + b"9" * 5000 + b"}"), "is no relay of this version"),
        ((b"HTTP/1.1 403 Forbidden\r\n\r\n", b'{"error": "not\\u001b[31m you"}'), r"HTTP status 403 \(not\?\[31m you\)"),
        ((b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 5000), r"HTTP status 500 \(x+~x+\)"),
        ((b"HTTP/1.1 500 Oops\r\n\r\n",), r"HTTP status 500 \(no message\)"),
        ((HEAD, *[b" " * (1 << 20)] * 5), "the server sent more than"),
    ],
)
def test_an_invalid_response_is_a_short_error(pieces: tuple[bytes, ...], reason: str) -> None:
    with answering(*pieces) as at, pytest.raises(NoAnswerError, match=reason) as caught:
        fetch(at, StatusQuery())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("pieces", [(), (HEAD, b"{")])
def test_a_missing_response_times_out(pieces: tuple[bytes, ...]) -> None:
    with answering(*pieces, ends=False) as at, pytest.raises(NoAnswerError, match=r"^no answer within 0\.3 s$"):
        fetch(at, StatusQuery(), timeout=0.3)
