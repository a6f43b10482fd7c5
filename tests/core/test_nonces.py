"""Nonces (RFC 8489 §9.2, docs/protocol.md)."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import ClientAddress, SocketAddress
from relay.core.counters import NonceOutcome
from relay.core.instant import Instant
from relay.core.nonces import Nonces
from tests.core.driver import CLIENT, CLIENT6, OTHER_CLIENT, START

HERE = ClientAddress(CLIENT)


def after(seconds: float) -> Instant:
    return Instant(START.monotonic + seconds, START.unix)


@pytest.fixture
def nonces() -> Nonces:
    return Nonces(Random(1))


@pytest.mark.parametrize("seconds", [0, 0.5, 1, 1800, 3599, 3599.75])
def test_a_nonce_is_valid_within_an_hour(nonces: Nonces, seconds: float) -> None:
    assert nonces.is_valid(nonces.issue(HERE, START), HERE, after(seconds))


@pytest.mark.parametrize("seconds", [3600, 3601, 7200, 10**8])
def test_a_nonce_is_not_valid_after_an_hour(nonces: Nonces, seconds: float) -> None:
    assert not nonces.is_valid(nonces.issue(HERE, START), HERE, after(seconds))


def test_a_nonce_from_the_future_is_not_valid(nonces: Nonces) -> None:
    assert not nonces.is_valid(nonces.issue(HERE, after(1)), HERE, START)


def test_a_nonce_lives_across_the_wrap_of_its_seconds(nonces: Nonces) -> None:
    nonce = nonces.issue(HERE, Instant(2**32 - 10, 0))
    assert nonces.is_valid(nonce, HERE, Instant(2**32 + 3589, 0))
    assert not nonces.is_valid(nonce, HERE, Instant(2**32 + 3590, 0))


def test_the_wall_clock_means_nothing_to_a_nonce(nonces: Nonces) -> None:
    nonce = nonces.issue(HERE, START)
    assert nonce == nonces.issue(HERE, Instant(START.monotonic, 0))
    assert nonces.is_valid(nonce, HERE, Instant(START.monotonic, START.unix + 10**9))


@pytest.mark.parametrize(
    "other",
    [OTHER_CLIENT, (CLIENT[0], CLIENT[1] + 1), CLIENT6, ("203.0.113.54", 0), ("203.0.113.5", 4000), ("203.0.113.5 4", 0)],
)
def test_a_nonce_is_bound_to_one_host_and_port(nonces: Nonces, other: SocketAddress) -> None:
    nonce = nonces.issue(HERE, START)
    assert not nonces.is_valid(nonce, ClientAddress(other), START)
    assert nonces.issue(ClientAddress(other), START) != nonce


def test_another_relays_nonce_is_not_valid(nonces: Nonces) -> None:
    theirs = Nonces(Random(2))
    assert not nonces.is_valid(theirs.issue(HERE, START), HERE, START)
    assert Nonces(Random(1)).is_valid(nonces.issue(HERE, START), HERE, START)


@given(
    st.ip_addresses().map(str),
    st.integers(0, 0xFFFF),
    st.floats(0, 2.0**40),
)
def test_a_nonce_has_16_printable_bytes(host: str, port: int, now: float) -> None:
    nonce = Nonces(Random(1)).issue(ClientAddress((host, port)), Instant(now, 0))
    assert len(nonce) == 16
    assert nonce.isascii()
    assert nonce.decode().isprintable()
    assert b'"' not in nonce


@pytest.mark.parametrize(
    "nonce",
    [
        b"",
        b"=",
        b"====",
        b"=" * 16,
        b"A" * 16,
        b"A" * 15,
        b"A" * 17,
        b"A" * 14 + b"==",
        b"A" * 15 + b"=",
        b"\xff" * 16,
        bytes(16),
    ],
)
def test_a_forged_nonce_is_not_valid(nonces: Nonces, nonce: bytes) -> None:
    assert not nonces.is_valid(nonce, HERE, START)
    assert not nonces.is_valid(nonce, HERE, Instant(0, 0))


base64_bytes = st.lists(
    st.sampled_from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="), min_size=16, max_size=16
).map(bytes)


@given(st.binary(max_size=30) | st.binary(min_size=16, max_size=16) | base64_bytes)
def test_no_bytes_but_its_own_are_a_valid_nonce(nonce: bytes) -> None:
    nonces = Nonces(Random(1))
    assert not nonces.is_valid(nonce, HERE, START)


@given(st.integers(0, 15), st.integers(1, 255))
def test_no_changed_byte_leaves_a_nonce_valid(at: int, mask: int) -> None:
    nonces = Nonces(Random(1))
    changed = bytearray(nonces.issue(HERE, START))
    changed[at] ^= mask
    assert not nonces.is_valid(bytes(changed), HERE, START)


@given(st.binary(min_size=1, max_size=3))
def test_nothing_may_be_added_to_a_nonce(more: bytes) -> None:
    nonces = Nonces(Random(1))
    nonce = nonces.issue(HERE, START)
    assert not nonces.is_valid(nonce + more, HERE, START)
    assert not nonces.is_valid(more + nonce, HERE, START)
    assert not nonces.is_valid(nonce[: -len(more)], HERE, START)


def test_what_came_of_each_nonce_is_counted() -> None:
    counted = dict.fromkeys(NonceOutcome, 0)
    nonces = Nonces(Random(1), counted)
    nonce = nonces.issue(HERE, START)
    for client, at in ((HERE, START), (HERE, after(3599)), (HERE, after(3600)), (ClientAddress(OTHER_CLIENT), START)):
        nonces.is_valid(nonce, client, at)
    nonces.is_valid(b"short", HERE, START)
    nonces.is_valid(b"A" * 16, HERE, START)
    assert counted == {NonceOutcome.OURS: 2, NonceOutcome.EXPIRED: 1, NonceOutcome.FOREIGN: 3}
