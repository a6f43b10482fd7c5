"""No output of the relay contains a secret: at trace level, under hostile input, and when the relay fails.

Secrets are the portal's token, the relay's secret, credentials for the proxy and the collector, and for clients: passwords,
their keys, usernames (a username and the relay's secret determine the password), nonces, and the payload of packets.
"""

import base64
import contextlib
import errno
import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest

from relay.core.attributes import (
    LIFETIME,
    NONCE,
    REALM,
    REQUESTED_TRANSPORT,
    USERNAME,
    XOR_PEER_ADDRESS,
    Attribute,
)
from relay.core.credentials import Credential, RelaySecret, integrity_key, mint
from relay.core.stun import MessageClass, Method, encode
from tests.support.command_line import run
from tests.support.connect_proxy import ConnectProxy
from tests.support.failing import RECEIVE, library
from tests.support.program import Program
from tests.support.scripted_portal import Authority, Connection, ScriptedPortal
from tests.support.secrets import Secrets, page, pages_of
from tests.support.turn_client import TIMEOUT, UDP, TurnClient, code_of, udp_socket

__all__ = ["library"]

TOKEN: Final = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_secret~of~the~portal"
PROXY_USER, PROXY_PASSWORD = "user-of-the-proxy", "password~of~the~proxy"
COLLECTOR_KEY = "key~for~the~collector"
PAYLOAD: Final = b"what two peers tell each other"
CHANNEL: Final = 0x4000
DAY: Final = 86400

Given: TypeAlias = tuple[Attribute[Any], Any]


def test_the_search_finds_encoded_secrets() -> None:
    secrets, key = Secrets(), b"\x00binary\xff"
    secrets.add("key", key)
    secrets.add("token", 'quo"ted')
    for text in (f"x {key!r}", key.hex(), json.dumps(key.decode("latin-1")), base64.b64encode(key).decode()):
        assert secrets.found_in(text) == {"key"}
    assert secrets.found_in(json.dumps({"x": 'a quo"ted one'})) == {"token"}
    assert secrets.found_in("nothing") == set()


class Victim:
    """A relay with a portal, its collected output, and the secrets."""

    def __init__(self, program: Program, secrets: Secrets, secret: RelaySecret) -> None:
        self.program = program
        self.secrets = secrets
        self._secret = secret
        self.shown = ""

    def credential(self, ttl: int = DAY) -> Credential:
        made = mint(self._secret, int(time.time()) + ttl, f"salt-{os.urandom(8).hex()}")
        self.secrets.add_credential(made)
        return made

    def client(self, credential: Credential | None = None) -> TurnClient:
        return TurnClient((self.program.host, 3478), credential or self.credential(), "127.0.0.1")

    def look(self) -> None:
        """Collect pages, dumps and the command line."""
        (control,) = re.findall(r"control\W+(127\.0\.0\.1):(\d+)", self.program.log)[:1]
        for address in ((control[0], int(control[1])), (self.program.host, 8080)):
            for path in ("/", *pages_of(address)):
                self.shown += page(address, "GET", path)
                self.shown += page(address, "POST", path)
        self.program.dump()
        self.program.dump(signal.SIGQUIT)
        self.shown += Path(f"/proc/{self.program.process.pid}/cmdline").read_text()

    def end(self) -> str:
        """Return all output after the end of the relay."""
        assert self.program.process.stdout is not None
        return self.shown + self.program.log + self.program.process.stdout.read()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """A file in which a test selects system calls that fail."""
    path = tmp_path / "faults"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture(params=["human", "json"])
def victim(
    request: pytest.FixtureRequest, authority: Authority, faults: Path, library: Path
) -> Iterator[tuple[Victim, Connection]]:
    secrets = Secrets()
    secrets.add("token", TOKEN)
    secrets.add("password of the proxy", PROXY_PASSWORD)
    secrets.add("credential of the proxy", f"{PROXY_USER}:{PROXY_PASSWORD}")
    secrets.add("payload", PAYLOAD)
    secrets.add("key for the collector", COLLECTOR_KEY)
    with ScriptedPortal(authority) as portal, ConnectProxy((PROXY_USER, PROXY_PASSWORD)) as proxy:
        program = Program(
            *("--allow-peer", "127.0.0.0/8", "--log-filter", "trace", "--log-format", request.param),
            by=("env", f"LD_PRELOAD={library}", f"FAULTS={faults}"),
            network={
                "FIREZONE_TOKEN": TOKEN,
                "FIREZONE_API_URL": portal.url,
                "SSL_CERT_FILE": str(authority.ca_file),
                # No collector listens there, so pushes fail and are logged.
                "OTLP_GRPC_ENDPOINT": "127.0.0.1:9",
                "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={COLLECTOR_KEY}",
                "OTEL_METRIC_EXPORT_INTERVAL": "500",
                "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
                "HTTPS_PROXY": f"http://{PROXY_USER}:{PROXY_PASSWORD}@{proxy.host}:{proxy.port}",
            },
        )
        try:
            program.wait_until_ready()
            connection = portal.wait_until_joined()
            assert connection.stamp_secret is not None
            secrets.add("secret of the relay", connection.stamp_secret)
            yield Victim(program, secrets, RelaySecret(connection.stamp_secret)), connection
        finally:
            program.close()


def hostile_requests(victim: Victim, nonce: bytes) -> Iterator[bytes]:
    """Yield invalid requests, each with a secret."""
    good = victim.credential()
    victim.secrets.add("nonce", nonce)

    def request(method: Method, credential: Credential, *more: Given, with_nonce: bytes = nonce) -> bytes:
        key = integrity_key(credential.username, "firezone", credential.password)
        login: list[Given] = [(USERNAME, credential.username), (REALM, "firezone"), (NONCE, with_nonce)]
        return encode(MessageClass.REQUEST, method, os.urandom(12), [*more, *login], key=key)

    wrong = Credential(good.username, "a wrong password of somebody's")
    victim.secrets.add_credential(wrong)
    yield request(Method.ALLOCATE, wrong, (REQUESTED_TRANSPORT, UDP))
    yield request(Method.ALLOCATE, victim.credential(-DAY), (REQUESTED_TRANSPORT, UDP))
    yield request(Method.ALLOCATE, good, (REQUESTED_TRANSPORT, UDP), with_nonce=b"AAAA" + nonce[4:])
    yield request(Method.ALLOCATE, good)
    yield request(Method.ALLOCATE, good, (REQUESTED_TRANSPORT, 6))
    yield request(Method.REFRESH, good, (LIFETIME, 600))
    yield request(Method.CHANNEL_BIND, good, (XOR_PEER_ADDRESS, ("169.254.169.254", 80)))
    for name in ("no colon", "a:b:c", f"{1 << 70}:x\n2026-11-23 forged", ":" * 500, "9" * 400 + ":x"):
        credential = Credential(f"{name} of somebody's", "password")
        victim.secrets.add("username", credential.username)
        yield request(Method.ALLOCATE, credential, (REQUESTED_TRANSPORT, UDP))
    whole = request(Method.ALLOCATE, good, (REQUESTED_TRANSPORT, UDP))
    for end in range(21, len(whole), 7):
        yield whole[:end]
        yield whole[:2] + (end - 20).to_bytes(2, "big") + whole[4:end]
    yield b"\x40\x00" + len(PAYLOAD).to_bytes(2, "big") + PAYLOAD
    yield b"\x40\x00\xff\xff" + PAYLOAD
    yield b"\x00" + PAYLOAD


def play_client(victim: Victim) -> None:
    """Send valid and invalid requests and data like clients."""
    with victim.client() as client, udp_socket("127.0.0.1") as peer, udp_socket("127.0.0.1") as stranger:
        (relayed,) = client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        assert client.bind_channel(CHANNEL + 1, ("169.254.169.254", 80)) == 403
        client.send(CHANNEL, PAYLOAD)
        assert peer.recv(100) == PAYLOAD
        peer.sendto(PAYLOAD, relayed[:2])
        assert client.receive() == (CHANNEL, PAYLOAD)
        stranger.sendto(PAYLOAD, relayed[:2])
        answer = client.request(Method.ALLOCATE, (REQUESTED_TRANSPORT, UDP))
        assert code_of(answer) == 437
        assert client.nonce is not None
        for datagram in hostile_requests(victim, client.nonce):
            client.socket.sendto(datagram, (victim.program.host, 3478))
            stranger.sendto(datagram, (victim.program.host, 3478))
        discard(client.socket, stranger)
        assert client.refresh(600) is None


def discard(*sockets: socket.socket) -> None:
    for each in sockets:
        each.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while each.recv(65535):
                pass
        each.settimeout(TIMEOUT)


def play_hostile_portal(connection: Connection) -> None:
    """Send the secrets of the portal back in every part of a message."""
    both = f"{TOKEN} {connection.stamp_secret}"
    connection.send(f"unknown {both}", {both: both}, topic=both)
    connection.send("init", {"credentials": both, "relays": [both]})
    connection.send("phx_reply", {"status": both, "response": {"reason": both}}, ref=both)
    connection.send_text(f"no JSON {both}")
    connection.send_text(json.dumps([None, None, both, both, {both: both}]))
    # The last message, because the relay closes the connection after it.
    connection.send_text(json.dumps({"topic": "relay", "event": "phx_error", "payload": {}, both: both}))


def fail_all_reads(faults: Path) -> None:
    """Make all reads fail, which ends the relay at once."""
    with faults.open("r+b") as file:
        file.seek(RECEIVE)
        file.write(struct.pack("=ii", errno.EBADF, -1))


def test_no_output_contains_a_secret(victim: tuple[Victim, Connection], faults: Path) -> None:
    relay, connection = victim
    play_client(relay)
    relay.look()
    play_hostile_portal(connection)
    relay.look()
    relay.program.wait_for_log("metrics could not be pushed")
    with relay.client() as last:
        last.allocate()
        fail_all_reads(faults)
        last.socket.sendto(bytes(20), (relay.program.host, 3478))
        assert relay.program.wait(60) == 1
    shown = relay.end()
    # Check that the output contains all parts.
    for part in (
        "allocation created",
        "[concealed]",
        "end of dump",
        "relay_",
        "active_allocations",
        "an actor failed",
        "Traceback",
    ):
        assert part in shown, part
    assert relay.secrets.found_in(shown) == set()


def test_the_token_is_removed_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child process may inherit the token."""
    monkeypatch.setenv("FIREZONE_TOKEN", TOKEN)
    # The program reads the token before it finds the usage error.
    assert run(monkeypatch, "--public-ip4-addr", "127.82.0.4", "--relay-secret-file", "/nowhere") == 2
    assert "FIREZONE_TOKEN" not in os.environ
