"""Whatever a portal sends costs at most its connection: no exception, no memory, no log without end, nothing revealed."""

import json
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.credentials import RelaySecret
from relay.core.portal.channel import State
from relay.core.portal.commands import Abandon, Begin, ConnectionId, Fatal, Note, PortalCommand
from tests.core.portal.driver import (
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

FIRST = ConnectionId(1)


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


# What is no frame.


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
def test_what_is_no_frame_is_counted_and_told(make: Callable[[], Driver], text: str) -> None:
    driver = make()
    state = driver.channel.state
    told = driver.receive(text)
    assert len(told) == len(of_kind(Note, told)) == 1
    assert driver.channel.oddities == 1
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
def test_a_frame_may_be_written_in_many_ways(driver: Driver, text: str) -> None:
    driver.open()
    assert driver.receive(text) == [Begin()]


@pytest.mark.parametrize("topic", ["relay", "phoenix"])
@pytest.mark.parametrize("event", ["phx_reply", "disconnect"])
@pytest.mark.parametrize("more", ["", ',"payload":null', ',"payload":{}'])
def test_a_frame_without_a_payload_has_an_empty_one(driver: Driver, topic: str, event: str, more: str) -> None:
    driver.open()
    assert deeds(driver.receive(f'{{"topic":"{topic}","event":"{event}","ref":0{more}}}')) == []
    assert driver.is_in(State.JOINING)
    assert driver.channel.oddities == 1


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
def test_what_is_nested_as_deeply_as_can_just_be_read_can_be_told(
    joined: Driver, frame: str, brackets: tuple[str, str]
) -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 100, limit - 20):
        assert deeds(joined.receive(frame % nested(depth, *brackets))) == []
    assert joined.channel.is_joined


# What is a frame, and yet means nothing.


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
def test_an_unknown_event_is_ignored_and_told(make: Callable[[], Driver], topic: str, event: str) -> None:
    driver = make()
    state = driver.channel.state
    note = the(Note, driver.receive(write(topic, event, {"any": "thing"}, 3)))
    assert (note.fields["topic"], note.fields["portal_event"]) == (topic, event)
    assert driver.channel.oddities == 1
    assert driver.is_in(state)


def test_an_unknown_key_is_told_and_the_frame_is_taken(driver: Driver) -> None:
    driver.open()
    told = driver.receive('{"topic":"relay","event":"init","payload":{},"ref":null,"colour":1}')
    assert the(Note, told).fields == {"keys": "colour"}
    assert of_kind(Begin, told)
    assert driver.channel.oddities == 1


def test_a_binary_frame_is_told(joined: Driver) -> None:
    assert "binary" in the(Note, joined.receive_other("binary")).event
    assert joined.channel.is_joined


@pytest.mark.parametrize("kind", ["ping", "pong"])
def test_pings_and_pongs_mean_nothing(joined: Driver, kind: str) -> None:
    assert joined.receive_other(kind) == []
    assert joined.channel.oddities == 0


def test_unknown_keys_of_a_payload_mean_nothing(driver: Driver) -> None:
    driver.open()
    assert driver.receive(write("relay", "init", {"relays": [1], "status": "x"})) == [Begin()]
    assert driver.channel.oddities == 0


# Too much.


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
def test_a_flood_costs_the_connection(make: Callable[[], Driver], flood: Callable[[Driver], list[PortalCommand]]) -> None:
    driver = make()
    driver.pass_time(0.5)
    driver.receive_other("ping")
    out: list[PortalCommand] = []
    for _ in range(101):
        out += flood(driver)
    assert the(Abandon, out) == Abandon(FIRST)
    assert len(out) < 20
    assert driver.is_in(State.WAITING, State.OVER)
    assert flood(driver) == []


def test_a_hundred_frames_in_10_s_are_no_flood(joined: Driver) -> None:
    # The answer to the join and init were the first two.
    for _ in range(98):
        assert joined.receive_other("ping") == []
    joined.pass_time(10 - TICK)
    assert deeds(joined.receive_other("ping")) == [Abandon(FIRST)]
    assert joined.is_in(State.WAITING)


@pytest.mark.parametrize("text", [INIT, TOKEN_EXPIRED, reply(0, "error")])
def test_the_frame_that_is_one_too_many_means_nothing_else(driver: Driver, text: str) -> None:
    driver.open()
    for _ in range(100):
        driver.receive_other("ping")
    assert deeds(driver.receive(text)) == [Abandon(FIRST)]
    assert driver.is_in(State.WAITING)
    assert not driver.channel.has_begun


def test_with_each_heartbeat_frames_are_counted_anew(joined: Driver) -> None:
    for _ in range(98):
        joined.receive_other("ping")
    for _ in range(3):
        joined.pass_time(10)
        for _ in range(100):
            assert joined.receive_other("ping") == []
    assert deeds(joined.receive(INIT)) == [Abandon(FIRST)]


def test_frames_are_counted_anew_on_each_connection(joined: Driver) -> None:
    for _ in range(90):
        joined.receive_other("ping")
    joined.report_lost()
    joined.join_again()
    for _ in range(99):
        assert joined.receive_other("ping") == []


def test_a_connection_has_ten_oddities_told_and_all_counted(joined: Driver) -> None:
    told: list[PortalCommand] = []
    for _ in range(90):
        told += joined.receive("{")
    assert len(told) == 11
    assert "only counted" in of_kind(Note, told)[-1].event
    assert joined.channel.oddities == 90
    joined.report_lost()
    joined.join_again()
    assert len(joined.receive("{")) == 1


def test_oddities_of_all_kinds_count_alike(joined: Driver) -> None:
    told: list[PortalCommand] = []
    for _ in range(15):
        told += joined.receive("{")
        told += joined.receive(write("relay", "x"))
        told += joined.receive_other("binary")
        told += joined.receive(reply(7, "error"))
        told += joined.receive(reply(7, topic="phoenix"))
        told += joined.receive(write("relay", "disconnect", {"reason": "?"}))
    assert len(told) == 11


def test_a_frame_with_many_unknown_keys_is_one_oddity(joined: Driver) -> None:
    text = json.dumps({"topic": "relay", "event": "init", **{f"key{n}": n for n in range(5000)}})
    assert len(joined.receive(text)) == 1
    assert joined.channel.oddities == 1


def test_nothing_that_a_portal_sends_is_kept(joined: Driver) -> None:
    for ref in range(90):
        joined.receive(reply(ref, topic="phoenix"))
    assert joined.channel._conversation.unanswered == 0
    joined.pass_time(50 - TICK)
    assert joined.channel._conversation.unanswered == 4


# What must not be told.

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
    """Give all that could be read of commands, as it is and as JSON would have it."""
    assert driver.channel.oddities or of_kind(Fatal, commands)
    reasons = [command.reason for command in of_kind(Fatal, commands)]
    fields = [str(value) for note in of_kind(Note, commands) for value in note.fields.values()]
    return "\n".join([repr(commands), *reasons, *fields])


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("echo", ECHOES)
def test_a_secret_that_the_portal_sends_back_is_not_told(echo: Callable[[str], str], secret: str) -> None:
    driver = driver_with(secret=RelaySecret(secret)).open()
    shown = shown_of(driver, driver.receive(echo(secret)))
    for spelling in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]):
        assert spelling not in shown


@pytest.mark.parametrize("echo", ECHOES)
def test_a_token_that_the_portal_sends_back_is_not_told(echo: Callable[[str], str]) -> None:
    driver = Driver().open()
    assert TOKEN not in shown_of(driver, driver.receive(echo(f"Bearer {TOKEN}")))


@pytest.mark.parametrize("text", [TOKEN, SECRET, f"GET /?token={TOKEN} failed"])
def test_a_loss_and_the_end_that_it_leads_to_do_not_tell_it_either(driver: Driver, text: str) -> None:
    driver.start()
    for _ in range(15):
        driver.report_lost(text)
        driver.pass_time(1)
    shown = repr(driver.log)
    assert "[concealed]" in driver.the_end()[1]
    assert TOKEN not in shown
    assert SECRET not in shown


# Anything at all.

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


@settings(deadline=None, max_examples=70)
@given(st.sampled_from(OPEN), st.lists(texts, min_size=1, max_size=12), st.integers(0, 2**32))
def test_nothing_that_a_portal_says_raises_or_harms(make: Callable[[], Driver], said: list[str], seed: int) -> None:
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
        assert driver.channel._conversation.unanswered <= 4
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
