"""Permitted and forbidden peers (docs/protocol.md)."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import Family, PeerAddress, host_number
from relay.core.peers import DENIED_BY_DEFAULT, Network, PeerPolicy, PeerRule, embedded_addresses
from tests.support.core import peer_at

Address = IPv4Address | IPv6Address

OWN = "198.51.100.1"
OWN6 = "2001:db8::1"
INNER = "10.1.2.3"
INNER6 = "fd12:3456::3"
POLICY = PeerPolicy(
    relay_addresses=frozenset({OWN, OWN6, INNER, INNER6}),
    service_ports=frozenset({3478, 8080}),
    relayed_ports=range(49152, 65536),
    public_addresses=frozenset({OWN, OWN6}),
)


def permits(policy: PeerPolicy, peer: PeerAddress) -> bool:
    return policy.rule_against(*host_number(peer[0]), peer[1]) is None


def permits_host(policy: PeerPolicy, peer: PeerAddress) -> bool:
    """Return whether any port of a peer's host is permitted."""
    return policy.rule_against(*host_number(peer[0]), None) is None


def networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


def embedding(host: str) -> dict[str, str]:
    """Return each IPv6 address with the embedded IPv4 address."""
    four = int(IPv4Address(host))
    public = int(IPv4Address("8.8.4.4"))
    forms = {
        "mapped": 0xFFFF << 32 | four,
        "compatible": four,
        "translated": 0xFFFF << 48 | four,
        "NAT64": 0x64_FF9B << 96 | four,
        "6to4": 0x2002 << 112 | four << 80 | 1,
        "Teredo server": 0x2001_0000 << 96 | four << 64 | ~public & 0xFFFFFFFF,
        "Teredo client": 0x2001_0000 << 96 | public << 64 | ~four & 0xFFFFFFFF,
    }
    return {form: str(IPv6Address(number)) for form, number in forms.items()}


FORMS = list(embedding("0.0.0.0"))


@pytest.mark.parametrize(
    ("host", "port", "rule"),
    [
        ("127.0.0.1", 3478, PeerRule.OWN_PORT),
        (OWN, 8080, PeerRule.OWN_PORT),
        (OWN, 22, PeerRule.OWN_ADDRESS),
        (OWN, 50000, None),
        (INNER, 50000, PeerRule.OWN_ADDRESS),
        ("127.0.0.1", 50000, PeerRule.NEVER_A_PEER),
        ("::ffff:127.0.0.1", 50000, PeerRule.NEVER_A_PEER),
        ("169.254.169.254", 80, PeerRule.NEVER_A_PEER),
        ("10.9.9.9", 80, PeerRule.DENIED),
        ("64:ff9b::a09:909", 80, PeerRule.DENIED),
        ("10.8.8.8", 80, None),
    ],
)
def test_a_forbidden_peer_has_a_reason(host: str, port: int, rule: PeerRule | None) -> None:
    policy = replace(POLICY, deny=networks("10.9.0.0/16"))
    assert policy.rule_against(*host_number(host), port) is rule
    if rule is not PeerRule.OWN_PORT and (host, port) != (OWN, 22):
        assert policy.rule_against(*host_number(host), None) is rule


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.255.255.255",
        "169.254.0.1",
        "169.254.169.254",
        "192.0.0.1",
        "192.0.0.192",
        "100.100.100.200",
        "168.63.129.16",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "64:ff9b:1::a9fe:a9fe",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "ff02::1",
    ],
)
def test_internal_addresses_are_forbidden(host: str) -> None:
    for policy in (PeerPolicy(), POLICY):
        assert not permits(policy, peer_at(host, 5000))
        assert not permits_host(policy, peer_at(host, 5000))


@pytest.mark.parametrize(
    "host",
    [
        "1.0.0.1",
        "8.8.8.8",
        "126.255.255.255",
        "128.0.0.1",
        "169.253.255.255",
        "192.0.1.1",
        "100.100.100.199",
        "100.100.100.201",
        "168.63.129.15",
        "223.255.255.255",
        "2001:4860:4860::8888",
        "64:ff9b:2::1",
        "fe7f::1",
        "2001:1::1",
    ],
)
def test_public_addresses_are_permitted(host: str) -> None:
    for policy in (PeerPolicy(), POLICY):
        assert permits(policy, peer_at(host, 3478))
        assert permits_host(policy, peer_at(host, 3478))


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "fc00::1", "fd00::1", "fdff::1"]
)
def test_private_addresses_are_permitted(host: str) -> None:
    assert permits(POLICY, peer_at(host, 5000))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "0.0.0.2", "255.255.255.255", "224.0.0.251"])
def test_an_address_with_an_embedded_forbidden_address_is_forbidden(form: str, host: str) -> None:
    peer = peer_at(embedding(host)[form], 5000)
    assert not permits(POLICY, peer)
    assert not permits_host(POLICY, peer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("host", ["8.8.8.8", "10.0.0.1"])
def test_an_address_with_an_embedded_permitted_address_is_permitted(form: str, host: str) -> None:
    assert permits(POLICY, peer_at(embedding(host)[form], 5000))


@pytest.mark.parametrize(
    ("address", "judged"),
    [
        ("8.8.8.8", ["8.8.8.8"]),
        ("2001:db8::1", ["2001:db8::1"]),
        ("::", ["::"]),
        ("::1", ["::1"]),
        ("::2", ["0.0.0.2"]),
        ("::127.0.0.1", ["127.0.0.1"]),
        ("::ffff:127.0.0.1", ["127.0.0.1"]),
        ("::ffff:0:127.0.0.1", ["127.0.0.1"]),
        ("64:ff9b::127.0.0.1", ["127.0.0.1"]),
        ("2002:7f00:1::", ["127.0.0.1"]),
        ("2002:7f00:1:ffff:ffff:ffff:ffff:ffff", ["127.0.0.1"]),
        # The example of RFC 4380 §4: server 65.54.227.120, client 192.0.2.45.
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", ["65.54.227.120", "192.0.2.45"]),
        ("2001:1::7f00:1", ["2001:1::7f00:1"]),
        ("::1:0:7f00:1", ["::1:0:7f00:1"]),
    ],
)
def test_an_address_is_checked_by_its_embedded_addresses(address: str, judged: list[str]) -> None:
    family, number = host_number(address)
    embedded = embedded_addresses(number) if family is Family.IPV6 else ()
    assert [str(IPv4Address(each)) for each in embedded] == [each for each in judged if each != address]


@pytest.mark.parametrize("form", FORMS)
def test_rules_for_ipv4_apply_to_embedded_addresses(form: str) -> None:
    allowed, denied = embedding("127.0.0.1")[form], embedding("8.8.8.8")[form]
    assert permits(PeerPolicy(allow=networks("127.0.0.0/8")), peer_at(allowed, 5000))
    assert not permits(PeerPolicy(deny=networks("8.8.8.0/24")), peer_at(denied, 5000))


def test_a_range_with_embedded_ipv4_can_be_denied_itself() -> None:
    policy = PeerPolicy(deny=networks("64:ff9b::/96", "2002::/16"))
    assert not permits(policy, peer_at("64:ff9b::8.8.8.8", 5000))
    assert not permits(policy, peer_at("2002:808:808::", 5000))
    assert permits(policy, peer_at("8.8.8.8", 5000))


def test_a_range_with_embedded_ipv4_cannot_be_allowed_itself() -> None:
    policy = PeerPolicy(allow=networks("::ffff:0:0/96", "64:ff9b::/96"))
    assert not permits(policy, peer_at("::ffff:127.0.0.1", 5000))
    assert not permits(policy, peer_at("64:ff9b::127.0.0.1", 5000))


def test_both_addresses_of_teredo_must_be_allowed() -> None:
    loopback_twice = str(IPv6Address(0x2001_0000 << 96 | 0x7F000001 << 64 | ~0x7F000002 & 0xFFFFFFFF))
    assert not permits(PeerPolicy(allow=networks("127.0.0.1/32")), peer_at(loopback_twice, 5000))
    assert not permits(PeerPolicy(allow=networks("127.0.0.2/32")), peer_at(loopback_twice, 5000))
    assert permits(PeerPolicy(allow=networks("127.0.0.0/30")), peer_at(loopback_twice, 5000))


@pytest.mark.parametrize("host", ["127.0.0.1", "8.8.8.8", OWN, "::1", OWN6])
def test_deny_precedes_allow_and_allow_precedes_the_defaults(host: str) -> None:
    everything = networks("0.0.0.0/0", "::/0")
    peer = peer_at(host, 5000)
    assert permits(replace(POLICY, allow=everything), peer)
    assert permits_host(replace(POLICY, allow=everything), peer)
    assert not permits(replace(POLICY, deny=everything), peer)
    assert not permits(replace(POLICY, allow=everything, deny=everything), peer)
    assert not permits_host(replace(POLICY, allow=everything, deny=everything), peer)
    assert not permits(replace(POLICY, allow=everything, deny=networks(f"{host}/{ip_address(host).max_prefixlen}")), peer)


@pytest.mark.parametrize("port", [3478, 8080])
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.8.8",
        "::1",
        "0.0.0.0",
        "::",
        OWN,
        OWN6,
        INNER,
        INNER6,
        *embedding("127.0.0.1").values(),
        *embedding("0.0.0.0").values(),
        *embedding(OWN).values(),
        *embedding(INNER).values(),
    ],
)
def test_a_service_port_of_the_relay_is_forbidden_even_if_allowed(host: str, port: int) -> None:
    policy = replace(POLICY, allow=networks("0.0.0.0/0", "::/0"))
    assert not permits(policy, peer_at(host, port))
    # Only the port is forbidden.
    assert permits(policy, peer_at(host, 5000))
    assert permits_host(policy, peer_at(host, port))


def test_a_service_port_in_the_relayed_range_is_forbidden() -> None:
    policy = replace(POLICY, service_ports=frozenset({50000}))
    assert not permits(policy, peer_at(OWN, 50000))
    assert permits(policy, peer_at(OWN, 50001))


def test_service_ports_of_other_machines_are_permitted() -> None:
    assert permits(POLICY, peer_at("8.8.8.8", 3478))
    assert permits(POLICY, peer_at("10.1.2.4", 8080))


@pytest.mark.parametrize("host", [OWN, OWN6, *embedding(OWN).values()])
@pytest.mark.parametrize(
    ("port", "permitted"), [(1, False), (3478, False), (49151, False), (49152, True), (60000, True), (65535, True)]
)
def test_the_public_address_is_permitted_within_the_relayed_port_range(
    host: str,
    port: int,
    permitted: bool,  # noqa: FBT001
) -> None:
    assert permits(POLICY, peer_at(host, port)) is permitted
    assert permits_host(POLICY, peer_at(host, port))


@pytest.mark.parametrize("host", [INNER, INNER6, *embedding(INNER).values()])
@pytest.mark.parametrize("port", [22, 50000])
def test_a_private_address_of_the_relay_is_forbidden(host: str, port: int) -> None:
    assert not permits(POLICY, peer_at(host, port))
    assert not permits_host(POLICY, peer_at(host, port))


def test_a_public_address_of_another_machine_has_no_special_rules() -> None:
    # Behind NAT the public address belongs to another machine, whose ports are independent of the relay's ports.
    policy = replace(POLICY, relay_addresses=frozenset({INNER}))
    assert permits(policy, peer_at(OWN, 1))


def test_the_is_loopback_property_of_python_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 reports True for ::ffff:127.0.0.1, but the policy must still check the embedded address."""
    monkeypatch.setattr(IPv6Address, "is_loopback", property(lambda _: True))
    monkeypatch.setattr(IPv6Address, "is_unspecified", property(lambda _: True))
    assert not permits(POLICY, peer_at("::ffff:127.0.0.1", 5000))


@pytest.mark.parametrize("host", ["127.0.0.1", "8.8.8.8", OWN, INNER, "::1", OWN6, *embedding(OWN).values()])
def test_permits_host_ignores_the_port(host: str) -> None:
    decisions = {permits_host(POLICY, peer_at(host, port)) for port in (0, 22, 3478, 8080, 50000, 65535)}
    assert len(decisions) == 1
    assert decisions == {any(permits(POLICY, peer_at(host, port)) for port in (22, 50000))}


def test_a_policy_replaced_from_another_has_its_own_rules() -> None:
    peer = peer_at("8.8.8.8", 5000)
    assert permits(POLICY, peer)
    assert not permits(replace(POLICY, deny=networks("8.8.8.8/32")), peer)
    assert permits(POLICY, peer)


# An independent implementation of the table with bits of the address instead of `ipaddress`.
def embedded(address: Address) -> list[int] | None:
    """Return the IPv4 addresses embedded in an IPv6 address as integers, or None."""
    if isinstance(address, IPv4Address):
        return None
    packed = address.packed
    if packed[:15] == bytes(15) and packed[15] <= 1:
        return None
    prefixes = (bytes(12), bytes(10) + b"\xff\xff", bytes(8) + b"\xff\xff\0\0", b"\0\x64\xff\x9b" + bytes(8))
    if packed[:12] in prefixes:
        return [int.from_bytes(packed[12:], "big")]
    if packed[:2] == b"\x20\x02":
        return [int.from_bytes(packed[2:6], "big")]
    if packed[:4] == b"\x20\x01\0\0":
        return [int.from_bytes(packed[4:8], "big"), int.from_bytes(bytes(b ^ 0xFF for b in packed[12:]), "big")]
    return None


def in_network(number: int, network: Network) -> bool:
    width = network.max_prefixlen - network.prefixlen
    return number >> width == int(network.network_address) >> width


def is_denied(address: Address) -> bool:
    four = [n for n in DENIED_BY_DEFAULT if isinstance(n, IPv4Network)]
    six = [n for n in DENIED_BY_DEFAULT if isinstance(n, IPv6Network)]
    inner = embedded(address)
    if inner is not None:
        return any(in_network(each, network) for each in inner for network in four)
    return any(in_network(int(address), network) for network in (four if isinstance(address, IPv4Address) else six))


def inside(network: Network) -> st.SearchStrategy[Address]:
    first, last = int(network.network_address), int(network.broadcast_address)
    make = IPv4Address if isinstance(network, IPv4Network) else IPv6Address
    return st.integers(first, last).map(make)


anywhere = st.ip_addresses()
in_denied = st.sampled_from(DENIED_BY_DEFAULT).flatmap(inside)
denied_v4 = st.sampled_from([n for n in DENIED_BY_DEFAULT if isinstance(n, IPv4Network)]).flatmap(inside)
embedding_something = st.builds(
    lambda host, form: IPv6Address(embedding(str(host))[form]),
    denied_v4 | st.ip_addresses(v=4),
    st.sampled_from(FORMS),
)


@given(anywhere | in_denied | embedding_something, st.integers(0, 0xFFFF))
def test_only_addresses_with_a_denied_address_embedded_are_forbidden(address: Address, port: int) -> None:
    peer = peer_at(str(address), port)
    assert permits(PeerPolicy(), peer) is not is_denied(address)
    assert permits_host(PeerPolicy(), peer) is not is_denied(address)


@given(denied_v4, st.sampled_from(FORMS), st.integers(1, 0xFFFF))
def test_a_denied_ipv4_address_is_forbidden_in_every_notation(address: Address, form: str, port: int) -> None:
    for policy in (PeerPolicy(), POLICY, replace(POLICY, allow=networks("8.8.0.0/16", "2001::/16", "::ffff:0:0/96"))):
        assert not permits(policy, peer_at(str(address), port))
        assert not permits(policy, peer_at(embedding(str(address))[form], port))


@pytest.mark.parametrize("own", ["2002:c000:201::1", "64:ff9b::c000:201", "2001:0:4136:e378:8000:63bf:3fff:fdd2"])
def test_an_own_address_with_embedded_ipv4_is_protected(own: str) -> None:
    policy = PeerPolicy(
        relay_addresses=frozenset({own}),
        service_ports=frozenset({3478}),
        relayed_ports=range(49152, 65536),
        public_addresses=frozenset({own}),
    )
    assert not permits(policy, peer_at(own, 3478))
    assert not permits(policy, peer_at(own, 22))
    assert permits(policy, peer_at(own, 50000))
