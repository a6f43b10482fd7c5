"""CreatePermission (RFC 8656 §10, docs/protocol.md)."""

import pytest

from relay.core.addresses import PeerAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, XOR_PEER_ADDRESS
from relay.core.stun import Method
from tests.support.core import FORBIDDEN_PEER, OTHER_PEER, PEER, PEER6, AttributeValue, Client, Relay, opaque, peer_at


def test_a_permission_is_granted_without_effect(relay: Relay, client: Client) -> None:
    allocation = client.allocate()
    answer = client.create_permission(PEER, OTHER_PEER)
    assert answer.code is None
    assert not answer.message.has(XOR_PEER_ADDRESS)
    assert relay.receive_from_peer(allocation.id, b"data", PEER) == []


def test_the_port_of_a_peer_is_ignored(client: Client) -> None:
    client.allocate()
    assert client.create_permission(PeerAddress((PEER[0], 0))).code is None


def test_a_permission_without_allocation_gets_437(relay: Relay, client: Client) -> None:
    assert client.create_permission(PEER).code == 437
    client.allocate()
    relay.pass_time(600)
    relay.wake()
    assert client.create_permission(PEER).code == 437


def test_a_permission_for_another_username_gets_441(relay: Relay, client: Client) -> None:
    client.allocate()
    assert Client(relay, salt="other").create_permission(PEER).code == 441


def test_a_permission_without_peer_gets_400(client: Client) -> None:
    client.allocate()
    assert client.create_permission().code == 400


@pytest.mark.parametrize("value", [b"", b"\0\1\0\1", b"\0\3\0\1" + bytes(4), b"\0\2\0\1" + bytes(4)])
def test_a_permission_for_a_malformed_peer_gets_400(client: Client, value: bytes) -> None:
    client.allocate()
    peers: list[AttributeValue] = [(XOR_PEER_ADDRESS, PEER), (opaque(XOR_PEER_ADDRESS.type), value)]
    assert client.ask(Method.CREATE_PERMISSION, *peers).code == 400


def test_a_permission_for_a_family_without_a_relayed_address_gets_443(client: Client) -> None:
    client.allocate()
    assert client.create_permission(PEER6).code == 443
    assert client.create_permission(PEER, PEER6).code == 443


def test_a_dual_allocation_has_permissions_for_both_families(client: Client) -> None:
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    assert client.create_permission(PEER, PEER6).code is None


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255"])
def test_a_permission_for_a_forbidden_peer_gets_403(client: Client, host: str) -> None:
    client.allocate()
    assert client.create_permission(peer_at(host, 5000)).code == 403


def test_a_forbidden_peer_among_permitted_peers_gets_403(client: Client) -> None:
    client.allocate()
    assert client.create_permission(PEER, FORBIDDEN_PEER).code == 403


def test_a_missing_family_is_checked_before_a_forbidden_peer(client: Client) -> None:
    client.allocate()
    assert client.create_permission(peer_at("::1", 5000)).code == 443
