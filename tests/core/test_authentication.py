"""The checks before every request except Binding, in their order (docs/protocol.md)."""

from typing import Any

import pytest

from relay.core.addresses import Family
from relay.core.attributes import (
    CHANNEL_NUMBER,
    LIFETIME,
    NONCE,
    REALM,
    SOFTWARE,
    UNKNOWN_ATTRIBUTES,
    USERNAME,
    XOR_MAPPED_ADDRESS,
    XOR_PEER_ADDRESS,
    Attribute,
)
from relay.core.authentication import claimed_user
from relay.core.commands import BindPort, SendToClient
from relay.core.counters import DropReason
from relay.core.credentials import CACHED_KEYS, RelaySecret, UserKey, integrity_key, key_cache
from relay.core.stun import Message, MessageClass, Method, decode, encode
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CLIENT6,
    OTHER_CLIENT,
    PEER,
    UDP,
    Answer,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    opaque,
    the,
)

UNKNOWN = opaque(0x7F01)
UNKNOWN_OPTIONAL = opaque(0xFF01)
PRIORITY = opaque(0x0024)

AUTHENTICATED = (Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND)
BODIES: dict[Method, list[AttributeValue]] = {
    Method.ALLOCATE: [UDP],
    Method.REFRESH: [(LIFETIME, 0)],
    Method.CREATE_PERMISSION: [(XOR_PEER_ADDRESS, PEER)],
    Method.CHANNEL_BIND: [(CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, PEER)],
}


def types_of(answer: Answer) -> set[int]:
    return {type_ for type_, _ in answer.message.attributes}


def assert_challenged(answer: Answer, code: int, client: Client) -> None:
    assert answer.code == code
    assert answer.get(REALM) == "firezone"
    nonce = answer.get(NONCE)
    assert nonce is not None
    # The nonce is valid.
    credible = encode(
        MessageClass.REQUEST,
        Method.REFRESH,
        client.relay.new_transaction_id(),
        [(USERNAME, client.credential.username), (REALM, "firezone"), (NONCE, nonce)],
        key=client.key,
    )
    assert answer_in(client.send(credible)).code == 437


@pytest.mark.parametrize("method", AUTHENTICATED)
def test_a_request_without_message_integrity_gets_401(relay: Relay, client: Client, method: Method) -> None:
    data = encode(MessageClass.REQUEST, method, b"transaction.", BODIES[method])
    answer = answer_in(client.send(data))
    assert answer.client == CLIENT
    assert answer.message.message_class is MessageClass.ERROR
    assert answer.message.method == method
    assert answer.message.transaction_id == b"transaction."
    assert answer.message.integrity_at is None
    assert_challenged(answer, 401, client)
    assert relay.counters.errors[method, 401] == 1


@pytest.mark.parametrize("method", AUTHENTICATED)
def test_an_unsigned_request_with_a_username_gets_a_signed_401(client: Client, method: Method) -> None:
    data = encode(MessageClass.REQUEST, method, b"transaction.", [*BODIES[method], (USERNAME, client.credential.username)])
    answer = answer_in(client.send(data))
    assert answer.message.integrity_holds(client.key)
    assert_challenged(answer, 401, client)


@pytest.mark.parametrize("method", AUTHENTICATED)
def test_a_signed_request_without_nonce_gets_a_signed_401(client: Client, method: Method) -> None:
    answer = answer_in(client.send(client.write(method, *BODIES[method], leave_out=(NONCE,))))
    assert answer.message.integrity_holds(client.key)
    assert_challenged(answer, 401, client)


@pytest.mark.parametrize("missing", [(NONCE, USERNAME), (NONCE, REALM), (NONCE, USERNAME, REALM)])
def test_a_missing_nonce_is_checked_before_a_missing_username_or_realm(
    client: Client, missing: tuple[Attribute[Any], ...]
) -> None:
    assert_challenged(answer_in(client.send(client.write(Method.ALLOCATE, UDP, leave_out=missing))), 401, client)


@pytest.mark.parametrize("method", AUTHENTICATED)
@pytest.mark.parametrize("missing", [USERNAME, REALM])
def test_a_signed_request_without_username_or_realm_gets_400(
    client: Client, method: Method, missing: Attribute[str]
) -> None:
    answer = answer_in(client.send(client.write(method, *BODIES[method], leave_out=(missing,))))
    assert answer.code == 400
    assert not answer.message.has(NONCE)
    assert answer.message.integrity_holds(client.key) is (missing is not USERNAME)


@pytest.mark.parametrize("nonce", [b"", b"garbage", bytes(16), b"A" * 16, b"\xff" * 16, b"A" * 700])
@pytest.mark.parametrize("missing", [USERNAME, REALM])
def test_a_missing_username_or_realm_is_checked_before_a_wrong_nonce(
    client: Client, missing: Attribute[str], nonce: bytes
) -> None:
    data = client.write(Method.ALLOCATE, UDP, (NONCE, nonce), leave_out=(NONCE, missing))
    assert answer_in(client.send(data)).code == 400


@pytest.mark.parametrize("method", AUTHENTICATED)
@pytest.mark.parametrize("nonce", [b"", b"garbage", bytes(16), b"A" * 16, b"\xff" * 16, b"A" * 700])
def test_an_unknown_nonce_gets_a_signed_438(client: Client, method: Method, nonce: bytes) -> None:
    answer = answer_in(client.send(client.write(method, *BODIES[method], (NONCE, nonce), leave_out=(NONCE,))))
    assert answer.message.integrity_holds(client.key)
    assert_challenged(answer, 438, client)


@pytest.mark.parametrize("address", [OTHER_CLIENT, (CLIENT[0], CLIENT[1] + 1), CLIENT6])
def test_a_nonce_of_another_address_gets_438(
    relay: Relay, client: Client, address: tuple[str, int] | tuple[str, int, int, int]
) -> None:
    answer = answer_in(relay.receive(client.write(Method.ALLOCATE, UDP), address))
    assert_challenged(answer, 438, Client(relay, address))


def test_a_nonce_is_valid_for_an_hour_and_then_gets_438(relay: Relay, client: Client) -> None:
    client.take_nonce()
    relay.pass_time(3599)
    assert client.refresh(600).code == 437
    relay.pass_time(1)
    answer = client.refresh(600)
    assert answer.message.integrity_holds(client.key)
    assert_challenged(answer, 438, client)


def test_a_stale_nonce_is_checked_before_wrong_credentials(relay: Relay) -> None:
    # On 401 a Firezone client discards its credentials; on 438 the client retries.
    client = Client(relay, valid_for=100)
    client.take_nonce()
    relay.pass_time(3600)
    assert client.refresh(600).code == 438
    wrong = client.write(Method.REFRESH, key=b"wrong")
    assert answer_in(client.send(wrong)).code == 438


@pytest.mark.parametrize("method", AUTHENTICATED)
def test_a_wrong_message_integrity_gets_a_signed_401(client: Client, method: Method) -> None:
    answer = answer_in(client.send(client.write(method, *BODIES[method], key=b"wrong")))
    assert answer.message.integrity_holds(client.key)
    assert_challenged(answer, 401, client)


@pytest.mark.parametrize("method", AUTHENTICATED)
def test_an_expired_credential_gets_a_signed_401(relay: Relay, method: Method) -> None:
    client = Client(relay, valid_for=-1)
    answer = answer_in(client.send(client.write(method, *BODIES[method])))
    assert answer.message.integrity_holds(client.key)
    assert answer.code == 401
    assert answer.get(REALM) == "firezone"
    assert answer.message.has(NONCE)


@pytest.mark.parametrize("username", ["", "salt", "1:2:3", "-1:salt", ":salt", "1.5:salt", "1" * 509])
def test_a_malformed_username_gets_an_unsigned_401(client: Client, username: str) -> None:
    key = integrity_key(username, "firezone", client.credential.password)
    data = client.write(Method.ALLOCATE, UDP, (USERNAME, username), leave_out=(USERNAME,), key=key)
    answer = answer_in(client.send(data))
    assert answer.message.integrity_at is None
    assert_challenged(answer, 401, client)


@pytest.mark.parametrize("username", ["", "salt", "1:2:3"])
def test_a_wrong_nonce_is_checked_before_a_malformed_username(client: Client, username: str) -> None:
    data = client.write(Method.ALLOCATE, UDP, (USERNAME, username), (NONCE, b"old"), leave_out=(USERNAME, NONCE))
    assert answer_in(client.send(data)).code == 438


def test_a_foreign_realm_gets_401(client: Client) -> None:
    key = integrity_key(client.credential.username, "elsewhere", client.credential.password)
    data = client.write(Method.ALLOCATE, UDP, (REALM, "elsewhere"), leave_out=(REALM,), key=key)
    assert_challenged(answer_in(client.send(data)), 401, client)


def test_a_changed_byte_after_signing_gets_401(client: Client) -> None:
    data = bytearray(client.write(Method.ALLOCATE, (LIFETIME, 700), UDP))
    data[27] ^= 1
    assert answer_in(client.send(bytes(data))).code == 401


def test_a_password_is_valid_only_for_its_own_username(relay: Relay, client: Client) -> None:
    other = Client(relay, salt="other")
    answer = answer_in(client.send(client.write(Method.ALLOCATE, UDP, key=other.key)))
    assert answer.code == 401
    assert answer.message.integrity_holds(client.key)


@pytest.mark.parametrize("method", AUTHENTICATED)
def test_an_unknown_attribute_gets_420_before_any_other_error(relay: Relay, client: Client, method: Method) -> None:
    bare = encode(MessageClass.REQUEST, method, b"transaction.", [(UNKNOWN, b""), (PRIORITY, b"1234"), (UNKNOWN, b"")])
    answer = answer_in(relay.receive(bare, CLIENT))
    assert answer.code == 420
    assert answer.get(UNKNOWN_ATTRIBUTES) == (0x7F01, 0x0024)
    assert answer.message.integrity_at is None
    assert not answer.message.has(NONCE)
    full = answer_in(client.send(client.write(method, (UNKNOWN, b""), key=b"wrong")))
    assert full.code == 420
    assert full.message.integrity_holds(client.key)


def test_an_unknown_attribute_of_binding_gets_420(relay: Relay) -> None:
    data = encode(MessageClass.REQUEST, Method.BINDING, b"transaction.", [(UNKNOWN, b"")])
    answer = answer_in(relay.receive(data, CLIENT))
    assert answer.code == 420
    assert answer.get(UNKNOWN_ATTRIBUTES) == (0x7F01,)


def test_an_unknown_comprehension_optional_attribute_is_ignored(relay: Relay) -> None:
    data = encode(MessageClass.REQUEST, Method.BINDING, b"transaction.", [(UNKNOWN_OPTIONAL, b"x")])
    assert answer_in(relay.receive(data, CLIENT)).code is None


def test_an_unknown_attribute_after_message_integrity_is_ignored(client: Client) -> None:
    late = encode(MessageClass.REQUEST, Method.ALLOCATE, bytes(12), [(UNKNOWN, b"")])[20:]
    data = client.write(Method.ALLOCATE, UDP) + late
    bind = the(BindPort, client.send(data[:2] + (len(data) - 20).to_bytes(2, "big") + data[4:]))
    assert bind.families == (Family.IPV4,)


@pytest.mark.parametrize("address", [CLIENT, CLIENT6])
def test_a_binding_response_has_the_address_of_the_sender(
    relay: Relay, address: tuple[str, int] | tuple[str, int, int, int]
) -> None:
    answer = answer_in(relay.receive(encode(MessageClass.REQUEST, Method.BINDING, b"transaction.", []), address))
    assert answer.code is None
    assert answer.client == address
    assert answer.message.method == Method.BINDING
    assert answer.message.transaction_id == b"transaction."
    assert answer.get(XOR_MAPPED_ADDRESS) == address
    assert types_of(answer) == {XOR_MAPPED_ADDRESS.type}


def test_binding_ignores_credentials(client: Client) -> None:
    answer = answer_in(client.send(client.write(Method.BINDING, key=b"wrong")))
    assert answer.code is None
    assert answer.get(XOR_MAPPED_ADDRESS) == CLIENT


@pytest.mark.parametrize("fingerprint", [True, False])
def test_a_response_has_a_fingerprint_like_its_request(relay: Relay, client: Client, fingerprint: bool) -> None:  # noqa: FBT001
    def has(data: bytes) -> bool:
        return answer_in(client.send(data)).message.has_fingerprint

    def bare(method: Method, *attributes: AttributeValue) -> bytes:
        return encode(MessageClass.REQUEST, method, bytes(12), attributes, fingerprint=fingerprint)

    assert has(bare(Method.BINDING)) is fingerprint
    assert has(bare(Method.BINDING, (UNKNOWN, b""))) is fingerprint
    assert has(bare(Method.ALLOCATE)) is fingerprint
    assert has(client.write(Method.ALLOCATE, (NONCE, b"x"), leave_out=(NONCE,), fingerprint=fingerprint)) is fingerprint
    assert has(client.write(Method.REFRESH, fingerprint=fingerprint)) is fingerprint
    allocate = client.write(Method.ALLOCATE, UDP, fingerprint=fingerprint)
    bind = the(BindPort, client.send(allocate))
    assert answer_in(relay.report_bound(bind.allocation)).message.has_fingerprint is fingerprint
    assert has(allocate) is fingerprint
    assert has(client.write(Method.CREATE_PERMISSION, (XOR_PEER_ADDRESS, PEER), fingerprint=fingerprint)) is fingerprint


def test_software_is_only_in_authenticated_success_responses(client: Client) -> None:
    assert not answer_in(client.send(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []))).message.has(SOFTWARE)
    assert not answer_in(client.send(encode(MessageClass.REQUEST, Method.ALLOCATE, bytes(12), []))).message.has(SOFTWARE)
    assert not answer_in(client.send(client.write(Method.ALLOCATE, key=b"wrong"))).message.has(SOFTWARE)
    assert not answer_in(client.send(client.write(Method.ALLOCATE, leave_out=(NONCE,)))).message.has(SOFTWARE)
    assert not answer_in(client.send(client.write(Method.BINDING))).message.has(SOFTWARE)
    assert not client.refresh(600).message.has(SOFTWARE)
    assert client.allocate().answer.get(SOFTWARE) == "relay under test"
    assert client.refresh(600).get(SOFTWARE) == "relay under test"
    assert client.create_permission(PEER).get(SOFTWARE) == "relay under test"
    assert client.bind_channel().get(SOFTWARE) == "relay under test"


def test_a_challenge_has_the_minimum_size(relay: Relay) -> None:
    # Header, ERROR-CODE without a reason phrase, REALM, NONCE: a spoofed request can reflect these bytes at a victim.
    sent = the(SendToClient, relay.receive(encode(MessageClass.REQUEST, Method.ALLOCATE, bytes(12), [UDP]), CLIENT))
    assert len(sent.data) == 20 + (4 + 4) + (4 + 8) + (4 + 16)


@pytest.mark.parametrize("method", AUTHENTICATED)
def test_every_authenticated_response_is_signed(relay: Relay, client: Client, method: Method) -> None:
    allocation = client.allocate()
    assert allocation.answer.message.integrity_holds(client.key)
    good = client.ask(method, *BODIES[method])
    assert good.message.integrity_holds(client.key)
    bad = client.ask(method, (LIFETIME, 600), (XOR_PEER_ADDRESS, PEER), (CHANNEL_NUMBER, 1))
    assert bad.message.integrity_holds(client.key)
    relay.pass_time(4000)
    assert client.ask(method, *BODIES[method]).message.integrity_holds(client.key)


def test_a_malformed_value_of_an_authenticated_request_gets_a_signed_400(client: Client) -> None:
    client.allocate()
    answer = client.ask(Method.REFRESH, (opaque(LIFETIME.type), b"\0"))
    assert answer.code == 400
    assert answer.message.integrity_holds(client.key)


def test_the_keys_of_the_most_recent_usernames_are_cached() -> None:
    keys = key_cache("firezone", RelaySecret("secret"))

    def user_of(number: int) -> UserKey | None:
        message = decode(encode(MessageClass.REQUEST, Method.REFRESH, bytes(12), [(USERNAME, f"9999999999:{number}")]))
        assert isinstance(message, Message)
        return claimed_user(message, keys)

    first = user_of(0)
    sizes = set()
    for number in range(2 * CACHED_KEYS):
        user = user_of(number)
        assert user is not None
        assert user.username.text == f"9999999999:{number}"
        sizes.add(keys.cache_info().currsize)  # type: ignore[attr-defined]
    assert max(sizes) == CACHED_KEYS
    assert user_of(0) == first != user_of(1)


def test_unauthenticated_clients_use_no_memory(relay: Relay) -> None:
    for number in range(100):
        request = encode(MessageClass.REQUEST, Method.ALLOCATE, bytes(12), [UDP])
        assert answer_in(relay.receive(request, (f"203.0.113.{number}", 1000))).code == 401
    assert not relay.server.allocations.by_client
    assert relay.server.poll_timeout() is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(19), DropReason.MALFORMED_HEADER),
        (bytes(20), DropReason.MALFORMED_COOKIE),
        (b"\0\1\0\1\x21\x12\xa4\x42" + bytes(12), DropReason.MALFORMED_LENGTH),
        (b"\0\1\0\4\x21\x12\xa4\x42" + bytes(12) + b"\0\x0d\0\4", DropReason.MALFORMED_ATTRIBUTE),
        (b"\0\1\1\4\x21\x12\xa4\x42" + bytes(12) + b"\x80\x22\0\0" * 65, DropReason.TOO_MANY_ATTRIBUTES),
        (b"\0\1\0\x08\x21\x12\xa4\x42" + bytes(12) + b"\x80\x28\0\4" + bytes(4), DropReason.MALFORMED_FINGERPRINT),
    ],
)
def test_a_malformed_message_is_dropped_and_counted(relay: Relay, data: bytes, reason: DropReason) -> None:
    assert relay.receive(data, CLIENT) == []
    assert {each: count for each, count in relay.counters.drops.items() if count} == {reason: 1}
