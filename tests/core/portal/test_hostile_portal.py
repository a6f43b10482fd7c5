"""A hostile portal can only close its connection: no exception, no memory growth, no log flood, no leak of secrets."""

import json
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.credentials import RelaySecret
from relay.core.portal.channel import State
from relay.core.portal.commands import Abandon, Begin, Fatal, Note, PortalCommand
from tests.support.examples import examples
from tests.support.portal_channel import (
    INIT,
    SECRET,
    TICK,
    TOKEN,
    TOKEN_EXPIRED,
    UNMATCHED_TOPIC,
    Driver,
    deeds,
    driver_with,
    of_kind,
    reply,
    the,
    write,
)


def leaving() -> Driver:
    driver = Driver().join()
    driver.leave()
    return driver


def joining_again() -> Driver:
    driver = Driver().join()
    driver.pass_time(12)
    driver.receive(UNMATCHED_TOPIC)
    return driver


OPEN: list[Callable[[], Driver]] = [lambda: Driver().open(), lambda: Driver().join(), joining_again, leaving]
open_in_each_state = pytest.mark.parametrize("make", OPEN, ids=["joining", "joined", "joining again", "leaving"])


# Invalid frames.


@open_in_each_state
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "hello",
        "null",
        "true",
        "1",
        '"relay"',
        "[]",
        '["0","0","relay","phx_reply",{}]',
        "{}",
        '{"topic":"relay"}',
        '{"event":"init"}',
        '{"topic":null,"event":"init","payload":{}}',
        '{"topic":"relay","event":1,"payload":{}}',
        '{"topic":["relay"],"event":"init","payload":{}}',
        '{"topic":"relay","event":"init","payload":[]}',
        '{"topic":"relay","event":"init","payload":"x"}',
        '{"topic":"relay","event":"init","payload":0}',
        '{"topic":"relay","event":"init","payload":false}',
        INIT + INIT,
        INIT + "x",
        "\ufeff" + INIT,
        INIT.replace('"', "'"),
        '{"topic":"relay","event":"init","payload":{},"ref":' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"topic":"relay","event":"init","payload":{"a":' + "[" * 50_000 + "]" * 50_000 + "}}",
    ],
)
def test_an_invalid_frame_is_counted_and_logged(make: Callable[[], Driver], text: str) -> None:
    driver = make()
    state = driver.channel.state
    told = driver.receive(text)
    assert len(told) == len(of_kind(Note, told)) == 1
    assert driver.channel.protocol_errors == 1
    assert driver.is_in(state)


@pytest.mark.parametrize(
    "text",
    [
        '{"topic":"relay","event":"init"}',
        '{"topic":"relay","event":"init","payload":null}',
        '{"ref":null,"payload":{},"event":"init","topic":"relay","join_ref":null}',
        ' \n{ "topic" : "rel\\u0061y" , "event" : "init", "payload":{"a":[1e999, -0, NaN]}}\n',
        '{"topic":"x","event":"init","payload":{},"topic":"relay"}',
        '{"topic":"relay","event":"init","payload":{},"ref":1e999}',
        '{"topic":"relay","event":"init","payload":{},"ref":{"a":[]}}',
    ],
)
def test_equivalent_encodings_of_a_frame_are_accepted(driver: Driver, text: str) -> None:
    driver.open()
    assert driver.receive(text) == [Begin()]


@pytest.mark.parametrize("topic", ["relay", "phoenix"])
@pytest.mark.parametrize("event", ["phx_reply", "disconnect"])
@pytest.mark.parametrize("more", ["", ',"payload":null', ',"payload":{}'])
def test_a_missing_payload_is_an_empty_payload(driver: Driver, topic: str, event: str, more: str) -> None:
    driver.open()
    assert deeds(driver.receive(f'{{"topic":"{topic}","event":"{event}","ref":0{more}}}')) == []
    assert driver.is_in(State.JOINING)
    assert driver.channel.protocol_errors == 1


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize(
    "frame",
    [
        '{"topic":"relay","event":"phx_reply","ref":7,"payload":{"status":"error","response":%s}}',
        '{"topic":"relay","event":"disconnect","payload":{"x":%s}}',
    ],
)
def test_json_of_the_maximum_nesting_can_be_logged(joined: Driver, frame: str, brackets: tuple[str, str]) -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 100, limit - 20):
        assert deeds(joined.receive(frame % nested(depth, *brackets))) == []
    assert joined.channel.is_joined


# Valid frames that are ignored.


@open_in_each_state
@pytest.mark.parametrize(
    ("topic", "event"),
    [
        ("relay", "new_event"),
        ("relay", "INIT"),
        ("relay", ""),
        ("", "init"),
        ("relay:1", "init"),
        ("phoenix", "init"),
        ("phoenix", "phx_close"),
        ("relay", "phx_join"),
        ("relay", "heartbeat"),
    ],
)
def test_an_unknown_event_is_ignored_and_logged(make: Callable[[], Driver], topic: str, event: str) -> None:
    driver = make()
    state = driver.channel.state
    note = the(Note, driver.receive(write(topic, event, {"any": "thing"}, 3)))
    assert (note.fields["topic"], note.fields["portal_event"]) == (topic, event)
    assert driver.channel.protocol_errors == 1
    assert driver.is_in(state)


def test_a_frame_with_an_unknown_key_is_logged_and_processed(driver: Driver) -> None:
    driver.open()
    told = driver.receive('{"topic":"relay","event":"init","payload":{},"ref":null,"colour":1}')
    assert the(Note, told).fields == {"keys": "colour"}
    assert of_kind(Begin, told)
    assert driver.channel.protocol_errors == 1


def test_a_binary_frame_is_logged(joined: Driver) -> None:
    assert "binary" in the(Note, joined.receive_other("binary")).event
    assert joined.channel.is_joined


@pytest.mark.parametrize("kind", ["ping", "pong"])
def test_pings_and_pongs_are_ignored(joined: Driver, kind: str) -> None:
    assert joined.receive_other(kind) == []
    assert joined.channel.protocol_errors == 0


def test_unknown_keys_of_a_payload_are_ignored(driver: Driver) -> None:
    driver.open()
    assert driver.receive(write("relay", "init", {"relays": [1], "status": "x"})) == [Begin()]
    assert driver.channel.protocol_errors == 0


# Floods.


@open_in_each_state
@pytest.mark.parametrize(
    "flood",
    [
        lambda driver: driver.receive_other("ping"),
        lambda driver: driver.receive_other("binary"),
        lambda driver: driver.receive("{"),
        lambda driver: driver.receive(write("relay", "new_event")),
        lambda driver: driver.receive(INIT),
        lambda driver: driver.receive(reply(1, topic="phoenix")),
    ],
    ids=["ping", "binary", "nonsense", "event", "init", "reply"],
)
def test_a_flood_closes_the_connection(make: Callable[[], Driver], flood: Callable[[Driver], list[PortalCommand]]) -> None:
    driver = make()
    driver.pass_time(0.5)
    driver.receive_other("ping")
    out: list[PortalCommand] = []
    for _ in range(101):
        out += flood(driver)
    assert the(Abandon, out) == Abandon()
    assert len(out) < 20
    assert driver.is_in(State.WAITING, State.OVER)
    assert flood(driver) == []


def test_a_hundred_frames_in_10_s_are_accepted(joined: Driver) -> None:
    # The join reply and init were the first two frames.
    for _ in range(98):
        assert joined.receive_other("ping") == []
    joined.pass_time(10 - TICK)
    assert deeds(joined.receive_other("ping")) == [Abandon()]
    assert joined.is_in(State.WAITING)


@pytest.mark.parametrize("text", [INIT, TOKEN_EXPIRED, reply(0, "error")])
def test_the_frame_over_the_limit_is_not_processed(driver: Driver, text: str) -> None:
    driver.open()
    for _ in range(100):
        driver.receive_other("ping")
    assert deeds(driver.receive(text)) == [Abandon()]
    assert driver.is_in(State.WAITING)
    assert not driver.channel.has_begun


def test_each_heartbeat_resets_the_count_of_frames(joined: Driver) -> None:
    for _ in range(98):
        joined.receive_other("ping")
    for _ in range(3):
        joined.pass_time(10)
        for _ in range(100):
            assert joined.receive_other("ping") == []
    assert deeds(joined.receive(INIT)) == [Abandon()]


def test_frames_are_counted_per_connection(joined: Driver) -> None:
    for _ in range(90):
        joined.receive_other("ping")
    joined.report_lost()
    joined.join_again()
    for _ in range(99):
        assert joined.receive_other("ping") == []


def test_a_connection_logs_ten_protocol_errors_and_counts_all(joined: Driver) -> None:
    told: list[PortalCommand] = []
    for _ in range(90):
        told += joined.receive("{")
    assert len(told) == 11
    assert "only counted" in of_kind(Note, told)[-1].event
    assert joined.channel.protocol_errors == 90
    joined.report_lost()
    joined.join_again()
    assert len(joined.receive("{")) == 1


def test_protocol_errors_of_all_kinds_share_the_limit(joined: Driver) -> None:
    told: list[PortalCommand] = []
    for _ in range(15):
        told += joined.receive("{")
        told += joined.receive(write("relay", "x"))
        told += joined.receive_other("binary")
        told += joined.receive(reply(7, "error"))
        told += joined.receive(reply(7, topic="phoenix"))
        told += joined.receive(write("relay", "disconnect", {"reason": "?"}))
    assert len(told) == 11


def test_a_frame_with_many_unknown_keys_is_a_single_protocol_error(joined: Driver) -> None:
    text = json.dumps({"topic": "relay", "event": "init", **{f"key{n}": n for n in range(5000)}})
    assert len(joined.receive(text)) == 1
    assert joined.channel.protocol_errors == 1


def test_replies_before_their_heartbeats_are_not_kept(joined: Driver) -> None:
    for ref in range(90):
        joined.receive(reply(ref, topic="phoenix"))
    assert len(joined.channel.connection.unanswered) == 0
    joined.pass_time(40 - TICK)
    assert len(joined.channel.connection.unanswered) == 3


# Redaction.

ECHOES: list[Callable[[str], str]] = [
    lambda text: write("relay", text),
    lambda text: write(text, "init"),
    lambda text: json.dumps({"topic": "relay", "event": "init", text: 1}),
    lambda text: reply(7, "error", {"reason": text}),
    lambda text: reply(7, "error", text),
    lambda text: reply(7, "error", {"stamp_secret": [text]}),
    lambda text: reply(7, "error", {text: 1}),
    lambda text: reply(7, "error", {"reason": json.dumps({"stamp_secret": text})}),
    lambda text: reply(7, text),
    lambda text: reply(7, "error", text, topic="phoenix"),
    lambda text: reply(0, "error", {"reason": text}),
    lambda text: reply(0, "error", {"stamp_secret": text}),
    lambda text: reply(0, text),
    lambda text: write("relay", "disconnect", {"reason": text}),
    lambda text: write("relay", "disconnect", {"why": text}),
    lambda text: text,
]
SECRETS = [SECRET, "pässwörd", 'a "quoted" one', "a/b"]


def shown_of(driver: Driver, commands: list[PortalCommand]) -> str:
    """Return all text in commands, both plain and JSON-encoded."""
    assert driver.channel.protocol_errors or of_kind(Fatal, commands)
    reasons = [command.reason for command in of_kind(Fatal, commands)]
    fields = [str(value) for note in of_kind(Note, commands) for value in note.fields.values()]
    return "\n".join([repr(commands), *reasons, *fields])


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("echo", ECHOES)
def test_a_secret_echoed_by_the_portal_is_redacted(echo: Callable[[str], str], secret: str) -> None:
    driver = driver_with(secret=RelaySecret(secret)).open()
    shown = shown_of(driver, driver.receive(echo(secret)))
    for spelling in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]):
        assert spelling not in shown


@pytest.mark.parametrize("echo", ECHOES)
def test_a_token_echoed_by_the_portal_is_redacted(echo: Callable[[str], str]) -> None:
    driver = Driver().open()
    assert TOKEN not in shown_of(driver, driver.receive(echo(f"Bearer {TOKEN}")))


@pytest.mark.parametrize("text", [TOKEN, SECRET, f"GET /?token={TOKEN} failed"])
def test_a_token_is_redacted_in_connection_errors_and_the_fatal_error(driver: Driver, text: str) -> None:
    driver.start()
    for _ in range(15):
        driver.report_lost(text)
        driver.pass_time(1)
    shown = repr(driver.log)
    assert "[concealed]" in driver.the_end()[1]
    assert TOKEN not in shown
    assert SECRET not in shown


# Random frames.

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([TOKEN, SECRET, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
topics = st.sampled_from(["relay", "relay", "relay", "phoenix", "", "relay:1"])
events = st.sampled_from(
    ["phx_reply", "phx_reply", "phx_reply", "init", "phx_close", "phx_error", "disconnect", "heartbeat", "phx_join", "new"]
)
reasons = st.sampled_from(["token_expired", "unmatched topic", "x", "", None, 1])
responses = json_values | st.fixed_dictionaries({}, optional={"reason": reasons | json_values})
payloads = json_values | st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["ok", "error", "?", None]) | json_values,
        "response": responses,
        "reason": reasons | json_values,
        "x": json_values,
    },
)
refs = st.integers(-1, 8) | st.integers(-1, 8).map(str) | json_values
frames = st.fixed_dictionaries(
    {"topic": topics, "event": events},
    optional={"payload": payloads, "ref": refs, "join_ref": refs, "x": json_values, TOKEN: json_values},
)
texts = (
    st.text(max_size=50)
    | st.text(alphabet='{}[]",:0e-ntfu\\', max_size=50)
    | json_values.map(json.dumps)
    | frames.map(json.dumps)
    | frames.map(json.dumps).flatmap(lambda text: st.integers(0, len(text)).map(lambda end: text[:end]))
)


@examples(70)
@given(st.sampled_from(OPEN), st.lists(texts, min_size=1, max_size=12), st.integers(0, 2**32))
def test_no_frame_raises_or_breaks_the_channel(make: Callable[[], Driver], said: list[str], seed: int) -> None:
    driver = make()
    random = Random(seed)
    for text in said:
        before = driver.channel.state
        out = driver.receive(text)
        fatal = of_kind(Fatal, out)
        assert len(out) <= 12
        assert len(fatal) <= 1
        assert not fatal or before is not State.LEAVING
        assert driver.is_in(before, *FOLLOWS[before])
        assert driver.seconds_left > 0
        assert len(driver.channel.connection.unanswered) <= 4
        driver.pass_time(random.choice([0, 0.25, 5]))
    shown = repr(driver.log)
    assert TOKEN not in shown
    assert SECRET not in shown
    assert json.dumps([dict(note.fields) for note in of_kind(Note, [each for _, each in driver.log])])


FOLLOWS = {
    State.JOINING: {State.JOINED, State.WAITING, State.OVER},
    State.JOINED: {State.JOINING, State.WAITING, State.OVER},
    State.LEAVING: {State.CLOSING},
    State.CLOSING: set[State](),
    State.WAITING: set[State](),
    State.CONNECTING: set[State](),
    State.OVER: set[State](),
}
