"""Nonces (RFC 8489 §9.2, docs/protocol.md)."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import ClientAddress, SocketAddress
from relay.core.counters import NonceOutcome
from relay.core.nonces import Nonces
from tests.support.core import CLIENT, CLIENT6, OTHER_CLIENT, START

HERE = ClientAddress(CLIENT)
NOW = START.monotonic


def made(seed: int = 1) -> Nonces:
    return Nonces(Random(seed), dict.fromkeys(NonceOutcome, 0))


def is_valid(nonces: Nonces, nonce: bytes, client: ClientAddress, now: float) -> bool:
    return nonces.check(nonce, client, now) is NonceOutcome.OURS


@pytest.fixture
def nonces() -> Nonces:
    return made()


@pytest.mark.parametrize("seconds", [0, 0.5, 1, 1800, 3599, 3599.75])
def test_a_nonce_is_valid_within_an_hour(nonces: Nonces, seconds: float) -> None:
    assert is_valid(nonces, nonces.issue(HERE, NOW), HERE, NOW + seconds)


@pytest.mark.parametrize("seconds", [3600, 3601, 7200, 10**8])
def test_a_nonce_is_not_valid_after_an_hour(nonces: Nonces, seconds: float) -> None:
    assert not is_valid(nonces, nonces.issue(HERE, NOW), HERE, NOW + seconds)


def test_a_nonce_from_the_future_is_not_valid(nonces: Nonces) -> None:
    assert not is_valid(nonces, nonces.issue(HERE, NOW + 1), HERE, NOW)


def test_a_nonce_stays_valid_when_its_seconds_wrap_around(nonces: Nonces) -> None:
    nonce = nonces.issue(HERE, 2**32 - 10)
    assert is_valid(nonces, nonce, HERE, 2**32 + 3589)
    assert not is_valid(nonces, nonce, HERE, 2**32 + 3590)


@pytest.mark.parametrize(
    "other",
    [OTHER_CLIENT, (CLIENT[0], CLIENT[1] + 1), CLIENT6, ("203.0.113.54", 0), ("203.0.113.5", 4000), ("203.0.113.5 4", 0)],
)
def test_a_nonce_is_bound_to_a_host_and_port(nonces: Nonces, other: SocketAddress) -> None:
    nonce = nonces.issue(HERE, NOW)
    assert not is_valid(nonces, nonce, ClientAddress(other), NOW)
    assert nonces.issue(ClientAddress(other), NOW) != nonce


def test_a_nonce_of_another_relay_is_not_valid(nonces: Nonces) -> None:
    theirs = made(2)
    assert not is_valid(nonces, theirs.issue(HERE, NOW), HERE, NOW)
    assert is_valid(made(), nonces.issue(HERE, NOW), HERE, NOW)


@given(
    st.ip_addresses().map(str),
    st.integers(0, 0xFFFF),
    st.floats(0, 2.0**40),
)
def test_a_nonce_has_16_printable_bytes(host: str, port: int, now: float) -> None:
    nonce = made().issue(ClientAddress((host, port)), now)
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
    assert not is_valid(nonces, nonce, HERE, NOW)
    assert not is_valid(nonces, nonce, HERE, 0)


base64_bytes = st.lists(
    st.sampled_from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="), min_size=16, max_size=16
).map(bytes)


@given(st.binary(max_size=30) | st.binary(min_size=16, max_size=16) | base64_bytes)
def test_any_different_bytes_are_not_a_valid_nonce(nonce: bytes) -> None:
    nonces = made()
    assert not is_valid(nonces, nonce, HERE, NOW)


@given(st.integers(0, 15), st.integers(1, 255))
def test_a_nonce_with_a_changed_byte_is_not_valid(at: int, mask: int) -> None:
    nonces = made()
    changed = bytearray(nonces.issue(HERE, NOW))
    changed[at] ^= mask
    assert not is_valid(nonces, bytes(changed), HERE, NOW)


@given(st.binary(min_size=1, max_size=3))
def test_a_nonce_with_added_bytes_is_not_valid(more: bytes) -> None:
    nonces = made()
    nonce = nonces.issue(HERE, NOW)
    assert not is_valid(nonces, nonce + more, HERE, NOW)
    assert not is_valid(nonces, more + nonce, HERE, NOW)
    assert not is_valid(nonces, nonce[: -len(more)], HERE, NOW)


def test_each_nonce_check_is_counted_by_result() -> None:
    counted = dict.fromkeys(NonceOutcome, 0)
    nonces = Nonces(Random(1), counted)
    nonce = nonces.issue(HERE, NOW)
    for client, at in ((HERE, NOW), (HERE, NOW + 3599), (HERE, NOW + 3600), (ClientAddress(OTHER_CLIENT), NOW)):
        is_valid(nonces, nonce, client, at)
    is_valid(nonces, b"short", HERE, NOW)
    is_valid(nonces, b"A" * 16, HERE, NOW)
    assert counted == {NonceOutcome.OURS: 2, NonceOutcome.EXPIRED: 1, NonceOutcome.FOREIGN: 3}
