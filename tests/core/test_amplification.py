"""Unauthenticated responses are at most twice the request's size on the wire, to limit amplification of spoofed requests."""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core.addresses import Family, SocketAddress, family_of
from relay.core.attributes import CHANNEL_NUMBER, LIFETIME, NONCE, REALM, USERNAME, XOR_PEER_ADDRESS
from relay.core.commands import SendToClient
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import CLIENT, CLIENT6, PEER, UDP, AttributeValue, Client, of_kind, opaque, relay_with
from tests.support.examples import examples

DOCS = Path(__file__).parents[2] / "docs" / "limits.md"
HEADERS = {Family.IPV4: 20 + 8, Family.IPV6: 40 + 8}
METHODS = (Method.BINDING, Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND)
LONGEST_V4, LONGEST_V6 = ("203.113.255.255", 65535), ("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", 65535, 0, 0)

usernames = st.sampled_from(["", "x", "1:", "1:s", "1700000000:salt", "99999999999:" + "s" * 400]) | st.from_regex(
    r"[0-9]{1,12}:[a-z]{0,30}", fullmatch=True
)
unknown = st.builds(lambda type_, value: (opaque(type_), value), st.integers(0x7000, 0x7FFF), st.binary(max_size=5))
bodies = st.lists(
    st.sampled_from([UDP, (LIFETIME, 0), (XOR_PEER_ADDRESS, PEER), (CHANNEL_NUMBER, 0x4000)]) | unknown, max_size=8
).map(tuple)
nonces = st.sampled_from([None, b"", b"x", b"A" * 16, b"A" * 700])


RELAY = relay_with(unauthenticated_rate=0)


def on_the_wire(data: bytes, address: SocketAddress) -> int:
    return len(data) + HEADERS[family_of(address)]


class Shape(NamedTuple):
    """The attributes of a request. The smallest of each kind has a name in docs/limits.md."""

    name: str = ""
    body: tuple[AttributeValue, ...] = ()
    username: str | None = None
    nonce: bytes | None = None
    realm: bool = False
    key: bytes | None = None
    fingerprint: bool = False

    def write(self, method: Method) -> bytes:
        proof: list[AttributeValue] = [(USERNAME, self.username)] if self.username is not None else []
        proof += [(REALM, "firezone")] if self.realm else []
        proof += [(NONCE, self.nonce)] if self.nonce is not None else []
        body = [*self.body, *proof]
        return encode(MessageClass.REQUEST, method, b"transaction.", body, key=self.key, fingerprint=self.fingerprint)


@examples(120)
@given(
    st.sampled_from(METHODS),
    st.builds(
        Shape,
        body=bodies,
        username=st.none() | usernames,
        nonce=nonces,
        realm=st.booleans(),
        key=st.sampled_from([None, b"wrong"]),
        fingerprint=st.booleans(),
    ),
    st.sampled_from([CLIENT, CLIENT6, LONGEST_V4, LONGEST_V6]),
)
# The worst case: only a username of two characters.
@example(Method.ALLOCATE, Shape(username="1:"), CLIENT)
@example(Method.BINDING, Shape(), LONGEST_V6)
def test_an_unauthenticated_response_is_at_most_twice_the_request(
    method: Method, shape: Shape, address: SocketAddress
) -> None:
    request = shape.write(method)
    (sent,) = of_kind(SendToClient, RELAY.receive(request, address))
    assert on_the_wire(sent.data, address) <= 2 * on_the_wire(request, address)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("address", [CLIENT, CLIENT6])
def test_a_response_to_a_wrong_password_is_not_larger_than_the_request(method: Method, address: SocketAddress) -> None:
    relay = relay_with()
    client = Client(relay, address)
    request = client.write(method, key=b"wrong")
    (sent,) = of_kind(SendToClient, client.send(request))
    assert on_the_wire(sent.data, address) <= on_the_wire(request, address)


UNKNOWN = (opaque(0x7F01), b"")
BINDINGS = (Shape("no attributes"), Shape("an unknown attribute: 420", (UNKNOWN,)))
OTHERS = (
    Shape("no attributes: 401"),
    Shape("a username: signed 401", username="1:"),
    Shape("MESSAGE-INTEGRITY: 401", key=b"wrong"),
    Shape("MESSAGE-INTEGRITY, a username: signed 401", username="1:", key=b"wrong"),
    Shape("an unknown attribute: 420", (UNKNOWN,)),
    Shape("an unknown attribute, a username: signed 420", (UNKNOWN,), username="1:"),
    Shape("MESSAGE-INTEGRITY, a nonce: 400", nonce=b"", key=b"wrong"),
    Shape("all credentials, a wrong nonce: signed 438", username="1:", nonce=b"", realm=True, key=b"wrong"),
)


@pytest.mark.parametrize(
    ("method", "shape"), [*product(METHODS[:1], BINDINGS), *product(METHODS[1:], OTHERS)], ids=lambda each: str(each)[:60]
)
def test_the_sizes_match_the_documentation(method: Method, shape: Shape) -> None:
    cells = ["Binding" if method is Method.BINDING else "authenticated", shape.name]
    for address in (CLIENT, CLIENT6):
        request = shape.write(method)
        (sent,) = of_kind(SendToClient, relay_with().receive(request, address))
        sizes = on_the_wire(request, address), on_the_wire(sent.data, address)
        cells += [str(sizes[0]), str(sizes[1]), f"{sizes[1] / sizes[0]:.2f}"]
    assert f"| {' | '.join(cells)} |" in DOCS.read_text().splitlines()
