"""The command without a terminal, and what it says of a relay that is not there."""

import json
import re
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from relay.cli import cli
from relay.status.model import Status
from relay.top.fetching import Address, Query, UnreachableError, fetch
from relay.top.reading import read
from relay.top.terminal import Screen
from tests.top.conftest import HOST, Stage, Terminal


@pytest.fixture
def top(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command, without a terminal."""
    monkeypatch.delenv("CONTROL_ENDPOINT", raising=False)
    # The relay's time is a test's: it is what the command waits for.
    monkeypatch.setattr("relay.top.once.time", SimpleNamespace(sleep=lambda _: stage.relay(*stage.meanwhile)))

    def top(*arguments: str, port: int = stage.port, charset: str = "utf-8") -> Result:
        return CliRunner(charset).invoke(cli, ["top", "--control-address", f"{HOST}:{port}", *arguments])

    return top


def test_one_look_is_a_plain_table(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(9, 4)
    stage.meanwhile = (1, 2)
    done = top("--once")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert lines[0].startswith("firezone-relay 0.1.0")
    (header,) = [at for at, line in enumerate(lines) if line.startswith("CLIENT")]
    assert lines[header].split() == (
        ["CLIENT", "PORT", "CH", "TO", "PEER", "TO", "CLIENT", "TOTAL", "AGE", "LEFT", "LOGIN", "RELAYED", "PEERS"]
    )
    assert [line.split()[0] for line in lines[header + 1 :]] == ["203.0.113.5:40002", "203.0.113.5:40001"]
    assert "16.0kb/s" in lines[header + 1], "two looks make a rate"


def test_one_look_goes_where_only_ascii_does(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(1)
    assert "●" in top("--once").stdout
    done = top("--once", charset="ascii")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_one_look_can_be_ordered_and_limited(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(*[1] * 30)
    done = top("--once", "--sort", "client", "--invert", "--limit", "2")
    assert re.findall(r"^203\.0\.113\.5:(\d+)", done.stdout, re.MULTILINE) == ["40030", "40029"]
    assert len(re.findall(r"^203\.0\.113\.5:(\d+)", top("--once").stdout, re.MULTILINE)) == 20


def test_one_look_as_json_is_what_the_relay_answered(stage: Stage, top: Callable[..., Result]) -> None:
    stage.relay(3)
    done = top("--once", "--json")
    status = read(Status, json.loads(done.stdout))
    assert status["allocations"][0]["to_peer"]["bytes"] == 3000
    assert status["totals"]["rates_over"] == 1.0


def test_a_relay_without_allocations_says_so(top: Callable[..., Result]) -> None:
    assert top("--once").stdout.splitlines()[-1] == "no allocations"


@pytest.mark.parametrize("arguments", [("--once",), ("--once", "--json")])
def test_a_relay_that_is_not_there_is_one_line_and_exit_code_1(
    top: Callable[..., Result], closed_port: int, arguments: tuple[str, ...]
) -> None:
    done = top(*arguments, port=closed_port)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"firezone-relay: no status from {HOST}:{closed_port}: connection refused; "
        "is the relay running, and is this its --control-address?\n"
    )


def test_a_relay_that_is_not_there_leaves_the_terminal_alone(closed_port: int) -> None:
    command = (sys.executable, "-m", "relay", "top", "--control-address", f"{HOST}:{closed_port}")
    terminal = Terminal(*command, width=200)
    try:
        assert terminal.ends() == 1
        assert b"\x1b" not in terminal.raw
        assert b"connection refused" in terminal.raw
    finally:
        terminal.close()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "top needs a terminal that it can draw on: give --once for a table"),
        (("--json",), "--json is for --once: give both"),
        (("--interval", "0.5"), "Invalid value for '--interval': 0.5 is not in the range 1<=x<=60."),
        (("--sort", "name"), "Invalid value for '--sort': 'name' is not one of 'rate', 'traffic', "),
        (("--control-address", "localhost"), "'localhost' is no address with a port"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(arguments: tuple[str, ...], line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relay", "top", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_relay_that_listens_everywhere_is_asked_on_this_machine(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.top.once.time", SimpleNamespace(sleep=lambda _: stage.relay()))
    done = CliRunner().invoke(cli, ["top", "--once"], env={"CONTROL_ENDPOINT": f"0.0.0.0:{stage.port}"})
    assert done.exit_code == 0


def test_it_imports_nothing_that_relays() -> None:
    heavy = ("relay.actors", "relay.offload", "relay.core.server", "pykka", "structlog", "waitress", "websocket", "psutil")
    script = (
        "import sys, relay.cli, relay.top.command, relay.top.live, relay.top.once; "
        f"print([name for name in sys.modules if name.startswith({heavy!r})])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_failure_in_the_midst_gives_the_terminal_back() -> None:
    # The terminal is gone once what it was for has ended.
    terminal = Terminal("sleep", "600")

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
def answering(*pieces: bytes, ends: bool = True) -> Iterator[Address]:
    """Answer the first connection with some bytes; and end it, or never."""
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
        yield Address(HOST, listening.getsockname()[1])
        over.set()
        thread.join(30)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ((b"",), "closed connection without response"),
        ((b"SSH-2.0-OpenSSH_9.2\r\n",), "speaks no HTTP"),
        ((HEAD, b"{}"), "is no relay of this version"),
        ((HEAD, b"<html>"), "is no relay of this version"),
        ((HEAD, b"[" * 100_000), "is no relay of this version"),
        ((HEAD, b"\xff\xfe"), "is no relay of this version"),
        ((HEAD, b'{"version": ' + b"9" * 5000 + b"}"), "is no relay of this version"),
        ((b"HTTP/1.1 403 Forbidden\r\n\r\n", b'{"error": "not\\u001b[31m you"}'), r"it answered 403 \(not\?\[31m you\)"),
        ((b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 5000), r"it answered 500 \(x+\.\.\.x+\)"),
        ((b"HTTP/1.1 500 Oops\r\n\r\n",), r"it answered 500 \(without a word\)"),
        ((HEAD, *[b" " * (1 << 20)] * 5), "does not end"),
    ],
)
def test_whatever_answers_is_told_in_a_few_words(pieces: tuple[bytes, ...], reason: str) -> None:
    with answering(*pieces) as at, pytest.raises(UnreachableError, match=reason) as caught:
        fetch(at, Query())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("pieces", [(), (HEAD, b"{")])
def test_an_answer_that_does_not_come_is_not_waited_for(pieces: tuple[bytes, ...]) -> None:
    with answering(*pieces, ends=False) as at, pytest.raises(UnreachableError, match=r"^no answer within 0\.3 s$"):
        fetch(at, Query(), timeout=0.3)
