"""A usage error is a line with the fix, and exit code 2."""

import sys
from pathlib import Path

import pytest

from relay import __version__
from tests.support.command_line import run

HOST = "127.81.0.1"
PUBLIC = ("--public-ip4-addr", HOST)
MEMBER = (*PUBLIC, "--api-url", "wss://portal.example")
STANDALONE = ("--standalone", *PUBLIC, "--health-check-addr", f"{HOST}:0", "--control-endpoint", f"{HOST}:0")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("FIREZONE_TOKEN", "FIREZONE_NAME", "FIREZONE_API_URL", "DRAIN_TIMEOUT", "RELAY_SECRET_FILE", "SSL_CERT_FILE"),
        *("PUBLIC_IP4_ADDR", "PUBLIC_IP6_ADDR", "LOWEST_PORT", "HIGHEST_PORT", "CPU_AFFINITY", "SWITCH_INTERVAL"),
        *("UNAUTHENTICATED_RATE", "UNAUTHENTICATED_BURST", "MAX_ALLOCATIONS"),
        *("MAX_ALLOCATIONS_PER_ADDRESS", "MAX_CHANNELS_PER_ALLOCATION", "MAX_CHANNELS"),
        *("OTLP_GRPC_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"),
        *("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"),
    ):
        monkeypatch.delenv(name, raising=False)


def usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the line of a usage error."""
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("firezone-relay: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no token: create one in the console of a self-hosted Firezone portal"),
        ((*PUBLIC, "--token-file", "/nowhere"), "set FIREZONE_API_URL to your own portal, such as wss://"),
        (("--standalone", *PUBLIC, "--listen-port", "3479"), "clients drop packets from any port but 3478"),
        (("--standalone", *PUBLIC, "--token-file", "/etc/hostname"), "use one of them"),
        ((*MEMBER, "--token-file", "/nowhere"), "can't read the token from /nowhere: No such file"),
        ((*MEMBER, "--token-file", "/dev/null"), "not a regular file"),
        ((*PUBLIC, "--api-url", "ftp://portal.example"), "begin with wss://"),
        ((*PUBLIC, "--api-url", "wss://"), "names no host"),
        (("--standalone", *PUBLIC, "--drain-timeout", "-1"), "'-1' is not a valid duration: use 90s, 15m, 12h, 1d or 2w"),
        (("--standalone", *PUBLIC, "--unauthenticated-rate", "-1"), "-1 is not in the range 0<=x<=1000000"),
        (("--standalone", *PUBLIC, "--unauthenticated-burst", "0"), "0 is not in the range 1<=x<=1000000"),
        (("--standalone", *PUBLIC, "--max-allocations-per-address", "0"), "0 is not in the range x>=1"),
        (("--standalone", *PUBLIC, "--max-channels-per-allocation", "0"), "0 is not in the range 1<=x<=16384"),
        (("--standalone", *PUBLIC, "--otlp-grpc-endpoint", "collector"), "use 127.0.0.1:4317 or https://"),
        (("--standalone", *PUBLIC, "--otlp-grpc-endpoint", "https://user:password@host:1"), "not a valid collector address"),
        (("--standalone", *PUBLIC, "--otlp-grpc-endpoint", "127.0.0.1:65536"), "not a valid collector address"),
        (("--standalone", *PUBLIC, "--health-check-addr", "127.0.0.1:8_080"), "is not an address and port"),
        (
            ("--standalone", *PUBLIC, "--log-filter", "loud"),
            "'loud' is not a level: use one of trace, debug, info, warn",
        ),
        (("--standalone", *PUBLIC, "--log-filter", "relay[x]=info"), "'relay[x]' is not a target: write relay.core=debug"),
        (("--standalone", *PUBLIC, "--log-filter", ","), "no directive is given"),
        (("--standalone",), "no public address: use --public-ip4-addr, --public-ip6-addr or"),
        (("--standalone", "--listen-address-discovery-method", "aws"), "is not one of 'gce_metadata', 'aws_ec2_metadata'"),
        (("--standalone", *PUBLIC, "--control-hostname", "http://a"), "'http://a' is not a valid hostname"),
        (("--standalone", *PUBLIC, "--control-hostname", "a, b:9999"), "'b:9999' is not a valid hostname"),
        (("--standalone", "--public-ip4-addr", "2001:db8::1"), "'2001:db8::1' is not an IPv4 address: use 203.0.113.7"),
        (("--standalone", "--public-ip6-addr", "192.0.2.1"), "'192.0.2.1' is not an IPv6 address: use 2001:db8::7"),
        (("--standalone", "--public-ip4-addr", "relay.example"), "is not an IPv4 address"),
        (("--standalone", "--public-ip4-addr", "0.0.0.0"), "is the unspecified address"),
        (("--standalone", "--public-ip6-addr", "::"), "is the unspecified address"),
        (("--standalone", "--public-ip4-addr", "224.0.0.1"), "is a multicast address"),
        (("--standalone", "--public-ip6-addr", "ff02::1"), "is a multicast address"),
        (("--standalone", "--public-ip4-addr", "255.255.255.255"), "is the broadcast address"),
        (("--standalone", "--public-ip4-addr", "0.1.2.3"), "is an address of no host"),
        (("--standalone", "--public-ip6-addr", "::ffff:192.0.2.1"), "is an IPv4-mapped address"),
        (("--standalone", "--public-ip6-addr", "fe80::1%eth0"), "is link-local"),
        (("--standalone", "--public-ip6-addr", "2001:db8::1%lo"), "is link-local"),
        (("--standalone", *PUBLIC, "--health-check-addr", "0.0.0.0:9999"), "overlap: use different ports"),
        (("--standalone", *PUBLIC, "--metrics-addr", "0.0.0.0:8080"), "--metrics-addr 0.0.0.0:8080 overlap"),
        (("--standalone", *PUBLIC, "--relay-secret-file", "/dev/zero"), "not a regular file"),
        (("--standalone", *PUBLIC, "--bind-ip6-addr", "::1"), "has no effect without --public-ip6-addr"),
        (("--standalone", *PUBLIC, "--lowest-port", "50000", "--highest-port", "49999"), "swap them"),
        (("--standalone", *PUBLIC, "--lowest-port", "1023"), "is reserved for services: use 1024 or higher"),
        (("--standalone", *PUBLIC, "--lowest-port", "3000", "--highest-port", "4000"), "include 3478"),
        (("--standalone", *PUBLIC, "--highest-port", "65536"), "is not in the range"),
        (("--standalone", *PUBLIC, "--allow-peer", "10.0.0.1/8"), "has host bits set"),
        (("--standalone", *PUBLIC, "--deny-peer", "everything"), "use 10.0.0.0/8"),
        (("--standalone", *PUBLIC, "--health-check-addr", "8080"), "use 127.0.0.1:8080"),
        (("--standalone", *PUBLIC, "--health-check-addr", "1.2.3.4:65536"), "use 127.0.0.1:8080"),
        (("--standalone", *PUBLIC, "--cpu-affinity", "-1"), "is not a CPU: use auto, off or a CPU number"),
        (("--standalone", *PUBLIC, "--cpu-affinity", "0,1"), "is not a CPU: use auto, off or a CPU number"),
        (("--standalone", *PUBLIC, "--cpu-affinity", ""), "is not a CPU: use auto, off or a CPU number"),
        (("--standalone", *PUBLIC, "--cpu-affinity", "1000000"), "is not a CPU: use auto, off or a CPU number"),
        (("--standalone", *PUBLIC, "--switch-interval", "0"), "use 0.0001 to 10 seconds, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "0.00009"), "use 0.0001 to 10 seconds, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "10.1"), "use 0.0001 to 10 seconds, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "nan"), "use 0.0001 to 10 seconds, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "5ms"), "use 0.0001 to 10 seconds, or off"),
        (("--standalone", *PUBLIC, "--log-format", "xml"), "is not one of 'human', 'json'"),
        (("--standalone", *PUBLIC, "--max-allocations", "0"), "is not in the range"),
        (("--standalone", *PUBLIC, "--relay-secret-file", "/nowhere"), "can't read the relay secret from /nowhere"),
        (("--port", "3479"), "No such option '--port'"),
        (("dance",), "unexpected argument: see --help"),
        (("credentials",), "Missing option '--relay-secret-file'"),
        (("credentials", "--relay-secret-file", "/nowhere"), "No such file"),
        (("credentials", "--relay-secret-file", "x", "--ttl", "soon"), "use 90s, 15m, 12h, 1d or 2w"),
        (("credentials", "--relay-secret-file", "x", "--ttl", "0"), "use 90s, 15m, 12h, 1d or 2w"),
    ],
)
def test_a_usage_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in usage_error(monkeypatch, capsys, *arguments)


def test_an_invalid_variable_is_an_error_that_names_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PUBLIC_IP4_ADDR", "nonsense")
    assert "--public-ip4-addr" in usage_error(monkeypatch, capsys, "--standalone")


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PUBLIC_IP6_ADDR", "")
    assert "no public address" in usage_error(monkeypatch, capsys, "--standalone")


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8 text")])
def test_a_secret_file_without_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    assert says in usage_error(monkeypatch, capsys, *STANDALONE, "--relay-secret-file", str(path))


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """A token in the environment."""
    monkeypatch.setenv("FIREZONE_TOKEN", "very-secret-token")
    return "very-secret-token"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("caf\u00e9", "no token has"),
        ("a\0b", "no token has"),
    ],
)
def test_a_token_file_without_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    assert says in usage_error(monkeypatch, capsys, *MEMBER, "--token-file", str(path))
    monkeypatch.setenv("FIREZONE_TOKEN", str(path))
    assert says in usage_error(monkeypatch, capsys, *MEMBER)


def test_the_error_for_an_invalid_token_does_not_contain_the_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FIREZONE_TOKEN", "very-secret\x7ftoken")
    line = usage_error(monkeypatch, capsys, *MEMBER)
    assert "FIREZONE_TOKEN has no valid token" in line
    assert "very-secret" not in line


def test_a_token_with_a_slash_must_be_a_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FIREZONE_TOKEN", "/run/secrets/nowhere")
    assert "can't read the token from /run/secrets/nowhere" in usage_error(monkeypatch, capsys, *MEMBER)


@pytest.mark.usefixtures("token")
def test_a_secret_file_requires_standalone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    path.write_text("s")
    assert "requires --standalone" in usage_error(monkeypatch, capsys, *MEMBER, "--relay-secret-file", str(path))


@pytest.mark.usefixtures("token")
def test_the_error_for_a_url_with_a_password_does_not_contain_the_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = usage_error(monkeypatch, capsys, *PUBLIC, "--api-url", "wss://user:hunter2@portal.example")
    assert "has a user or a password in it" in line
    assert "hunter2" not in line


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    "proxy", ["socks5://user:hunter2@proxy.example:1080", "http://user:hunter2@:80", "http://user:hunter2@h:port"]
)
def test_the_error_for_an_invalid_proxy_does_not_contain_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    line = usage_error(monkeypatch, capsys, *MEMBER)
    assert "HTTPS_PROXY" in line
    assert "hunter2" not in line


def test_non_linux_systems_are_rejected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "runs only on Linux" in usage_error(monkeypatch, capsys, *STANDALONE)


def test_help_names_each_environment_variable_and_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    for text in (
        *("PUBLIC_IP4_ADDR", "PUBLIC_IP6_ADDR", "BIND_IP4_ADDR", "BIND_IP6_ADDR", "LOWEST_PORT", "HIGHEST_PORT"),
        *("HEALTH_CHECK_ADDR", "CONTROL_ENDPOINT", "LOG_FORMAT", "RNG_SEED", "ALLOW_PEER", "DENY_PEER", "MAX_ALLOCATIONS"),
        *("49152", "65535", "0.0.0.0:8080", "127.0.0.1:9999", "human"),
        *("FIREZONE_TOKEN", "FIREZONE_NAME", "FIREZONE_API_URL", "DRAIN_TIMEOUT", "RUST_LOG", "LISTEN_PORT"),
        *("CPU_AFFINITY", "auto", "SWITCH_INTERVAL", "0.5"),
        *("--ebpf-offloading", "EBPF_OFFLOADING", "--ebpf-attach-mode", "EBPF_ATTACH_MODE", "[driver|generic|auto]"),
    ):
        assert text in said
    # Every user of the machine could read the token in the command line.
    assert "--token " not in said


def test_the_version_matches_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"
