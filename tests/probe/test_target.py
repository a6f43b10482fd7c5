import socket
import threading

import click
import pytest

from relay.core.attributes import ErrorValue
from relay.core.stun import Method
from relay.net.endpoint import Endpoint
from relay.tools.probe.client import RefusedError
from relay.tools.probe.command import parse_target, resolve


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("relay.example.com", Endpoint("relay.example.com", 3478)),
        ("relay.example.com:99", Endpoint("relay.example.com", 99)),
        ("192.0.2.1", Endpoint("192.0.2.1", 3478)),
        ("192.0.2.1:65535", Endpoint("192.0.2.1", 65535)),
        ("2001:db8::1", Endpoint("2001:db8::1", 3478)),
        ("[2001:db8::1]", Endpoint("2001:db8::1", 3478)),
        ("[2001:db8::1]:5000", Endpoint("2001:db8::1", 5000)),
        ("fe80::1%lo", Endpoint("fe80::1%lo", 3478)),
        ("turn:relay.example.com", Endpoint("relay.example.com", 3478)),
        ("turn:relay.example.com:99?transport=udp", Endpoint("relay.example.com", 99)),
        ("TURN:[2001:db8::1]:5000?transport=UDP", Endpoint("2001:db8::1", 5000)),
        ("turn:2001:db8::1?transport=udp", Endpoint("2001:db8::1", 3478)),
        ("turn:99", Endpoint("turn", 99)),
    ],
)
def test_hosts_and_uris_are_parsed(text: str, target: Endpoint) -> None:
    assert parse_target(text) == (target, True)


def test_a_stun_uri_is_a_server_that_need_not_relay() -> None:
    assert parse_target("stun:192.0.2.1:99") == (Endpoint("192.0.2.1", 99), False)


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
        "turn:",
        "turn:host?transport=tcp",
        "turns:host",
        "turns:host:5349?transport=tcp",
        "http:host",
    ],
)
def test_invalid_hosts_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="write HOST, HOST:PORT"):
        parse_target(text)


def test_a_port_is_shown_with_its_host() -> None:
    assert str(parse_target("::1")[0]) == "[::1]:3478"
    assert str(parse_target("relay.example.com:1")[0]) == "relay.example.com:1"


def test_addresses_are_resolved_once_each() -> None:
    assert resolve(Endpoint("127.0.0.1", 5)) == (("127.0.0.1", 5),)


@pytest.mark.parametrize("host", ["no-such-name.invalid", "a..b", "x" * 70, "1:2:3"])
def test_unknown_names_are_rejected(host: str) -> None:
    with pytest.raises(click.UsageError, match="unknown"):
        resolve(Endpoint(host, 1))


def test_a_lookup_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def hang(*_: object, **__: object) -> list[tuple[object, ...]]:
        may_end.wait(100)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with pytest.raises(click.UsageError, match="DNS"):
            resolve(Endpoint("host", 1), timeout=0.05)
    finally:
        may_end.set()


def test_server_text_is_escaped_for_the_terminal() -> None:
    def said(text: str) -> str:
        return str(RefusedError(Method.ALLOCATE, ErrorValue(500, text), None))

    words = "Allocate answered with 500"
    assert said("\x1b[2Jrealm\r\n\N{RIGHT-TO-LEFT OVERRIDE}'\\") == rf"{words} \x1b[2Jrealm\r\n\u202e'" + "\\"
    assert len(said("x" * 5000)) < 200
