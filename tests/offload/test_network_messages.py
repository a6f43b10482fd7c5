"""Messages of rtnetlink, as they should be and as they should not: odd ones are left out, and disturb nothing."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.offload import route_messages
from relay.offload.layout import packed_address
from relay.offload.netlink import messages
from relay.offload.network import Address, Link, LookUp, Neighbour, NeighbourState, NoRoute, Route
from relay.offload.network_messages import Decoder, Kind, link_index

GATEWAY, PEER, PEER6 = (packed_address(host) for host in ("192.0.2.254", "198.51.100.9", "2001:db8::9"))
MAC = b"\x02\0\0\0\1\1"
UP = 0x1 | 0x40 | 0x10000
VLAN_ID, VLAN_PROTOCOL = 1, 5


def attribute(kind: int, *values: bytes) -> bytes:
    value = b"".join(values)
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, *attributes: bytes, sequence: int = 7) -> bytes:
    whole = body + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(whole), kind, 0, sequence, 0) + whole


def word(number: int) -> bytes:
    return struct.pack("=I", number)


def link_message(*more: bytes, kind: int = Kind.NEW_LINK, family: int = 0, flags: int = UP) -> bytes:
    body = struct.pack("=BxHiII", family, 1, 9, flags, 0)
    return message(kind, body, attribute(3, b"eth0.7\0"), attribute(4, word(1500)), attribute(1, MAC), *more)


def vlan(tag: int, *more: bytes) -> bytes:
    return attribute(18, attribute(1, b"vlan\0"), attribute(2, attribute(VLAN_ID, struct.pack("=H", tag)), *more))


def route_message(*attributes: bytes, family: int = 2, kind: int = 1) -> bytes:
    return message(24, struct.pack("=BBBBBBBBI", family, 32, 0, 0, 254, 0, 0, kind, 0), *attributes)


ADDRESS = message(Kind.NEW_ADDRESS, struct.pack("=BBBBI", 2, 24, 0, 0, 9), attribute(2, b"\xc0\0\2\1"))
NEIGHBOUR = message(
    Kind.NEW_NEIGHBOUR, struct.pack("=BxxxiHBB", 2, 9, 4, 0, 1), attribute(1, GATEWAY[12:]), attribute(2, MAC)
)
ROUTE = route_message(attribute(4, word(9)), attribute(5, GATEWAY[12:]))
PARENT = attribute(5, word(3))
PLAIN = Link(9, "eth0.7", MAC, 1500, 1500, up=True, ethernet=True, kind="")
TAGGED = PLAIN._replace(kind="vlan", parent=3, vlan=7)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(link_message(), PLAIN, id="hardware"),
        pytest.param(link_message(PARENT, vlan(7)), TAGGED, id="VLAN"),
        pytest.param(link_message(PARENT, vlan(7, attribute(VLAN_PROTOCOL, b"\x81\0"))), TAGGED, id="802.1Q"),
        pytest.param(
            link_message(PARENT, vlan(7, attribute(VLAN_PROTOCOL, b"\x88\xa8"))), PLAIN._replace(kind="vlan"), id="802.1ad"
        ),
        pytest.param(
            link_message(PARENT, attribute(37, word(0)), vlan(7)), PLAIN._replace(kind="vlan"), id="parent elsewhere"
        ),
        pytest.param(link_message(PARENT, attribute(18, attribute(1, b"veth\0"))), PLAIN._replace(kind="veth"), id="veth"),
        pytest.param(link_message(flags=0x1), PLAIN._replace(up=False), id="no carrier"),
        pytest.param(link_message(attribute(777, b"?"), attribute(3000)), PLAIN, id="attributes of the future"),
        pytest.param(link_message(family=7), None, id="bridge's view"),
        pytest.param(message(Kind.NEW_LINK, bytes(16), attribute(11, b"radio")), None, id="radio"),
    ],
)
def test_a_link_is_read(decoder: Decoder, given: bytes, expected: Link | None) -> None:
    assert decoder.link(given) == expected


def test_an_address_and_a_neighbour_are_read(decoder: Decoder) -> None:
    assert decoder.address(ADDRESS) == Address(9, packed_address("192.0.2.1"), 0)
    assert decoder.neighbour(NEIGHBOUR) == Neighbour(9, GATEWAY, MAC, NeighbourState.STALE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(ROUTE, Route(9, GATEWAY, None, None), id="gateway"),
        pytest.param(
            route_message(
                attribute(4, word(9)),
                attribute(18, b"\x0a\0", PEER6),
                attribute(7, b"\xc0\0\2\1"),
                attribute(0x8000 | 8, attribute(1, word(1)), attribute(2, word(1400))),
            ),
            Route(9, PEER6, packed_address("192.0.2.1"), 1400),
            id="gateway of IPv6, source, MTU",
        ),
        pytest.param(route_message(attribute(4, word(9)), attribute(8)), Route(9, None, None, None), id="empty metrics"),
        pytest.param(route_message(attribute(4, word(9)), attribute(21, b"\1\0")), NoRoute.TUNNEL, id="encapsulated"),
        pytest.param(route_message(attribute(4, word(9)), attribute(5, b"?")), NoRoute.UNKNOWN, id="odd gateway"),
        pytest.param(route_message(attribute(4, b"?")), NoRoute.UNKNOWN, id="odd interface"),
        pytest.param(ROUTE[:-4], NoRoute.UNKNOWN, id="cut off"),
        pytest.param(route_message(kind=99), NoRoute.UNKNOWN, id="type of the future"),
        *(pytest.param(route_message(kind=kind), NoRoute.UNREACHABLE, id=f"type {kind}") for kind in (6, 7, 8)),
        *(pytest.param(route_message(kind=kind), NoRoute.NOT_UNICAST, id=f"type {kind}") for kind in (3, 4, 5)),
        pytest.param(message(2, struct.pack("=i", -101)), NoRoute.UNREACHABLE, id="error"),
    ],
)
def test_an_answer_is_read(given: bytes, expected: object) -> None:
    assert route_messages.answer(given) == (7, expected)


@pytest.mark.parametrize("given", [b"", ROUTE[:15], NEIGHBOUR])
def test_what_is_no_answer_is_none(given: bytes) -> None:
    assert route_messages.answer(given) is None


@pytest.mark.parametrize("look_up", [LookUp(0, PEER), LookUp(0, PEER, GATEWAY), LookUp(0, PEER6, PEER6)])
def test_a_question_is_as_long_as_it_says(look_up: LookUp) -> None:
    assert [kind for kind, _, _ in messages(route_messages.request(look_up, 1) * 3)] == [26] * 3


SAMPLES = [link_message(PARENT, vlan(7)), ADDRESS, NEIGHBOUR, ROUTE]
ODD = st.binary(max_size=100) | st.builds(
    lambda sample, start, odd, end: (sample[:start] + odd + sample[start + len(odd) :])[:end],
    st.sampled_from(SAMPLES),
    st.integers(0, 150),
    st.binary(max_size=8),
    st.integers(0, 200),
)


@given(ODD)
def test_whatever_comes_is_read_or_left_out(odd: bytes) -> None:
    decoder = Decoder()
    assert isinstance(decoder.link(odd), Link | None)
    assert isinstance(decoder.address(odd), Address | None)
    assert isinstance(decoder.neighbour(odd), Neighbour | None)
    assert isinstance(route_messages.answer(odd), tuple | None)
    assert isinstance(link_index(odd), int | None)
    assert sum(len(each) for _, _, each in messages(odd)) <= len(odd)


def test_messages_that_make_no_sense_are_not_written_about(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    for sample in SAMPLES:
        for end in range(len(sample)):
            decoder.link(sample[:end])
            decoder.address(sample[:end])
            decoder.neighbour(sample[:end])
    assert not caplog.records
