"""A relay with a portal: gate, reconnects, shutdown, drain and fatal errors."""

import contextlib
import errno
import functools
import http.client
import json
import os
import queue
import re
import select
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeAlias

import pykka
import pytest

from relay.actors.mailbox import depths
from relay.actors.messages import Tick
from relay.config import PortalAccess, Timeouts
from relay.core.addresses import Family
from relay.core.credentials import RelaySecret
from relay.core.portal import limits
from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.commands import Fatal, PortalCommand
from relay.core.portal.endpoint import PortalConfig, PortalToken, PortalUrl
from relay.core.portal.events import Connected, ConnectionEvent, ConnectionLost, OtherReceived, TextReceived, UpgradeRefused
from relay.core.randomness import RandomSource
from relay.core.stun import MessageClass, Method, encode
from relay.core.timestamp import Timestamp
from relay.net.proxy import Proxy, ProxyCredentials
from relay.net.websocket import WebSocketLink
from relay.ops.dump import dump
from relay.ops.systemd import Systemd
from relay.system.events import Failure, SystemRequest
from relay.system.portal import user_agent
from relay.system.shutdown import LEAVE_TIMEOUT
from relay.system.supervisor import supervise
from relay.system.system import System
from tests.support.connect_proxy import ConnectProxy
from tests.support.descriptors import open_descriptors
from tests.support.log_lines import KeptLog, capture_logs
from tests.support.portal_channel import TOKEN_EXPIRED
from tests.support.raw_server import (
    ENDLESS_EVENTS,
    INVALID_UTF8,
    SILENCE,
    TEXT,
    RawServer,
    Recital,
    frame,
    joined,
    upgraded,
)
from tests.support.requirements import HAS_IPV6
from tests.support.scripted_portal import Authority, Refusal, ScriptedPortal
from tests.support.system import CONFIG, JumpingClock, Relay, allocate_refused, settle
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until

TOKEN = ".SFMyNTY.g2gDaANtAAAAJDE.the-token-of-the-relay-under-test"
NAME = "a relay under test"
MINUTE, HOUR = 60, 3600
LONG = 90.0
"""Seconds; longer than any test."""

SOON = 30.0
"""Seconds for an exit that waits for nothing, on a busy machine."""

BINDING = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
OK, UNAVAILABLE = HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE

SAYS_NOTHING = joined(Recital("says nothing", b""))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def portal(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedPortal]:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    with ScriptedPortal(authority) as portal:
        yield portal


@pytest.fixture
def log() -> Iterator[list[dict[str, Any]]]:
    """Events logged until now."""
    with capture_logs() as log:
        yield log


class HoldableClock(JumpingClock):
    """A clock that a test can stop."""

    def __init__(self) -> None:
        super().__init__()
        self._held: Timestamp | None = None

    def now(self) -> Timestamp:
        return self._held or super().now()

    def hold(self) -> None:
        """Stop the clock until `jump`, so that no timeout of the relay expires."""
        self._held = self.now()

    def jump(self, seconds: float) -> None:
        super().jump(seconds)
        if self._held is not None:
            self._held = self._held._replace(monotonic=self._held.monotonic + seconds)


class Member(Relay):
    """A relay, with a portal or standalone, that runs until it exits."""

    clock: HoldableClock

    def __init__(self, system: System, clock: HoldableClock, stack: contextlib.ExitStack, log: list[dict[str, Any]]) -> None:
        super().__init__(system, clock, stack)
        self.log = log
        self._outcome: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self._dumped = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="supervisor")
        self._thread.start()
        stack.callback(self._stop)

    @property
    def channel(self) -> PortalChannel:
        assert self.system.portal is not None
        return self.system.portal

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def events(self, level: str) -> list[str]:
        """Return the events logged at a level, without warnings about kernel settings of this machine."""
        return [entry["event"] for entry in self.log.copy() if entry["log_level"] == level and "mend" not in entry]

    def ask(self, request: SystemRequest) -> None:
        self.system.events.put(request)

    def ask_and_wait(self, request: SystemRequest) -> None:
        """Send a request, and wait until its immediate effects are complete."""
        self.ask(request)
        self.wake()

    def wake(self) -> None:
        """Make the supervisor check the clock, and wait until the check has begun."""
        self.ask(SystemRequest.DUMP)
        assert self._dumped.acquire(timeout=LONG)

    def wait_for_end(self, seconds: float = LONG) -> int:
        """Wait for the exit, and return the exit code."""
        outcome = self._outcome.get(timeout=seconds)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def page(self, path: str) -> int:
        """Return the status of a health page."""
        at = self.system.http["health"]
        connection = http.client.HTTPConnection(at.host, at.port, timeout=LONG)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.page("/readyz") == OK)

    def wait_until_not_ready(self) -> None:
        wait_until(lambda: self.page("/readyz") == UNAVAILABLE)

    def wait_for_state(self, state: State) -> None:
        wait_until(lambda: self.channel.state is state)

    def look(self) -> None:
        """Make the portal actor check the clock, and wait for the end of the check."""
        actor = self.system.portal_actor
        assert actor is not None
        with contextlib.suppress(pykka.ActorDeadError):
            actor.ask(Tick(), timeout=LONG)

    def pass_time(self, seconds: float) -> None:
        """Advance the clock of the portal actor."""
        self.clock.jump(seconds)
        self.look()

    def retry_until(self, condition: Callable[[], bool]) -> None:
        """Skip each backoff until a condition is true."""

        def is_there() -> bool:
            if condition():
                return True
            if self.channel.state is State.WAITING:
                # As long as the longest backoff, and shorter than the timeouts.
                self.pass_time(30 if self.channel.joins else 1)
            return False

        wait_until(is_there, LONG)

    def turn_client(self, portal: ScriptedPortal, salt: str) -> TurnClient:
        """Return a client with a credential of the portal."""
        at = self.system.address_of(Family.IPV4)
        return self._stack.enter_context(TurnClient((at.host, at.port), portal.mint(salt)))

    def is_answered(self, client: socket.socket) -> bool:
        """Return whether the relay responds to a Binding request of this client."""
        at = self.system.address_of(Family.IPV4)
        client.sendto(BINDING, (at.host, at.port))
        return bool(select.select([client], [], [], SOON)[0])

    def _run(self) -> None:
        try:
            self._outcome.put(supervise(self.system, self._dumped.release))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to hear of it
            self._outcome.put(error)

    def _stop(self) -> None:
        if self.is_running:
            self.ask(SystemRequest.STOP)
        self._thread.join(LONG)
        assert not self.is_running


MemberMaker: TypeAlias = Callable[..., Member]
ChannelMaker: TypeAlias = Callable[[PortalConfig, RandomSource], PortalChannel]
LinkMaker: TypeAlias = Callable[..., WebSocketLink]


def access_to(url: str, proxy: Proxy | None = None) -> PortalAccess:
    return PortalAccess(PortalUrl.parse(url), PortalToken(TOKEN), proxy)


@pytest.fixture
def start(log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[MemberMaker]:
    """Start relays with the portal at a URL, with the given changes of the settings."""
    with contextlib.ExitStack() as stack:

        def start(
            url: str | None,
            *,
            systemd: Systemd | None = None,
            channel: ChannelMaker = PortalChannel,
            link: LinkMaker = WebSocketLink,
            **settings: object,
        ) -> Member:
            monkeypatch.setattr("relay.system.portal.PortalChannel", channel)
            monkeypatch.setattr("relay.system.portal.WebSocketLink", link)
            given = {"secret": None, "name": NAME, "portal": None if url is None else access_to(url), **settings}
            clock = HoldableClock()
            config = replace(CONFIG, **given)  # type: ignore[arg-type]
            system = System(config, clock, systemd=systemd)
            return Member(stack.enter_context(system), clock, stack, log)

        yield start


@pytest.fixture
def start_in(start: MemberMaker) -> Callable[..., Member]:
    """Start relays, and wait until each has joined and received init."""

    def start_in(portal: ScriptedPortal, **settings: object) -> Member:
        member = start(portal.url, **settings)
        portal.wait_until_joined()
        member.wait_until_ready()
        return member

    return start_in


@pytest.fixture
def member(start_in: Callable[..., Member], portal: ScriptedPortal) -> Member:
    return start_in(portal)


@pytest.fixture(autouse=True)
def _no_connection_outlives_its_test() -> Iterator[None]:
    yield
    wait_until(lambda: not [each for each in threading.enumerate() if each.name == "portal-connection"])


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of an unreachable portal."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"ws://127.0.0.1:{bound.getsockname()[1]}"


# The gate.


def test_requests_received_before_init_are_dropped(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.sends_init = False
    member = start(portal.url)
    connection = portal.wait_until_joined()
    member.wait_for_state(State.JOINED)
    with udp_socket("127.0.0.1") as early, udp_socket("127.0.0.1") as late:
        at = member.system.address_of(Family.IPV4)
        for _ in range(100):
            early.sendto(BINDING, (at.host, at.port))
        assert not select.select([early], [], [], 0.2)[0]
        assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
        assert "ready" not in member.events("info")
        connection.send_init()
        member.wait_until_ready()
        assert member.page("/healthz") == OK
        assert member.is_answered(late)
        # The relay reads these requests before the requests of `late`, from the same queue.
        assert not select.select([early], [], [], 0)[0]
        assert member.is_answered(early)
    assert member.events("info").count("ready") == 1


@pytest.mark.parametrize("family", [Family.IPV4, *([Family.IPV6] if HAS_IPV6 else [])])
def test_clients_of_each_family_are_served_after_init(member: Member, portal: ScriptedPortal, family: Family) -> None:
    at = member.system.address_of(family)
    with TurnClient((at.host, at.port), portal.mint("salt")) as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        client.send(0x4000, b"hello")
        assert peer.recvfrom(100) == (b"hello", relayed[:2])


def test_the_relay_is_healthy_but_not_ready_before_the_portal_responds(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.delay_upgrade = threading.Event()
    member = start(portal.url)
    portal.wait_for_connection()
    assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
    portal.script.delay_upgrade.set()
    member.wait_until_ready()


def test_the_gate_stays_closed_if_the_portal_is_lost_before_init(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.sends_init = False
    member = start(portal.url)
    portal.wait_until_joined().drop()
    member.retry_until(lambda: len(portal.connections) > 1)
    connection = portal.wait_until_joined(2)
    assert member.page("/readyz") == UNAVAILABLE
    connection.send_init()
    member.wait_until_ready()


def test_a_second_init_changes_nothing(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    threads = threading.active_count()
    for _ in range(3):
        connection.send_init()
    # The pong shows that the relay has read the earlier frames.
    connection.ping()
    member.look()
    # Fewer if an HTTP request was still being served before.
    assert threading.active_count() <= threads
    assert member.events("info").count("ready") == 1
    assert member.is_running


def test_the_port_is_bound_before_init(start: MemberMaker, portal: ScriptedPortal) -> None:
    """A port in use must be an error before the relay joins a portal."""
    portal.script.sends_init = False
    member = start(portal.url)
    at = member.system.address_of(Family.IPV4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other, pytest.raises(OSError, match="in use"):
        other.bind((at.host, at.port))


# Data sent to the portal.


@pytest.mark.parametrize("name", [NAME, None, "Zürich & more = 100 %"])
def test_the_relay_sends_its_name_and_addresses_to_the_portal(
    start: MemberMaker, portal: ScriptedPortal, name: str | None
) -> None:
    member = start(portal.url, name=name)
    connection = portal.wait_until_joined()
    assert connection.path == "/relay/websocket"
    assert connection.query == {
        **({} if name is None else {"name": name}),
        "ipv4": "127.0.0.1",
        **({"ipv6": "::1"} if HAS_IPV6 else {}),
        "port": str(member.system.address_of(Family.IPV4).port),
    }
    assert connection.headers.get_all("X-Authorization") == [f"Bearer {TOKEN}"]
    assert connection.headers.get_all("User-Agent") == [user_agent()]
    assert re.fullmatch(r"\S+/\S+ relay/\S+ \(\S+; \S+\)", user_agent())
    assert TOKEN not in connection.target
    first = connection.wait_for("phx_join")
    assert first == {
        "topic": "relay",
        "event": "phx_join",
        "payload": {"stamp_secret": member.system.secret.expose()},
        "ref": 0,
    }


def test_a_relay_of_one_family_sends_one_address(start: MemberMaker, portal: ScriptedPortal) -> None:
    start(portal.url, public_ip6=None)
    assert portal.wait_until_joined().query.keys() == {"name", "ipv4", "port"}


def test_each_relay_generates_a_secret_and_accepts_credentials_of_the_portal(
    start_in: Callable[..., Member], portal: ScriptedPortal
) -> None:
    member = start_in(portal)
    first = portal.wait_until_joined().stamp_secret
    assert first is not None
    assert len(bytes.fromhex(first)) == 32
    member.turn_client(portal, "salt").allocate()
    start_in(portal)
    assert portal.wait_until_joined(2).stamp_secret != first


def test_refs_are_accepted_as_strings(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.ref_as_string = True
    member = start(portal.url)
    connection = portal.wait_until_joined()
    member.wait_until_ready()
    for number in range(1, 8):
        member.pass_time(10)
        connection.wait_for("heartbeat", number)
        wait_until(lambda: not member.channel.connection.unanswered)
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert connection.closed_with == 1000


def test_joining_a_portal_without_tls_logs_a_warning(start: MemberMaker) -> None:
    with ScriptedPortal() as plain:
        member = start(plain.url)
        plain.wait_until_joined()
        member.wait_until_ready()
        assert [event for event in member.events("warning") if "without TLS" in event]


def test_joining_a_portal_with_tls_logs_no_warning(member: Member) -> None:
    assert member.events("warning") == member.events("error") == member.events("critical") == []


def test_joining_through_a_proxy_does_not_log_its_password(start: MemberMaker, portal: ScriptedPortal) -> None:
    with ConnectProxy(("user", "pass-word")) as stands_between:
        credentials = ProxyCredentials("Basic dXNlcjpwYXNzLXdvcmQ=")
        proxy = Proxy("127.0.0.1", stands_between.port, credentials)
        member = start(None, portal=access_to(portal.url, proxy=proxy))
        member.wait_until_ready()
        assert stands_between.tunnels == 1
        assert f"127.0.0.1:{stands_between.port}" in repr(member.log)
        assert not re.search("dXNlcjpw|pass-word", repr(member.log))


def test_a_dump_contains_the_portals_state(member: Member, portal: ScriptedPortal) -> None:
    def state() -> Any:  # noqa: ANN401 - as JSON has it
        log = KeptLog()
        dump(member.system.measured, depths(), log)
        return log.take()[0]

    written = state()
    assert written["state"]["relay.portal.state"] == {"joined": 1}
    assert written["state"]["relay.ready"] == written["state"]["relay.portal.joins"] == 1
    assert written["state"]["relay.portal.oddities"] == 0
    assert {"ServerActor", "PortalActor"} <= written["inboxes"].keys()
    portal.wait_until_joined().send("nonsense")
    wait_until(lambda: state()["state"]["relay.portal.oddities"] == 1)


# Loss of the portal.


def test_a_lost_portal_affects_only_readiness(start_in: Callable[..., Member], portal: ScriptedPortal) -> None:
    member = start_in(portal)
    secret = portal.wait_until_joined().stamp_secret
    old = member.turn_client(portal, "old")
    with udp_socket("127.0.0.1") as peer:
        (relayed,) = old.allocate()
        assert old.bind_channel(0x4000, peer.getsockname()) is None
        portal.stop()
        member.wait_until_not_ready()
        assert member.page("/healthz") == OK
        old.send(0x4000, b"still relayed")
        assert peer.recvfrom(100) == (b"still relayed", relayed)
        assert old.refresh(600) is None
        member.turn_client(portal, "new").allocate()
        portal.start()
        member.retry_until(lambda: not member.system.not_ready)
        assert member.page("/readyz") == OK
        again = portal.wait_until_joined(2)
        assert again.stamp_secret == secret
        assert again.query == portal.connections[0].query
        peer.sendto(b"as ever", relayed[:2])
        assert old.receive() == (0x4000, b"as ever")
        member.turn_client(portal, "newest").allocate()
    assert member.events("info").count("ready") == 1
    assert member.channel.joins == 2
    assert member.is_running


@pytest.mark.parametrize("how", ["drop", "close", "phx_close", "phx_error"])
def test_the_relay_reconnects_after_any_end_of_a_connection(member: Member, portal: ScriptedPortal, how: str) -> None:
    connection = portal.wait_until_joined()
    member.clock.jump(limits.LASTING_JOIN)
    if how == "drop":
        connection.drop()
    elif how == "close":
        connection.close(1012, "restarting")
    else:
        connection.send(how)
    # Without help of the clock: the wait is an eighth of a second.
    again = portal.wait_until_joined(2)
    member.wait_until_ready()
    connection.wait_until_closed()
    assert again.stamp_secret == connection.stamp_secret
    assert portal.presence.secrets == {again.stamp_secret}


def test_clients_are_not_told_of_a_rollout(member: Member, portal: ScriptedPortal) -> None:
    """On a busy machine some absences are longer, which is no fault of the relay."""
    for number in range(1, 11):
        member.clock.jump(limits.LASTING_JOIN)
        portal.wait_until_joined(number).close(1012, "restarting")
        portal.wait_until_joined(number + 1)
        member.wait_until_ready()
    assert len(portal.presence.absences) == 10
    assert min(portal.presence.absences) < 0.3
    assert len(portal.connections) == 11


def test_a_portal_that_crashes_on_each_join_is_joined_at_growing_intervals(
    start: MemberMaker, portal: ScriptedPortal
) -> None:
    member = start(portal.url)
    # Otherwise joins would last on a busy machine.
    member.clock.hold()
    for number in range(1, 8):
        portal.wait_until_joined(number).send("phx_error")
        member.wait_for_state(State.WAITING)
        member.pass_time(30)
    waits = [entry["retry_in"] for entry in member.log if "retry_in" in entry]
    assert waits == sorted(waits)
    assert len(waits) == 7
    assert waits[-1] >= 4


def test_a_crashed_later_join_is_retried(member: Member, portal: ScriptedPortal) -> None:
    portal.script.join_error = "join crashed"
    portal.wait_until_joined().drop()
    member.retry_until(lambda: len(portal.connections) > 2)
    portal.script.join_error = None
    member.retry_until(lambda: not member.system.not_ready)
    assert "it refused the join (join crashed)" in repr(member.log)


def test_answered_heartbeats_keep_the_connection(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    for number in range(1, 13):
        member.pass_time(10)
        assert connection.wait_for("heartbeat", number) == {
            "topic": "phoenix",
            "event": "heartbeat",
            "payload": {},
            "ref": number,
        }
        wait_until(lambda: not member.channel.connection.unanswered)
    assert portal.connections == [connection]
    assert member.page("/readyz") == OK


def test_an_unanswered_heartbeat_closes_the_connection(member: Member, portal: ScriptedPortal) -> None:
    portal.script.answers_heartbeats = False
    connection = portal.wait_until_joined()
    for number in range(1, 4):
        member.pass_time(10)
        connection.wait_for("heartbeat", number)
    assert member.page("/readyz") == OK
    member.pass_time(10)
    connection.wait_until_closed()
    assert len([each for each in connection.frames if each["event"] == "heartbeat"]) == 3
    portal.wait_until_joined(2)
    member.wait_until_ready()


def test_closed_connections_are_released(start_in: Callable[..., Member], portal: ScriptedPortal) -> None:
    """A year has many connections."""
    links: weakref.WeakSet[WebSocketLink] = weakref.WeakSet()

    def make_link(*arguments: Any) -> WebSocketLink:  # noqa: ANN401
        link = WebSocketLink(*arguments)
        links.add(link)
        return link

    member = start_in(portal, link=make_link)
    portal.script.refuse_next = [Refusal(502)] * 3
    for number in range(1, 4):
        portal.wait_until_joined(number).drop()
        member.retry_until(lambda number=number: member.channel.joins > number)  # type: ignore[misc]
    assert len(portal.connections) == 7
    wait_until(lambda: len(links) == 1)


@pytest.mark.parametrize(
    "event", [TextReceived(TOKEN_EXPIRED), UpgradeRefused(401), ConnectionLost("late")], ids=["text", "refused", "lost"]
)
def test_late_events_of_a_former_connection_are_ignored(
    start_in: Callable[..., Member], portal: ScriptedPortal, event: ConnectionEvent
) -> None:
    """A connection may report an event before it learns that it was abandoned."""
    former: list[Callable[[], None]] = []

    def make_link(*arguments: Any) -> WebSocketLink:  # noqa: ANN401
        link = WebSocketLink(*arguments)
        former.append(functools.partial(arguments[-1], link, event))
        return link

    member = start_in(portal, link=make_link)
    portal.wait_until_joined().drop()
    member.retry_until(lambda: member.channel.joins > 1)
    portal.wait_until_joined(2)
    former[0]()
    member.look()
    assert member.channel.state is State.JOINED
    assert len(portal.connections) == 2
    assert member.is_running


def test_an_unanswered_join_closes_the_connection(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.answers_join = False
    member = start(portal.url)
    connection = portal.wait_for_connection()
    connection.wait_for("phx_join")
    portal.script.answers_join = True
    member.pass_time(5)
    connection.wait_until_closed()
    member.retry_until(lambda: not member.system.not_ready)
    assert portal.wait_until_joined() is not connection


def test_a_hanging_connection_attempt_times_out_and_is_retried(member: Member, portal: ScriptedPortal) -> None:
    portal.script.delay_upgrade = threading.Event()
    portal.wait_until_joined().drop()
    member.retry_until(lambda: len(portal.connections) > 1)
    hanging = portal.wait_for_connection(2)
    portal.script.delay_upgrade = None
    member.pass_time(limits.ATTEMPT_TIMEOUT - 5)
    assert member.channel.state is State.CONNECTING
    member.pass_time(5)
    hanging.wait_until_closed()
    member.retry_until(lambda: member.channel.joins == 2)
    member.wait_until_ready()
    assert not hanging.opened


def test_a_lost_channel_is_rejoined_on_the_same_connection(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    first = connection.wait_for("phx_join")
    member.pass_time(12)
    connection.send("phx_reply", {"status": "error", "response": {"reason": "unmatched topic"}})
    again = connection.wait_for("phx_join", 2)
    assert again["payload"] == first["payload"]
    wait_until(lambda: member.channel.joins == 2)
    assert member.page("/readyz") == OK
    assert portal.connections == [connection]


def test_a_missing_init_is_waited_for_and_logged(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.sends_init = False
    member = start(portal.url)
    connection = portal.wait_until_joined()
    member.wait_for_state(State.JOINED)
    for number in range(1, 4):
        member.pass_time(10)
        connection.wait_for("heartbeat", number)
        wait_until(lambda: not member.channel.connection.unanswered)
    assert len([event for event in member.events("warning") if "does not say init" in event]) == 1
    connection.send_init()
    member.wait_until_ready()


def test_a_flooding_portal_is_disconnected_without_effect_on_clients(start: MemberMaker) -> None:
    with RawServer(joined(ENDLESS_EVENTS)) as flooding, udp_socket("127.0.0.1") as client:
        member = start(flooding.url)
        flooding.wait_for_peer().gone.wait(LONG)
        assert member.is_answered(client)
        member.retry_until(lambda: len(flooding.peers) > 2)
        assert member.is_answered(client)
        assert member.is_running
        assert flooding.peers[0].sent < 8 * 2**20
        # A line for each frame could fill the disk.
        assert len(member.log) < 100


def test_a_connection_without_a_thread_or_descriptor_is_retried(
    member: Member, portal: ScriptedPortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def refuse_thread(thread: threading.Thread) -> None:
        if thread.name == "portal-connection":
            raise RuntimeError("can't start new thread")
        begin(thread)

    def refuse_descriptor(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def reasons() -> str:
        return " ".join(str(entry.get("reason")) for entry in member.log.copy())

    for number, (place, name, refuse, says) in enumerate(
        (
            (threading.Thread, "start", refuse_thread, "can't start new thread"),
            (os, "eventfd", refuse_descriptor, os.strerror(errno.EMFILE)),
        ),
        start=2,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refuse)
            portal.connections[-1].drop()
            member.retry_until(lambda says=says: says in reasons())  # type: ignore[misc]
        member.retry_until(lambda number=number: len(portal.connections) >= number)  # type: ignore[misc]
        portal.wait_until_joined(number)
        member.wait_until_ready()
    assert member.is_running


# Fatal errors.


def the_only_critical(member: Member) -> str:
    (event,) = (entry["reason"] for entry in member.log if entry["log_level"] == "critical")
    return str(event)


def test_a_rejected_join_exits_with_the_reason(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.join_error = "invalid_address: 127.0.0.1 is no public address"
    member = start(portal.url)
    assert member.wait_for_end(SOON) == 1
    assert "invalid_address: 127.0.0.1 is no public address" in the_only_critical(member)
    assert len(portal.connections) == 1


@pytest.mark.parametrize("topic", ["relay", "phoenix"])
def test_an_expired_token_exits_with_a_fix(member: Member, portal: ScriptedPortal, topic: str) -> None:
    portal.wait_until_joined().send("disconnect", {"reason": "token_expired"}, topic)
    assert member.wait_for_end(SOON) == 1
    assert "the token has expired" in the_only_critical(member)
    assert "FIREZONE_TOKEN" in the_only_critical(member)


def test_any_other_disconnect_is_only_logged(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    connection.send("disconnect", {"reason": "maintenance"})
    wait_until(lambda: "maintenance" in repr(member.log))
    assert member.page("/readyz") == OK
    assert not connection.closed


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("refusal", [Refusal.invalid_token, Refusal.missing_token])
def test_a_rejected_token_exits_with_the_portals_message(
    start: MemberMaker, portal: ScriptedPortal, refusal: Callable[..., Refusal], *, chunked: bool
) -> None:
    portal.script.refuse = refusal(chunked=chunked)
    member = start(portal.url)
    assert member.wait_for_end(SOON) == 1
    code = refusal.__name__
    assert f"{code}: {code.replace('_', ' ').capitalize()}" in the_only_critical(member)
    assert len(portal.connections) == 1


def test_a_revoked_token_exits(member: Member, portal: ScriptedPortal) -> None:
    member.turn_client(portal, "salt").allocate()
    portal.script.refuse = Refusal.invalid_token()
    portal.wait_until_joined().close(1000)
    assert member.wait_for_end(SOON) == 1
    assert "invalid_token" in the_only_critical(member)


@pytest.mark.parametrize("how", ["401", "token_expired"])
def test_a_final_rejection_drains_before_the_exit(
    start_in: Callable[..., Member], portal: ScriptedPortal, peer: socket.socket, how: str
) -> None:
    member = start_in(portal, drain_timeout=LONG)
    member.clock.hold()
    session = Session(member.turn_client(portal, "salt"), peer)
    newcomer = member.turn_client(portal, "new")
    connection = portal.wait_until_joined()
    if how == "401":
        portal.script.refuse = Refusal.invalid_token()
        connection.close(1000)
        member.retry_until(lambda: member.channel.state is State.OVER)
    else:
        connection.send("disconnect", {"reason": "token_expired"})
    wait_until(lambda: any(event.startswith("draining") for event in member.events("info")))
    settle(member)
    assert allocate_refused(newcomer) == 508
    assert session.relays()
    assert member.page("/readyz") == UNAVAILABLE
    assert "token" in the_only_critical(member)
    assert session.client.refresh(0) is None
    assert member.wait_for_end(SOON) == 1
    assert len(portal.connections) == (2 if how == "401" else 1)


def test_a_second_request_ends_the_drain_of_a_rejected_relay(
    start_in: Callable[..., Member], portal: ScriptedPortal
) -> None:
    member = start_in(portal, drain_timeout=LONG)
    member.turn_client(portal, "salt").allocate()
    portal.wait_until_joined().send("disconnect", {"reason": "token_expired"})
    wait_until(lambda: any(event.startswith("draining") for event in member.events("info")))
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 1


def test_a_rejection_during_a_drain_does_not_end_the_drain(
    start_in: Callable[..., Member], portal: ScriptedPortal, peer: socket.socket
) -> None:
    """The portal may reject the relay just before the relay leaves."""
    member = start_in(portal, drain_timeout=LONG, channel=Stuck)
    member.clock.hold()
    session = Session(member.turn_client(portal, "salt"), peer)
    begin_to_drain(member)
    member.system.events.put(Fatal("invalid_token"))
    wait_until(lambda: bool(member.events("critical")))
    assert session.relays()
    assert session.client.refresh(0) is None
    assert member.wait_for_end(SOON) == 0


def test_a_token_file_is_read_for_each_attempt(start: MemberMaker, portal: ScriptedPortal, tmp_path: Path) -> None:
    file = tmp_path / "token"
    member = start(None, portal=replace(access_to(portal.url), token_file=file))

    def token_of_the_next_attempt() -> str | None:
        portal.connections[-1].drop()
        number = len(portal.connections) + 1
        member.retry_until(lambda: len(portal.connections) >= number)
        return portal.wait_until_joined(number).headers.get("X-Authorization")

    assert portal.wait_until_joined().headers.get("X-Authorization") == f"Bearer {TOKEN}"
    file.write_text("rotated-token\n")
    assert token_of_the_next_attempt() == "Bearer rotated-token"
    file.unlink()
    assert token_of_the_next_attempt() == "Bearer rotated-token"
    (warning,) = {str(entry["reason"]) for entry in member.log if entry["event"].startswith("no new token")}
    assert str(file) in warning
    file.write_text("töken")
    assert token_of_the_next_attempt() == "Bearer rotated-token"
    file.write_text("third-token")
    assert token_of_the_next_attempt() == "Bearer third-token"
    assert "rotated-token" not in repr(member.log)


def test_a_problem_document_of_any_status_is_logged(member: Member, portal: ScriptedPortal) -> None:
    portal.script.refuse_next = [Refusal.problem(403, "wrong_region", f"Go away,\n{TOKEN}")]
    portal.wait_until_joined().drop()
    member.retry_until(lambda: member.channel.joins == 2)
    assert "(wrong_region: Go away,?[concealed])" in repr(member.log)


@pytest.mark.parametrize("status", [503, 429])
def test_retry_after_delays_the_next_attempt(start: MemberMaker, portal: ScriptedPortal, status: int) -> None:
    """The wait may be longer than the start timeout: a requested wait is not a failure."""
    portal.script.refuse_next = [Refusal.retry_after(100, status)]
    member = start(portal.url)
    member.wait_for_state(State.WAITING)
    for _ in range(9):
        member.pass_time(10)
    assert member.channel.state is State.WAITING
    assert len(portal.connections) == 1
    member.pass_time(11)
    portal.wait_until_joined()
    assert len(portal.connections) == 2
    member.wait_until_ready()


def test_an_unreachable_portal_exits_after_15_seconds(start: MemberMaker, nobody: str) -> None:
    member = start(nobody)
    for _ in range(10):
        member.wait_for_state(State.WAITING)
        member.pass_time(1)
    assert member.is_running
    assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
    member.wait_for_state(State.WAITING)
    member.pass_time(6)
    assert member.wait_for_end(SOON) == 1
    assert "15 s" in the_only_critical(member)
    assert "Connection refused" in the_only_critical(member)


def test_a_portal_with_an_untrusted_certificate_is_rejected(
    start: MemberMaker, portal: ScriptedPortal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path).ca_file))
    member = start(portal.url)
    member.wait_for_state(State.WAITING)
    member.pass_time(16)
    assert member.wait_for_end(SOON) == 1
    assert "certificate is not trusted" in the_only_critical(member)
    assert portal.connections == []


def be_without(member: Member, portal: ScriptedPortal, seconds: int) -> None:
    """Advance the clock without a portal, in steps of at most an hour."""
    portal.stop()
    member.wait_until_not_ready()
    while seconds:
        member.wait_for_state(State.WAITING)
        step = min(seconds, HOUR)
        member.pass_time(step)
        seconds -= step


def test_a_day_without_a_portal_exits(member: Member, portal: ScriptedPortal) -> None:
    be_without(member, portal, 23 * HOUR)
    with udp_socket("127.0.0.1") as client:
        assert member.is_answered(client)
    be_without(member, portal, HOUR)
    assert member.wait_for_end(SOON) == 1
    assert "24 hours" in the_only_critical(member)


def test_a_minute_less_than_a_day_does_not_exit(member: Member, portal: ScriptedPortal) -> None:
    be_without(member, portal, 24 * HOUR - MINUTE)
    assert member.is_running
    portal.start()
    member.retry_until(lambda: member.channel.joins == 2)
    member.wait_until_ready()
    # A new day begins with each success.
    portal.stop()
    member.wait_until_not_ready()
    member.wait_for_state(State.WAITING)
    member.pass_time(23 * HOUR)
    assert member.is_running


PLACES = {
    Connected: "connected",
    UpgradeRefused: "refused",
    ConnectionLost: "lost",
    OtherReceived: "other",
}


class Fragile(PortalChannel):
    """A channel with bugs.

    Args:
        config: settings of the channel.
        random: random generator of the channel.
        fails_at: the place of a bug; a test can change it.
    """

    def __init__(self, config: PortalConfig, random: RandomSource, fails_at: str = "nowhere") -> None:
        super().__init__(config, random)
        self.fails_at = fails_at

    def break_at(self, place: str) -> None:
        if self.fails_at == place:
            raise ZeroDivisionError(place)

    def start(self, now: Timestamp) -> None:
        self.break_at("start")
        super().start(now)

    def leave(self, now: Timestamp) -> None:
        self.break_at("leave")
        super().leave(now)

    def handle_timeout(self, now: Timestamp) -> None:
        self.break_at("time")
        super().handle_timeout(now)

    def handle_event(self, event: ConnectionEvent, now: Timestamp) -> None:
        self.break_once_at(PLACES.get(type(event), "text that is no poison"))
        if isinstance(event, TextReceived) and "poison" in event.text:
            raise ZeroDivisionError("text")
        super().handle_event(event, now)

    def break_once_at(self, place: str) -> None:
        if self.fails_at == place:
            self.fails_at = "nowhere"
            raise ZeroDivisionError(place)


def fragile(fails_at: str) -> ChannelMaker:
    return functools.partial(Fragile, fails_at=fails_at)


def failures(member: Member) -> list[tuple[str, str]]:
    return [(entry["actor"], entry["error"]) for entry in member.log if entry["log_level"] == "critical"]


@pytest.mark.parametrize("place", ["time", "leave"])
def test_a_bug_in_the_portal_actor_exits_with_an_error(
    start_in: Callable[..., Member], portal: ScriptedPortal, place: str
) -> None:
    member = start_in(portal, channel=Fragile)
    connection = portal.wait_until_joined()
    assert isinstance(member.channel, Fragile)
    member.channel.fails_at = place
    if place == "time":
        assert member.system.portal_actor is not None
        member.system.portal_actor.tell(Tick())
    else:
        member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 1
    assert failures(member) == [("portal", f"ZeroDivisionError: {place}")]
    connection.wait_until_closed()


def test_a_bug_at_the_start_of_the_portal_actor_exits_with_an_error(start: MemberMaker, portal: ScriptedPortal) -> None:
    """Otherwise the relay would never join, without an error."""
    member = start(portal.url, channel=fragile("start"))
    assert member.wait_for_end(SOON) == 1
    assert failures(member) == [("portal", "ZeroDivisionError: start")]


@pytest.mark.parametrize("dead", ["portal", "server"])
def test_a_bug_during_shutdown_exits_with_an_error(
    start_in: Callable[..., Member], portal: ScriptedPortal, dead: str
) -> None:
    """A shutdown request may arrive between the death of an actor and its report to the supervisor."""
    member = start_in(portal, drain_timeout=LONG)
    actor = member.system.portal_actor if dead == "portal" else member.system.server
    assert actor is not None
    actor.stop(timeout=LONG)
    member.ask(SystemRequest.LEAVE)
    member.system.events.put(Failure(dead, ZeroDivisionError("a bug")))
    assert member.wait_for_end(SOON) == 1
    assert failures(member) == [(dead, "ZeroDivisionError: a bug")]


@pytest.mark.parametrize("place", ["connected", "refused", "lost", "text", "other"])
def test_a_bug_in_the_core_closes_one_connection(start: MemberMaker, portal: ScriptedPortal, place: str) -> None:
    """A client that triggers a bug must not end the sessions of all clients."""
    if place == "refused":
        portal.script.refuse_next = [Refusal(502)]
    member = start(portal.url, channel=fragile(place))
    first = portal.wait_for_connection()
    if place in {"lost", "text", "other"}:
        portal.wait_until_joined()
        member.wait_until_ready()
        member.turn_client(portal, "salt").allocate()
        if place == "lost":
            first.drop()
        elif place == "text":
            first.send_text("poison")
        else:
            first.send_binary(b"poison")
    member.retry_until(lambda: len(portal.connections) > 1 and not member.system.not_ready)
    first.wait_until_closed()
    faults = [entry for entry in member.log if entry["log_level"] == "error"]
    assert len(faults) == 1
    assert faults[0]["exc_info"]
    member.look()
    assert member.channel.faults == 1
    assert len(member.system.core.allocations.by_id) == (place in {"lost", "text", "other"})


def test_bugs_are_logged_once_and_counted(start_in: Callable[..., Member], portal: ScriptedPortal) -> None:
    member = start_in(portal, channel=Fragile)
    for number in range(1, 4):
        portal.wait_until_joined(number).send_text("poison")
        member.retry_until(lambda number=number: member.channel.joins > number)  # type: ignore[misc]
    member.look()
    assert member.channel.faults == 3
    assert len(member.events("error")) == 1


# Shutdown.


def test_a_shutdown_leaves_the_channel_and_closes_the_connection(member: Member, portal: ScriptedPortal) -> None:
    member.clock.hold()
    connection = portal.wait_until_joined()
    member.turn_client(portal, "salt").allocate()
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert [each["event"] for each in connection.frames][-1] == "phx_leave"
    assert connection.closed_with == 1000
    assert portal.connections == [connection]
    assert member.events("warning") == member.events("error") == member.events("critical") == []


@pytest.mark.parametrize("reached", ["join not answered", "no init yet"])
def test_a_shutdown_before_init_leaves_the_channel(start: MemberMaker, portal: ScriptedPortal, reached: str) -> None:
    portal.script.answers_join = reached == "no init yet"
    portal.script.sends_init = False
    member = start(portal.url)
    connection = portal.wait_for_connection()
    connection.wait_for("phx_join")
    if reached == "no init yet":
        member.wait_for_state(State.JOINED)
    member.clock.hold()
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert (connection.left, connection.closed_with) == (True, 1000)


def test_a_leaving_relay_is_not_ready_and_keeps_relaying(start_in: Callable[..., Member], portal: ScriptedPortal) -> None:
    portal.script.answers_leave = False
    member = start_in(portal)
    member.clock.hold()
    with udp_socket("127.0.0.1") as client:
        member.ask(SystemRequest.LEAVE)
        portal.wait_until_left()
        assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
        assert member.is_answered(client)
        # There is no drain.
        member.turn_client(portal, "new").allocate()


def test_an_unconfirmed_leave_times_out_and_closes(member: Member, portal: ScriptedPortal) -> None:
    portal.script.answers_leave = False
    member.clock.hold()
    member.ask(SystemRequest.LEAVE)
    connection = portal.wait_until_left()
    assert member.is_running
    member.pass_time(limits.LEAVE_TIMEOUT)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert connection.closed_with == 1000


def test_a_mute_portal_delays_the_exit_by_two_seconds(start: MemberMaker) -> None:
    assert LEAVE_TIMEOUT > limits.LEAVE_TIMEOUT + limits.CLOSE_TIMEOUT == 2
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url)
        member.wait_until_ready()
        member.clock.hold()
        member.ask(SystemRequest.LEAVE)
        for state, seconds in ((State.LEAVING, limits.LEAVE_TIMEOUT), (State.CLOSING, limits.CLOSE_TIMEOUT)):
            member.wait_for_state(state)
            member.pass_time(seconds - 0.01)
            assert member.channel.state is state
            member.pass_time(0.02)
        assert member.wait_for_end(SOON) == 0
        # The leave has not timed out: the relay has left.
        assert "left the portal" in member.events("info")


def test_the_leave_timeout_expires_without_a_wake_up(start: MemberMaker) -> None:
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url)
        member.wait_until_ready()
        began = member.clock.monotonic()
        member.ask_and_wait(SystemRequest.LEAVE)
        # The rest of the timeout passes in real time.
        member.pass_time(limits.LEAVE_TIMEOUT - 0.05)
        wait_until(lambda: member.channel.state is not State.LEAVING)
        member.pass_time(limits.CLOSE_TIMEOUT - 0.05)
        assert member.wait_for_end(SOON) == 0
        assert member.clock.monotonic() - began >= 2


@pytest.mark.parametrize("request_", [SystemRequest.LEAVE, SystemRequest.STOP])
def test_a_second_request_exits_at_once(start: MemberMaker, request_: SystemRequest) -> None:
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url)
        member.wait_until_ready()
        member.clock.hold()
        member.ask(SystemRequest.LEAVE)
        member.wait_for_state(State.LEAVING)
        member.ask(request_)
        assert member.wait_for_end(SOON) == 0


def test_a_stop_does_not_leave_the_channel(member: Member, portal: ScriptedPortal) -> None:
    member.clock.hold()
    connection = portal.wait_until_joined()
    member.ask(SystemRequest.STOP)
    assert member.wait_for_end(SOON) == 0
    assert not connection.left


def test_an_unreachable_portal_does_not_delay_the_exit(start: MemberMaker, nobody: str) -> None:
    member = start(nobody)
    member.wait_for_state(State.WAITING)
    member.clock.hold()
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 0


def test_a_pending_attempt_does_not_delay_the_exit(start: MemberMaker) -> None:
    with RawServer(SILENCE) as silent:
        member = start(silent.url)
        silent.wait_for_peer()
        member.clock.hold()
        member.ask(SystemRequest.LEAVE)
        assert member.wait_for_end(SOON) == 0


class Stuck(PortalChannel):
    """A channel that never leaves."""

    def leave(self, now: Timestamp) -> None:
        """Do nothing."""


def test_a_portal_actor_that_never_leaves_times_out(start_in: Callable[..., Member], portal: ScriptedPortal) -> None:
    member = start_in(portal, channel=Stuck)
    member.ask_and_wait(SystemRequest.LEAVE)
    # The rest of the timeout passes in real time.
    member.clock.jump(LEAVE_TIMEOUT - 0.05)
    member.wake()
    assert member.wait_for_end(SOON) == 0
    assert len(member.events("warning")) == 1


# Drain.


class Session:
    """A client, its allocation and a peer."""

    def __init__(self, client: TurnClient, peer: socket.socket) -> None:
        self.client = client
        self.peer = peer
        (self._relayed,) = client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None

    def relays(self) -> bool:
        """Return whether packets are relayed both ways."""
        self.client.send(0x4000, b"there")
        there = self.peer.recvfrom(100) == (b"there", self._relayed)
        self.peer.sendto(b"back", self._relayed[:2])
        return there and self.client.receive() == (0x4000, b"back")


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with udp_socket("127.0.0.1") as peer:
        yield peer


def begin_to_drain(member: Member) -> None:
    """Request a shutdown, and wait until new allocations are rejected."""
    member.ask_and_wait(SystemRequest.LEAVE)
    assert any(event.startswith("draining") for event in member.events("info"))
    settle(member)


@pytest.fixture(params=["portal", "standalone"])
def draining(
    request: pytest.FixtureRequest, start: MemberMaker, portal: ScriptedPortal, peer: socket.socket
) -> tuple[Member, Session]:
    """A relay, with a portal or standalone, in a drain longer than any test, and its only session."""
    if request.param == "portal":
        member = start(portal.url, drain_timeout=LONG)
        portal.wait_until_joined()
        member.wait_until_ready()
        session = Session(member.turn_client(portal, "salt"), peer)
    else:
        member = start(None, drain_timeout=LONG, secret=CONFIG.secret)
        session = Session(member.client(), peer)
    # Otherwise the drain of an idle relay would end on a busy machine.
    member.clock.hold()
    begin_to_drain(member)
    return member, session


def test_a_drain_ends_if_nothing_is_relayed(draining: tuple[Member, Session]) -> None:
    """Clients that have moved to another relay never delete their allocations."""
    member, session = draining
    assert session.relays()

    def is_over() -> bool:
        # Ten seconds in a second at most: the relay looks every second, and the whole drain has 90.
        member.clock.jump(0.01)
        return not member.is_running

    wait_until(is_over)
    assert member.wait_for_end() == 0
    assert "nothing is relayed: not draining any longer" in member.events("info")


def test_a_drain_leaves_the_portal_at_once_and_keeps_relaying(
    start_in: Callable[..., Member], portal: ScriptedPortal, peer: socket.socket
) -> None:
    member = start_in(portal, drain_timeout=LONG)
    session = Session(member.turn_client(portal, "salt"), peer)
    member.clock.hold()
    begin_to_drain(member)
    connection = portal.wait_until_left()
    connection.wait_until_closed()
    assert connection.closed_with == 1000
    wait_until(lambda: "left the portal" in member.events("info"))
    assert session.relays()
    assert member.is_running
    # The relay does not rejoin during the drain.
    for _ in range(10):
        member.pass_time(4)
        assert session.relays()
    assert portal.connections == [connection]
    assert session.client.refresh(0) in {None, 437}
    assert member.wait_for_end(SOON) == 0


def test_a_drain_serves_allocations_and_rejects_new_allocations(
    draining: tuple[Member, Session], portal: ScriptedPortal
) -> None:
    member, session = draining
    newcomer = member.turn_client(portal, "new") if member.system.portal is not None else member.client()
    assert allocate_refused(newcomer) == 508
    assert session.relays()
    assert session.client.refresh(600) is None
    assert session.client.bind_channel(0x4000, session.peer.getsockname()) is None
    with udp_socket("127.0.0.1") as client:
        assert member.is_answered(client)
    assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
    assert member.is_running


def test_a_drain_ends_once_the_last_allocation_is_deleted(draining: tuple[Member, Session]) -> None:
    member, session = draining
    assert session.relays()
    assert member.is_running
    assert session.client.refresh(0) is None
    assert member.wait_for_end(SOON) == 0


def test_a_drain_ends_once_the_last_allocation_expires(draining: tuple[Member, Session]) -> None:
    member, _ = draining
    member.clock.jump(601)
    settle(member)
    assert member.wait_for_end(SOON) == 0


@pytest.mark.parametrize("request_", [SystemRequest.LEAVE, SystemRequest.STOP])
def test_a_second_request_ends_a_drain_at_once(draining: tuple[Member, Session], request_: SystemRequest) -> None:
    member, _ = draining
    member.ask(request_)
    assert member.wait_for_end(SOON) == 0


def test_a_dump_does_not_end_a_drain(draining: tuple[Member, Session]) -> None:
    member, session = draining
    member.ask(SystemRequest.DUMP)
    assert session.relays()
    assert member.is_running


def test_a_drain_ends_at_its_timeout(start: MemberMaker, peer: socket.socket) -> None:
    member = start(None, drain_timeout=0.1, secret=CONFIG.secret)
    Session(member.client(), peer)
    began = time.monotonic()
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 0
    assert time.monotonic() - began > 0.09
    assert len(member.events("warning")) == 1


def test_a_drain_in_a_network_ends_at_its_timeout(
    start_in: Callable[..., Member], portal: ScriptedPortal, peer: socket.socket
) -> None:
    """The leave runs during the drain: its timeout is not added, and a fast leave does not shorten the drain."""
    member = start_in(portal, drain_timeout=0.3)
    Session(member.turn_client(portal, "salt"), peer)
    member.clock.hold()
    member.ask(SystemRequest.LEAVE)
    wait_until(lambda: "left the portal" in member.events("info"))
    member.clock.jump(0.29)
    member.wake()
    # The supervisor still waits; after its end a wake-up would fail.
    member.wake()
    member.clock.jump(0.02)
    assert member.wait_for_end(SOON) == 0
    assert "left the portal" in member.events("info")


def test_a_drain_at_its_timeout_waits_for_the_leave(start: MemberMaker, peer: socket.socket) -> None:
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url, drain_timeout=0.1, secret=CONFIG.secret)
        member.wait_until_ready()
        Session(member.client(), peer)
        member.clock.hold()
        member.ask_and_wait(SystemRequest.LEAVE)
        member.clock.jump(0.1)
        member.wake()
        wait_until(lambda: any(event.startswith("not waiting") for event in member.events("warning")))
        assert member.is_running
        member.wait_for_state(State.LEAVING)
        member.pass_time(limits.LEAVE_TIMEOUT)
        member.pass_time(limits.CLOSE_TIMEOUT)
        assert member.wait_for_end(SOON) == 0


def test_a_drain_without_allocations_ends_at_once(start: MemberMaker, portal: ScriptedPortal) -> None:
    for url in (portal.url, None):
        member = start(url, drain_timeout=LONG)
        member.wait_until_ready()
        member.clock.hold()
        member.ask(SystemRequest.LEAVE)
        assert member.wait_for_end(SOON) == 0


def test_a_finished_drain_waits_for_the_leave(start: MemberMaker) -> None:
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url, drain_timeout=LONG)
        member.wait_until_ready()
        member.clock.hold()
        member.ask(SystemRequest.LEAVE)
        wait_until(lambda: "no allocation is left" in member.events("info"))
        assert member.is_running
        member.wait_for_state(State.LEAVING)
        member.pass_time(limits.LEAVE_TIMEOUT)
        member.pass_time(limits.CLOSE_TIMEOUT)
        assert member.wait_for_end(SOON) == 0


def test_a_drain_timeout_of_zero_skips_the_drain(start: MemberMaker, peer: socket.socket) -> None:
    member = start(None, secret=CONFIG.secret)
    Session(member.client(), peer)
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 0


def test_a_bug_ends_a_drain_with_an_error(draining: tuple[Member, Session]) -> None:
    member, _ = draining
    member.system.server.tell("what is this?")
    assert member.wait_for_end(SOON) == 1


SECRET = "a secret that is told to the portal only"
ECHO = f"{TOKEN} and {SECRET}"


def refusal(head: str) -> Recital:
    return Recital("refusal", f"HTTP/1.1 {head}\r\n\r\n".encode())


def after_join(*frames: bytes) -> Recital:
    return joined(Recital("echo", b"".join(frames)))


def text(value: object) -> Recital:
    """A portal that accepts a join and then sends a JSON message."""
    return after_join(frame(TEXT, json.dumps(value).encode()))


def said(event: str, payload: object, topic: str = "relay", ref: object = None) -> Recital:
    return text({"topic": topic, "event": event, "payload": payload, "ref": ref})


ECHOES = {
    "unknown event": said(ECHO, {}),
    "unknown topic": said("init", {}, ECHO),
    "unknown keys": text({"topic": "relay", "event": "init", TOKEN: 1, SECRET: 2, ECHO: 3}),
    "no JSON": after_join(frame(TEXT, ECHO.encode())),
    "no object": text([ECHO]),
    "topic and event of another type": text({"topic": [ECHO], "event": {ECHO: 1}}),
    "error reply": said("phx_reply", {"status": "error", "response": {"reason": ECHO}}),
    "error reply of another type": said("phx_reply", {"status": ECHO, "response": {"reason": [ECHO]}}, ref=ECHO),
    "heartbeat error": said("phx_reply", {"status": "error", "response": ECHO}, "phoenix", 1),
    "disconnect": said("disconnect", {"reason": ECHO}),
    "disconnect of another type": said("disconnect", {ECHO: ECHO}),
    "close": after_join(frame(0x8, b"\x0f\xa0" + ECHO.encode())),
    "invalid UTF-8": after_join(frame(TEXT, ECHO.encode() + b"\xff")),
    "binary": after_join(frame(0x2, ECHO.encode())),
    "ping": after_join(frame(0x9, ECHO.encode())),
    "invalid opcode": after_join(frame(0x3, ECHO.encode())),
    "status line": Recital("status line", f"{TOKEN} {SECRET}\r\n\r\n".encode()),
    "status": refusal(f"{ECHO} {ECHO}"),
    "phrase": refusal(f"503 {ECHO}"),
    "header": refusal(f"101 Well\r\n{TOKEN}\r\n{SECRET}: {ECHO}"),
    "header that is no text": Recital("header", f"HTTP/1.1 101 {ECHO}\r\n{ECHO}".encode() + b"\xff\r\n\r\n"),
    "length": refusal(f"401 No\r\nContent-Length: {ECHO}"),
    "retry-after": refusal(f"503 Later\r\nRetry-After: {ECHO}\r\nContent-Length: 0"),
    "location": refusal(f"302 Found\r\nLocation: ws://{TOKEN}/{ECHO}\r\nSet-Cookie: {TOKEN}={SECRET}"),
}


class Recorded(Fragile):
    """A channel that records its settings and all its commands."""

    def __init__(self, config: PortalConfig, random: RandomSource) -> None:
        super().__init__(config, random)
        self.config = config
        self.commands: list[PortalCommand] = []

    def drain(self) -> list[PortalCommand]:
        drained = super().drain()
        self.commands.extend(drained)
        return drained


def check_that_nothing_is_shown(member: Member, caplog: pytest.LogCaptureFixture) -> None:
    channel = member.channel
    assert isinstance(channel, Recorded)
    log = KeptLog()
    dump(member.system.measured, depths(), log)
    tracebacks = [
        "".join(traceback.format_exception(each))
        for entry in member.log
        if isinstance(each := entry.get("exc_info"), Exception)
    ]
    # Without the portal's frames, which contain both.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("websockets.")]
    shown = [repr(member.log), repr(logged), log.written.text, *tracebacks]
    shown += [repr(member.system.config), repr(channel), repr(channel.config), repr(channel.commands)]
    assert channel.commands
    for each in shown:
        assert TOKEN not in each
        assert SECRET not in each


@pytest.mark.parametrize("echo", ECHOES)
def test_token_and_secret_are_redacted_in_replies_of_the_portal(
    start: MemberMaker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, echo: str
) -> None:
    monkeypatch.setattr("relay.net.limited.BODY_TIMEOUT", 0.1)
    caplog.set_level(0)
    with RawServer(ECHOES[echo]) as echoing:
        member = start(echoing.url, channel=Recorded, secret=RelaySecret(SECRET))
        connection = echoing.wait_for_peer()
        wait_until(
            lambda: (
                echo == "ping"
                or bool(member.channel.protocol_errors)
                or "no connection to the portal" in member.events("warning")
            )
        )
        wait_until(lambda: connection.sent >= len(ECHOES[echo].text))
        member.look()
        check_that_nothing_is_shown(member, caplog)
        member.ask(SystemRequest.STOP)
        assert member.wait_for_end(SOON) == 0
        check_that_nothing_is_shown(member, caplog)


@pytest.mark.parametrize("place", ["join", "401"])
def test_token_and_secret_are_redacted_in_fatal_errors(
    start: MemberMaker, portal: ScriptedPortal, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    caplog.set_level(0)
    if place == "join":
        portal.script.join_error = ECHO
    else:
        portal.script.refuse = Refusal.problem(401, ECHO, ECHO)
    member = start(portal.url, channel=Recorded, secret=RelaySecret(SECRET))
    assert member.wait_for_end(SOON) == 1
    assert "[concealed] and [concealed]" in the_only_critical(member)
    check_that_nothing_is_shown(member, caplog)


def test_token_and_secret_are_redacted_in_tracebacks(start: MemberMaker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    with RawServer(after_join(frame(TEXT, f"poison {ECHO}".encode()))) as poisonous:
        member = start(poisonous.url, channel=Recorded, secret=RelaySecret(SECRET))
        wait_until(lambda: bool(member.events("error")))
        check_that_nothing_is_shown(member, caplog)


def test_a_healthy_relay_exposes_no_token_or_secret(
    start_in: Callable[..., Member], portal: ScriptedPortal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    member = start_in(portal, channel=Recorded, secret=RelaySecret(SECRET))
    assert portal.wait_until_joined().stamp_secret == SECRET
    member.ask(SystemRequest.LEAVE)
    assert member.wait_for_end(SOON) == 0
    check_that_nothing_is_shown(member, caplog)


class Notified:
    """systemd's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(LONG)
        self.socket.bind(str(path))
        self.environ = {"NOTIFY_SOCKET": str(path)}

    def next(self) -> dict[str, str]:
        """Return the fields of the next message."""
        fields = (line.partition("=") for line in self.socket.recv(4096).decode().split("\n"))
        return {name: value for name, _, value in fields}

    def wait_for(self, field: str) -> dict[str, str]:
        """Return the next message with a field."""
        while field not in (message := self.next()):
            pass
        return message

    def waiting(self) -> list[dict[str, str]]:
        """Return all queued messages."""
        found = []
        while select.select([self.socket], [], [], 0)[0]:
            found.append(self.next())
        return found


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[Notified]:
    notified = Notified(tmp_path / "notify")
    with notified.socket:
        yield notified


def test_systemd_receives_ready_at_init(start: MemberMaker, portal: ScriptedPortal, notified: Notified) -> None:
    portal.script.sends_init = False
    member = start(portal.url, systemd=Systemd({**notified.environ, "WATCHDOG_USEC": "40000"}))
    assert notified.next() == {"STATUS": "joining the portal"}
    connection = portal.wait_until_joined()
    member.wait_for_state(State.JOINED)
    member.look()
    # The watchdog is not notified either: its interval begins at READY=1.
    assert notified.waiting() == []
    connection.send_init()
    assert notified.next() == {"READY": "1", "STATUS": "answering clients"}
    for _ in range(3):
        assert notified.next() == {"WATCHDOG": "1"}


def test_a_reconnect_does_not_repeat_ready(start: MemberMaker, portal: ScriptedPortal, notified: Notified) -> None:
    member = start(portal.url, systemd=Systemd(notified.environ))
    notified.wait_for("READY")
    portal.wait_until_joined().drop()
    member.retry_until(lambda: member.channel.joins == 2)
    member.wait_until_ready()
    assert [message for message in notified.waiting() if "READY" in message] == []


@pytest.mark.parametrize("drain_timeout", [0, 20])
def test_systemd_receives_stopping_and_an_extended_timeout(
    start: MemberMaker, portal: ScriptedPortal, notified: Notified, peer: socket.socket, drain_timeout: int
) -> None:
    portal.script.answers_leave = False
    member = start(portal.url, systemd=Systemd({**notified.environ, "WATCHDOG_USEC": "40000"}), drain_timeout=drain_timeout)
    portal.wait_until_joined()
    member.wait_until_ready()
    Session(member.turn_client(portal, "salt"), peer)
    member.ask(SystemRequest.LEAVE)
    stopping = notified.wait_for("STOPPING")
    assert stopping["STOPPING"] == "1"
    assert stopping["STATUS"] == ("draining" if drain_timeout else "stopping")
    least = (drain_timeout + LEAVE_TIMEOUT) * 1_000_000
    assert least < int(stopping["EXTEND_TIMEOUT_USEC"]) < least + 30 * 1_000_000
    # Notifications continue until the exit.
    assert notified.wait_for("WATCHDOG")
    member.ask(SystemRequest.STOP)
    assert member.wait_for_end(SOON) == 0


def test_a_standalone_relay_sends_ready_at_once(start: MemberMaker, notified: Notified) -> None:
    start(None, systemd=Systemd(notified.environ))
    assert notified.next() == {"READY": "1", "STATUS": "answering clients"}


@pytest.mark.usefixtures("only_new_garbage")
@pytest.mark.parametrize(
    "recital",
    [
        SILENCE,
        SAYS_NOTHING,
        joined(ENDLESS_EVENTS),
        upgraded(INVALID_UTF8),
        Recital("dripping", b"HTTP/1.1 101 ", b"x", drips=True),
    ],
    ids=str,
)
def test_stopping_ends_every_thread_and_closes_every_descriptor(log: list[dict[str, Any]], recital: Recital) -> None:
    timeouts = Timeouts(stop_listener=LONG, stop_portal=LONG, stop_server=LONG)
    with RawServer(recital) as server:
        threads, opened = set(threading.enumerate()), open_descriptors()
        with System(replace(CONFIG, portal=access_to(server.url), timeouts=timeouts), JumpingClock()):
            peer = server.wait_for_peer()
            wait_until(lambda: peer.sent > 0 or recital is SILENCE)
            began = time.monotonic()
        assert time.monotonic() - began < SOON
        server.stop()
        wait_until(lambda: set(threading.enumerate()) <= threads)
        wait_until(lambda: open_descriptors() <= opened)
    assert [entry for entry in log if entry["event"] == "did not stop in time"] == []
