"""Valid and invalid messages of rtnetlink. Invalid messages are ignored."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.net.netlink import Kind, Message, split
from relay.offload.layout import packed_address
from relay.offload.network import (
    Address,
    Link,
    LookUp,
    Neighbour,
    Route,
    parse_address,
    parse_link,
    parse_neighbour,
    parse_route,
    route_request,
)

GATEWAY, PEER, PEER6 = (packed_address(host) for host in ("192.0.2.254", "198.51.100.9", "2001:db8::9"))
MAC = b"\x02\0\0\0\1\1"
UP = 0x1 | 0x40 | 0x10000
VLAN_ID, VLAN_PROTOCOL = 1, 5
INCOMPLETE, REACHABLE, STALE, DELAY, PROBE, FAILED, NOARP, PERMANENT = (1 << bit for bit in range(8))


def attribute(kind: int, *values: bytes) -> bytes:
    value = b"".join(values)
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, *attributes: bytes) -> Message:
    return Message(kind, 0, 7, body + b"".join(attributes))


def word(number: int) -> bytes:
    return struct.pack("=I", number)


def link_message(*more: bytes, kind: int = Kind.NEW_LINK, family: int = 0, flags: int = UP) -> Message:
    body = struct.pack("=BxHiII", family, 1, 9, flags, 0)
    return message(kind, body, attribute(3, b"eth0.7\0"), attribute(4, word(1500)), attribute(1, MAC), *more)


def bond_port(state: int) -> bytes:
    return attribute(18, attribute(4, b"bond\0"), attribute(5, attribute(1, bytes([state]))))


def vlan(tag: int, *more: bytes) -> bytes:
    return attribute(18, attribute(1, b"vlan\0"), attribute(2, attribute(VLAN_ID, struct.pack("=H", tag)), *more))


def route_message(*attributes: bytes, family: int = 2, kind: int = 1) -> Message:
    return message(24, struct.pack("=BBBBBBBBI", family, 32, 0, 0, 254, 0, 0, kind, 0), *attributes)


ADDRESS = message(Kind.NEW_ADDRESS, struct.pack("=BBBBI", 2, 24, 0, 0, 9), attribute(2, b"\xc0\0\2\1"))
NEIGHBOUR = message(
    Kind.NEW_NEIGHBOUR, struct.pack("=BxxxiHBB", 2, 9, 4, 0, 1), attribute(1, GATEWAY[12:]), attribute(2, MAC)
)
ROUTE = route_message(attribute(4, word(9)), attribute(5, GATEWAY[12:]))
PARENT = attribute(5, word(3))
PLAIN = Link(9, "eth0.7", MAC, 1500, 1500, up=True, ethernet=True)
TAGGED = PLAIN._replace(parent=3, vlan=7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(link_message(), PLAIN, id="hardware"),
        pytest.param(link_message(PARENT, vlan(7)), TAGGED, id="VLAN"),
        pytest.param(link_message(PARENT, vlan(7, attribute(VLAN_PROTOCOL, b"\x81\0"))), TAGGED, id="802.1Q"),
        pytest.param(link_message(PARENT, vlan(7, attribute(VLAN_PROTOCOL, b"\x88\xa8"))), PLAIN, id="802.1ad"),
        pytest.param(link_message(PARENT, attribute(37, word(0)), vlan(7)), PLAIN, id="parent elsewhere"),
        pytest.param(link_message(PARENT, attribute(18, attribute(1, b"veth\0"))), PLAIN, id="veth"),
        pytest.param(link_message(attribute(10, word(5)), bond_port(0)), PLAIN._replace(master=5), id="port of a bond"),
        pytest.param(link_message(attribute(10, word(5)), bond_port(1)), PLAIN, id="inactive port of a bond"),
        pytest.param(link_message(attribute(10, word(5))), PLAIN._replace(master=5), id="port of another interface"),
        pytest.param(
            link_message(attribute(26, attribute(10, attribute(2, struct.pack("=3i", 0, 64, 1280))))),
            PLAIN._replace(ipv6_mtu=1280),
            id="MTU of a router advertisement",
        ),
        pytest.param(link_message(attribute(26, attribute(10, attribute(2, b"?")))), PLAIN, id="odd MTU"),
        pytest.param(link_message(flags=0x1), PLAIN._replace(up=False), id="no carrier"),
        pytest.param(link_message(attribute(777, b"?"), attribute(3000)), PLAIN, id="attributes of the future"),
        pytest.param(link_message(family=7), None, id="bridge's view"),
        pytest.param(message(Kind.NEW_LINK, bytes(16), attribute(11, b"radio")), None, id="radio"),
    ],
)
def test_a_link_is_parsed(given: Message, expected: Link | None) -> None:
    assert parse_link(given.body) == expected


def test_an_address_and_a_neighbour_are_parsed() -> None:
    assert parse_address(ADDRESS.body) == Address(9, packed_address("192.0.2.1"))
    assert parse_neighbour(NEIGHBOUR.body) == Neighbour(9, GATEWAY, MAC, stale=True)


def neighbour_message(state: int, mac: bytes) -> Message:
    body = struct.pack("=BxxxiHBB", 2, 9, state, 0, 1)
    return message(Kind.NEW_NEIGHBOUR, body, attribute(1, GATEWAY[12:]), *([attribute(2, mac)] if mac else []))


@pytest.mark.parametrize(
    ("state", "mac", "usable"),
    [
        *((state, MAC, True) for state in (REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT)),
        *((state, MAC, False) for state in (0, INCOMPLETE, FAILED)),
        *((REACHABLE, mac, False) for mac in (b"", bytes(6), MAC[:4], MAC * 2)),
    ],
)
def test_a_neighbour_is_used_unless_unresolved(state: int, mac: bytes, *, usable: bool) -> None:
    found = parse_neighbour(neighbour_message(state, mac).body)
    assert found == Neighbour(9, GATEWAY, MAC if usable else b"", stale=state == STALE)


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
        pytest.param(route_message(attribute(4, word(9)), attribute(21, b"\1\0")), None, id="encapsulated"),
        pytest.param(route_message(attribute(4, word(9)), attribute(5, b"?")), None, id="odd gateway"),
        pytest.param(route_message(attribute(4, b"?")), None, id="odd interface"),
        pytest.param(message(24, ROUTE.body[:11]), None, id="cut off"),
        pytest.param(route_message(kind=99), None, id="type of the future"),
        *(pytest.param(route_message(kind=kind), None, id=f"type {kind}") for kind in range(2, 9)),
    ],
)
def test_a_route_response_is_parsed(given: Message, expected: Route | None) -> None:
    assert parse_route(given.body) == expected


@pytest.mark.parametrize("look_up", [LookUp(PEER), LookUp(PEER, GATEWAY), LookUp(PEER6, PEER6)])
def test_a_request_has_the_length_in_its_header(look_up: LookUp) -> None:
    assert [each[:3] for each in split(route_request(look_up, 1) * 3)] == [(Kind.GET_ROUTE, 1, 1)] * 3


SAMPLES = [link_message(PARENT, vlan(7)), ADDRESS, NEIGHBOUR, ROUTE]
SAMPLE_BODIES = [each.body for each in SAMPLES]
ODD = st.binary(max_size=100) | st.builds(
    lambda sample, start, odd, end: (sample[:start] + odd + sample[start + len(odd) :])[:end],
    st.sampled_from(SAMPLE_BODIES),
    st.integers(0, 150),
    st.binary(max_size=8),
    st.integers(0, 200),
)


@given(ODD)
def test_any_message_is_parsed_or_ignored(odd: bytes) -> None:
    assert isinstance(parse_link(odd), Link | None)
    assert isinstance(parse_address(odd), Address | None)
    assert isinstance(parse_neighbour(odd), Neighbour | None)
    assert isinstance(parse_route(odd), Route | None)
    assert sum(16 + len(each.body) for each in split(odd)) <= len(odd)
