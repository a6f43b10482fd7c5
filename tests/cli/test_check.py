"""`--check` prints the settings in force with their sources; likely mistakes are warned of."""

import contextlib
import re
from pathlib import Path

import pytest

from relay.cli import cli
from relay.system.settings import typos
from tests.support.process import run
from tests.support.program import Program, kept_environment

HOST = "127.84.0.1"
TOKEN = ".SFMyNTY.throw-away~token"


def check(*arguments: str, **variables: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return value and source by option, and the warnings."""
    done = run("--check", "--public-ip4-addr", HOST, *arguments, env=kept_environment() | variables)
    assert (done.returncode, done.stderr) == (0, "")
    rows = re.findall(r"^(--\S+) +(.+?) +(\S+)$", done.stdout, re.MULTILINE)
    return {option: (value, source) for option, value, source in rows}, re.findall(
        r"^Warning: (.*)", done.stdout, re.MULTILINE
    )


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef" * 4)
    path.chmod(0o600)
    return path


def test_each_setting_has_its_value_and_source(secret: Path) -> None:
    rows, warnings = check(
        *("--standalone", "--highest-port", "50000", "--allow-peer", "10.0.0.0/8,::1", "--allow-peer", "192.0.2.1"),
        *("--relay-secret-file", str(secret), "--control-endpoint", "localhost:9999"),
        RUST_LOG="info,portal=debug",
        LOWEST_PORT="49153",
    )
    assert warnings == []
    assert rows["--standalone"] == ("yes", "option")
    assert rows["--highest-port"] == ("50000", "option")
    assert rows["--lowest-port"] == ("49153", "LOWEST_PORT")
    assert rows["--log-filter"] == ("info,portal=debug", "RUST_LOG")
    assert rows["--allow-peer"] == ("10.0.0.0/8,::1/128,192.0.2.1/32", "option")
    assert rows["--control-endpoint"] == ("127.0.0.1:9999", "option")
    assert rows["--health-check-addr"] == ("0.0.0.0:8080", "default")
    assert rows["--max-allocations"] == ("848", "default")
    assert rows["--cpu-affinity"] == ("auto", "default")
    assert rows["--relay-secret-file"] == (str(secret), "option")


def test_a_token_is_shown_only_as_its_source(secret: Path) -> None:
    secret.write_text(TOKEN)
    url = {"FIREZONE_API_URL": "wss://portal.example"}
    assert check(FIREZONE_TOKEN=TOKEN, **url)[0]["--token-file"] == ("(hidden)", "FIREZONE_TOKEN")
    assert check(FIREZONE_TOKEN=str(secret), **url)[0]["--token-file"] == (str(secret), "FIREZONE_TOKEN")
    assert check("--token-file", str(secret), **url)[0]["--token-file"] == (str(secret), "option")


def test_invalid_settings_are_a_usage_error() -> None:
    done = run("--check", "--standalone", env=kept_environment())
    assert (done.returncode, done.stdout) == (2, "")


def test_a_short_secret_and_a_file_that_every_user_can_read_are_warned_of(secret: Path) -> None:
    secret.write_text("short")
    secret.chmod(0o644)
    arguments = ("--relay-secret-file", str(secret))
    _, warnings = check("--standalone", *arguments)
    assert warnings == [
        "the relay secret has under 16 characters: create a secret with openssl rand -hex 32",
        f"every user can read {secret}: run chmod o-r {secret}",
    ]
    with contextlib.closing(Program(*arguments)) as program:
        for warning in warnings:
            program.wait_for_log(warning)


def test_a_misspelled_variable_is_named() -> None:
    warning = "the relay does not read PUBLIC_IPV4_ADDR: rename it if PUBLIC_IP4_ADDR is meant"
    assert check("--standalone", PUBLIC_IPV4_ADDR=HOST)[1] == [warning]
    with contextlib.closing(Program(variables={"PUBLIC_IPV4_ADDR": HOST})) as program:
        program.wait_for_log(warning)


def test_an_error_for_a_missing_setting_names_the_misspelled_variable() -> None:
    done = run("--public-ip4-addr", HOST, env=kept_environment() | {"FIREZONE_TOKN": TOKEN})
    assert done.returncode == 2
    assert done.stderr.startswith("firezone-relay: no token: ")
    assert done.stderr.endswith("; the relay does not read FIREZONE_TOKN: rename it if FIREZONE_TOKEN is meant\n")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("FIREZONE_TOKENS", "FIREZONE_TOKEN"), ("FIREZONE_TOKEN_FILE", "FIREZONE_TOKEN")),
        *(("firezone_token", "FIREZONE_TOKEN"), ("FIREZONE_URL", "FIREZONE_API_URL"), ("LOGFORMAT", "LOG_FORMAT")),
        *(("RELAY_SECRET", "RELAY_SECRET_FILE"), ("OTEL_GRPC_ENDPOINT", "OTLP_GRPC_ENDPOINT")),
        *(("HEALTH_CHECK_ADDRESS", "HEALTH_CHECK_ADDR"), ("DRAIN_TIMOUT", "DRAIN_TIMEOUT")),
    ],
)
def test_similar_names_are_typos(name: str, meant: str) -> None:
    assert list(typos(cli, {name: "x"})) == [f"the relay does not read {name}: rename it if {meant} is meant"]


def test_variables_of_other_programs_are_no_typos() -> None:
    """From containers, systemd, Kubernetes, shells, the Rust relay and Firezone's other programs."""
    names = [
        *("PATH", "HOME", "USER", "SHELL", "TERM", "LANG", "HOSTNAME", "PWD", "TZ", "INVOCATION_ID", "JOURNAL_STREAM"),
        *("FTP_PROXY", "ALL_PROXY", "HTTP_PROXY", "no_proxy", "LOG_FILE", "LOG_LEVEL", "LOG_DIR", "PORT", "HOST", "NAME"),
        *("FIREZONE_ID", "FIREZONE_RELAY_PASSWORD", "FIREZONE_RELAY_SERVICE_HOST", "FIREZONE_RELAY_PORT_3478_UDP_ADDR"),
        *("FIREZONE_RELAY_SERVICE_PORT", "KUBERNETES_SERVICE_PORT_HTTPS", "KUBERNETES_PORT_443_TCP_ADDR", "NODE_NAME"),
        *("RELAY_PORT", "RELAY_HOST", "PUBLIC_URL", "EBPF_INT4_ADDR", "EBPF_INT6_ADDR", "NUM_WORKER_THREADS", "TELEMETRY"),
        *(
            "OTEL_METADATA_DISCOVERY_METHOD",
            "OTEL_SERVICE_NAME",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "RUST_BACKTRACE",
            "RUST_LOG",
        ),
        *(
            "WATCHDOG_USEC",
            "NOTIFY_SOCKET",
            "LISTEN_FDS",
            "LISTEN_PID",
            "CREDENTIALS_DIRECTORY",
            "LOGS_DIRECTORY",
            "API_URL",
        ),
    ]
    assert list(typos(cli, dict.fromkeys(names, "x"))) == []
