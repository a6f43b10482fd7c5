"""The program with a scripted portal: join, reconnects, rejections, shutdown and drain."""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeAlias

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from relay import __version__
from relay.core.addresses import SocketAddress
from relay.core.attributes import REQUESTED_TRANSPORT
from relay.core.portal.limits import FRAMES_PER_HEARTBEAT
from relay.core.stun import Message, MessageClass, Method, decode, encode
from relay.system.shutdown import STOP_TIMEOUT
from tests.support.connect_proxy import ConnectProxy
from tests.support.ice import converse
from tests.support.log_lines import valid
from tests.support.process import run
from tests.support.program import Program
from tests.support.raw_server import PATIENCE, Peer, RawServer, Recital
from tests.support.requirements import HAS_IPV6
from tests.support.scripted_portal import Authority, Connection, Refusal, Script, ScriptedPortal
from tests.support.turn_client import UDP, TurnClient, code_of, udp_socket
from tests.support.waiting import wait_until

TOKEN = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_throw.away~token"
CHANNEL = 0x4000
ENDLESS = 5000
"""Frames beyond the relay's limits."""
FORMATS = ("human", "json")
IN_TIME = STOP_TIMEOUT
"""Seconds for an exit, on a busy machine."""

MUTE = Recital("mute after the join", b"", opening=Peer.join)

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z ([A-Z]+) +(\S+ +.*)")

ProgramStarter: TypeAlias = Callable[..., Program]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def portal(authority: Authority) -> Iterator[ScriptedPortal]:
    with ScriptedPortal(authority) as portal:
        yield portal


def variables(url: str, authority: Authority) -> dict[str, str]:
    """Return the environment variables for joining a portal."""
    return {"FIREZONE_TOKEN": TOKEN, "FIREZONE_API_URL": url, "SSL_CERT_FILE": str(authority.ca_file)}


@pytest.fixture
def start_member(portal: ScriptedPortal, authority: Authority) -> Iterator[ProgramStarter]:
    """Start programs with this portal or another; they end with the test."""
    with ExitStack() as stack:

        def start(*options: str, url: str = portal.url, real: bool = False, **more: str) -> Program:
            network = variables(url, authority) | more
            program = Program("--allow-peer", "127.0.0.0/8", *options, network=network, real=real)
            stack.callback(program.close)
            return program

        yield start


@pytest.fixture(scope="module", autouse=True)
def strays(authority: Authority) -> Iterator[Mapping[str, Program]]:
    """Relays without a portal, by log format. They exit after 15 s, while the other tests run."""
    with ExitStack() as stack:
        nobody = stack.enter_context(socket.socket())
        # Bound without listen, so that the port is reserved and connections are refused.
        nobody.bind(("127.0.0.1", 0))
        url = f"wss://127.0.0.1:{nobody.getsockname()[1]}"
        started = {each: Program("--log-format", each, network=variables(url, authority)) for each in FORMATS}
        for program in started.values():
            stack.callback(program.close)
        yield started


@pytest.fixture
def member(start_member: ProgramStarter) -> Program:
    """A relay that has joined and serves clients."""
    program = start_member()
    program.wait_until_ready()
    return program


@pytest.fixture
def mute_portal(authority: Authority) -> Iterator[RawServer]:
    """A portal that accepts joins and then sends nothing, not even a close frame."""
    with RawServer(MUTE, tls=authority.server_context()) as server:
        yield server


def page(program: Program, name: str) -> tuple[int, str]:
    """Return the status and the body of a page at the health address."""
    try:
        with urllib.request.urlopen(f"http://{program.host}:8080/{name}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait_for_readiness(program: Program, status: int) -> None:
    wait_until(lambda: page(program, "readyz")[0] == status, PATIENCE)


def binding(from_: socket.socket, program: Program) -> bytes:
    """Send a Binding request, and return its transaction id."""
    transaction_id = os.urandom(12)
    from_.sendto(encode(MessageClass.REQUEST, Method.BINDING, transaction_id, ()), (program.host, 3478))
    return transaction_id


def turn_client(program: Program, portal: ScriptedPortal, salt: str) -> TurnClient:
    return TurnClient((program.host, 3478), portal.mint(salt), "127.0.0.1")


def end(program: Program, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
    """Send a signal, and return the exit code and the seconds until the exit.

    Tests of the actors check that an immediate exit waits for nothing, with very long timeouts.
    """
    began = time.monotonic()
    code = program.stop(number)
    return code, time.monotonic() - began


def code_of_close(portal: ScriptedPortal) -> int | None:
    """Wait until a relay has left and closed, and return its close code."""
    connection = portal.wait_until_left()
    connection.wait_until_closed()
    return connection.closed_with


@dataclass(frozen=True)
class Session:
    """A client with a channel to a peer, and the peer."""

    client: TurnClient
    peer: socket.socket
    relayed: SocketAddress

    def send_to_client(self, payload: bytes) -> None:
        self.peer.sendto(payload, (self.relayed[0], self.relayed[1]))

    def check(self) -> None:
        """Check that data is relayed both ways."""
        self.client.send(CHANNEL, b"to the peer")
        assert self.peer.recv(100) == b"to the peer"
        self.send_to_client(b"to the client")
        assert self.client.receive() == (CHANNEL, b"to the client")


@contextmanager
def session_on(program: Program, portal: ScriptedPortal, salt: str = "salt") -> Iterator[Session]:
    """Open a session with a credential of the portal."""
    with turn_client(program, portal, salt) as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        yield Session(client, peer, relayed)


class Traffic:
    """Numbered packets through a session, both ways at a steady rate. A context manager."""

    RATE = 500
    LAST = (1 << 64) - 1

    def __init__(self, session: Session) -> None:
        self.sent = 0
        """Packets sent per direction."""
        self.to_peer: list[int] = []
        self.to_client: list[int] = []
        self.session = session
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._send),
            threading.Thread(target=self._receive, args=(lambda: session.peer.recv(2048), self.to_peer)),
            threading.Thread(target=self._receive, args=(lambda: session.client.receive()[1], self.to_client)),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def go_on(self, seconds: float) -> None:
        """Wait for the number of packets sent in some seconds."""
        goal = self.sent + int(seconds * self.RATE)
        wait_until(lambda: self.sent >= goal, seconds + PATIENCE)

    def stop(self) -> None:
        """Stop sending, and wait for packets in flight."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def losses(self) -> int:
        """Return the number of packets lost, duplicated or reordered."""
        self.stop()
        return len(self._lost(self.to_peer)) + len(self._lost(self.to_client))

    def _lost(self, arrived: list[int]) -> list[int]:
        return [] if arrived == list(range(self.sent)) else sorted({*range(self.sent)} ^ {*arrived}) or arrived

    def _send(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(0.01):
            # If this thread is late it sends no burst: the test is not about queue lengths.
            due = min(int((time.monotonic() - began) * self.RATE), self.sent + 20)
            while self.sent < due:
                self._send_both(self.sent)
                self.sent += 1
        self._send_both(self.LAST)

    def _send_both(self, number: int) -> None:
        payload = number.to_bytes(8, "big").ljust(172)
        self.session.client.send(CHANNEL, payload)
        self.session.send_to_client(payload)

    def _receive(self, receive: Callable[[], bytes], into: list[int]) -> None:
        with suppress(TimeoutError):
            while (number := int.from_bytes(receive()[:8], "big")) != self.LAST:
                into.append(number)


def events(program: Program, log_format: str) -> list[tuple[str, str]]:
    """Return the level and the text with fields of each log line; each line must be an event."""
    lines = program.log.splitlines()
    if log_format == "json":
        return [(each["level"], f"{each['event']} {each.get('reason', '')}") for each in map(json.loads, lines)]
    matches = [LOG_LINE.fullmatch(line) for line in lines]
    assert None not in matches, program.log
    return [("critical" if match[1] == "FATAL" else match[1].lower(), match[2]) for match in matches if match is not None]


def last_words(program: Program, log_format: str) -> str:
    """Wait until a program has exited with a fatal error, and return the line with the error."""
    assert program.wait() == 1
    assert "Traceback" not in program.log
    assert program.process.stdout is not None
    assert program.process.stdout.read() == ""
    (critical,) = (text for level, text in events(program, log_format) if level == "critical")
    return critical


# The gate


def test_requests_are_dropped_until_init(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    portal.script.sends_init = False
    program = start_member()
    connection = portal.wait_until_joined()
    with udp_socket("127.0.0.1") as client:
        binding(client, program)
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(2048)
        assert page(program, "healthz")[0] == 200
        assert page(program, "readyz")[0] == 503
        connection.send_init()
        program.wait_until_ready()
        assert page(program, "readyz")[0] == 200
        client.settimeout(PATIENCE)
        transaction_id = binding(client, program)
        answer = decode(client.recv(2048))
        assert isinstance(answer, Message)
        # Earlier requests get no response after init.
        assert answer.transaction_id == transaction_id
        assert answer.message_class is MessageClass.SUCCESS
    assert program.stop() == 0


# Clients with the portal's credentials


@contextmanager
def echoing_peer() -> Iterator[int]:
    """An echo peer, and its port."""
    with udp_socket("127.0.0.1") as peer:
        peer.settimeout(None)

        def echo() -> None:
            while True:
                data, sender = peer.recvfrom(2048)
                if not data:
                    return
                peer.sendto(data, sender)

        echoing = threading.Thread(target=echo)
        echoing.start()
        try:
            yield peer.getsockname()[1]
        finally:
            peer.sendto(b"", peer.getsockname())
            echoing.join()


@pytest.mark.skipif(
    shutil.which("turnutils_uclient") is None, reason="coturn's clients are not installed (apt-get install coturn)"
)
def test_uclient_relays_with_credentials_of_the_portal(portal: ScriptedPortal, member: Program) -> None:
    credential = portal.mint("salt")
    with echoing_peer() as port:
        done = subprocess.run(
            [
                *("turnutils_uclient", "-u", credential.username, "-w", credential.password, "-e", "127.0.0.1"),
                *("-r", str(port), "-c", "-n", "50", "-l", "172", "-m", "1", member.host),
            ],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert "tot_send_msgs=50, tot_recv_msgs=50" in done.stdout, done


def test_two_ice_agents_connect_with_credentials_of_the_portal(portal: ScriptedPortal, member: Program) -> None:
    asyncio.run(asyncio.wait_for(converse(member.host, [portal.mint("one"), portal.mint("other")]), 30))


# Restart and misbehavior of the portal


def test_a_restart_of_the_portal_does_not_affect_clients(portal: ScriptedPortal, member: Program) -> None:
    secret = portal.wait_until_joined().stamp_secret
    assert secret is not None
    with session_on(member, portal) as session, Traffic(session) as traffic:
        traffic.go_on(0.5)
        assert page(member, "readyz")[0] == 200
        portal.stop()
        wait_for_readiness(member, 503)
        with session_on(member, portal, "while the portal is away") as another:
            another.check()
        assert page(member, "healthz")[0] == 200
        traffic.go_on(1)
        portal.start()
        assert portal.wait_until_joined(2).stamp_secret == secret
        wait_for_readiness(member, 200)
        with session_on(member, portal, "after it came back") as another:
            another.check()
        traffic.go_on(0.5)
        # On a busy machine the relay drops packets.
        assert traffic.losses() <= member.dropped()


def garbage() -> Iterator[str]:
    """Invalid frames without end."""
    unknown: dict[str, Any] = {"topic": "relay", "event": "nonsense", "payload": {}, "ref": None}
    error = {"topic": "relay", "event": "phx_reply", "payload": {"status": "error", "response": {"reason": "x" * 1000}}}
    frames = [
        *("", "{", "[]", "null", '"init"', "[" * 20_000, "\N{REPLACEMENT CHARACTER}" * 10_000, "{}"),
        json.dumps({"topic": 1, "event": [], "payload": 3, "ref": {}}),
        json.dumps({**unknown, "topic": "\x1b[31m" * 1000}),
        json.dumps({**error, "ref": 10**30}),
        json.dumps(unknown | {f"key {number}": number for number in range(100)}),
    ]
    for number in itertools.count():
        yield json.dumps({**unknown, "event": f"nonsense {number}"})
        yield frames[number % len(frames)]


def flood(connection: Connection, frames: Iterator[str]) -> int:
    """Flood the relay until it disconnects; return the number of frames, including pings."""
    sent = 0
    with suppress(ConnectionClosed):
        while sent < ENDLESS:
            connection.send_text(next(frames))
            sent += 1
            if sent % 10 == 0:
                connection.send_ping()
                sent += 1
    return sent


def test_a_flooding_portal_does_not_affect_packets_memory_or_log(portal: ScriptedPortal, member: Program) -> None:
    frames = garbage()
    process = psutil.Process(member.process.pid)
    with session_on(member, portal) as session, Traffic(session) as traffic:
        traffic.go_on(0.5)
        before = process.memory_info().rss
        flooded = [flood(portal.wait_until_joined(n), frames) for n in (1, 2)]
        portal.wait_until_joined(3)
        wait_for_readiness(member, 200)
        grown = process.memory_info().rss - before
        losses = traffic.losses()
        session.check()
    # Plus frames in kernel buffers. A few of the frames are replies to the relay's requests.
    assert all(FRAMES_PER_HEARTBEAT - 5 < count < ENDLESS for count in flooded)
    assert grown < 20 << 20
    assert len(member.log.splitlines()) < 50
    assert len(member.log) < 50_000
    # On a busy machine the relay drops packets.
    assert losses <= member.dropped()
    assert member.stop() == 0


def test_large_frames_of_the_portal_use_little_cpu_time(portal: ScriptedPortal, member: Program) -> None:
    frame = json.dumps({"topic": "relay", "event": "nonsense", "payload": {"lists": [[]] * 15_000}})
    connection = portal.wait_until_joined()
    process = psutil.Process(member.process.pid)
    before = sum(process.cpu_times()[:2])
    for _ in range(50):
        connection.send_text(frame)
    # The pong shows that the relay has read all frames.
    connection.ping()
    spent = sum(process.cpu_times()[:2]) - before
    began = time.thread_time()
    for _ in range(50):
        json.loads(frame)
    # Relative to the speed of this machine, with a margin of four.
    assert spent < 12 * (time.thread_time() - began)


# Shutdown


@pytest.mark.parametrize(
    "script",
    [Script(), Script(sends_init=False), Script(answers_join=False)],
    ids=["after init", "before init", "before the join is answered"],
)
def test_sigterm_leaves_the_portal_and_exits_with_0(
    portal: ScriptedPortal, start_member: ProgramStarter, script: Script
) -> None:
    portal.script = script
    program = start_member()
    connection = portal.wait_for_connection()
    connection.wait_for("phx_join")
    if script.answers_join:
        connection.wait_until_joined()
    if script.answers_join and script.sends_init:
        program.wait_until_ready()
    code, seconds = end(program)
    assert code == 0
    assert seconds < IN_TIME
    connection.wait_until_closed()
    assert [frame["event"] for frame in connection.frames] == ["phx_join", "phx_leave"]
    assert connection.closed_with == 1000
    assert {level for level, _ in events(program, "human")} <= {"info", "warn"}


def test_sigterm_exits_with_0_in_time_if_the_leave_is_unanswered(portal: ScriptedPortal, member: Program) -> None:
    portal.script.answers_leave = False
    code, seconds = end(member)
    assert code == 0
    assert seconds < IN_TIME
    assert code_of_close(portal) == 1000


def test_sigterm_exits_with_0_in_time_if_the_portal_is_mute(mute_portal: RawServer, start_member: ProgramStarter) -> None:
    program = start_member(url=mute_portal.url)
    program.wait_until_ready()
    code, seconds = end(program)
    assert code == 0
    assert seconds < IN_TIME
    assert "Traceback" not in program.log


def test_sigterm_exits_with_0_at_once_during_the_upgrade(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    portal.script.delay_upgrade = threading.Event()
    program = start_member()
    portal.wait_for_connection()
    code, seconds = end(program)
    assert code == 0
    assert seconds < IN_TIME
    assert not portal.connections[0].opened


def test_sigterm_exits_with_0_at_once_without_a_portal(portal: ScriptedPortal, member: Program) -> None:
    portal.stop()
    wait_for_readiness(member, 503)
    code, seconds = end(member)
    assert code == 0
    assert seconds < IN_TIME


def test_sigint_exits_with_0_at_once(portal: ScriptedPortal, member: Program) -> None:
    code, seconds = end(member, signal.SIGINT)
    assert code == 0
    assert seconds < IN_TIME
    portal.connections[0].wait_until_closed()


@pytest.mark.parametrize("is_leaving", [False, True], ids=["", "while it waits for the portal"])
def test_sigint_exits_with_0_at_once_if_the_portal_is_mute(
    mute_portal: RawServer, start_member: ProgramStarter, *, is_leaving: bool
) -> None:
    program = start_member(url=mute_portal.url)
    program.wait_until_ready()
    if is_leaving:
        program.process.send_signal(signal.SIGTERM)
        wait_for_readiness(program, 503)
    code, seconds = end(program, signal.SIGINT)
    assert code == 0
    assert seconds < IN_TIME


@contextmanager
def draining(program: Program, portal: ScriptedPortal) -> Iterator[tuple[Session, Traffic]]:
    """A session on a relay that then receives a signal, and another session whose traffic prevents the end of the drain."""
    program.wait_until_ready()
    with session_on(program, portal) as session, session_on(program, portal, "busy") as busy, Traffic(busy) as traffic:
        program.process.send_signal(signal.SIGTERM)
        program.wait_for_log("draining")
        yield session, traffic


def is_refused(late: TurnClient) -> bool:
    """Return whether an Allocate request is rejected with 508."""
    code = code_of(late.request(Method.ALLOCATE, (REQUESTED_TRANSPORT, UDP)))
    if code is None:
        late.refresh(0)
    return code == 508


@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_drain_keeps_allocations_and_ends_with_the_last(
    portal: ScriptedPortal, start_member: ProgramStarter, by: str
) -> None:
    program = start_member("--drain-timeout", "300") if by == "option" else start_member(DRAIN_TIMEOUT="300s")
    with draining(program, portal) as (session, traffic):
        assert page(program, "readyz")[0] == 503
        assert page(program, "healthz")[0] == 200
        assert code_of_close(portal) == 1000
        with turn_client(program, portal, "too late") as late:
            # The event is logged before the drain begins.
            wait_until(lambda: is_refused(late))
        session.check()
        assert session.client.refresh(600) is None
        session.check()
        assert program.process.poll() is None
        traffic.stop()
        assert traffic.session.client.refresh(0) is None
        session.check()
        began = time.monotonic()
        assert session.client.refresh(0) is None
        assert program.wait() == 0
        assert time.monotonic() - began < IN_TIME


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_drain_at_once(
    portal: ScriptedPortal, start_member: ProgramStarter, number: signal.Signals
) -> None:
    program = start_member("--drain-timeout", "300")
    with draining(program, portal) as (session, _):
        session.check()
        code, seconds = end(program, number)
    assert code == 0
    assert seconds < IN_TIME


def test_a_drain_ends_at_its_timeout_despite_an_allocation(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    program = start_member("--drain-timeout", "1")
    program.wait_until_ready()
    with session_on(program, portal):
        code, seconds = end(program)
    assert code == 0
    assert 1 <= seconds < IN_TIME + 1
    portal.wait_until_left()


def test_a_drain_ends_once_nothing_is_relayed(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    """Clients that were told to use another relay do not delete their allocations."""
    program = start_member("--drain-timeout", "300")
    with draining(program, portal) as (_, traffic):
        traffic.go_on(0.5)
        traffic.stop()
        assert program.wait() == 0
    assert "nothing is relayed" in program.log


def test_a_cancelled_drain_joins_again_with_the_current_token(
    portal: ScriptedPortal, start_member: ProgramStarter, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    program = start_member(FIREZONE_TOKEN=str(token))
    program.wait_until_ready()
    with session_on(program, portal) as session:
        for number, arguments in enumerate((("--timeout", "5m"), ("--cancel",))):
            if number:
                portal.wait_until_left().wait_until_closed()
                token.write_text(f"{TOKEN}2")
            done = run("drain", "--control-endpoint", program.control, *arguments)
            assert (done.returncode, done.stderr) == (0, "")
            wait_for_readiness(program, 200 if number else 503)
            session.check()
        assert portal.wait_until_joined(2).headers["X-Authorization"] == f"Bearer {TOKEN}2"
        with turn_client(program, portal, "welcome again") as late:
            assert late.allocate()
    assert end(program)[0] == 0


def test_a_revoked_token_drains_and_exits_with_1(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    program = start_member("--drain-timeout", "300")
    program.wait_until_ready()
    with session_on(program, portal) as session, Traffic(session) as traffic:
        portal.script.refuse = Refusal.invalid_token()
        portal.wait_until_joined().close(1000)
        program.wait_for_log("draining")
        with turn_client(program, portal, "too late") as late:
            wait_until(lambda: is_refused(late))
        traffic.go_on(0.5)
        assert program.process.poll() is None
        traffic.stop()
        assert program.wait() == 1
    assert "invalid_token" in program.log


@pytest.mark.long
def test_a_dead_path_is_replaced_before_clients_are_told(portal: ScriptedPortal, member: Program) -> None:
    """In real time, 40 s: the portal would close the connection after 41 s, and tell clients a second later."""
    connection = portal.wait_until_joined()
    portal.script.is_cut_off = True
    connection.wait_until_closed(60)
    portal.script.is_cut_off = False
    portal.wait_until_joined(2)
    wait_for_readiness(member, 200)
    assert connection.how_it_ended != "silence"
    assert portal.presence.drops == 0


@pytest.mark.parametrize("source", ["variable", "option"])
def test_a_rotated_token_file_needs_no_restart(
    portal: ScriptedPortal, start_member: ProgramStarter, tmp_path: Path, source: str
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    program = (
        start_member("--token-file", str(path), FIREZONE_TOKEN="")
        if source == "option"
        else start_member(FIREZONE_TOKEN=str(path))
    )
    program.wait_until_ready()
    path.write_text("rotated\n")
    portal.wait_until_joined().close(1012)
    assert portal.wait_until_joined(2).headers["X-Authorization"] == "Bearer rotated"
    wait_for_readiness(program, 200)


def test_a_drain_without_allocations_ends_at_once(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    program = start_member("--drain-timeout", "300")
    program.wait_until_ready()
    code, seconds = end(program)
    assert code == 0
    assert seconds < IN_TIME
    assert code_of_close(portal) == 1000


# Secrets


@pytest.mark.parametrize(
    ("source", "log_format", "ending"),
    [
        ("variable", "human", "join error"),
        ("path in the variable", "json", "join error"),
        ("option", "human", "401"),
        ("variable", "json", "401"),
    ],
)
def test_token_and_secret_are_redacted_in_replies_of_the_portal(
    portal: ScriptedPortal, start_member: ProgramStarter, tmp_path: Path, source: str, log_format: str, ending: str
) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    options = ["--log-format", log_format, *(("--token-file", str(path)) if source == "option" else ())]
    given = {"variable": TOKEN, "path in the variable": str(path), "option": "another token, which is of no account"}
    # Only a real process has its own command line, which contains the option.
    program = start_member(*options, FIREZONE_TOKEN=given[source], real=source == "option")
    program.wait_until_ready()
    connection = portal.wait_until_joined()
    secret = connection.stamp_secret
    assert secret is not None
    assert len(secret) >= 32
    assert connection.headers["X-Authorization"] == f"Bearer {TOKEN}"
    elsewhere = [connection.path, connection.query, page(program, "healthz"), page(program, "readyz")]
    command_line = Path(f"/proc/{program.process.pid}/cmdline").read_text()
    program.dump()
    program.dump(signal.SIGQUIT)
    both = f"{TOKEN} {secret}"
    portal.script.join_error = both
    portal.script.refuse = Refusal.problem(401, both, both) if ending == "401" else None
    connection.send(f"unknown {both}", {both: both}, topic=both)
    connection.send_text(json.dumps({"topic": "relay", "event": "phx_error", "payload": {}, both: both}))
    if ending == "join error":
        # A later join is tried again.
        program.wait_for_log("it refused the join")
        program.process.send_signal(signal.SIGTERM)
    assert program.wait() == (ending == "401")
    assert len(portal.connections) >= 2
    assert program.process.stdout is not None
    said = program.log + program.process.stdout.read()
    assert "[concealed] [concealed]" in said
    for concealed in (TOKEN, secret):
        assert concealed not in said
        assert concealed not in repr(elsewhere) + command_line


# Proxy, and data sent to the portal


def test_the_portal_connection_is_tunneled_through_the_proxy(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    with ConnectProxy(("user", "proxy:pass")) as proxy:
        login = base64.b64encode(b"user:proxy:pass").decode()
        program = start_member(HTTPS_PROXY=f"http://user:proxy%3Apass@{proxy.host}:{proxy.port}")
        program.wait_until_ready()
        request = proxy.wait_for_request()
        assert request.line == f"CONNECT localhost:{portal.port} HTTP/1.1"
        assert request.authorization == f"Basic {login}"
        assert proxy.tunnels == 1
        assert program.stop() == 0
    assert code_of_close(portal) == 1000
    assert f"{proxy.host}:{proxy.port}" in program.log
    for concealed in ("proxy:pass", "proxy%3Apass", login):
        assert concealed not in program.log


def test_no_proxy_bypasses_the_proxy(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    with ConnectProxy() as proxy:
        start_member(HTTPS_PROXY=proxy.url, NO_PROXY="example.com,localhost").wait_until_ready()
        assert proxy.requests == []
    assert portal.wait_until_joined().status == 101


@pytest.mark.parametrize("by", ["option", "variable"])
def test_the_portal_receives_name_addresses_and_user_agent(
    portal: ScriptedPortal, start_member: ProgramStarter, by: str
) -> None:
    name = "Zürich & Köln = 100 % #1"
    options = ["--name", name] if by == "option" else []
    options += ["--public-ip6-addr", "::1"] if HAS_IPV6 else []
    program = start_member(*options) if by == "option" else start_member(*options, FIREZONE_NAME=name)
    connection = portal.wait_until_joined()
    told = {"name": name, "ipv4": program.host, "port": "3478"}
    assert connection.path == "/relay/websocket"
    assert connection.query == told | ({"ipv6": "::1"} if HAS_IPV6 else {})
    assert re.fullmatch(rf"[A-Z]\S*/\S+ relay/{re.escape(__version__)} \(\S+; \S+\)", connection.headers["User-Agent"])
    assert [frame["payload"].keys() for frame in connection.frames] == [{"stamp_secret"}]


def test_a_relay_without_a_name_sends_no_name(portal: ScriptedPortal, member: Program) -> None:
    assert portal.wait_until_joined().query == {"ipv4": member.host, "port": "3478"}


def test_the_help_lists_portal_options_first() -> None:
    command = [str(Path(sys.executable).with_name("firezone-relay")), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    introduction, _, options = said.partition("Options:")
    assert "FIREZONE_TOKEN" in introduction
    assert "portal" in introduction
    assert "standalone" not in introduction
    assert options.index("--token-file") < options.index("--standalone ")
    assert options.index("With a Firezone portal") < options.index("Without a portal:")


# Fatal errors


@pytest.mark.parametrize(
    ("refusal", "said", "advice"),
    [
        (Refusal.invalid_token(), "invalid_token: Invalid token", "FIREZONE_TOKEN or --token-file"),
        (Refusal.invalid_token(chunked=True), "invalid_token: Invalid token", "FIREZONE_TOKEN or --token-file"),
        (Refusal.missing_token(), "missing_token: Missing token", "X-Authorization"),
        (Refusal(401, b"go away"), "401 without a reason", "make a new token"),
    ],
    ids=["invalid", "invalid, chunked", "missing", "without a reason"],
)
def test_a_rejected_token_exits_with_1_and_a_fix(
    portal: ScriptedPortal, start_member: ProgramStarter, refusal: Refusal, said: str, advice: str
) -> None:
    portal.script.refuse = refusal
    for program, log_format in [(start_member("--log-format", each), each) for each in FORMATS]:
        words = last_words(program, log_format)
        assert said in words
        assert advice in words
    assert len(portal.connections) == 2, "it is not tried again"


def test_a_rejected_join_exits_with_1_and_a_fix(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    portal.script.join_error = "invalid_stamp_secret"
    for program, log_format in [(start_member("--log-format", each), each) for each in FORMATS]:
        words = last_words(program, log_format)
        assert "refused this relay (invalid_stamp_secret)" in words
        assert "check its public addresses" in words
    assert len(portal.connections) == 2, "it is not tried again"


EVIL = 'x\n2026-11-23T20:25:16.250Z FATAL core forged\n{"level": "critical", "event": "forged"}\r\x1b[31m\x9b\u202e\u2028'


def test_messages_of_the_portal_are_escaped_in_the_log(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    programs = [(start_member("--log-format", each, "--log-filter", "trace"), each) for each in FORMATS]
    portal.wait_until_joined(2)
    for connection in portal.connections:
        connection.send(EVIL, {"reason": EVIL})
        connection.send("phx_reply", {"status": "error", "response": {"reason": EVIL}}, ref=99)
        connection.send("disconnect", {"reason": EVIL})
        connection.send("disconnect", {"reason": "token_expired"})
    for program, log_format in programs:
        assert "the token has expired" in last_words(program, log_format)
        assert program.log.count("forged") >= 2, "it was told of, and concealed nothing"
        assert program.log.replace("\n", "").isprintable()
        if log_format == "json":
            entries = [valid(line) for line in program.log.splitlines()]
            assert not [entry for entry in entries if entry["event"] == "forged"]


def test_an_expired_token_exits_with_1_and_a_fix(portal: ScriptedPortal, start_member: ProgramStarter) -> None:
    programs = [(start_member("--log-format", each), each) for each in FORMATS]
    portal.wait_until_joined(2)
    for connection in portal.connections:
        connection.send("disconnect", {"reason": "token_expired"})
    for program, log_format in programs:
        words = last_words(program, log_format)
        assert "the token has expired" in words
        assert "make a new one in the portal's console and set it as FIREZONE_TOKEN or --token-file" in words


def test_an_unreachable_portal_exits_with_1_after_15_seconds(
    strays: Mapping[str, Program],
) -> None:
    for log_format, program in strays.items():
        program.wait(60)
        words = last_words(program, log_format)
        # Measured by the log's timestamps: a test may see the exit later.
        began, *_, ended = (datetime.fromisoformat(each) for each in re.findall(r"\d{4}-\d\d-\d\dT[\d:.]+Z", program.log))
        assert 14 < (ended - began).total_seconds() < 60
        assert "(last: Connection refused)" in words
        assert "check FIREZONE_API_URL" in words
