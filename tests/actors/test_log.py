"""The log of a running relay, and its filter."""

import contextlib
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, NamedTuple

import pytest

from relay.core.addresses import Family
from relay.core.commands import SendToClient
from relay.core.stun import MessageClass, Method, encode
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.log import events_to
from relay.ops.logs.rate_limiter import USUAL
from relay.ops.logs.stats import flow_in
from relay.system.system import System
from tests.support.log_lines import KeptLog
from tests.support.system import CONFIG, JumpingClock, Relay
from tests.support.turn_client import udp_socket

BINDING = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])


class Logging(NamedTuple):
    """A relay and its log."""

    relay: Relay
    log: KeptLog

    def ask(self, method: str, directives: str | None = None, *, at: str = "control") -> tuple[int, dict[str, Any]]:
        """Request the log's filter, or a change of the filter."""
        query = "" if directives is None else "?" + urllib.parse.urlencode({"directives": directives})
        url = f"http://{self.relay.system.http[at]}/log_filter{query}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def events(self, *without: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log.take() if entry["event"] not in without]

    def names(self) -> list[str]:
        return [entry["event"] for entry in self.events()]


Starter = Callable[[str], Logging]


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start a relay with a filter, and discard its log up to `ready`."""
    with contextlib.ExitStack() as stack:

        def started(directives: str) -> Logging:
            log, clock = KeptLog(directives=directives), JumpingClock()
            stack.enter_context(events_to(log))
            system = stack.enter_context(System(CONFIG, clock, log=log))
            log.take()
            return Logging(Relay(system, clock, stack), log)

        yield started


def test_info_logs_the_start_and_end_of_an_allocation(start: Starter) -> None:
    logging = start("info")
    client = logging.relay.client()
    (relayed, *_) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        client.send(0x4000, b"hello")
        assert peer.recv(100) == b"hello"
    assert client.refresh(600) is None
    assert client.refresh(0) is None
    created, freed = logging.events()
    host, port = client.socket.getsockname()[:2]
    assert created["event"] == "allocation created"
    assert created["client"] == freed["client"] == f"{host}:{port}"
    assert f"{relayed[0]}:{relayed[1]}" in created["relayed"]
    assert (freed["event"], freed["reason"], freed["to_peer_bytes"]) == ("allocation freed", "deleted", 5)


def test_debug_logs_every_request_and_no_packet(start: Starter) -> None:
    logging = start("debug")
    client = logging.relay.client()
    (relayed, *_) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        client.send(0x4000, b"hello")
        assert peer.recv(100) == b"hello"
        assert "channel bound" in logging.names()
        for _ in range(50):
            client.send(0x4000, b"hello")
            assert peer.recv(100) == b"hello"
            peer.sendto(b"and back", relayed)
            assert client.receive() == (0x4000, b"and back")
    assert logging.events() == []


@pytest.mark.parametrize(("before", "after"), [("info", "warn"), ("info", "off"), ("warn", "info"), ("info", "debug")])
def test_a_change_of_the_filter_is_logged_once(start: Starter, before: str, after: str) -> None:
    logging = start(before)
    assert logging.ask("POST", after)[0] == 200
    (told,) = logging.events()
    assert (told["event"], told["before"], told["directives"]) == ("log filter changed", before, after)


def test_missing_directives_are_rejected_with_a_usage(start: Starter) -> None:
    code, body = start("info").ask("POST")
    assert (code, "/log_filter?directives=" in body["error"], body["directives"]) == (400, True, "info")


def test_a_forbidden_peer_is_logged_with_its_client(start: Starter) -> None:
    logging = start("info")
    client = logging.relay.client()
    client.allocate()
    assert client.bind_channel(0x4000, ("169.254.169.254", 80)) == 403
    (entry,) = logging.events("allocation created")
    assert (entry["event"], entry["peer"], entry["request"]) == ("peer refused", "169.254.169.254:80", "channel_bind")


def test_a_filter_is_returned_and_in_force_at_once(start: Starter) -> None:
    logging = start("info")
    assert logging.ask("GET") == (HTTPStatus.OK, {"directives": "info"})
    with udp_socket("127.0.0.1") as stranger:
        at = logging.relay.system.address_of(Family.IPV4)

        def names_after_a_binding() -> list[str]:
            stranger.sendto(BINDING, (at.host, at.port))
            assert stranger.recv(1500)
            # The thread that responds writes the line afterwards.
            logging.relay.client().allocate()
            return [name for name in logging.names() if name == "answered"]

        assert names_after_a_binding() == []
        status, told = logging.ask("POST", "info,relay.core=debug,portal=trace")
        assert (status, told) == (HTTPStatus.OK, {"directives": "info,relay.core=debug,portal=trace"})
        assert logging.ask("GET")[1] == told
        assert "answered" in names_after_a_binding()
        assert logging.ask("POST", "relay::core=warn")[0] == HTTPStatus.OK
        logging.log.take()
        assert names_after_a_binding() == []


def test_traffic_is_read_from_the_counters_of_a_relay(start: Starter) -> None:
    logging = start("info")
    client = logging.relay.client()
    (relayed, *_) = client.allocate()
    before = flow_in(logging.relay.system.measured)
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        client.send(0x4000, b"hello")
        assert peer.recv(100) == b"hello"
        peer.sendto(b"and back", relayed)
        assert client.receive() == (0x4000, b"and back")
        client.socket.sendto(b"\x40\x00 truncated", client.server)
        client.send(0x4000, b"the end")
        assert peer.recv(100) == b"the end"
    after = flow_in(logging.relay.system.measured)
    lossy = flow_in(logging.relay.system.measured._replace(kernel_drops=lambda: 7))
    assert lossy["drops"] == 8
    assert [*before.values()] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert [*after.values()] == [2, 12, 1, 8, 0, 1, 1, 1]


def test_a_change_of_the_filter_is_logged(start: Starter) -> None:
    logging = start("info")
    logging.ask("POST", "debug")
    (entry,) = logging.events()
    assert (entry["event"], entry["before"], entry["directives"]) == ("log filter changed", "info", "debug")


@pytest.mark.parametrize("directives", [None, "", "loud", "relay=", "x" * 2000, "\x1b[31m=info", "relay\u202e=off"])
def test_an_invalid_filter_gets_400_with_the_reason(start: Starter, directives: str | None) -> None:
    logging = start("warn,core=debug")
    status, told = logging.ask("POST", directives)
    assert status == HTTPStatus.BAD_REQUEST
    assert told["error"]
    assert told["error"].isprintable()
    assert told["directives"] == "warn,core=debug"
    assert logging.ask("GET")[1] == {"directives": "warn,core=debug"}
    assert logging.events() == []


def test_the_health_address_does_not_serve_the_filter(start: Starter) -> None:
    logging = start("info")
    for method in ("GET", "POST"):
        assert logging.ask(method, "debug", at="health")[0] == HTTPStatus.NOT_FOUND
    assert logging.ask("GET")[1] == {"directives": "info"}


def test_repeated_requests_do_not_fill_the_log(start: Starter) -> None:
    logging = start("info")
    client = logging.relay.client()
    client.allocate()
    for number in range(2 * USUAL.burst):
        assert client.bind_channel(0x4000 + number, ("169.254.169.254", 80)) == 403
    refused = [entry for entry in logging.events() if entry["event"] == "peer refused"]
    assert len(refused) == USUAL.burst
    logging.log.report_suppressed()
    assert sum(entry["left_out"] for entry in logging.events()) >= USUAL.burst


def test_a_stopped_relay_logs_nothing(start: Starter) -> None:
    logging = start("off")
    system = logging.relay.system
    system.__exit__()
    logging.log.change_filter(LogFilter.parse("trace"))
    # The core would add an event to the response if the filter still reached it.
    system.core.handle_client_datagram((BINDING, ("127.0.0.1", 9), 0, 0), logging.relay.clock.now())
    assert [type(each) for each in system.core.drain()] == [SendToClient]
    assert "stats" not in {thread.name for thread in threading.enumerate()}
