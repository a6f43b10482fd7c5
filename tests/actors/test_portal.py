"""A relay in a portal's network: the gate, what a lost portal changes, how it leaves, and what ends it."""

import contextlib
import errno
import gc
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
from structlog.testing import capture_logs
from structlog.typing import EventDict

from relay.actors import departure as actors_departure
from relay.actors import portal as actors_portal
from relay.actors import system as actors_system
from relay.actors.messages import Tick
from relay.actors.news import Failure, Request
from relay.actors.system import System
from relay.config import PortalAccess
from relay.core.addresses import Family
from relay.core.credentials import RelaySecret
from relay.core.instant import Instant
from relay.core.portal import limits
from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.commands import PortalCommand
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.core.stun import MessageClass, Method, encode
from relay.net import upgrade
from relay.net.link import WebSocketLink
from relay.net.proxy import Proxy, ProxyCredentials
from relay.ops.dump import dump
from relay.ops.machine import user_agent
from relay.ops.systemd import Systemd
from tests.actors.conftest import CONFIG, JumpingClock, Relay
from tests.actors.test_lifetime import allocate_refused, settle
from tests.conftest import HAS_IPV6, wait_until
from tests.connect_proxy import ConnectProxy
from tests.raw_server import (
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
from tests.scripted_portal import Authority, Refusal, ScriptedPortal
from tests.turn_client import TurnClient, udp_socket

TOKEN = ".SFMyNTY.g2gDaANtAAAAJDE.the-token-of-the-relay-under-test"
NAME = "a relay under test"
MINUTE, HOUR = 60, 3600
LONG = 90.0
"""Seconds that no test takes."""

SOON = 30.0
"""Seconds in which the relay has ended if it waits for nothing, on a machine that has other work."""

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
def log() -> Iterator[list[EventDict]]:
    """What the relay has logged so far."""
    with capture_logs() as log:
        yield log


class Member(Relay):
    """A relay in a network, or on its own, that runs until it ends."""

    def __init__(self, system: System, clock: JumpingClock, stack: contextlib.ExitStack, log: list[EventDict]) -> None:
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
        """Give what was logged at a level, but for what some machines have: settings that bite, and what mends them."""
        return [entry["event"] for entry in self.log.copy() if entry["log_level"] == level and "mend" not in entry]

    def ask(self, request: Request) -> None:
        self.system.news.put(request)

    def ask_and_wait(self, request: Request) -> None:
        """Ask, and wait until what follows at once has been done."""
        self.ask(request)
        self.ask(Request.DUMP)
        assert self._dumped.acquire(timeout=LONG)

    def wait_for_end(self, seconds: float = LONG) -> int:
        """Wait until it ends by itself, and give its exit code."""
        outcome = self._outcome.get(timeout=seconds)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def page(self, path: str) -> int:
        """Give the status of a health page."""
        at = self.system._http["health"]
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
        """Have the portal actor look at the clock, and wait until it has."""
        actor = self.system._portal_actor
        assert actor is not None
        with contextlib.suppress(pykka.ActorDeadError):
            actor.ask(Tick(), timeout=LONG)

    def pass_time(self, seconds: float) -> None:
        """Let time pass for the portal actor."""
        self.clock.jump(seconds)
        self.look()

    def retry_until(self, condition: Callable[[], bool]) -> None:
        """Have it try again each time that it waits to, until it has got there."""

        def is_there() -> bool:
            if condition():
                return True
            if self.channel.state is State.WAITING:
                # As long as any of its waits, and less than its patience.
                self.pass_time(30 if self.channel.joins else 1)
            return False

        wait_until(is_there, LONG)

    def turn_client(self, portal: ScriptedPortal, salt: str) -> TurnClient:
        """A client with a credential of the portal's."""
        at = self.system.address_of(Family.IPV4)
        return self._stack.enter_context(TurnClient((at.host, at.port), portal.mint(salt)))

    def is_answered(self, client: socket.socket) -> bool:
        """Tell whether a Binding is answered that this client sends now."""
        at = self.system.address_of(Family.IPV4)
        client.sendto(BINDING, (at.host, at.port))
        return bool(select.select([client], [], [], SOON)[0])

    def _run(self) -> None:
        try:
            self._outcome.put(self.system.run(self._dumped.release))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to hear of it
            self._outcome.put(error)

    def _stop(self) -> None:
        if self.is_running:
            self.ask(Request.STOP)
        self._thread.join(LONG)
        assert not self.is_running


MemberMaker: TypeAlias = Callable[..., Member]


def access_to(url: str, name: str | None = NAME, proxy: Proxy | None = None) -> PortalAccess:
    return PortalAccess(PortalUrl.parse(url), PortalToken(TOKEN), name, proxy)


@pytest.fixture
def start(log: list[EventDict]) -> Iterator[MemberMaker]:
    """Start relays in the network of the portal at a URL; with settings that differ from those of the tests as given."""
    with contextlib.ExitStack() as stack:

        def start(url: str | None, *, systemd: Systemd | None = None, **settings: object) -> Member:
            given = {"secret": None, "portal": None if url is None else access_to(url), **settings}
            clock = JumpingClock()
            system = System(replace(CONFIG, **given), clock, systemd=systemd)  # type: ignore[arg-type]
            return Member(stack.enter_context(system), clock, stack, log)

        yield start


@pytest.fixture
def start_in(start: MemberMaker) -> Callable[..., Member]:
    """Start relays that a portal has let in and told to begin."""

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
def polite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a portal have more time for a farewell than any test takes: whoever ends sooner has not waited for its end."""
    for name in ("LEAVE_TIMEOUT", "CLOSE_TIMEOUT"):
        monkeypatch.setattr(limits, name, LONG)
    monkeypatch.setattr(actors_departure, "LEAVE_TIMEOUT", 3 * LONG)


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of a portal that is not there."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"ws://127.0.0.1:{bound.getsockname()[1]}"


# The gate.


def test_nobody_is_answered_before_init_and_what_came_before_is_not_answered_after_it(
    start: MemberMaker, portal: ScriptedPortal
) -> None:
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
        # They were before those of the other in the same queue.
        assert not select.select([early], [], [], 0)[0]
        assert member.is_answered(early)
    assert member.events("info").count("ready") == 1


@pytest.mark.parametrize("family", [Family.IPV4, *([Family.IPV6] if HAS_IPV6 else [])])
def test_after_init_clients_of_each_family_are_served(member: Member, portal: ScriptedPortal, family: Family) -> None:
    at = member.system.address_of(family)
    with TurnClient((at.host, at.port), portal.mint("salt")) as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        client.send(0x4000, b"hello")
        assert peer.recvfrom(100) == (b"hello", relayed[:2])


def test_before_the_portal_answers_at_all_the_relay_is_well_but_not_ready(
    start: MemberMaker, portal: ScriptedPortal
) -> None:
    portal.script.delay_upgrade = threading.Event()
    member = start(portal.url)
    portal.wait_for_connection()
    assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
    portal.script.delay_upgrade.set()
    member.wait_until_ready()


def test_a_portal_that_is_lost_before_init_leaves_the_gate_shut_until_it_says_so(
    start: MemberMaker, portal: ScriptedPortal
) -> None:
    portal.script.sends_init = False
    member = start(portal.url)
    portal.wait_until_joined().drop()
    member.retry_until(lambda: len(portal.connections) > 1)
    connection = portal.wait_until_joined(2)
    assert member.page("/readyz") == UNAVAILABLE
    connection.send_init()
    member.wait_until_ready()


def test_another_init_begins_nothing(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    threads = threading.active_count()
    for _ in range(3):
        connection.send_init()
    # The answer shows that what came before has been heard.
    connection.ping()
    member.look()
    # Fewer, if the last request for a page was still being answered before.
    assert threading.active_count() <= threads
    assert member.events("info").count("ready") == 1
    assert member.is_running


def test_the_port_is_taken_from_the_start(start: MemberMaker, portal: ScriptedPortal) -> None:
    """That it is in use should be known before a portal hears of this relay."""
    portal.script.sends_init = False
    member = start(portal.url)
    at = member.system.address_of(Family.IPV4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other, pytest.raises(OSError, match="in use"):
        other.bind((at.host, at.port))


# What the portal is told.


@pytest.mark.parametrize("name", [NAME, None, "Zürich & more = 100 %"])
def test_the_portal_is_told_who_and_where_the_relay_is(start: MemberMaker, portal: ScriptedPortal, name: str | None) -> None:
    member = start(None, portal=access_to(portal.url, name))
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
    assert TOKEN not in connection._websocket.request.path  # type: ignore[union-attr]
    first = connection.wait_for("phx_join")
    assert first == {
        "topic": "relay",
        "event": "phx_join",
        "payload": {"stamp_secret": member.system.secret.reveal()},
        "ref": 0,
    }


def test_a_relay_of_one_family_tells_one_address(start: MemberMaker, portal: ScriptedPortal) -> None:
    start(portal.url, public_ip6=None)
    assert portal.wait_until_joined().query.keys() == {"name", "ipv4", "port"}


def test_each_relay_makes_its_own_secret_and_clients_of_the_portal_get_in_with_it(
    start_in: Callable[..., Member], portal: ScriptedPortal
) -> None:
    member = start_in(portal)
    first = portal.wait_until_joined().stamp_secret
    assert first is not None
    assert len(bytes.fromhex(first)) == 32
    member.turn_client(portal, "salt").allocate()
    start_in(portal)
    assert portal.wait_until_joined(2).stamp_secret != first


def test_refs_may_come_back_as_strings(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.ref_as_string = True
    member = start(portal.url)
    connection = portal.wait_until_joined()
    member.wait_until_ready()
    for number in range(1, 8):
        member.pass_time(10)
        connection.wait_for("heartbeat", number)
        wait_until(lambda: member.channel._conversation.unanswered == 0)
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert connection.closed_with == 1000


def test_a_portal_without_tls_is_joined_with_a_warning(start: MemberMaker) -> None:
    with ScriptedPortal() as plain:
        member = start(plain.url)
        plain.wait_until_joined()
        member.wait_until_ready()
        assert [event for event in member.events("warning") if "without TLS" in event]


def test_a_portal_with_tls_is_joined_without_any_warning(member: Member) -> None:
    assert member.events("warning") == member.events("error") == member.events("critical") == []


def test_a_portal_is_joined_through_a_proxy_whose_password_is_not_logged(start: MemberMaker, portal: ScriptedPortal) -> None:
    with ConnectProxy(("user", "pass-word")) as stands_between:
        credentials = ProxyCredentials("Basic dXNlcjpwYXNzLXdvcmQ=")
        proxy = Proxy("127.0.0.1", stands_between.port, credentials)
        member = start(None, portal=access_to(portal.url, proxy=proxy))
        member.wait_until_ready()
        assert stands_between.tunnels == 1
        assert f"127.0.0.1:{stands_between.port}" in repr(member.log)
        assert not re.search("dXNlcjpw|pass-word", repr(member.log))


def test_the_summary_says_how_it_is_with_the_portal(member: Member, portal: ScriptedPortal) -> None:
    summary = member.system.summary()
    assert (summary["ready"], summary["portal"], summary["portal_joins"], summary["portal_oddities"]) == (
        True,
        "joined",
        1,
        0,
    )
    portal.wait_until_joined().send("nonsense")
    wait_until(lambda: member.system.summary()["portal_oddities"] == 1)


# A portal that is lost.


def test_a_lost_portal_costs_readiness_and_nothing_else_until_it_is_back(
    start_in: Callable[..., Member], portal: ScriptedPortal
) -> None:
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
        member.retry_until(lambda: member.system.is_ready)
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
def test_a_connection_that_ends_in_any_way_is_followed_by_another(member: Member, portal: ScriptedPortal, how: str) -> None:
    connection = portal.wait_until_joined()
    if how == "drop":
        connection.drop()
    elif how == "close":
        connection.close(1012, "restarting")
    else:
        connection.send(how)
    member.retry_until(lambda: len(portal.connections) > 1)
    portal.wait_until_joined(2)
    member.wait_until_ready()
    connection.wait_until_closed()


def test_heartbeats_that_are_answered_keep_the_connection(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    for number in range(1, 13):
        member.pass_time(10)
        assert connection.wait_for("heartbeat", number) == {
            "topic": "phoenix",
            "event": "heartbeat",
            "payload": {},
            "ref": number,
        }
        wait_until(lambda: member.channel._conversation.unanswered == 0)
    assert portal.connections == [connection]
    assert member.page("/readyz") == OK


def test_heartbeats_that_are_not_answered_cost_the_connection(member: Member, portal: ScriptedPortal) -> None:
    portal.script.answers_heartbeats = False
    connection = portal.wait_until_joined()
    for number in range(1, 5):
        member.pass_time(10)
        connection.wait_for("heartbeat", number)
    assert member.page("/readyz") == OK
    member.pass_time(10)
    connection.wait_until_closed()
    member.wait_until_not_ready()
    assert len([each for each in connection.frames if each["event"] == "heartbeat"]) == 4
    member.retry_until(lambda: len(portal.connections) > 1)
    portal.wait_until_joined(2)
    member.wait_until_ready()


def test_connections_that_are_over_are_forgotten(
    start_in: Callable[..., Member], portal: ScriptedPortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a year there are many."""
    links: weakref.WeakSet[WebSocketLink] = weakref.WeakSet()

    class Remembered(WebSocketLink):
        def __init__(self, *arguments: Any) -> None:  # noqa: ANN401
            super().__init__(*arguments)
            links.add(self)

    monkeypatch.setattr(actors_portal, "WebSocketLink", Remembered)
    member = start_in(portal)
    portal.script.refuse_next = [Refusal(502)] * 3
    for number in range(1, 4):
        portal.wait_until_joined(number).drop()
        member.retry_until(lambda number=number: member.channel.joins > number)  # type: ignore[misc]
    assert len(portal.connections) == 7
    wait_until(lambda: len(links) == 1)


def test_a_join_that_is_not_answered_costs_the_connection(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.answers_join = False
    member = start(portal.url)
    connection = portal.wait_for_connection()
    connection.wait_for("phx_join")
    portal.script.answers_join = True
    member.pass_time(5)
    connection.wait_until_closed()
    member.retry_until(lambda: member.system.is_ready)
    assert portal.wait_until_joined() is not connection


def test_an_attempt_that_hangs_is_given_up_for_another(member: Member, portal: ScriptedPortal) -> None:
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


def test_a_portal_that_has_lost_the_channel_is_joined_again_on_the_same_connection(
    member: Member, portal: ScriptedPortal
) -> None:
    connection = portal.wait_until_joined()
    first = connection.wait_for("phx_join")
    member.pass_time(12)
    connection.send("phx_reply", {"status": "error", "response": {"reason": "unmatched topic"}})
    again = connection.wait_for("phx_join", 2)
    assert again["payload"] == first["payload"]
    wait_until(lambda: member.channel.joins == 2)
    assert member.page("/readyz") == OK
    assert portal.connections == [connection]


def test_a_portal_that_does_not_say_init_is_waited_for_and_told_of(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.sends_init = False
    member = start(portal.url)
    connection = portal.wait_until_joined()
    member.wait_for_state(State.JOINED)
    for number in range(1, 4):
        member.pass_time(10)
        connection.wait_for("heartbeat", number)
        wait_until(lambda: member.channel._conversation.unanswered == 0)
    assert len([event for event in member.events("warning") if "does not say init" in event]) == 1
    connection.send_init()
    member.wait_until_ready()


def test_a_portal_that_floods_the_relay_is_left_and_no_client_feels_it(start: MemberMaker) -> None:
    with RawServer(joined(ENDLESS_EVENTS)) as flooding, udp_socket("127.0.0.1") as client:
        member = start(flooding.url)
        flooding.wait_for_peer().gone.wait(LONG)
        assert member.is_answered(client)
        member.retry_until(lambda: len(flooding.peers) > 2)
        assert member.is_answered(client)
        assert member.is_running
        assert flooding.peers[0].sent < 8 * 2**20
        # A line for each would be a way to fill its disk.
        assert len(member.log) < 100


def test_a_relay_without_a_thread_or_descriptor_for_a_connection_tries_again(
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


# What ends it.


def the_only_critical(member: Member) -> str:
    (event,) = (entry["reason"] for entry in member.log if entry["log_level"] == "critical")
    return str(event)


def test_a_join_that_is_refused_ends_it_with_the_reason(start: MemberMaker, portal: ScriptedPortal) -> None:
    portal.script.join_error = "invalid_address: 127.0.0.1 is no public address"
    member = start(portal.url)
    assert member.wait_for_end(SOON) == 1
    assert "invalid_address: 127.0.0.1 is no public address" in the_only_critical(member)
    assert len(portal.connections) == 1


@pytest.mark.parametrize("topic", ["relay", "phoenix"])
def test_a_token_that_has_expired_ends_it_and_says_what_to_do(member: Member, portal: ScriptedPortal, topic: str) -> None:
    portal.wait_until_joined().send("disconnect", {"reason": "token_expired"}, topic)
    assert member.wait_for_end(SOON) == 1
    assert "the token has expired" in the_only_critical(member)
    assert "FIREZONE_TOKEN" in the_only_critical(member)


def test_any_other_disconnect_is_logged_and_left_to_the_portal(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    connection.send("disconnect", {"reason": "maintenance"})
    wait_until(lambda: "maintenance" in repr(member.log))
    assert member.page("/readyz") == OK
    assert not connection.closed


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("refusal", [Refusal.invalid_token, Refusal.missing_token])
def test_a_token_that_is_not_accepted_ends_it_with_what_the_portal_says(
    start: MemberMaker, portal: ScriptedPortal, refusal: Callable[..., Refusal], *, chunked: bool
) -> None:
    portal.script.refuse = refusal(chunked=chunked)
    member = start(portal.url)
    assert member.wait_for_end(SOON) == 1
    code = refusal.__name__
    assert f"{code}: {code.replace('_', ' ').capitalize()}" in the_only_critical(member)
    assert len(portal.connections) == 1


def test_a_token_that_is_taken_away_later_ends_it_too(member: Member, portal: ScriptedPortal) -> None:
    portal.script.refuse = Refusal.invalid_token()
    portal.wait_until_joined().drop()
    member.wait_for_state(State.WAITING)
    member.pass_time(31)
    assert member.wait_for_end(SOON) == 1
    assert "invalid_token" in the_only_critical(member)


@pytest.mark.parametrize("status", [503, 429])
def test_a_portal_that_asks_to_wait_is_asked_again_after_that_and_no_sooner(
    start: MemberMaker, portal: ScriptedPortal, status: int
) -> None:
    """Longer than the patience of a start: a wait that was asked for is no failure."""
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


def test_a_portal_that_is_not_there_ends_it_after_15_seconds(start: MemberMaker, nobody: str) -> None:
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


def test_a_portal_with_a_strangers_certificate_is_none(
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
    """Let time pass without a portal, up to an hour at once."""
    portal.stop()
    member.wait_until_not_ready()
    while seconds:
        member.wait_for_state(State.WAITING)
        step = min(seconds, HOUR)
        member.pass_time(step)
        seconds -= step


def test_a_day_without_a_portal_ends_it(member: Member, portal: ScriptedPortal) -> None:
    be_without(member, portal, 23 * HOUR)
    with udp_socket("127.0.0.1") as client:
        assert member.is_answered(client)
    be_without(member, portal, HOUR)
    assert member.wait_for_end(SOON) == 1
    assert "24 hours" in the_only_critical(member)


def test_a_minute_less_than_a_day_does_not(member: Member, portal: ScriptedPortal) -> None:
    be_without(member, portal, 24 * HOUR - MINUTE)
    assert member.is_running
    portal.start()
    member.retry_until(lambda: member.channel.joins == 2)
    member.wait_until_ready()
    # The next day is another one.
    portal.stop()
    member.wait_until_not_ready()
    member.wait_for_state(State.WAITING)
    member.pass_time(23 * HOUR)
    assert member.is_running


class Fragile(PortalChannel):
    """A channel with bugs."""

    fails_at: str

    def _fail(self, place: str) -> None:
        if self.fails_at == place:
            raise ZeroDivisionError(place)

    def start(self, now: Instant) -> None:
        self._fail("start")
        super().start(now)

    def leave(self, now: Instant) -> None:
        self._fail("leave")
        super().leave(now)

    def handle_timeout(self, now: Instant) -> None:
        self._fail("time")
        super().handle_timeout(now)

    def handle_connected(self, connection: Any, now: Instant) -> None:  # noqa: ANN401
        self._fail_once("connected")
        super().handle_connected(connection, now)

    def handle_refused(self, connection: Any, refusal: Any, now: Instant) -> None:  # noqa: ANN401
        self._fail_once("refused")
        super().handle_refused(connection, refusal, now)

    def handle_lost(self, connection: Any, reason: str, now: Instant) -> None:  # noqa: ANN401
        self._fail_once("lost")
        super().handle_lost(connection, reason, now)

    def handle_text(self, connection: Any, text: str, now: Instant) -> None:  # noqa: ANN401
        if "poison" in text:
            raise ZeroDivisionError("text")
        super().handle_text(connection, text, now)

    def handle_other_frame(self, connection: Any, kind: str, now: Instant) -> None:  # noqa: ANN401
        self._fail_once("other")
        super().handle_other_frame(connection, kind, now)

    def _fail_once(self, place: str) -> None:
        if self.fails_at == place:
            Fragile.fails_at = "nowhere"
            raise ZeroDivisionError(place)


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> type[Fragile]:
    """What relays think of their portal with, from now on."""
    monkeypatch.setattr(actors_system, "PortalChannel", Fragile)
    Fragile.fails_at = "nowhere"
    return Fragile


def failures(member: Member) -> list[tuple[str, str]]:
    return [(entry["actor"], entry["error"]) for entry in member.log if entry["log_level"] == "critical"]


@pytest.mark.parametrize("place", ["time", "leave"])
def test_a_portal_actor_that_fails_ends_it_with_an_error(
    start_in: Callable[..., Member], portal: ScriptedPortal, fragile: type[Fragile], place: str
) -> None:
    member = start_in(portal)
    connection = portal.wait_until_joined()
    fragile.fails_at = place
    if place == "time":
        actor = member.system._portal_actor
        assert actor is not None
        actor.tell(Tick())
    else:
        member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 1
    assert failures(member) == [("portal", f"ZeroDivisionError: {place}")]
    connection.wait_until_closed()


def test_a_portal_actor_that_fails_at_its_start_ends_it_with_an_error(
    start: MemberMaker, portal: ScriptedPortal, fragile: type[Fragile]
) -> None:
    """Else it would never join, and never say so."""
    fragile.fails_at = "start"
    member = start(portal.url)
    assert member.wait_for_end(SOON) == 1
    assert failures(member) == [("portal", "ZeroDivisionError: start")]


@pytest.mark.parametrize("dead", ["portal", "server"])
def test_asked_to_leave_while_an_actor_is_failing_it_ends_with_the_error(
    start_in: Callable[..., Member], portal: ScriptedPortal, dead: str
) -> None:
    """It is dead before the supervisor hears of it, and the wish to leave may come in between."""
    member = start_in(portal, drain_timeout=LONG)
    actor = member.system._portal_actor if dead == "portal" else member.system._server
    assert actor is not None
    actor.stop(timeout=LONG)
    member.ask(Request.LEAVE)
    member.system.news.put(Failure(dead, ZeroDivisionError("a bug")))
    assert member.wait_for_end(SOON) == 1
    assert failures(member) == [(dead, "ZeroDivisionError: a bug")]


@pytest.mark.parametrize("place", ["connected", "refused", "lost", "text", "other"])
def test_a_report_that_the_core_fails_on_costs_one_connection(
    start: MemberMaker, portal: ScriptedPortal, fragile: type[Fragile], place: str
) -> None:
    """Whoever finds a bug in the core shall not end everybody's sessions with it."""
    fragile.fails_at = place
    if place == "refused":
        portal.script.refuse_next = [Refusal(502)]
    member = start(portal.url)
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
    member.retry_until(lambda: len(portal.connections) > 1 and member.system.is_ready)
    first.wait_until_closed()
    faults = [entry for entry in member.log if entry["log_level"] == "error"]
    assert len(faults) == 1
    assert faults[0]["exc_info"]
    member.look()
    assert member.channel.faults == 1
    assert len(member.system.core.allocations.by_id) == (place in {"lost", "text", "other"})


def test_faults_are_logged_once_and_counted(
    start_in: Callable[..., Member], portal: ScriptedPortal, fragile: type[Fragile]
) -> None:
    del fragile
    member = start_in(portal)
    for number in range(1, 4):
        portal.wait_until_joined(number).send_text("poison")
        member.retry_until(lambda number=number: member.channel.joins > number)  # type: ignore[misc]
    member.look()
    assert member.channel.faults == 3
    assert len(member.events("error")) == 1


# Leaving.


@pytest.mark.usefixtures("polite")
def test_asked_to_leave_it_tells_the_portal_closes_and_ends(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    member.turn_client(portal, "salt").allocate()
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert [each["event"] for each in connection.frames][-1] == "phx_leave"
    assert connection.closed_with == 1000
    assert portal.connections == [connection]
    assert member.events("warning") == member.events("error") == member.events("critical") == []


@pytest.mark.usefixtures("polite")
@pytest.mark.parametrize("reached", ["join not answered", "no init yet"])
def test_a_relay_that_never_began_leaves_as_politely(start: MemberMaker, portal: ScriptedPortal, reached: str) -> None:
    portal.script.answers_join = reached == "no init yet"
    portal.script.sends_init = False
    member = start(portal.url)
    connection = portal.wait_for_connection()
    connection.wait_for("phx_join")
    if reached == "no init yet":
        member.wait_for_state(State.JOINED)
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert (connection.left, connection.closed_with) == (True, 1000)


@pytest.mark.usefixtures("polite")
def test_a_relay_that_leaves_is_not_ready_and_goes_on_relaying(
    start_in: Callable[..., Member], portal: ScriptedPortal
) -> None:
    portal.script.answers_leave = False
    member = start_in(portal)
    with udp_socket("127.0.0.1") as client:
        member.ask(Request.LEAVE)
        portal.wait_until_left()
        assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
        assert member.is_answered(client)
        # There is no drain.
        member.turn_client(portal, "new").allocate()


@pytest.mark.usefixtures("polite")
def test_a_portal_that_does_not_confirm_is_left_after_a_while_and_closed_all_the_same(
    member: Member, portal: ScriptedPortal
) -> None:
    portal.script.answers_leave = False
    member.ask(Request.LEAVE)
    connection = portal.wait_until_left()
    assert member.is_running
    member.pass_time(LONG)
    assert member.wait_for_end(SOON) == 0
    connection.wait_until_closed()
    assert connection.closed_with == 1000


def test_a_portal_that_answers_nothing_holds_it_up_for_two_seconds(
    start: MemberMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert actors_departure.LEAVE_TIMEOUT > limits.LEAVE_TIMEOUT + limits.CLOSE_TIMEOUT == 2
    monkeypatch.setattr(actors_departure, "LEAVE_TIMEOUT", LONG)
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url)
        member.wait_until_ready()
        began = time.monotonic()
        member.ask(Request.LEAVE)
        assert member.wait_for_end(SOON) == 0
        assert time.monotonic() - began > 1.5
        # It has not been given up on: it has got there.
        assert "left the portal" in member.events("info")


@pytest.mark.usefixtures("polite")
@pytest.mark.parametrize("request_", [Request.LEAVE, Request.STOP])
def test_asked_again_it_ends_at_once(start: MemberMaker, request_: Request) -> None:
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url)
        member.wait_until_ready()
        member.ask(Request.LEAVE)
        wait_until(lambda: member.channel.state is State.LEAVING)
        member.ask(request_)
        assert member.wait_for_end(SOON) == 0


@pytest.mark.usefixtures("polite")
def test_told_to_stop_it_does_not_even_say_so(member: Member, portal: ScriptedPortal) -> None:
    connection = portal.wait_until_joined()
    member.ask(Request.STOP)
    assert member.wait_for_end(SOON) == 0
    assert not connection.left


@pytest.mark.usefixtures("polite")
def test_a_portal_that_is_not_there_holds_nobody_up(start: MemberMaker, nobody: str) -> None:
    member = start(nobody)
    member.wait_for_state(State.WAITING)
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0


@pytest.mark.usefixtures("polite")
def test_an_attempt_under_way_holds_nobody_up(start: MemberMaker) -> None:
    with RawServer(SILENCE) as silent:
        member = start(silent.url)
        silent.wait_for_peer()
        member.ask(Request.LEAVE)
        assert member.wait_for_end(SOON) == 0


def test_a_portal_actor_that_never_gets_there_is_not_waited_for_without_end(
    start_in: Callable[..., Member], portal: ScriptedPortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = start_in(portal)
    monkeypatch.setattr(actors_departure, "LEAVE_TIMEOUT", 0.3)
    monkeypatch.setattr(member.channel, "leave", lambda _: None)
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0
    assert len(member.events("warning")) == 1


# Draining.


class Session:
    """A client, its allocation and a peer."""

    def __init__(self, client: TurnClient, peer: socket.socket) -> None:
        self.client = client
        self._peer = peer
        (self._relayed,) = client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None

    def relays(self) -> bool:
        """Tell whether packets go both ways."""
        self.client.send(0x4000, b"there")
        there = self._peer.recvfrom(100) == (b"there", self._relayed)
        self._peer.sendto(b"back", self._relayed[:2])
        return there and self.client.receive() == (0x4000, b"back")


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with udp_socket("127.0.0.1") as peer:
        yield peer


def begin_to_drain(member: Member) -> None:
    """Ask it to leave, and wait until no allocation is made any more."""
    member.ask_and_wait(Request.LEAVE)
    assert any(event.startswith("draining") for event in member.events("info"))
    settle(member)


@pytest.fixture(params=["portal", "standalone"])
def draining(
    request: pytest.FixtureRequest, start: MemberMaker, portal: ScriptedPortal, peer: socket.socket
) -> tuple[Member, Session]:
    """A relay, in a network or on its own, that drains for longer than any test takes, and the session there is."""
    if request.param == "portal":
        member = start(portal.url, drain_timeout=LONG)
        portal.wait_until_joined()
        member.wait_until_ready()
        session = Session(member.turn_client(portal, "salt"), peer)
    else:
        member = start(None, drain_timeout=LONG, secret=CONFIG.secret)
        session = Session(member.client(), peer)
    begin_to_drain(member)
    return member, session


def test_a_drain_leaves_the_portal_at_once_and_relays_on(
    start_in: Callable[..., Member], portal: ScriptedPortal, peer: socket.socket
) -> None:
    member = start_in(portal, drain_timeout=LONG)
    session = Session(member.turn_client(portal, "salt"), peer)
    begin_to_drain(member)
    connection = portal.wait_until_left()
    connection.wait_until_closed()
    assert connection.closed_with == 1000
    wait_until(lambda: "left the portal" in member.events("info"))
    assert session.relays()
    assert member.is_running
    # It does not come back in the meantime, either.
    member.pass_time(HOUR)
    assert portal.connections == [connection]
    assert session.client.refresh(0) in {None, 437}
    assert member.wait_for_end(SOON) == 0


def test_while_it_drains_what_there_is_goes_on_and_nothing_new_begins(
    draining: tuple[Member, Session], portal: ScriptedPortal
) -> None:
    member, session = draining
    newcomer = member.turn_client(portal, "new") if member.system.portal is not None else member.client()
    assert allocate_refused(newcomer) == 508
    assert session.relays()
    assert session.client.refresh(600) is None
    assert session.client.bind_channel(0x4000, session._peer.getsockname()) is None
    with udp_socket("127.0.0.1") as client:
        assert member.is_answered(client)
    assert (member.page("/healthz"), member.page("/readyz")) == (OK, UNAVAILABLE)
    assert member.is_running


def test_it_ends_once_the_last_allocation_is_deleted(draining: tuple[Member, Session]) -> None:
    member, session = draining
    assert session.relays()
    assert member.is_running
    assert session.client.refresh(0) is None
    assert member.wait_for_end(SOON) == 0


def test_it_ends_once_the_last_allocation_has_expired(draining: tuple[Member, Session]) -> None:
    member, _ = draining
    member.clock.jump(601)
    settle(member)
    assert member.wait_for_end(SOON) == 0


@pytest.mark.parametrize("request_", [Request.LEAVE, Request.STOP])
def test_asked_again_a_drain_ends_at_once(draining: tuple[Member, Session], request_: Request) -> None:
    member, _ = draining
    member.ask(request_)
    assert member.wait_for_end(SOON) == 0


def test_a_dump_in_the_middle_of_a_drain_ends_nothing(draining: tuple[Member, Session]) -> None:
    member, session = draining
    member.ask(Request.DUMP)
    assert session.relays()
    assert member.is_running


def test_it_ends_when_the_time_for_it_is_over(start: MemberMaker, peer: socket.socket) -> None:
    member = start(None, drain_timeout=0.5, secret=CONFIG.secret)
    Session(member.client(), peer)
    began = time.monotonic()
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0
    assert time.monotonic() - began > 0.45
    assert len(member.events("warning")) == 1


@pytest.mark.usefixtures("polite")
def test_in_a_network_too_however_short_it_is(
    start_in: Callable[..., Member], portal: ScriptedPortal, peer: socket.socket
) -> None:
    """The time that a portal may take to be left is not added to it, nor is it waited for if the portal takes none."""
    member = start_in(portal, drain_timeout=0.3)
    Session(member.turn_client(portal, "salt"), peer)
    began = time.monotonic()
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0
    assert time.monotonic() - began > 0.25
    assert "left the portal" in member.events("info")


@pytest.mark.usefixtures("polite")
def test_a_drain_whose_time_is_over_waits_for_the_portal_to_be_left(start: MemberMaker, peer: socket.socket) -> None:
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url, drain_timeout=0.1, secret=CONFIG.secret)
        member.wait_until_ready()
        Session(member.client(), peer)
        member.ask(Request.LEAVE)
        wait_until(lambda: any(event.startswith("not waiting") for event in member.events("warning")))
        assert member.is_running
        member.pass_time(LONG)
        member.pass_time(LONG)
        assert member.wait_for_end(SOON) == 0


@pytest.mark.usefixtures("polite")
def test_without_an_allocation_a_drain_is_over_at_once(start: MemberMaker, portal: ScriptedPortal) -> None:
    for url in (portal.url, None):
        member = start(url, drain_timeout=LONG)
        member.wait_until_ready()
        member.ask(Request.LEAVE)
        assert member.wait_for_end(SOON) == 0


@pytest.mark.usefixtures("polite")
def test_a_drain_that_is_over_waits_for_the_portal_to_be_left(start: MemberMaker) -> None:
    with RawServer(SAYS_NOTHING) as mute:
        member = start(mute.url, drain_timeout=LONG)
        member.wait_until_ready()
        member.ask(Request.LEAVE)
        wait_until(lambda: "no allocation is left" in member.events("info"))
        assert member.is_running
        member.pass_time(LONG)
        member.pass_time(LONG)
        assert member.wait_for_end(SOON) == 0


def test_without_time_to_drain_nobody_is_waited_for(start: MemberMaker, peer: socket.socket) -> None:
    member = start(None, secret=CONFIG.secret)
    Session(member.client(), peer)
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0


def test_an_actor_that_fails_ends_a_drain_with_an_error(draining: tuple[Member, Session]) -> None:
    member, _ = draining
    assert member.system._server is not None
    member.system._server.tell("what is this?")
    assert member.wait_for_end(SOON) == 1


# Secrets.

SECRET = "a secret that is told to the portal only"
ECHO = f"{TOKEN} and {SECRET}"


def refusal(head: str) -> Recital:
    return Recital("refusal", f"HTTP/1.1 {head}\r\n\r\n".encode())


def after_join(*frames: bytes) -> Recital:
    return joined(Recital("echo", b"".join(frames)))


def text(value: object) -> Recital:
    """A portal that lets a relay join, and then says something in JSON."""
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


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[PortalCommand]:
    """All that the channel wants done."""
    commands: list[PortalCommand] = []
    drain = PortalChannel.drain

    def drain_and_keep(channel: PortalChannel) -> list[PortalCommand]:
        drained = drain(channel)
        commands.extend(drained)
        return drained

    monkeypatch.setattr(PortalChannel, "drain", drain_and_keep)
    return commands


class Written:
    """Keeps a dump."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Have it all already."""

    def isatty(self) -> bool:
        return False


def check_that_nothing_is_shown(member: Member, commands: list[PortalCommand], caplog: pytest.LogCaptureFixture) -> None:
    written = Written()
    dump(member.system.summary(), written)
    tracebacks = [
        "".join(traceback.format_exception(each))
        for entry in member.log
        if isinstance(each := entry.get("exc_info"), Exception)
    ]
    # Not that of the portal, which knows both.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("websockets.")]
    shown = [repr(member.log), repr(logged), repr(member.system.summary()), written.text, repr(commands), *tracebacks]
    shown += [repr(member.system.config), repr(member.system.portal), repr(member.channel._config)]
    assert commands
    for each in shown:
        assert TOKEN not in each
        assert SECRET not in each


@pytest.mark.parametrize("echo", ECHOES)
def test_token_and_secret_are_shown_nowhere_whatever_the_portal_sends_back(
    start: MemberMaker,
    commands: list[PortalCommand],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    echo: str,
) -> None:
    caplog.set_level(0)
    monkeypatch.setattr(upgrade, "BODY_TIMEOUT", 0.1)
    with RawServer(ECHOES[echo]) as echoing:
        member = start(echoing.url, secret=RelaySecret(SECRET))
        connection = echoing.wait_for_peer()
        wait_until(
            lambda: (
                echo == "ping" or bool(member.channel.oddities) or "no connection to the portal" in member.events("warning")
            )
        )
        wait_until(lambda: connection.sent >= len(ECHOES[echo].text))
        member.look()
        check_that_nothing_is_shown(member, commands, caplog)
        member.ask(Request.STOP)
        assert member.wait_for_end(SOON) == 0
        check_that_nothing_is_shown(member, commands, caplog)


@pytest.mark.parametrize("place", ["join", "401"])
def test_token_and_secret_are_not_shown_in_what_ends_the_relay_either(
    start: MemberMaker,
    portal: ScriptedPortal,
    commands: list[PortalCommand],
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    caplog.set_level(0)
    if place == "join":
        portal.script.join_error = ECHO
    else:
        portal.script.refuse = Refusal.problem(401, ECHO, ECHO)
    member = start(portal.url, secret=RelaySecret(SECRET))
    assert member.wait_for_end(SOON) == 1
    assert "[concealed] and [concealed]" in the_only_critical(member)
    check_that_nothing_is_shown(member, commands, caplog)


def test_token_and_secret_are_not_shown_by_a_relay_that_fails_on_them(
    start: MemberMaker,
    fragile: type[Fragile],
    commands: list[PortalCommand],
    caplog: pytest.LogCaptureFixture,
) -> None:
    del fragile
    caplog.set_level(0)
    with RawServer(after_join(frame(TEXT, f"poison {ECHO}".encode()))) as poisonous:
        member = start(poisonous.url, secret=RelaySecret(SECRET))
        wait_until(lambda: bool(member.events("error")))
        check_that_nothing_is_shown(member, commands, caplog)


def test_a_relay_that_is_well_shows_neither(
    start_in: Callable[..., Member],
    portal: ScriptedPortal,
    commands: list[PortalCommand],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    member = start_in(portal, secret=RelaySecret(SECRET))
    assert portal.wait_until_joined().stamp_secret == SECRET
    member.ask(Request.LEAVE)
    assert member.wait_for_end(SOON) == 0
    check_that_nothing_is_shown(member, commands, caplog)


# systemd.


class Notified:
    """systemd's end."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(LONG)
        self.socket.bind(str(path))
        self.environ = {"NOTIFY_SOCKET": str(path)}

    def next(self) -> dict[str, str]:
        """Give the fields of the next message."""
        fields = (line.partition("=") for line in self.socket.recv(4096).decode().split("\n"))
        return {name: value for name, _, value in fields}

    def wait_for(self, field: str) -> dict[str, str]:
        """Give the next message that has a field."""
        while field not in (message := self.next()):
            pass
        return message

    def waiting(self) -> list[dict[str, str]]:
        """Give the messages that have come."""
        found = []
        while select.select([self.socket], [], [], 0)[0]:
            found.append(self.next())
        return found


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[Notified]:
    notified = Notified(tmp_path / "notify")
    with notified.socket:
        yield notified


def test_systemd_hears_that_it_is_ready_with_init_and_no_sooner(
    start: MemberMaker, portal: ScriptedPortal, notified: Notified
) -> None:
    portal.script.sends_init = False
    member = start(portal.url, systemd=Systemd({**notified.environ, "WATCHDOG_USEC": "40000"}))
    assert notified.next() == {"STATUS": "joining the portal"}
    connection = portal.wait_until_joined()
    member.wait_for_state(State.JOINED)
    member.look()
    # Nor is the watchdog told that it works: it counts from READY=1.
    assert notified.waiting() == []
    connection.send_init()
    assert notified.next() == {"READY": "1", "STATUS": "answering clients"}
    for _ in range(3):
        assert notified.next() == {"WATCHDOG": "1"}


def test_systemd_is_not_told_again_by_a_portal_that_comes_back(
    start: MemberMaker, portal: ScriptedPortal, notified: Notified
) -> None:
    member = start(portal.url, systemd=Systemd(notified.environ))
    notified.wait_for("READY")
    portal.wait_until_joined().drop()
    member.retry_until(lambda: member.channel.joins == 2)
    member.wait_until_ready()
    assert [message for message in notified.waiting() if "READY" in message] == []


@pytest.mark.parametrize("drain_timeout", [0, 20])
def test_systemd_hears_that_it_stops_and_how_long_that_may_take(
    start: MemberMaker, portal: ScriptedPortal, notified: Notified, peer: socket.socket, drain_timeout: int
) -> None:
    portal.script.answers_leave = False
    member = start(portal.url, systemd=Systemd({**notified.environ, "WATCHDOG_USEC": "40000"}), drain_timeout=drain_timeout)
    portal.wait_until_joined()
    member.wait_until_ready()
    Session(member.turn_client(portal, "salt"), peer)
    member.ask(Request.LEAVE)
    stopping = notified.wait_for("STOPPING")
    assert stopping["STOPPING"] == "1"
    assert stopping["STATUS"] == ("draining" if drain_timeout else "stopping")
    least = (drain_timeout + actors_departure.LEAVE_TIMEOUT) * 1_000_000
    assert least < int(stopping["EXTEND_TIMEOUT_USEC"]) < least + 30 * 1_000_000
    # The watchdog goes on watching until the end.
    assert notified.wait_for("WATCHDOG")
    member.ask(Request.STOP)
    assert member.wait_for_end(SOON) == 0


def test_systemd_hears_that_a_standalone_relay_is_ready_at_once(start: MemberMaker, notified: Notified) -> None:
    start(None, systemd=Systemd(notified.environ))
    assert notified.next() == {"READY": "1", "STATUS": "answering clients"}


# Its end.


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
def test_stopping_ends_every_thread_and_closes_every_descriptor(
    log: list[EventDict], recital: Recital, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LISTENER_STOP_TIMEOUT", "PORTAL_STOP_TIMEOUT", "SERVER_STOP_TIMEOUT"):
        monkeypatch.setattr(actors_system, name, LONG)

    def descriptors() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    with RawServer(recital) as server:
        threads, opened = set(threading.enumerate()), descriptors()
        with System(replace(CONFIG, portal=access_to(server.url)), JumpingClock()):
            peer = server.wait_for_peer()
            wait_until(lambda: peer.sent > 0 or recital is SILENCE)
            began = time.monotonic()
        assert time.monotonic() - began < SOON
        server.stop()
        wait_until(lambda: set(threading.enumerate()) <= threads)
        wait_until(lambda: descriptors() <= opened)
    assert [entry for entry in log if entry["event"] == "did not stop in time"] == []
