"""What the core tells of, as lines: each with what an operator looks for, and none with half of a credential."""

from collections.abc import Iterator

import pytest

from relay.core.addresses import ClientAddress, Family
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, REQUESTED_ADDRESS_FAMILY, REQUESTED_TRANSPORT
from relay.core.authentication import ErrorCode
from relay.core.events import (
    CORE_EVENTS,
    AllocationCreated,
    AllocationFreed,
    Answered,
    LimitReached,
    RequestRefused,
)
from relay.core.stun import MessageClass, Method, encode
from relay.ops.logs.core import WATCHED, CoreLog, wanted
from relay.ops.logs.filter import Level, LogFilter
from relay.ops.logs.log import events_to
from relay.ops.logs.repeats import USUAL
from tests.core.driver import (
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
from tests.log_lines import KeptLog


@pytest.fixture
def log() -> Iterator[KeptLog]:
    kept = KeptLog()
    with events_to(kept):
        yield kept


def lived_through() -> Relay:
    """A relay of which all that there is to be told was written to the log."""
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
    written = CoreLog(lambda: relay.now.monotonic)
    assert {type(event) for event in relay.events} == set(CORE_EVENTS)
    for event in relay.events:
        written.write(event)
    return relay


def test_every_event_of_the_core_is_a_line_as_the_schema_says_at_its_level_and_target(log: KeptLog) -> None:
    relay = lived_through()
    lines = log.take()
    assert len(lines) == len(relay.events)
    for event, line in zip(relay.events, lines, strict=True):
        target, level, words = WATCHED[type(event)]
        assert line["target"] == target
        assert line["event"] == words
        assert line["level"] == {Level.WARN: "warning"}.get(level, level.name.lower())


def test_lines_name_client_peer_channel_addresses_and_reasons(log: KeptLog) -> None:
    lived_through()
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


def test_a_refusal_whose_code_says_it_all_is_told_in_words_too(log: KeptLog) -> None:
    events = CoreLog(lambda: 0.0)
    events.write(RequestRefused(ClientAddress(("203.0.113.5", 1)), Method.REFRESH, ErrorCode.WRONG_CREDENTIALS))
    events.write(Answered(ClientAddress(("203.0.113.5", 1)), Method.REFRESH, ErrorCode.STALE_NONCE))
    assert [(line["code"], line["reason"]) for line in log.take()] == [(441, "wrong_credentials"), (438, "stale_nonce")]


def test_events_that_come_too_often_are_left_out_and_counted_before_they_are_made_a_line(log: KeptLog) -> None:
    events = CoreLog(lambda: 0.0, log.leaves_out)
    refused = RequestRefused(ClientAddress(("203.0.113.5", 1)), Method.REFRESH, ErrorCode.WRONG_CREDENTIALS)
    for _ in range(USUAL.burst):
        events.write(refused)
    assert len(log.take()) == USUAL.burst
    # Nothing that a line is made of is in it: only who does not look can take it.
    blank = RequestRefused.__new__(RequestRefused, None, None, None)  # type: ignore[arg-type]
    for _ in range(7):
        events.write(blank)
    assert log.take() == []
    log.tell_left_out()
    assert [(line["what"], line["left_out"]) for line in log.take()] == [("request refused", 7)]


def test_a_family_that_is_not_served_and_an_ipv6_client_are_shown(log: KeptLog) -> None:
    relay = relay_with(public_hosts={Family.IPV4: HOSTS[Family.IPV4]})
    relay.watch(AllocationCreated)
    Client(relay, CLIENT6).allocate((ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    CoreLog(lambda: 0.0).write(relay.events[0])
    (line,) = log.take()
    assert line["client"] == "[2001:db8:5::5]:40000"
    assert line["not_served"] == ["IPv6"]


def test_no_line_has_a_username_in_it(log: KeptLog) -> None:
    relay = lived_through()
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
def test_the_core_is_asked_for_no_more_than_the_filter_admits(directives: str, kinds: set[type]) -> None:
    log_filter = LogFilter.parse(directives)
    assert wanted(lambda target, level: level >= log_filter.threshold(target)) == kinds


def test_answers_and_channels_are_not_among_what_is_logged_by_default() -> None:
    """With hundreds of clients, what is logged at info has to be readable."""
    told = wanted(lambda target, level: level >= LogFilter().threshold(target))
    assert {kind.__name__ for kind in told} == {
        "AllocationCreated",
        "AllocationFreed",
        "PeerRefused",
        "LimitReached",
        "RequestRefused",
    }
