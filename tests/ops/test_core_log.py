"""Lines of the core's events: with the fields for operators, and without usernames."""

import pytest

from relay.core.addresses import ClientAddress, Family
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, REQUESTED_ADDRESS_FAMILY, REQUESTED_TRANSPORT
from relay.core.errors import ErrorCode
from relay.core.events import (
    CORE_EVENTS,
    AllocationCreated,
    AllocationFreed,
    Answered,
    LimitReached,
    RequestRefused,
)
from relay.core.stun import MessageClass, Method, encode
from relay.logger import Level
from relay.ops.logs.core import LOGGED_AS, log_event, wanted
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.rate_limiter import USUAL
from tests.support.core import (
    CLIENT6,
    FORBIDDEN_PEER,
    HOSTS,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    PEER,
    PEER6,
    Client,
    Relay,
    relay_with,
)
from tests.support.log_lines import KeptLog, log

__all__ = ["log"]


def logged_relay() -> Relay:
    """Run a relay through every event, and log the events."""
    relay = relay_with(max_allocations=1)
    relay.watch(*CORE_EVENTS)
    client = Client(relay)
    client.send(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []))
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    Client(relay, OTHER_CLIENT, salt="other").ask(Method.ALLOCATE, (REQUESTED_TRANSPORT, 17))
    client.bind_channel()
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, PEER6)
    client.bind_channel(OTHER_CHANNEL, PEER)
    client.bind_channel(OTHER_CHANNEL, FORBIDDEN_PEER)
    client.send_on_channel(b"hello")
    client.refresh(0, (REQUESTED_ADDRESS_FAMILY, Family.IPV6))
    client.refresh(3600)
    relay.pass_time(700)
    relay.wake()
    client.refresh(0)
    assert {type(event) for event in relay.events} == set(CORE_EVENTS)
    for event in relay.events:
        log_event(event, lambda: relay.now.monotonic)
    return relay


def test_every_core_event_matches_the_schema_level_and_target(log: KeptLog) -> None:
    relay = logged_relay()
    lines = log.take()
    assert len(lines) == len(relay.events)
    for event, line in zip(relay.events, lines, strict=True):
        target, level, name, _ = LOGGED_AS[type(event)]
        assert line["target"] == target
        assert line["event"] == name
        assert line["level"] == {Level.WARN: "warning"}.get(level, level.name.lower())


def test_lines_contain_client_peer_channel_addresses_and_reasons(log: KeptLog) -> None:
    logged_relay()
    lines = {line["event"]: line for line in log.take()}
    common = {"timestamp", "level", "target", "event"}

    def fields(event: str) -> dict[str, object]:
        return {name: value for name, value in lines[event].items() if name not in common}

    port = lines["allocation created"]["relayed"][0].rpartition(":")[2]
    client, peer = "203.0.113.5:40000", "198.51.100.9:5000"
    relayed = [f"192.0.2.1:{port}", f"[2001:db8::1]:{port}"]
    assert fields("allocation created") == {"allocation": 1, "client": client, "relayed": relayed, "lifetime": 600}
    assert fields("allocation refreshed") == {"allocation": 1, "client": client, "lifetime": 3600}
    assert fields("relayed address deleted") == {"allocation": 1, "client": client, "family": "IPv6"}
    assert fields("allocation freed") == {
        "allocation": 1,
        "client": client,
        "reason": "deleted",
        "age": 700,
        "to_peer_bytes": 5,
        "to_client_bytes": 0,
    }
    channel = {"allocation": 1, "client": client, "channel": "0x4000", "peer": peer}
    assert fields("channel refreshed") == channel
    assert lines["channel bound"]["channel"] == "0x4001"
    assert lines["channel expired"]["client"] == client
    assert fields("peer refused") == {
        "allocation": 1,
        "client": client,
        "peer": "127.0.0.1:5000",
        "request": "channel_bind",
        "rule": "never_a_peer",
    }
    assert fields("limit reached") == {"client": "203.0.113.6:40000", "limit": "allocations", "code": 486}
    assert fields("request refused") == {"client": client, "request": "channel_bind", "code": 400, "reason": "channel_taken"}
    assert fields("answered") == {"client": client, "request": "refresh", "success": True}


def test_an_error_without_a_reason_is_logged_with_the_name_of_its_code(log: KeptLog) -> None:
    log_event(RequestRefused(ClientAddress(("203.0.113.5", 1)), Method.REFRESH, ErrorCode.WRONG_CREDENTIALS), lambda: 0.0)
    log_event(Answered(ClientAddress(("203.0.113.5", 1)), Method.REFRESH, ErrorCode.STALE_NONCE), lambda: 0.0)
    assert [(line["code"], line["reason"]) for line in log.take()] == [(441, "wrong_credentials"), (438, "stale_nonce")]


def test_rate_limited_events_are_counted_but_not_formatted(log: KeptLog) -> None:
    refused = RequestRefused(ClientAddress(("203.0.113.5", 1)), Method.REFRESH, ErrorCode.WRONG_CREDENTIALS)
    for _ in range(USUAL.burst):
        log_event(refused, lambda: 0.0)
    assert len(log.take()) == USUAL.burst
    # Its fields can't be formatted.
    blank = RequestRefused.__new__(RequestRefused, None, None, None)  # type: ignore[arg-type]
    for _ in range(7):
        log_event(blank, lambda: 0.0)
    assert log.take() == []
    log.report_suppressed()
    assert [(line["what"], line["left_out"]) for line in log.take()] == [("request refused", 7)]


def test_an_unserved_family_and_an_ipv6_client_are_logged(log: KeptLog) -> None:
    relay = relay_with(public_hosts={Family.IPV4: HOSTS[Family.IPV4]})
    relay.watch(AllocationCreated)
    Client(relay, CLIENT6).allocate((ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    log_event(relay.events[0], lambda: 0.0)
    (line,) = log.take()
    assert line["client"] == "[2001:db8:5::5]:40000"
    assert line["not_served"] == ["IPv6"]


def test_no_line_contains_a_username(log: KeptLog) -> None:
    relay = logged_relay()
    text = log.take_text()
    assert len(text) > 1000
    assert Client(relay).credential.username not in text
    assert ":salt" not in text


@pytest.mark.parametrize(
    ("directives", "kinds"),
    [
        ("off", set()),
        ("error", set()),
        ("warn", {LimitReached}),
        ("trace", set(CORE_EVENTS)),
        ("off,answers=debug", {Answered}),
        ("off,relay.core.allocations=info", {AllocationCreated, AllocationFreed}),
    ],
)
def test_the_core_creates_only_events_admitted_by_the_filter(directives: str, kinds: set[type]) -> None:
    log_filter = LogFilter.parse(directives)
    assert wanted(lambda target, level: level >= log_filter.threshold(target)) == kinds


def test_answers_and_channels_are_not_logged_by_default() -> None:
    """The log at info must stay readable with hundreds of clients."""
    told = wanted(lambda target, level: level >= LogFilter().threshold(target))
    assert {kind.__name__ for kind in told} == {
        "AllocationCreated",
        "AllocationFreed",
        "PeerRefused",
        "LimitReached",
        "RequestRefused",
    }
