"""Whatever the user can mend is said in one line, with what to do, and exit code 2."""

import sys
from pathlib import Path

import pytest

from relay import __version__
from relay.cli import main

HOST = "127.81.0.1"
PUBLIC = ("--public-ip4-addr", HOST)
STANDALONE = ("--standalone", *PUBLIC, "--health-address", f"{HOST}:0", "--control-address", f"{HOST}:0")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("FIREZONE_TOKEN", "FIREZONE_NAME", "FIREZONE_API_URL", "DRAIN_TIMEOUT", "RELAY_SECRET_FILE", "SSL_CERT_FILE"),
        *("PUBLIC_IP4_ADDR", "PUBLIC_IP6_ADDR", "LOWEST_PORT", "HIGHEST_PORT", "CPU_AFFINITY", "SWITCH_INTERVAL"),
        *("UNAUTHENTICATED_RATE", "UNAUTHENTICATED_BURST", "MAX_ALLOCATIONS"),
        *("MAX_ALLOCATIONS_PER_ADDRESS", "MAX_CHANNELS_PER_ALLOCATION"),
        *("OTLP_GRPC_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"),
        *("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"),
    ):
        monkeypatch.delenv(name, raising=False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Give the exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["firezone-relay", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Give the one line with which a command line is refused."""
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("firezone-relay: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no token: make one for a relay in the Firezone portal and set it as FIREZONE_TOKEN, or give --standalone"),
        (("--standalone", *PUBLIC, "--token-file", "/etc/hostname"), "give one of the two"),
        ((*PUBLIC, "--token-file", "/nowhere"), "can't read the token from /nowhere: No such file"),
        ((*PUBLIC, "--token-file", "/dev/null"), "is no regular file"),
        ((*PUBLIC, "--api-url", "ftp://portal.example"), "begin with wss://"),
        ((*PUBLIC, "--api-url", "wss://"), "names no host"),
        (("--standalone", *PUBLIC, "--drain-timeout", "-1"), "is no duration"),
        (("--standalone", *PUBLIC, "--unauthenticated-rate", "-1"), "-1 is not in the range 0<=x<=1000000"),
        (("--standalone", *PUBLIC, "--unauthenticated-burst", "0"), "0 is not in the range 1<=x<=1000000"),
        (("--standalone", *PUBLIC, "--max-allocations-per-address", "0"), "0 is not in the range x>=1"),
        (("--standalone", *PUBLIC, "--max-channels-per-allocation", "0"), "0 is not in the range 1<=x<=16384"),
        (("--standalone", *PUBLIC, "--otlp-grpc-endpoint", "collector"), "write 127.0.0.1:4317 or https://"),
        (("--standalone", *PUBLIC, "--otlp-grpc-endpoint", "https://user:password@host:1"), "no address of a collector"),
        (("--standalone", *PUBLIC, "--otlp-grpc-endpoint", "127.0.0.1:65536"), "no address of a collector"),
        (("--standalone", *PUBLIC, "--health-address", "127.0.0.1:8_080"), "no address with a port"),
        (
            ("--standalone", *PUBLIC, "--log-filter", "loud"),
            "'loud' is no level: one of trace, debug, info, warn",
        ),
        (("--standalone", *PUBLIC, "--log-filter", "relay[x]=info"), "'relay[x]' is no target: write relay.core=debug"),
        (("--standalone", *PUBLIC, "--log-filter", ","), "no directive is given"),
        (("--standalone",), "no public address: give --public-ip4-addr or --public-ip6-addr"),
        (("--standalone", "--listen-address-discovery-method", "aws"), "is not one of 'gce_metadata', 'aws_ec2_metadata'"),
        (("--standalone", *PUBLIC, "--control-hostname", "http://a"), "'http://a' is no name of a host"),
        (("--standalone", *PUBLIC, "--control-hostname", "a, b:9999"), "'b:9999' is no name of a host"),
        (("--standalone", "--public-ip4-addr", "2001:db8::1"), "is an IPv6 address: give an IPv4 address"),
        (("--standalone", "--public-ip6-addr", "192.0.2.1"), "is an IPv4 address: give an IPv6 address"),
        (("--standalone", "--public-ip4-addr", "relay.example"), "is no IP address"),
        (("--standalone", "--public-ip4-addr", "0.0.0.0"), "is the unspecified address"),
        (("--standalone", "--public-ip6-addr", "::"), "is the unspecified address"),
        (("--standalone", "--public-ip4-addr", "224.0.0.1"), "is a multicast address"),
        (("--standalone", "--public-ip6-addr", "ff02::1"), "is a multicast address"),
        (("--standalone", "--public-ip4-addr", "255.255.255.255"), "is the broadcast address"),
        (("--standalone", "--public-ip4-addr", "0.1.2.3"), "is an address of no host"),
        (("--standalone", "--public-ip6-addr", "::ffff:192.0.2.1"), "is an IPv4 address in disguise"),
        (("--standalone", "--public-ip6-addr", "fe80::1%eth0"), "is link-local"),
        (("--standalone", "--public-ip6-addr", "2001:db8::1%lo"), "is link-local"),
        (("--standalone", *PUBLIC, "--health-address", "0.0.0.0:9999"), "are the same: give one another port"),
        (("--standalone", *PUBLIC, "--relay-secret-file", "/dev/zero"), "is no regular file"),
        (("--standalone", *PUBLIC, "--bind-ip6-addr", "::1"), "does nothing without --public-ip6-addr"),
        (("--standalone", *PUBLIC, "--lowest-port", "50000", "--highest-port", "49999"), "swap them"),
        (("--standalone", *PUBLIC, "--lowest-port", "1023"), "is below 1024"),
        (("--standalone", *PUBLIC, "--lowest-port", "3000", "--highest-port", "4000"), "enclose 3478"),
        (("--standalone", *PUBLIC, "--highest-port", "65536"), "is not in the range"),
        (("--standalone", *PUBLIC, "--allow-peer", "10.0.0.1/8"), "has host bits set"),
        (("--standalone", *PUBLIC, "--deny-peer", "everything"), "is no network: write 10.0.0.0/8"),
        (("--standalone", *PUBLIC, "--health-address", "8080"), "write 127.0.0.1:8080"),
        (("--standalone", *PUBLIC, "--health-address", "1.2.3.4:65536"), "write 127.0.0.1:8080"),
        (("--standalone", *PUBLIC, "--cpu-affinity", "-1"), "is no CPU: write auto, off, or the number of one"),
        (("--standalone", *PUBLIC, "--cpu-affinity", "0,1"), "is no CPU: write auto, off, or the number of one"),
        (("--standalone", *PUBLIC, "--cpu-affinity", ""), "is no CPU: write auto, off, or the number of one"),
        (("--standalone", *PUBLIC, "--cpu-affinity", "1000000"), "is no CPU: write auto, off, or the number of one"),
        (("--standalone", *PUBLIC, "--switch-interval", "0"), "write seconds, 0.0001 to 10, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "0.00009"), "write seconds, 0.0001 to 10, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "10.1"), "write seconds, 0.0001 to 10, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "nan"), "write seconds, 0.0001 to 10, or off"),
        (("--standalone", *PUBLIC, "--switch-interval", "5ms"), "write seconds, 0.0001 to 10, or off"),
        (("--standalone", *PUBLIC, "--log-format", "xml"), "is not one of 'human', 'json'"),
        (("--standalone", *PUBLIC, "--max-allocations", "0"), "is not in the range"),
        (("--standalone", *PUBLIC, "--relay-secret-file", "/nowhere"), "can't read the relay secret from /nowhere"),
        (("--port", "3479"), "No such option '--port'"),
        (("dance",), "No such command 'dance'"),
        (("credentials",), "Missing option '--relay-secret-file'"),
        (("credentials", "--relay-secret-file", "/nowhere"), "No such file"),
        (("credentials", "--relay-secret-file", "x", "--ttl", "soon"), "write 90s, 15m, 12h, 1d or 2w"),
        (("credentials", "--relay-secret-file", "x", "--ttl", "0"), "write 90s, 15m, 12h, 1d or 2w"),
    ],
)
def test_bad_use_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in refusal(monkeypatch, capsys, *arguments)


def test_a_bad_environment_is_refused_naming_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PUBLIC_IP4_ADDR", "nonsense")
    assert "--public-ip4-addr" in refusal(monkeypatch, capsys, "--standalone")


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PUBLIC_IP6_ADDR", "")
    assert "no public address" in refusal(monkeypatch, capsys, "--standalone")


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "is no text")])
def test_a_secret_file_without_a_secret_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    assert says in refusal(monkeypatch, capsys, *STANDALONE, "--relay-secret-file", str(path))


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """A token, set."""
    monkeypatch.setenv("FIREZONE_TOKEN", "very-secret-token")
    return "very-secret-token"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("two words", "white space"),
        ("caf\u00e9", "no token has"),
        ("a\0b", "no token has"),
    ],
)
def test_a_token_file_without_a_token_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    assert says in refusal(monkeypatch, capsys, *PUBLIC, "--token-file", str(path))
    monkeypatch.setenv("FIREZONE_TOKEN", str(path))
    assert says in refusal(monkeypatch, capsys, *PUBLIC)


def test_a_token_that_is_none_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line break in it, it could begin another header."""
    monkeypatch.setenv("FIREZONE_TOKEN", "very-secret\r\nX-Other: token")
    line = refusal(monkeypatch, capsys, *PUBLIC)
    assert "FIREZONE_TOKEN is no token" in line
    assert "very-secret" not in line


def test_a_token_that_looks_like_a_path_has_to_be_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FIREZONE_TOKEN", "/run/secrets/nowhere")
    assert "can't read the token from /run/secrets/nowhere" in refusal(monkeypatch, capsys, *PUBLIC)


@pytest.mark.usefixtures("token")
def test_a_portal_takes_no_secret_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    path.write_text("s")
    assert "is for --standalone" in refusal(monkeypatch, capsys, *PUBLIC, "--relay-secret-file", str(path))


@pytest.mark.usefixtures("token")
def test_a_url_with_a_password_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(monkeypatch, capsys, *PUBLIC, "--api-url", "wss://user:hunter2@portal.example")
    assert "has a user or a password in it" in line
    assert "hunter2" not in line


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    "proxy", ["socks5://user:hunter2@proxy.example:1080", "http://user:hunter2@:80", "http://user:hunter2@h:port"]
)
def test_a_proxy_that_is_none_is_refused_without_its_password_being_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    line = refusal(monkeypatch, capsys, *PUBLIC)
    assert "HTTPS_PROXY" in line
    assert "hunter2" not in line


def test_another_system_than_linux_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "runs on Linux only" in refusal(monkeypatch, capsys, *STANDALONE)


def test_help_names_each_environment_variable_and_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    for text in (
        *("PUBLIC_IP4_ADDR", "PUBLIC_IP6_ADDR", "BIND_IP4_ADDR", "BIND_IP6_ADDR", "LOWEST_PORT", "HIGHEST_PORT"),
        *("HEALTH_CHECK_ADDR", "CONTROL_ENDPOINT", "LOG_FORMAT", "RNG_SEED", "ALLOW_PEER", "DENY_PEER", "MAX_ALLOCATIONS"),
        *("49152", "65535", "0.0.0.0:8080", "127.0.0.1:9999", "human"),
        *("FIREZONE_TOKEN", "FIREZONE_NAME", "FIREZONE_API_URL", "wss://api.firezone.dev", "DRAIN_TIMEOUT"),
        *("CPU_AFFINITY", "auto", "SWITCH_INTERVAL", "0.5"),
        *("--ebpf-offloading", "EBPF_OFFLOADING", "--ebpf-attach-mode", "EBPF_ATTACH_MODE", "[driver|generic|auto]"),
    ):
        assert text in said
    # It would be seen by every user of the machine.
    assert "--token " not in said


def test_the_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"
