import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from relay.core.addresses import Family
from tests.support.process import run
from tests.support.program import kept_environment
from tests.support.shell import SECRET, Shell

Command = Callable[..., Result]

QUICK = ("--count", 5, "--rate", 500, "--timeout", 30)
KEYS = {
    "target", "server", "ok", "failed_step", "advice", "mapped_address", "binding_rtt_ms", "realm", "software",
    "lifetime_s", "relayed_addresses", "address_errors", "packets", "path_mtu", "steps",
}  # fmt: skip


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"  {SECRET.expose()}\n\n")
    return path


def test_a_working_relay_prints_a_line_for_each_step(command: Command, secret_file: Path) -> None:
    with Shell([Family.IPV4]) as shell:
        result = command(f"127.0.0.1:{shell.port}", "--relay-secret-file", secret_file, *QUICK)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"Probe of 127.0.0.1:{shell.port}/udp"
    assert [line.split("  ")[0] for line in lines[1:-1]] == [
        "Binding", "Challenge", "Allocate", "ChannelBind IPv4", "Peer path IPv4", "Packets IPv4", "Path MTU IPv4", "Refresh",
    ]  # fmt: skip
    assert lines[-1] == "All steps succeeded."
    assert "to peer 5/5, to client 5/5, round trip 5/5" in result.stdout
    assert result.stderr == ""


def test_a_name_is_resolved(command: Command) -> None:
    with Shell([Family.IPV4]) as shell:
        result = command(f"localhost:{shell.port}", *QUICK)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Probe of localhost:{shell.port}/udp at 127.0.0.1:{shell.port}\n")
    assert result.stdout.endswith("Nothing failed, but steps were skipped.\n")


def test_a_wrong_password_fails_at_allocate_and_is_not_printed(command: Command) -> None:
    password = {"FIREZONE_RELAY_PASSWORD": "hush-hush"}
    with Shell([Family.IPV4]) as shell:
        result = command(f"127.0.0.1:{shell.port}", "--username", f"{int(time.time()) + 600}:x", *QUICK, env=password)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("Failed: Allocate: ")
    assert "credentials" in result.stdout.splitlines()[-1]
    assert "hush" not in result.output


def test_a_stun_uri_is_tested_with_binding_only(command: Command) -> None:
    with Shell([Family.IPV4]) as shell:
        result = command(f"stun:127.0.0.1:{shell.port}", *QUICK)
    assert result.exit_code == 0
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:]] == ["Binding", "All steps succeeded."]


def test_the_secret_file_in_the_environment_is_used_unless_a_username_is_given(command: Command, secret_file: Path) -> None:
    environment = {"RELAY_SECRET_FILE": str(secret_file)}
    with Shell([Family.IPV4]) as shell:
        target = f"turn:127.0.0.1:{shell.port}?transport=udp"
        assert command(target, *QUICK, "--size", 1300, env=environment).exit_code == 0
        result = command(target, "--username", f"{int(time.time()) + 600}:x", "--password", "x", *QUICK, env=environment)
    assert "answered with 401" in result.stdout


def test_a_missing_server_fails_within_the_timeout(command: Command, silent_port: int) -> None:
    started = time.monotonic()
    result = command(f"127.0.0.1:{silent_port}", "--timeout", 0.3)
    assert time.monotonic() - started < 30
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("Failed: Binding: no response")


def test_json_always_has_the_same_fields(command: Command, secret_file: Path, silent_port: int) -> None:
    with Shell([Family.IPV4]) as shell:
        good = command(f"127.0.0.1:{shell.port}", "--json", "--relay-secret-file", secret_file, *QUICK)
    bad = command(f"127.0.0.1:{silent_port}", "--json", "--timeout", 0.2)
    assert (good.exit_code, bad.exit_code) == (0, 1)
    found, failed = json.loads(good.stdout), json.loads(bad.stdout)
    assert set(found) == set(failed) == KEYS
    assert (found["ok"], found["failed_step"], found["realm"], found["lifetime_s"]) == (True, None, "firezone", 600)
    assert found["address_errors"] == {"ipv4": None, "ipv6": 440}
    assert found["relayed_addresses"]["ipv4"].startswith("127.0.0.1:")
    packets = found["packets"]["ipv4"]
    assert packets["mode"] == "peer"
    for way in ("to_peer", "to_client", "round_trip"):
        assert packets[way] == {"sent": 5, "received": 5, "lost": 0}
    rtts = packets["rtt_ms"]
    assert list(rtts) == ["min", "p50", "p90", "p99", "max"]
    assert 0 < rtts["min"] <= rtts["p50"] <= rtts["p90"] <= rtts["p99"] <= rtts["max"] < 10_000
    assert found["packets"]["ipv6"] is None
    assert (failed["ok"], failed["failed_step"], failed["server"]) == (False, "binding", None)
    assert failed["advice"]
    fields = {"step", "family", "outcome", "detail", "advice", "code"}
    assert all(set(step) == fields for step in found["steps"] + failed["steps"])


def test_an_absent_credential_ignores_a_password_in_the_environment(command: Command, secret_file: Path) -> None:
    with Shell([Family.IPV4]) as shell:
        for more in ((), ("--relay-secret-file", secret_file)):
            result = command(f"127.0.0.1:{shell.port}", *more, *QUICK, env={"FIREZONE_RELAY_PASSWORD": "x"})
            assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no-such-name.invalid",), "unknown"),
        (("127.0.0.1:nan",), "port"),
        (("127.0.0.1", "--username", "a"), "--password"),
        (("127.0.0.1", "--username", "", "--password", "p"), "username"),
        (("127.0.0.1", "--username", "a" * 509, "--password", "p"), "508"),
        (("127.0.0.1", "--username", "\udcff", "--password", "p"), "UTF-8"),
        (("127.0.0.1", "--password", "a"), "--username"),
        (("127.0.0.1", "--username", "a", "--password", "b", "--relay-secret-file", "x"), "use one kind of credential"),
        (("127.0.0.1", "--password", "b", "--relay-secret-file", "x"), "use one kind of credential"),
        (("127.0.0.1", "--relay-secret-file", "/no/such/file"), "/no/such/file"),
        (("127.0.0.1", "--relay-secret-file", os.devnull), "not a regular file"),
        (("127.0.0.1", "--relay-secret-file", "/"), "not a regular file"),
        (("127.0.0.1", "--count", "0"), "--count"),
        (("127.0.0.1", "--rate", "0"), "--rate"),
        (("127.0.0.1", "--timeout", "0"), "--timeout"),
        (("127.0.0.1", "--size", "20"), "--size"),
        (("127.0.0.1", "--max-loss", "101"), "--max-loss"),
        (("turns:127.0.0.1",), "turn:HOST:PORT"),
        ((), "HOST"),
    ],
)
def test_a_usage_error_exits_with_2_and_the_problem(command: Command, arguments: tuple[str, ...], words: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_a_secret_that_is_not_utf_8_is_a_usage_error(command: Command, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    result = command("127.0.0.1", "--relay-secret-file", tmp_path / "binary")
    assert result.exit_code == 2
    assert "is not UTF-8 text" in result.stderr


def test_help_has_an_example(command: Command) -> None:
    result = command("--help")
    assert result.exit_code == 0
    assert "probe relay.example.com --relay-secret-file" in result.stdout


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_colours_unless_no_color_is_set(no_color: str, silent_port: int) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as screen:
        done = run(
            "probe",
            f"127.0.0.1:{silent_port}",
            "--timeout",
            "0.1",
            env=kept_environment() | {"NO_COLOR": no_color},
            stdout=screen.fileno(),
        )
    assert done.returncode == 1
    assert ("\x1b[31m" in os.read(ours, 4096).decode()) is (no_color == "")
    os.close(ours)
