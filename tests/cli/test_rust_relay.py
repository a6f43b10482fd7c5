"""The program in place of the Rust relay: variables, options, and tokens in the command line."""

import contextlib
import json
import re
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support.process import run
from tests.support.program import Program, kept_environment
from tests.support.scripted_portal import ScriptedPortal

HOST = "127.83.0.1"
TOKEN = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_throw.away~token"
MEANINGLESS = {
    "EBPF_INT4_ADDR": "192.0.2.1",
    "EBPF_INT6_ADDR": "2001:db8::1",
    "NUM_WORKER_THREADS": "2",
    "OTEL_METADATA_DISCOVERY_METHOD": "gce_metadata",
    "RUST_BACKTRACE": "1",
    "TELEMETRY": "true",
}


@pytest.fixture
def portal() -> Iterator[ScriptedPortal]:
    with ScriptedPortal() as portal:
        yield portal


@contextlib.contextmanager
def member(portal: ScriptedPortal, **variables: str) -> Iterator[Program]:
    """Start a relay that joins the portal, and check its exit code at the end."""
    variables = {"FIREZONE_TOKEN": TOKEN, "FIREZONE_API_URL": portal.url} | variables
    with contextlib.closing(Program(network=variables)) as program:
        program.wait_until_ready()
        yield program
        assert program.stop() == 0


def refusal(*arguments: str, **variables: str) -> str:
    """Start the program with invalid settings, and return the error line."""
    environment = kept_environment() | {"PUBLIC_IP4_ADDR": HOST} | variables
    done = run(*arguments, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_a_token_that_a_console_has_wrapped_is_sent_whole(portal: ScriptedPortal) -> None:
    with member(portal, FIREZONE_TOKEN=f"{TOKEN[:20]}\n  {TOKEN[20:]} "):
        assert portal.wait_until_joined().headers["X-Authorization"] == f"Bearer {TOKEN}"


def test_variables_without_a_meaning_here_are_named_in_one_line(portal: ScriptedPortal) -> None:
    with member(portal, **MEANINGLESS, LOG_FORMAT="json") as program:
        lines = [line for line in program.log.splitlines() if "NUM_WORKER_THREADS" in line]
    (line,) = map(json.loads, lines)
    assert (line["level"], sorted(line["variables"])) == ("info", sorted(MEANINGLESS))


def test_no_such_line_without_such_variables(portal: ScriptedPortal) -> None:
    with member(portal, RUST_BACKTRACE="") as program:
        assert "no effect" not in program.log


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({"RUST_LOG": "warn,relay=debug"}, "warn,relay=debug"),
        ({"RUST_LOG": "debug,str0m::ice=warn"}, "debug,str0m.ice=warn"),
        ({"RUST_LOG": "debug", "LOG_FILTER": "info"}, "info"),
        ({"RUST_LOG": "debug", "LOG_FILTER": ""}, "debug"),
        ({"RUST_LOG": ""}, "info"),
    ],
)
def test_rust_log_is_the_filter_unless_there_is_a_log_filter(variables: dict[str, str], level: str) -> None:
    with contextlib.closing(Program(variables=variables | {"LOG_FORMAT": "json"})) as program:
        program.wait_until_ready()
        control = json.loads(next(line for line in program.log.splitlines() if '"ready"' in line))["control"]
        with urllib.request.urlopen(f"http://{control}/log_filter", timeout=30) as answer:
            assert json.load(answer) == {"directives": level}


def test_addresses_have_the_names_of_the_rust_relay() -> None:
    options = ("--health-check-addr", f"{HOST}:0", "--control-endpoint", f"{HOST}:0")
    with contextlib.closing(Program(*options)) as program:
        program.wait_until_ready()
        assert len(re.findall(rf"(?:health|control)={re.escape(HOST)}:[1-9]\d*", program.log)) == 2


def test_the_old_names_of_the_addresses_are_gone() -> None:
    for name in ("--health-address", "--control-address"):
        assert f"No such option '{name}'" in refusal("--standalone", name, f"{HOST}:0")


@pytest.mark.parametrize("port", ["3479", "0", "53", "03478", "3478.5", "many"])
def test_another_port_for_clients_is_refused_with_the_reason(port: str) -> None:
    line = refusal("--standalone", LISTEN_PORT=port)
    assert "LISTEN_PORT" in line
    assert "clients drop packets from any port but 3478" in line
    assert "a second relay on this machine its own address" in line


def test_the_port_that_clients_expect_is_accepted(portal: ScriptedPortal) -> None:
    with member(portal, LISTEN_PORT="3478") as program:
        assert f"{program.host}:3478" in program.log
        assert portal.wait_until_joined().query["port"] == "3478"


@pytest.mark.parametrize(
    "arguments",
    [
        (TOKEN,),
        (TOKEN, "frankfurt-1"),
        ("--standalone", TOKEN),
        ("--token", TOKEN),
        (f"--token={TOKEN}",),
        (f"--firezone-token={TOKEN}",),
        ("--firezone-token", TOKEN),
        ("-t", TOKEN),
        (f"-t{TOKEN}",),
        ("--token-file", TOKEN),
        (f"--token-file={TOKEN}",),
        ("credentials", "--relay-secret-file", "/etc/hostname", TOKEN),
        ("credentials", "--relay-secret-file", TOKEN),
        ("healthcheck", TOKEN),
        ("probe", HOST, TOKEN),
        ("top", TOKEN),
    ],
    ids=lambda arguments: " ".join(arguments).replace(TOKEN, "TOKEN"),
)
def test_a_token_in_the_arguments_is_refused_without_being_shown(arguments: tuple[str, ...]) -> None:
    line = refusal(*arguments, FIREZONE_API_URL="wss://portal.example")
    assert "throw" not in line
    assert "SFM" not in line


@pytest.mark.parametrize("arguments", [(TOKEN,), ("--token", TOKEN), (f"--firezone-token={TOKEN}",)])
def test_the_line_about_a_token_in_the_arguments_says_where_a_token_belongs(arguments: tuple[str, ...]) -> None:
    assert "FIREZONE_TOKEN" in refusal(*arguments)


def test_a_token_without_a_url_is_sent_to_nobody() -> None:
    assert refusal(FIREZONE_TOKEN=TOKEN) == (
        "firezone-relay: no portal URL: set FIREZONE_API_URL to your own portal, such as wss://api.example.com"
    )


def test_the_line_about_a_missing_token_says_how_to_get_a_token() -> None:
    assert "Portal.Authentication.create_relay_token" in refusal(FIREZONE_API_URL="wss://portal.example")
