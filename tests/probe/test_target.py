import socket
import threading

import pytest

from relay.probe.errors import printable
from relay.probe.target import Target, TargetError, parse_target, resolve


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("relay.example.com", Target("relay.example.com", 3478)),
        ("relay.example.com:99", Target("relay.example.com", 99)),
        ("192.0.2.1", Target("192.0.2.1", 3478)),
        ("192.0.2.1:65535", Target("192.0.2.1", 65535)),
        ("2001:db8::1", Target("2001:db8::1", 3478)),
        ("[2001:db8::1]", Target("2001:db8::1", 3478)),
        ("[2001:db8::1]:5000", Target("2001:db8::1", 5000)),
        ("fe80::1%lo", Target("fe80::1%lo", 3478)),
    ],
)
def test_hosts_are_read(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":3478",
        "host:",
        "host:0",
        "host:65536",
        "host:٣",
        "host:-1",
        "[::1",
        "[::1]3478",
        "[]",
        "[host]:1",
        "1:2:3",
        "turn:host",
    ],
)
def test_misspelt_hosts_are_refused(text: str) -> None:
    with pytest.raises(TargetError):
        parse_target(text)


def test_a_port_is_shown_with_its_host() -> None:
    assert str(parse_target("::1")) == "[::1]:3478"
    assert str(parse_target("relay.example.com:1")) == "relay.example.com:1"


def test_addresses_are_looked_up_once_each() -> None:
    assert resolve(Target("127.0.0.1", 5)) == (("127.0.0.1", 5),)


@pytest.mark.parametrize("host", ["no-such-name.invalid", "a..b", "x" * 70])
def test_unknown_names_are_refused(host: str) -> None:
    with pytest.raises(TargetError, match="unknown"):
        resolve(Target(host, 1))


def test_a_lookup_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        given_up.wait(100)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with pytest.raises(TargetError, match="DNS"):
            resolve(Target("host", 1), timeout=0.05)
    finally:
        given_up.set()


def test_text_of_a_server_cannot_steer_a_terminal() -> None:
    assert printable("\x1b[2Jrealm\r\n\N{RIGHT-TO-LEFT OVERRIDE}'\\") == r"\x1b[2Jrealm\r\n\u202e'" + "\\"
    assert len(printable("x" * 5000)) < 200
