"""Usernames, passwords and their expiry (docs/protocol.md)."""

import time
import traceback
from datetime import UTC, datetime

import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from relay.core.commands import BindPort, FreeAllocation
from relay.core.counters import FreeReason
from relay.core.credentials import (
    Credential,
    RelaySecret,
    Username,
    integrity_key,
    mint,
    parse_username,
    password_of,
)
from relay.core.stun import Method
from relay.core.timestamp import Timestamp
from tests.support.core import START, UDP, Client, Relay, answer_in, the

SECRET_TEXT = "4c98bf59c99b3e467ecd7cf9d6b3e5279645fca59be67bc5bb4af3cf653761ab"


@pytest.mark.parametrize(
    ("username", "secret", "password"),
    [
        ("1892160000:n23JJ2wKKtt30oXi", SECRET_TEXT, "00hqldgk5xLeKKOB+xls9mHMVtgqzie9DulfgQwMv68"),
        (
            "1685984278:uvdgKvS9GXYZ_vmv",
            "1cab293a-4032-46f4-862a-40e5d174b0d2",
            "6xUIoZ+QvxKhRasLifwfRkMXl+ETLJUsFkHlXjlHAkg",
        ),
    ],
)
def test_a_password_is_derived_as_the_portal_does(username: str, secret: str, password: str) -> None:
    parsed = parse_username(username)
    assert parsed is not None
    assert password_of(parsed, RelaySecret(secret)) == password
    expiry, _, salt = username.partition(":")
    assert mint(RelaySecret(secret), int(expiry), salt) == Credential(username, password)


def test_the_integrity_key_is_the_long_term_key() -> None:
    # The example of RFC 5389 §15.4.
    assert integrity_key("user", "realm", "pass").hex() == "8493fbc53ba582fb4c044c456bdc40eb"


@pytest.mark.parametrize(
    ("text", "expiry"),
    [
        ("0:salt", 0),
        ("1700000000:salt", 1_700_000_000),
        ("0001:salt", 1),
        ("1:", 1),
        ("1: ", 1),
        ("1:\u30de", 1),
        ("9" * 400 + ":salt", int("9" * 400)),
    ],
)
def test_a_username_consists_of_an_expiry_and_a_salt(text: str, expiry: int) -> None:
    assert parse_username(text) == Username(text, expiry)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "salt",
        "1700000000",
        ":salt",
        "1:2:3",
        "1::salt",
        "1:salt:",
        "-1:salt",
        "+1:salt",
        "1.0:salt",
        "1e9:salt",
        "1_000:salt",
        "0x1:salt",
        " 1:salt",
        "1 :salt",
        "1\n:salt",
        "\u0661:salt",
        "\u00b2:salt",
        "\uff11:salt",
        "salt:1",
    ],
)
def test_any_other_text_is_no_username(text: str) -> None:
    assert parse_username(text) is None


@given(st.text("0123456789:-+ a\u0661\u00b2", max_size=20))
def test_any_text_is_parsed_as_a_username_or_none(text: str) -> None:
    username = parse_username(text)
    fields = text.split(":")
    well_formed = len(fields) == 2 and fields[0] != "" and set(fields[0]) <= set("0123456789")
    assert (username is not None) is well_formed
    assert username is None or username.text == text


def test_leading_zeros_of_an_expiry_are_part_of_the_password() -> None:
    one, padded = parse_username("1:salt"), parse_username("01:salt")
    assert one is not None
    assert padded is not None
    assert password_of(one, RelaySecret("s")) != password_of(padded, RelaySecret("s"))


@pytest.mark.parametrize(
    ("now", "expired"), [(0, False), (999, False), (999.5, False), (1000, False), (1000.001, True), (1001, True)]
)
def test_a_username_is_expired_when_its_expiry_is_past(now: float, expired: bool) -> None:  # noqa: FBT001
    assert Username("1000:salt", 1000).is_expired(now) is expired


def test_only_expose_shows_the_secret() -> None:
    secret = RelaySecret(SECRET_TEXT)
    assert secret.expose() == SECRET_TEXT
    for shown in (repr(secret), str(secret), f"{secret}", f"{[secret]}", repr({"secret": secret})):
        assert SECRET_TEXT not in shown
        assert "RelaySecret(...)" in shown


def test_the_settings_of_a_relay_do_not_show_the_secret() -> None:
    relay = Relay()
    assert relay.config.secret.expose() not in repr(relay.config)


def test_a_traceback_with_locals_does_not_show_the_secret() -> None:
    with pytest.raises(ValueError, match="salt") as raised:
        mint(RelaySecret(SECRET_TEXT), 1, "a:b")
    shown = traceback.TracebackException.from_exception(raised.value, capture_locals=True).format()
    assert SECRET_TEXT not in "".join(shown)


@pytest.mark.parametrize(("expiry", "salt"), [(-1, "salt"), (1, "sa:lt"), (1, ":")])
def test_an_invalid_credential_is_not_created(expiry: int, salt: str) -> None:
    with pytest.raises(ValueError, match="expiry"):
        mint(RelaySecret("s"), expiry, salt)


@given(st.integers(0, 10**12), st.text("abc/+=\u00e9 ", max_size=30))
def test_a_created_credential_is_accepted(expiry: int, salt: str) -> None:
    secret = RelaySecret("s")
    credential = mint(secret, expiry, salt)
    username = parse_username(credential.username)
    assert username is not None
    assert username.expiry == expiry
    assert password_of(username, secret) == credential.password
    assert not credential.password.endswith("=")


def test_an_allocation_outlives_an_expired_credential() -> None:
    # The expiry uses the adjustable wall clock; all other deadlines use the monotonic clock.
    expiry = 1_800_000_000
    relay = Relay()

    def at(unix: float, monotonic: float) -> Timestamp:
        with freeze_time(datetime.fromtimestamp(unix, UTC)):
            return Timestamp(monotonic=monotonic, unix=time.time())

    relay.now = at(expiry - 10, 50)
    client = Client(relay, valid_for=10)
    assert client.credential.username == f"{expiry}:salt"
    client.take_nonce()
    relay.now = at(expiry, 60)
    bind = the(BindPort, client.send(client.write(Method.ALLOCATE, UDP)))
    assert answer_in(relay.report_bound(bind.allocation)).code is None
    assert client.bind_channel().code is None
    relay.now = at(expiry + 1, 61)
    assert client.refresh(600).code == 401
    assert client.bind_channel().code == 401
    assert client.refresh(0).code == 401
    assert len(client.send_on_channel(b"data")) == 1
    relay.now = at(expiry + 598, 659.75)
    assert len(client.send_on_channel(b"data")) == 1
    assert relay.wake() == []
    relay.now = at(expiry + 599, 660)
    assert relay.wake() == [FreeAllocation(bind.allocation, FreeReason.EXPIRED)]


def test_setting_the_wall_clock_moves_no_deadline() -> None:
    relay = Relay()
    client = Client(relay)
    client.allocate()
    client.bind_channel()
    relay.now = Timestamp(START.monotonic + 599, START.unix - 10**8)
    assert relay.wake() == []
    assert len(client.send_on_channel(b"data")) == 1
    relay.now = Timestamp(START.monotonic + 599, START.unix + 10**8)
    assert relay.wake() == []
    assert len(client.send_on_channel(b"data")) == 1
    assert client.refresh(600).code == 401
    # Once the clock is corrected, the credential is valid again.
    relay.now = Timestamp(START.monotonic + 599, START.unix)
    assert client.refresh(600).code is None


def test_a_too_large_expiry_is_rejected_without_arithmetic() -> None:
    assert parse_username("1" * 5000 + ":salt") is None
