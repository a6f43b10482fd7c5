"""Draining a running relay: the command, the pages that show the drain, systemd, and the signals that end no relay."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.process import COMMAND, run
from tests.support.program import Program, ProgramStarter, kept_environment, program, start_program
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import PATIENCE, wait_until

__all__ = ["program", "start_program"]

CHANNEL = 0x4000
RELOADS = (signal.SIGHUP, signal.SIGUSR2)


def drain(program: Program, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run("drain", "--control-endpoint", program.control, *arguments)


def ask(program: Program, path: str, method: str = "GET") -> tuple[int, Any]:
    request = urllib.request.Request(f"http://{program.control}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310 - http
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@contextlib.contextmanager
def busy_client(program: Program) -> Iterator[TurnClient]:
    """A client that sends all the time, so that the drain does not end as idle."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.2):
            client.send(CHANNEL, b"on and on")

    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client, udp_socket("127.0.0.1") as peer:
        client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        sending = threading.Thread(target=send)
        sending.start()
        try:
            yield client
        finally:
            stop.set()
            sending.join()


def test_a_drain_is_shown_everywhere_and_can_be_changed_and_cancelled(program: Program) -> None:
    with busy_client(program):
        done = drain(program, "--timeout", "15m")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"draining for at most 1[45]m\d\ds, allocations left: 1\n", done.stdout)
        status, ready = ask(program, "/readyz")
        assert (status, ready["reasons"]) == (503, ["draining"])
        assert 600 < ready["drain"]["time_left"] <= 900
        assert ready["drain"]["allocations"] == 1
        shown = ask(program, "/status?limit=0")[1]
        assert (shown["not_ready"], shown["drain"]["allocations"]) == (["draining"], 1)
        assert 0 < shown["drain"]["until"] - shown["time"] <= 901
        assert "draining for at most 1" in run("top", "--once", "--control-endpoint", program.control).stdout
        assert re.search("at most (59m|1h)", drain(program, "--timeout", "1h").stdout)
        probe = run("probe", program.host, "--username", program.credential.username, "--password", "wrong")
        assert "draining" not in probe.stdout
        probe = run(
            "probe", program.host, *("--username", program.credential.username), *("--password", program.credential.password)
        )
        assert "508 Insufficient capacity: draining" in probe.stdout
        done = drain(program, "--cancel")
        assert (done.returncode, done.stdout) == (0, "the relay is not draining\n")
        assert ask(program, "/readyz")[0] == 200
        assert ask(program, "/drain")[1]["drain"] is None
    assert program.stop() == 0


@contextlib.contextmanager
def waiting(program: Program) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """A drain that waits, and its output."""
    command = [*COMMAND, "drain", "--control-endpoint", program.control, "--timeout", "1h", "--wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept_environment()) as process:
        assert process.stdout is not None
        yield process, process.stdout


def test_wait_returns_when_the_relay_has_ended(program: Program) -> None:
    with busy_client(program) as client, waiting(program) as (process, out):
        assert out.readline().endswith("allocations left: 1\n")
        assert client.refresh(0) is None
        assert program.wait() == 0
        assert out.read() == "the relay has ended\n"
        assert process.wait(PATIENCE) == 0


def test_wait_fails_if_the_drain_is_cancelled(program: Program) -> None:
    with busy_client(program), waiting(program) as (process, out):
        out.readline()
        assert drain(program, "--cancel").returncode == 0
        assert process.wait(PATIENCE) == 1
        assert out.read() == "the relay is not draining\n"


def test_a_relay_without_allocations_ends_at_once(program: Program) -> None:
    assert drain(program, "--timeout", "1h", "--wait").returncode == 0
    assert program.wait() == 0
    assert "no allocation is left" in program.log


def test_without_a_time_the_drain_timeout_of_the_relay_applies(start_program: ProgramStarter) -> None:
    started = start_program("--drain-timeout", "20m", "--allow-peer", "127.0.0.0/8")
    with busy_client(started):
        assert re.search("at most (19m|20m)", drain(started).stdout)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/drain", 400, "no timeout"),
        ("/drain?timeout=soon", 400, "'soon' is not a valid duration"),
        ("/drain?time=5m", 400, "the only parameter is timeout"),
        ("/drain/cancel", 409, "not draining"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(program: Program, path: str, status: int, words: str) -> None:
    answer, body = ask(program, path, "POST")
    assert answer == status
    assert words in body["error"]
    assert ask(program, "/readyz")[0] == 200


def test_a_drain_by_sigterm_can_not_be_cancelled(start_program: ProgramStarter) -> None:
    started = start_program("--drain-timeout", "1h", "--allow-peer", "127.0.0.0/8")
    with busy_client(started):
        started.process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(started, "/readyz")[0] == 503)
        refused = drain(started, "--cancel")
        assert refused.returncode == 1
        assert "SIGTERM" in refused.stderr
        assert re.search("at most (29m|30m)", drain(started, "--timeout", "30m").stdout)
    assert started.stop() == 0


@pytest.mark.parametrize("arguments", [("--cancel", "--wait"), ("--cancel", "--timeout", "5m"), ("--timeout", "soon")])
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, ...]) -> None:
    done = run("drain", *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_without_a_relay_the_command_fails() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host, port = unused.getsockname()
        done = run("drain", "--control-endpoint", f"{host}:{port}", "--timeout", "5m")
    assert done.returncode == 1
    assert "is the relay running" in done.stderr


def test_systemd_shows_the_drain(start_program: ProgramStarter, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        started = start_program("--allow-peer", "127.0.0.0/8", variables={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert b"STATUS=answering clients" in systemd.recv(4096)
        with busy_client(started):
            drain(started, "--timeout", "15m")
            shown = systemd.recv(4096)
            assert shown.startswith(b"STATUS=draining until 20")
            assert shown.endswith(b"allocations left: 1")
            drain(started, "--cancel")
            while (shown := systemd.recv(4096)).startswith(b"STATUS=draining"):
                pass
            assert shown == b"STATUS=answering clients"


def test_reload_signals_end_no_relay_and_are_explained(start_program: ProgramStarter) -> None:
    started = start_program("--drain-timeout", "1h", "--allow-peer", "127.0.0.0/8")
    with busy_client(started) as client:
        for number in RELOADS:
            started.process.send_signal(number)
        started.wait_for_log("signal=SIGUSR2")
        started.process.send_signal(signal.SIGTERM)
        started.wait_for_log("draining")
        for number in RELOADS:
            started.process.send_signal(number)
        wait_until(lambda: started.log.count("signal ignored") == 4)
        assert client.refresh(600) is None
    lines = [line for line in started.log.splitlines() if "signal ignored" in line]
    assert all("restart" in line and "/log_filter" in line for line in lines)
    assert started.stop() == 0


@pytest.mark.parametrize("number", RELOADS)
def test_reload_signals_during_the_start_do_not_end_the_relay(number: signal.Signals) -> None:
    """The interpreter's own start takes some milliseconds, in which nobody can block signals."""
    code = (
        "import os, signal, sys; from relay import __main__ as m; signals = m.signals; block = signals.block\n"
        f"def blocked(): block(); signals.block = block; os.kill(os.getpid(), {int(number)})\n"
        "signals.block = blocked; m.main()"
    )
    started = Program(command=(sys.executable, "-c", code))
    try:
        started.wait_until_ready()
        started.wait_for_log(f"signal={number.name}")
        assert started.stop() == 0
    finally:
        started.close()
