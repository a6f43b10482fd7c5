import hmac
import zlib
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import attributes as table
from relay.core.addresses import Family, SocketAddress, socket_address
from relay.core.attributes import (
    DATA,
    FINGERPRINT,
    LIFETIME,
    MESSAGE_INTEGRITY,
    NONCE,
    REALM,
    SOFTWARE,
    USERNAME,
    XOR_MAPPED_ADDRESS,
    XOR_PEER_ADDRESS,
    AddressErrorValue,
    Attribute,
    ErrorValue,
    MalformedAttributeError,
)
from relay.core.credentials import integrity_key
from relay.core.stun import Malformed, Message, MessageClass, Method, decode, encode
from tests.support.core import AttributeValue

# RFC 5769 §2.1–2.4. Their padding is 0x20.
SHORT_TERM_KEY = b"VOkJxbRl1RmTxUk/WvJxBt"
SHORT_TERM_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff"
    "80290008932ff9b151263b36000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004e57a3bcf"
)
IPV4_RESPONSE = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
)
IPV6_RESPONSE = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179"
    "bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c"
)
LONG_TERM_REQUEST = bytes.fromhex(
    "000100602112a44278ad3433c6ad72c029da412e00060012e3839ee38388e383aae38383e382afe382b900000015001c"
    "662f2f3439396b39353464364f4c33346f4c394653547679363473410014000b6578616d706c652e6f726700"
    "00080014f67024656dd64a3e02b8e0712e85c9a28ca89666"
)
VECTOR_TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")
LONG_TERM_USERNAME = "\u30de\u30c8\u30ea\u30c3\u30af\u30b9"
LONG_TERM_NONCE = b"f//499k954d6OL34oL9FSTvy64sA"

TRANSACTION = bytes(range(12))
KEY = b"some key"


def decoded(data: bytes) -> Message:
    message = decode(data)
    assert isinstance(message, Message)
    return message


def with_length(data: bytes) -> bytes:
    """Correct a message's length field after changes of its attributes."""
    return data[:2] + (len(data) - 20).to_bytes(2, "big") + data[4:]


def test_the_short_term_request_of_rfc_5769_is_parsed() -> None:
    message = decoded(SHORT_TERM_REQUEST)
    assert message.message_class is MessageClass.REQUEST
    assert message.method == Method.BINDING
    assert message.transaction_id == VECTOR_TRANSACTION
    assert message.get(SOFTWARE) == "STUN test client"
    assert message.get(USERNAME) == "evtj:h6vY"
    assert dict(message.attributes)[0x0024] == bytes.fromhex("6e0001ff")
    assert dict(message.attributes)[0x8029] == bytes.fromhex("932ff9b151263b36")
    assert message.has_fingerprint
    assert message.integrity_holds(SHORT_TERM_KEY)
    assert not message.integrity_holds(b"another key")


@pytest.mark.parametrize(
    ("data", "address"),
    [
        (IPV4_RESPONSE, ("192.0.2.1", 32853)),
        (IPV6_RESPONSE, ("2001:db8:1234:5678:11:2233:4455:6677", 32853, 0, 0)),
    ],
)
def test_the_responses_of_rfc_5769_are_parsed(data: bytes, address: SocketAddress) -> None:
    message = decoded(data)
    assert message.message_class is MessageClass.SUCCESS
    assert message.method == Method.BINDING
    assert message.transaction_id == VECTOR_TRANSACTION
    assert message.get(SOFTWARE) == "test vector"
    assert message.get(XOR_MAPPED_ADDRESS) == address
    assert message.has_fingerprint
    assert message.integrity_holds(SHORT_TERM_KEY)
    assert not message.integrity_holds(b"another key")


def test_the_long_term_request_of_rfc_5769_is_parsed() -> None:
    message = decoded(LONG_TERM_REQUEST)
    assert message.get(USERNAME) == LONG_TERM_USERNAME
    assert message.get(REALM) == "example.org"
    assert message.get(NONCE) == LONG_TERM_NONCE
    assert not message.has_fingerprint
    key = integrity_key(LONG_TERM_USERNAME, "example.org", "TheMatrIX")
    assert key == bytes.fromhex("e8ca7ad59d5eb0518e312911d2dab2a9")
    assert message.integrity_holds(key)
    assert not message.integrity_holds(integrity_key(LONG_TERM_USERNAME, "example.org", "thematrix"))


@pytest.mark.parametrize("length", [0, 1, 16, 63, 64, 65, 200])
def test_messages_are_signed_with_hmac_sha1_for_any_key_length(length: int) -> None:
    key = bytes(range(length))
    signed = encode(MessageClass.REQUEST, Method.REFRESH, bytes(12), [(LIFETIME, 600)], key=key)
    for _ in range(2):
        assert signed[-20:] == hmac.digest(key, signed[:-24], "sha1")
        assert decoded(signed).integrity_holds(key)
        assert not decoded(signed).integrity_holds(key + b"1")


def test_the_long_term_request_of_rfc_5769_is_serialized() -> None:
    # The only vector padded with zeros, hence the only vector reproduced byte for byte.
    written = encode(
        MessageClass.REQUEST,
        Method.BINDING,
        bytes.fromhex("78ad3433c6ad72c029da412e"),
        [(USERNAME, LONG_TERM_USERNAME), (NONCE, LONG_TERM_NONCE), (REALM, "example.org")],
        key=bytes.fromhex("e8ca7ad59d5eb0518e312911d2dab2a9"),
    )
    assert written == LONG_TERM_REQUEST


@pytest.mark.parametrize("vector", [IPV4_RESPONSE, IPV6_RESPONSE])
def test_the_responses_of_rfc_5769_are_serialized_except_padding(vector: bytes) -> None:
    message = decoded(vector)
    attributes: list[AttributeValue] = [
        (SOFTWARE, "test vector"),
        (XOR_MAPPED_ADDRESS, message.get(XOR_MAPPED_ADDRESS)),
    ]
    written = encode(message.message_class, message.method, message.transaction_id, attributes)
    assert message.integrity_at is not None
    # The padding byte is at 35; the length field does not yet include integrity and fingerprint.
    assert vector[35:36] == b" "
    assert written[:2] == vector[:2]
    assert written[4:] == vector[4:35] + b"\0" + vector[36 : message.integrity_at]


def test_fingerprint_is_the_crc_of_the_preceding_bytes() -> None:
    message = encode(MessageClass.REQUEST, Method.BINDING, TRANSACTION, [], fingerprint=True)
    # The polynomial division of ITU-T V.42, independent of the library in the tested code.
    crc = 0xFFFFFFFF
    for byte in message[:20]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    assert message[20:] == bytes.fromhex("80280004") + (crc ^ 0xFFFFFFFF ^ 0x5354554E).to_bytes(4, "big")


hosts = st.ip_addresses().map(str)
addresses = st.builds(socket_address, hosts, st.integers(0, 0xFFFF))
codes = st.integers(0, 799)
u8 = st.integers(0, 0xFF)
# One to four bytes per character. Hypothesis needs seconds to build its own alphabet.
text = st.text("a0: \0\u00e9\u20ac\U0001f600", max_size=40)
VALUES: dict[Attribute[Any], st.SearchStrategy[Any]] = {
    table.MAPPED_ADDRESS: st.binary(max_size=40),
    table.USERNAME: text,
    table.ERROR_CODE: st.builds(ErrorValue, codes, text),
    table.UNKNOWN_ATTRIBUTES: st.lists(st.integers(0, 0xFFFF)).map(tuple),
    table.CHANNEL_NUMBER: st.integers(0, 0xFFFF),
    table.LIFETIME: st.integers(0, 0xFFFFFFFF),
    table.XOR_PEER_ADDRESS: addresses,
    table.DATA: st.binary(max_size=100),
    table.REALM: text,
    table.NONCE: st.binary(max_size=40),
    table.XOR_RELAYED_ADDRESS: addresses,
    table.REQUESTED_ADDRESS_FAMILY: u8,
    table.EVEN_PORT: st.booleans(),
    table.REQUESTED_TRANSPORT: u8,
    table.DONT_FRAGMENT: st.just(b""),
    table.XOR_MAPPED_ADDRESS: addresses,
    table.RESERVATION_TOKEN: st.binary(min_size=8, max_size=8),
    table.ADDITIONAL_ADDRESS_FAMILY: u8,
    table.ADDRESS_ERROR_CODE: st.builds(AddressErrorValue, st.sampled_from(Family), codes),
    table.SOFTWARE: text,
}
ROWS = [row for row in vars(table).values() if isinstance(row, Attribute)]


@st.composite
def attribute_values(draw: st.DrawFn) -> tuple[Attribute[Any], Any]:
    row = draw(st.sampled_from(list(VALUES)))
    return row, draw(VALUES[row])


messages = st.fixed_dictionaries(
    {
        "message_class": st.sampled_from(MessageClass),
        "method": st.integers(0, 0xFFF),
        "transaction_id": st.binary(min_size=12, max_size=12),
        "attributes": st.lists(attribute_values(), max_size=8),
        "key": st.none() | st.binary(min_size=1, max_size=20),
        "fingerprint": st.booleans(),
    }
)


def test_round_trips_cover_every_attribute_of_the_table() -> None:
    assert set(ROWS) - set(VALUES) == {MESSAGE_INTEGRITY, FINGERPRINT}


def test_the_attribute_types_match_the_iana_registry() -> None:
    # RFC 8489 §18.3, RFC 8656 §18.
    assert {row.name: row.type for row in ROWS} == {
        "MAPPED-ADDRESS": 0x0001,
        "USERNAME": 0x0006,
        "MESSAGE-INTEGRITY": 0x0008,
        "ERROR-CODE": 0x0009,
        "UNKNOWN-ATTRIBUTES": 0x000A,
        "CHANNEL-NUMBER": 0x000C,
        "LIFETIME": 0x000D,
        "XOR-PEER-ADDRESS": 0x0012,
        "DATA": 0x0013,
        "REALM": 0x0014,
        "NONCE": 0x0015,
        "XOR-RELAYED-ADDRESS": 0x0016,
        "REQUESTED-ADDRESS-FAMILY": 0x0017,
        "EVEN-PORT": 0x0018,
        "REQUESTED-TRANSPORT": 0x0019,
        "DONT-FRAGMENT": 0x001A,
        "XOR-MAPPED-ADDRESS": 0x0020,
        "RESERVATION-TOKEN": 0x0022,
        "ADDITIONAL-ADDRESS-FAMILY": 0x8000,
        "ADDRESS-ERROR-CODE": 0x8001,
        "SOFTWARE": 0x8022,
        "FINGERPRINT": 0x8028,
    }


@given(messages)
def test_a_serialized_message_is_parsed_back(parts: dict[str, Any]) -> None:
    data = encode(**parts)
    message = decoded(data)
    assert message.message_class is parts["message_class"]
    assert message.method == parts["method"]
    assert message.transaction_id == parts["transaction_id"]
    assert [type_ for type_, _ in message.attributes] == [row.type for row, _ in parts["attributes"]]
    for row in VALUES:
        assert list(message.get_all(row)) == [value for each, value in parts["attributes"] if each is row]
    assert message.has_fingerprint is parts["fingerprint"]
    assert (message.integrity_at is not None) is (parts["key"] is not None)
    assert message.integrity_holds(parts["key"] or b"any key") is (parts["key"] is not None)
    assert len(data) % 4 == 0


@given(messages, st.data())
def test_any_mutation_of_a_message_is_parsed_or_rejected(parts: dict[str, Any], data: st.DataObject) -> None:
    mutable = bytearray(encode(**parts))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutable)))
        match data.draw(st.sampled_from(["change", "insert", "delete", "cut"])):
            case "change":
                mutable[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                mutable[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case "delete":
                del mutable[at : at + data.draw(st.integers(1, 4))]
            case _:
                del mutable[at:]
    mutated = bytes(mutable)
    for candidate in (mutated, with_length(mutated) if len(mutated) >= 20 else mutated):
        result = decode(candidate)
        if isinstance(result, Message):
            assert result.raw == candidate
            assert sum(4 + len(value) for _, value in result.attributes) <= len(candidate) - 20
        else:
            assert isinstance(result, Malformed)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_rejected(data: bytes) -> None:
    assert isinstance(decode(data), Message | Malformed)
    body = data[: len(data) // 4 * 4]
    framed = b"\0\1" + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + TRANSACTION + body
    result = decode(framed)
    assert isinstance(result, Message) or result in (
        Malformed.ATTRIBUTE,
        Malformed.FINGERPRINT,
        Malformed.TOO_MANY_ATTRIBUTES,
    )


@given(st.sampled_from(ROWS), st.binary(max_size=40))
def test_any_attribute_value_is_parsed_or_rejected_by_name(row: Attribute[Any], value: bytes) -> None:
    try:
        read = row.unpack(value, TRANSACTION)
    except MalformedAttributeError:
        return
    assert row.unpack(row.pack(read, TRANSACTION), TRANSACTION) == read


@given(messages, st.data())
def test_the_fingerprint_detects_every_changed_byte(parts: dict[str, Any], data: st.DataObject) -> None:
    message = encode(**(parts | {"fingerprint": True}))
    at = data.draw(st.integers(0, len(message) - 1))
    changed = bytearray(message)
    changed[at] ^= data.draw(st.integers(1, 0xFF))
    result = decode(bytes(changed))
    assert isinstance(result, Malformed) or not result.has_fingerprint


@given(messages, st.data())
def test_message_integrity_detects_every_changed_byte(parts: dict[str, Any], data: st.DataObject) -> None:
    message = encode(**(parts | {"key": KEY, "fingerprint": False}))
    at = data.draw(st.integers(0, len(message) - 1))
    changed = bytearray(message)
    changed[at] ^= data.draw(st.integers(1, 0xFF))
    result = decode(bytes(changed))
    assert isinstance(result, Malformed) or not result.integrity_holds(KEY)


HEADER = b"\0\1\0\0\x21\x12\xa4\x42" + TRANSACTION
GOOD = encode(MessageClass.REQUEST, Method.ALLOCATE, TRANSACTION, [(LIFETIME, 600)], fingerprint=True)


def test_a_message_without_attributes_is_parsed() -> None:
    assert decoded(HEADER).attributes == ()


def test_a_message_with_64_attributes_is_parsed() -> None:
    assert decoded(with_length(HEADER + b"\0\x0d\0\0" * 64)).attributes == ((0x0D, b""),) * 64


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Malformed.HEADER),
        (HEADER[:19], Malformed.HEADER),
        (b"\x40" + HEADER[1:], Malformed.HEADER),
        (b"\x80" + HEADER[1:], Malformed.HEADER),
        (HEADER[:4] + b"\x21\x12\xa4\x43" + HEADER[8:], Malformed.COOKIE),
        (HEADER[:4] + bytes(4) + HEADER[8:], Malformed.COOKIE),
        (HEADER + bytes(4), Malformed.LENGTH),
        (HEADER[:3] + b"\4" + HEADER[4:], Malformed.LENGTH),
        (HEADER[:3] + b"\2" + HEADER[4:] + bytes(2), Malformed.LENGTH),
        (GOOD + bytes(4), Malformed.LENGTH),
        (GOOD[:-4], Malformed.LENGTH),
        (with_length(HEADER + b"\0\x0d\0\4"), Malformed.ATTRIBUTE),
        (with_length(HEADER + b"\0\x0d\0\5" + bytes(4)), Malformed.ATTRIBUTE),
        (with_length(HEADER + b"\0\x0d\xff\xff" + bytes(4)), Malformed.ATTRIBUTE),
        (with_length(HEADER + b"\0\x0d\0\0" * 65), Malformed.TOO_MANY_ATTRIBUTES),
        (with_length(HEADER + b"\0\x08\0\0" * 65), Malformed.TOO_MANY_ATTRIBUTES),
        (GOOD[:-1] + bytes((GOOD[-1] ^ 1,)), Malformed.FINGERPRINT),
        (GOOD[:27] + b"\0" + GOOD[28:], Malformed.FINGERPRINT),
        (with_length(HEADER + b"\x80\x28\0\0"), Malformed.FINGERPRINT),
        (with_length(HEADER + b"\x80\x28\0\3" + bytes(4)), Malformed.FINGERPRINT),
        (with_length(GOOD + GOOD[-8:]), Malformed.FINGERPRINT),
    ],
)
def test_a_malformed_message_is_rejected_with_a_reason(data: bytes, reason: Malformed) -> None:
    assert decode(data) is reason


@pytest.mark.parametrize("after", [b"\0\x1a\0\0", b"\x80\x22\0\4text", b"\xff\xff\0\0"])
def test_a_correct_fingerprint_before_the_end_is_rejected(after: bytes) -> None:
    # RFC 8489 §14.7. The CRC covers the header with its length field.
    covered = HEADER[:2] + (8 + len(after)).to_bytes(2, "big") + HEADER[4:]
    crc = (zlib.crc32(covered) ^ 0x5354554E).to_bytes(4, "big")
    assert decode(covered + b"\x80\x28\0\4" + crc + after) is Malformed.FINGERPRINT


def test_attributes_after_message_integrity_are_ignored() -> None:
    signed = encode(MessageClass.REQUEST, Method.REFRESH, TRANSACTION, [(LIFETIME, 1)], key=KEY)
    appended = encode(MessageClass.REQUEST, Method.REFRESH, TRANSACTION, [(SOFTWARE, "late"), (USERNAME, "late")])[20:]
    second_integrity = signed[-24:]
    message = decoded(with_length(signed + appended + second_integrity))
    assert message.attributes == decoded(signed).attributes
    assert not message.has(SOFTWARE)
    assert message.get(USERNAME) is None
    assert message.integrity_holds(KEY)
    assert decode(with_length(signed + b"\0\x0d\0\x08" + bytes(4))) is Malformed.ATTRIBUTE


def test_a_fingerprint_after_message_integrity_is_checked() -> None:
    message = decoded(encode(MessageClass.REQUEST, Method.REFRESH, TRANSACTION, [], key=KEY, fingerprint=True))
    assert message.has_fingerprint
    assert message.integrity_holds(KEY)


@pytest.mark.parametrize("length", [0, 19, 21, 32])
def test_message_integrity_of_a_wrong_length_is_never_valid(length: int) -> None:
    signed = encode(MessageClass.REQUEST, Method.REFRESH, TRANSACTION, [], key=KEY)
    mac = (signed[24:] + bytes(12))[:length]
    data = with_length(signed[:20] + b"\0\x08" + length.to_bytes(2, "big") + mac + bytes(-length % 4))
    assert not decoded(data).integrity_holds(KEY)


def test_a_missing_message_integrity_is_never_valid() -> None:
    assert not decoded(HEADER).integrity_holds(b"")


def test_the_first_value_of_a_repeated_attribute_counts() -> None:
    peers = [socket_address("192.0.2.7", 1), socket_address("2001:db8::7", 2)]
    attributes = [(XOR_PEER_ADDRESS, peer) for peer in peers]
    message = decoded(encode(MessageClass.REQUEST, Method.CHANNEL_BIND, TRANSACTION, attributes))
    assert message.get(XOR_PEER_ADDRESS) == peers[0]
    assert list(message.get_all(XOR_PEER_ADDRESS)) == peers


def test_unknown_attributes_lists_each_comprehension_required_type_once() -> None:
    body = b"".join(type_.to_bytes(2, "big") + b"\0\0" for type_ in (0x7FFF, 0x0024, 0x8003, 0x7FFF, 0x001A, 0xFFFF))
    assert decoded(with_length(HEADER + body)).unknown_attributes() == (0x7FFF, 0x0024)


@pytest.mark.parametrize(
    ("row", "value"),
    [
        (XOR_PEER_ADDRESS, b""),
        (XOR_PEER_ADDRESS, bytes(8)),
        (XOR_PEER_ADDRESS, b"\0\2" + bytes(6)),
        (XOR_PEER_ADDRESS, b"\0\1" + bytes(18)),
        (XOR_PEER_ADDRESS, b"\0\1" + bytes(5)),
        (LIFETIME, bytes(3)),
        (LIFETIME, bytes(5)),
        (table.CHANNEL_NUMBER, bytes(2)),
        (table.REQUESTED_TRANSPORT, bytes(1)),
        (table.REQUESTED_ADDRESS_FAMILY, b""),
        (table.EVEN_PORT, b""),
        (table.ERROR_CODE, bytes(3)),
        (table.ERROR_CODE, b"\0\0\4\x64"),
        (table.ADDRESS_ERROR_CODE, b"\1\0\4\x64"),
        (table.ADDRESS_ERROR_CODE, bytes(3)),
        (table.ADDRESS_ERROR_CODE, b"\3\0\4\0"),
        (table.UNKNOWN_ATTRIBUTES, bytes(3)),
        (USERNAME, b"\xff"),
        (USERNAME, b"a" * 509),
        (REALM, b"\xc3"),
    ],
)
def test_a_value_of_the_wrong_format_is_rejected(row: Attribute[Any], value: bytes) -> None:
    with pytest.raises(MalformedAttributeError):
        row.unpack(value, TRANSACTION)


@pytest.mark.parametrize(
    ("row", "value", "read"),
    [
        (table.EVEN_PORT, b"\x7f", False),
        (table.EVEN_PORT, b"\xff", True),
        (table.CHANNEL_NUMBER, b"\x40\x01\xff\xff", 0x4001),
        (table.REQUESTED_TRANSPORT, b"\x11\xff\xff\xff", 17),
        (table.REQUESTED_ADDRESS_FAMILY, b"\2\xff\xff\xff", 2),
        (table.ADDITIONAL_ADDRESS_FAMILY, b"\2\xff\xff\xff", 2),
        (table.ERROR_CODE, b"\xff\xff\xfc\x26", ErrorValue(438, "")),
        (table.ADDRESS_ERROR_CODE, b"\2\xff\xfc\x28", AddressErrorValue(Family.IPV6, 440)),
        (XOR_MAPPED_ADDRESS, b"\xff\1\x21\x13\xe1\x12\xa6\x43", ("192.0.2.1", 1)),
    ],
)
def test_reserved_bits_are_ignored(row: Attribute[Any], value: bytes, read: object) -> None:
    assert row.unpack(value, TRANSACTION) == read


def test_a_username_may_have_508_bytes() -> None:
    assert USERNAME.unpack(b"a" * 508, TRANSACTION) == "a" * 508


def test_a_malformed_value_raises_only_when_read() -> None:
    message = decoded(with_length(HEADER + b"\0\x0d\0\1" + bytes(4)))
    assert message.has(LIFETIME)
    with pytest.raises(MalformedAttributeError):
        message.get(LIFETIME)


def test_a_data_attribute_is_not_modified() -> None:
    payload = Random(1).randbytes(1201)
    message = decoded(encode(MessageClass.INDICATION, Method.SEND, TRANSACTION, [(DATA, payload)]))
    assert message.get(DATA) == payload
