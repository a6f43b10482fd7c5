"""Refresh (RFC 8656 §8, docs/protocol.md)."""

import pytest

from relay.core.addresses import Family, PeerAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, LIFETIME, REQUESTED_ADDRESS_FAMILY, XOR_RELAYED_ADDRESS
from relay.core.commands import BindPort, FreeAllocation, SendToClient, SendToPeer
from relay.core.counters import FreeReason
from relay.core.overload import EARLY_AGE
from relay.core.stun import Method
from tests.support.core import (
    CHANNEL,
    CLIENT,
    HOSTS,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    PEER,
    PEER6,
    UDP,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    the,
)

DUAL: AttributeValue = (ADDITIONAL_ADDRESS_FAMILY, 2)
OF_IPV4: AttributeValue = (REQUESTED_ADDRESS_FAMILY, 1)
OF_IPV6: AttributeValue = (REQUESTED_ADDRESS_FAMILY, 2)


@pytest.mark.parametrize(
    ("asked", "granted"), [(1, 600), (599, 600), (600, 600), (601, 601), (3600, 3600), (3601, 3600), (0xFFFFFFFF, 3600)]
)
def test_a_refresh_grants_between_600_and_3600_seconds_from_now(
    relay: Relay, client: Client, asked: int, granted: int
) -> None:
    allocation = client.allocate()
    relay.pass_time(100)
    answer = client.refresh(asked)
    assert answer.code is None
    assert answer.get(LIFETIME) == granted
    assert relay.server.poll_timeout() == relay.now.monotonic + granted
    relay.pass_time(granted - 0.25)
    assert relay.wake() == []
    relay.pass_time(0.25)
    assert relay.wake() == [FreeAllocation(allocation.id, FreeReason.EXPIRED)]


def test_a_refresh_without_lifetime_grants_the_default_lifetime(relay: Relay, client: Client) -> None:
    client.allocate((LIFETIME, 3600))
    answer = client.ask(Method.REFRESH)
    assert answer.get(LIFETIME) == 600
    assert relay.server.poll_timeout() == relay.now.monotonic + 600


@pytest.mark.parametrize("lifetime", [0, 600])
def test_a_refresh_without_allocation_gets_437(client: Client, lifetime: int) -> None:
    assert client.refresh(lifetime).code == 437


def test_an_expired_allocation_can_no_longer_be_refreshed(relay: Relay, client: Client) -> None:
    client.allocate()
    relay.pass_time(600)
    freed, sent = client.send(client.write(Method.REFRESH, (LIFETIME, 600)))
    assert isinstance(freed, FreeAllocation)
    assert answer_in([sent]).code == 437


def test_a_refresh_with_another_username_gets_441(relay: Relay, client: Client) -> None:
    client.allocate()
    ends = relay.server.poll_timeout()
    relay.pass_time(10)
    assert Client(relay, salt="other").refresh(600).code == 441
    assert relay.server.poll_timeout() == ends


def test_a_refresh_with_lifetime_zero_deletes_the_allocation(relay: Relay, client: Client) -> None:
    allocation = client.allocate()
    client.bind_channel()
    freed, sent = client.send(client.write(Method.REFRESH, (LIFETIME, 0)))
    assert freed == FreeAllocation(allocation.id, FreeReason.DELETED)
    answer = answer_in([sent])
    assert answer.code is None
    assert answer.get(LIFETIME) == 0
    assert relay.server.poll_timeout() is None
    assert client.send_on_channel(b"data") == []
    assert relay.receive_from_peer(allocation.id, b"data", PEER) == []


def test_a_retransmitted_delete_gets_437(client: Client) -> None:
    client.allocate()
    data = client.write(Method.REFRESH, (LIFETIME, 0))
    assert answer_in(client.send(data)).code is None
    assert answer_in(client.send(data)).code == 437


def test_different_valid_credentials_from_the_same_address_delete(relay: Relay, client: Client) -> None:
    # A Firezone client does this after new credentials at the same address.
    old = client.allocate()
    renewed = Client(relay, salt="renewed")
    assert renewed.ask(Method.ALLOCATE, UDP).code == 437
    freed, sent = renewed.send(renewed.write(Method.REFRESH, (LIFETIME, 0)))
    assert freed == FreeAllocation(old.id, FreeReason.DELETED)
    assert answer_in([sent]).code is None
    assert answer_in([sent]).message.integrity_holds(renewed.key)
    renewed.allocate()
    assert renewed.refresh(600).code is None


def test_a_delete_from_another_address_has_no_effect(relay: Relay, client: Client) -> None:
    client.allocate()
    assert Client(relay, OTHER_CLIENT).refresh(0).code == 437
    assert client.refresh(600).code is None


def test_a_delete_with_invalid_credentials_has_no_effect(relay: Relay, client: Client) -> None:
    client.allocate()
    assert Client(relay, valid_for=-1, salt="expired").refresh(0).code == 401
    assert answer_in(client.send(client.write(Method.REFRESH, (LIFETIME, 0), key=b"wrong"))).code == 401
    assert client.refresh(600).code is None


@pytest.mark.parametrize("lifetime", [0, 600])
@pytest.mark.parametrize(("had", "named"), [(OF_IPV4, OF_IPV6), (OF_IPV6, OF_IPV4), (DUAL, (REQUESTED_ADDRESS_FAMILY, 3))])
def test_a_family_without_a_relayed_address_gets_443(
    client: Client, had: AttributeValue, named: AttributeValue, lifetime: int
) -> None:
    client.allocate(had)
    assert client.refresh(lifetime, named).code == 443
    assert client.refresh(600).code is None


@pytest.mark.parametrize("family", [OF_IPV4, OF_IPV6])
def test_a_family_with_a_relayed_address_may_be_requested(client: Client, family: AttributeValue) -> None:
    client.allocate(family)
    assert client.refresh(1000, family).get(LIFETIME) == 1000
    assert client.refresh(0, family).code is None
    assert client.refresh(600).code == 437


def test_a_wrong_username_is_checked_before_a_wrong_family(relay: Relay, client: Client) -> None:
    client.allocate()
    assert Client(relay, salt="other").refresh(600, OF_IPV6).code == 441


@pytest.mark.parametrize(
    ("deleted", "left", "gone", "kept"), [(OF_IPV4, OF_IPV6, PEER, PEER6), (OF_IPV6, OF_IPV4, PEER6, PEER)]
)
def test_a_family_of_a_dual_allocation_can_be_deleted(
    relay: Relay,
    client: Client,
    deleted: AttributeValue,
    left: AttributeValue,
    gone: PeerAddress,
    kept: PeerAddress,
) -> None:
    allocation = client.allocate(DUAL)
    client.bind_channel(CHANNEL, gone)
    client.bind_channel(OTHER_CHANNEL, kept)
    answer = client.refresh(0, deleted)
    assert answer.code is None
    assert answer.get(LIFETIME) == 0
    assert client.send_on_channel(b"data", CHANNEL) == []
    assert relay.receive_from_peer(allocation.id, b"data", gone) == []
    assert the(SendToPeer, client.send_on_channel(b"data", OTHER_CHANNEL)).peer == kept
    assert the(SendToClient, relay.receive_from_peer(allocation.id, b"data", kept)).client == CLIENT
    assert client.bind_channel(CHANNEL, gone).code == 443
    assert client.create_permission(gone).code == 443
    assert client.refresh(600, deleted).code == 443
    assert client.refresh(600, left).code is None
    # Deleting the second family ends the allocation.
    assert client.refresh(0, left).code is None
    assert client.refresh(600).code == 437
    # The packet on the channel without a relayed address waits for a ChannelBind.
    relay.pass_time(EARLY_AGE)
    assert relay.wake() == []
    assert relay.server.poll_timeout() is None


def test_an_allocation_can_be_deleted_while_its_sockets_are_bound(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    freed, sent = client.send(client.write(Method.REFRESH, (LIFETIME, 0)))
    assert freed == FreeAllocation(bind.allocation, FreeReason.DELETED)
    assert answer_in([sent]).message.method == Method.REFRESH
    assert answer_in([sent]).code is None
    assert relay.report_bound(bind.allocation) == []


def test_a_family_deleted_while_sockets_are_bound_is_not_granted(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate(DUAL)
    assert client.refresh(0, OF_IPV4).code is None
    retried = the(BindPort, relay.report_refused(bind.allocation))
    assert retried.families == (Family.IPV6,)
    answer = answer_in(relay.report_bound(bind.allocation))
    assert answer.get_all(XOR_RELAYED_ADDRESS) == [(HOSTS[Family.IPV6], retried.port, 0, 0)]


def test_a_refresh_does_not_move_the_expiry_of_channels(relay: Relay, client: Client) -> None:
    client.allocate()
    client.bind_channel()
    relay.pass_time(599)
    client.refresh(3600)
    assert len(client.send_on_channel(b"data")) == 1
    relay.pass_time(1)
    assert client.send_on_channel(b"data") == []
