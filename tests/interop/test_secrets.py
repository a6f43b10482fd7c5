"""Nothing that the relay writes or shows has a secret in it: at trace level, under hostile input, and when it fails.

Secrets are the portal's token, the relay's secret, what the proxy and a collector want to be told, and of clients:
passwords, the keys made of them, usernames (who has one and the secret has the password), nonces, and what is in packets.
"""

import base64
import contextlib
import errno
import http.client
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
from relay.core.portal.endpoint import PortalUrl
from relay.core.stun import MessageClass, Method, encode
from relay.process import _portal_access
from tests.conftest import wait_until
from tests.connect_proxy import ConnectProxy
from tests.faults.conftest import RECEIVE, library
from tests.interop.conftest import Program
from tests.scripted_portal import Authority, Connection, ScriptedPortal
from tests.turn_client import TIMEOUT, UDP, TurnClient, code_of, udp_socket

__all__ = ["library"]

TOKEN: Final = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_secret~of~the~portal"
PROXY_USER, PROXY_PASSWORD = "user-of-the-proxy", "password~of~the~proxy"
COLLECTOR_KEY = "key~for~the~collector"
PAYLOAD: Final = b"what two peers tell each other"
CHANNEL: Final = 0x4000
DAY: Final = 86400

Given: TypeAlias = tuple[Attribute[Any], Any]


class Secrets:
    """Texts and bytes that must not be seen, in whichever way they might be written."""

    def __init__(self) -> None:
        self._spellings: dict[str, str] = {}

    def add(self, what: str, secret: str | bytes) -> None:
        data = secret.encode() if isinstance(secret, str) else secret
        text, based = data.decode("latin-1"), base64.b64encode(data).decode()
        for spelling in (text, repr(data)[2:-1], json.dumps(text)[1:-1], data.hex(), based.rstrip("=")):
            self._spellings[spelling] = what

    def add_credential(self, credential: Credential) -> None:
        self.add("username", credential.username)
        self.add("salt of a username", credential.username.partition(":")[2])
        self.add("password", credential.password)
        self.add("key", integrity_key(credential.username, "firezone", credential.password))

    def found_in(self, text: str) -> set[str]:
        return {what for spelling, what in self._spellings.items() if spelling in text}


def test_what_is_looked_for_would_be_found() -> None:
    secrets, key = Secrets(), b"\x00binary\xff"
    secrets.add("key", key)
    secrets.add("token", 'quo"ted')
    for text in (f"x {key!r}", key.hex(), json.dumps(key.decode("latin-1")), base64.b64encode(key).decode()):
        assert secrets.found_in(text) == {"key"}
    assert secrets.found_in(json.dumps({"x": 'a quo"ted one'})) == {"token"}
    assert secrets.found_in("nothing") == set()


def page(address: tuple[str, int], method: str, path: str) -> str:
    """What a page says."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return f"{answer.status} {answer.headers} {answer.read().decode()}"


def pages_of(address: tuple[str, int]) -> list[str]:
    """The pages that there are, as who asks for another one is told."""
    text = page(address, "GET", "/")
    found: list[str] = json.loads(text[text.index("{") :])["pages"]
    assert found
    return found


class Victim:
    """A relay in a network, all that it shows, and what it must not show."""

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
        """See all that can be seen of it from outside."""
        (control,) = re.findall(r"control\W+(127\.0\.0\.1):(\d+)", self.program.log)[:1]
        for address in ((control[0], int(control[1])), (self.program.host, 8080)):
            for path in ("/", *pages_of(address)):
                self.shown += page(address, "GET", path)
                self.shown += page(address, "POST", path)
        ends = self.program.log.count("--- end of dump")
        self.program.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: self.program.log.count("--- end of dump") > ends, 30)
        self.program.process.send_signal(signal.SIGQUIT)
        self.program.wait_for_log("--- end of stacks")
        self.shown += Path(f"/proc/{self.program.process.pid}/cmdline").read_text()

    def end(self) -> str:
        """Give all that was shown until its end."""
        assert self.program.process.stdout is not None
        return self.shown + self.program.log + self.program.process.stdout.read()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """What a test writes to have system calls fail."""
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
                # Nobody is there: it fails to push, and says so.
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
    """Requests that are refused, each with a secret in it that is somebody's all the same."""
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


def be_a_client(victim: Victim) -> None:
    """Do all that clients do, right and wrong."""
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
        assert client._nonce is not None
        for datagram in hostile_requests(victim, client._nonce):
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


def be_a_mad_portal(connection: Connection) -> None:
    """Send back what the portal knows, wherever it could be looked at."""
    both = f"{TOKEN} {connection.stamp_secret}"
    connection.send(f"unknown {both}", {both: both}, topic=both)
    connection.send("init", {"credentials": both, "relays": [both]})
    connection.send("phx_reply", {"status": both, "response": {"reason": both}}, ref=both)
    connection.send_text(f"no JSON {both}")
    connection.send_text(json.dumps([None, None, both, both, {both: both}]))
    # The last: it has the relay give this connection up.
    connection.send_text(json.dumps({"topic": "relay", "event": "phx_error", "payload": {}, both: both}))


def fail_all_reads(faults: Path) -> None:
    """Have whoever reads find its socket broken: that ends the relay at once."""
    with faults.open("r+b") as file:
        file.seek(RECEIVE)
        file.write(struct.pack("=ii", errno.EBADF, -1))


def test_no_secret_is_shown_whatever_happens(victim: tuple[Victim, Connection], faults: Path) -> None:
    relay, connection = victim
    be_a_client(relay)
    relay.look()
    be_a_mad_portal(connection)
    relay.look()
    relay.program.wait_for_log("metrics could not be pushed")
    with relay.client() as last:
        last.allocate()
        fail_all_reads(faults)
        last.socket.sendto(bytes(20), (relay.program.host, 3478))
        assert relay.program.wait(60) == 1
    shown = relay.end()
    # All that it has to tell is there to be looked at.
    for part in (
        "allocation created",
        "[concealed]",
        "--- end of dump",
        "relay_",
        "active_allocations",
        "an actor failed",
        "Traceback",
    ):
        assert part in shown, part
    assert relay.secrets.found_in(shown) == set()


def test_the_token_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program that the relay might start is given it."""
    monkeypatch.setenv("FIREZONE_TOKEN", TOKEN)
    access = _portal_access(standalone=False, token_file=None, api_url=PortalUrl.parse("wss://portal.example"), name=None)
    assert access is not None
    assert access.token.reveal() == TOKEN
    assert "FIREZONE_TOKEN" not in os.environ
