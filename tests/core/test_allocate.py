"""Allocate (RFC 8656 §7, docs/protocol.md)."""

from collections.abc import Callable

import pytest

from relay.core.addresses import AllocationId, ClientAddress, Family, SocketAddress
from relay.core.allocation import AllocationState
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    ADDRESS_ERROR_CODE,
    DONT_FRAGMENT,
    EVEN_PORT,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    RESERVATION_TOKEN,
    XOR_MAPPED_ADDRESS,
    XOR_RELAYED_ADDRESS,
    AddressErrorValue,
)
from relay.core.commands import BindPort, Command, FreeAllocation, SendToClient
from relay.core.counters import DropReason, FreeReason
from relay.core.lifecycle import BindRefusal
from relay.core.stun import Method
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CLIENT6,
    HOSTS,
    OTHER_CLIENT,
    PEER,
    UDP,
    Answer,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    of_kind,
    opaque,
    relay_with,
    the,
)

IPV4, IPV6 = Family.IPV4, Family.IPV6
DUAL: AttributeValue = (ADDITIONAL_ADDRESS_FAMILY, IPV6)
ONLY_IPV4 = {IPV4: HOSTS[IPV4]}
ONLY_IPV6 = {IPV6: HOSTS[IPV6]}


def refused(client: Client, *attributes: AttributeValue) -> int | None:
    return client.ask(Method.ALLOCATE, *attributes).code


def ports_of(answer: Answer) -> list[int]:
    return [address[1] for address in answer.get_all(XOR_RELAYED_ADDRESS)]


def test_an_allocate_gets_a_response_once_its_socket_is_bound(relay: Relay, client: Client) -> None:
    request = client.write(Method.ALLOCATE, UDP, transaction_id=b"transaction.")
    (bind,) = client.send(request)
    assert isinstance(bind, BindPort)
    assert bind.port in relay.config.ports
    assert bind.families == (IPV4,)
    (sent,) = relay.report_bound(bind.allocation)
    answer = answer_in([sent])
    assert answer.code is None
    assert answer.client == CLIENT
    assert answer.message.method == Method.ALLOCATE
    assert answer.message.transaction_id == b"transaction."
    assert answer.get_all(XOR_RELAYED_ADDRESS) == [(HOSTS[IPV4], bind.port)]
    assert answer.get(XOR_MAPPED_ADDRESS) == CLIENT
    assert answer.get(LIFETIME) == 600
    assert not answer.message.has(ADDRESS_ERROR_CODE)


def test_a_client_on_ipv6_gets_an_ipv4_address_by_default(relay: Relay) -> None:
    allocation = Client(relay, CLIENT6).allocate()
    assert allocation.answer.get_all(XOR_RELAYED_ADDRESS) == [(HOSTS[IPV4], allocation.port)]
    assert allocation.answer.get(XOR_MAPPED_ADDRESS) == CLIENT6


@pytest.mark.parametrize(("family", "relayed"), [(IPV4, ("192.0.2.1",)), (IPV6, ("2001:db8::1",))], ids=["IPv4", "IPv6"])
def test_a_requested_family_is_allocated(relay: Relay, client: Client, family: Family, relayed: tuple[str]) -> None:
    bind = client.begin_allocate((REQUESTED_ADDRESS_FAMILY, family))
    assert bind.families == (family,)
    answer = answer_in(relay.report_bound(bind.allocation))
    assert tuple(address[0] for address in answer.get_all(XOR_RELAYED_ADDRESS)) == relayed
    assert not answer.message.has(ADDRESS_ERROR_CODE)


def test_a_dual_allocation_has_one_port_and_ipv4_first(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate(DUAL)
    assert bind.families == (IPV4, IPV6)
    answer = answer_in(relay.report_bound(bind.allocation))
    expected: list[SocketAddress] = [(HOSTS[IPV4], bind.port), (HOSTS[IPV6], bind.port, 0, 0)]
    assert answer.get_all(XOR_RELAYED_ADDRESS) == expected
    assert not answer.message.has(ADDRESS_ERROR_CODE)


@pytest.mark.parametrize(
    ("hosts", "served", "missing"), [(ONLY_IPV4, IPV4, IPV6), (ONLY_IPV6, IPV6, IPV4)], ids=["IPv4 only", "IPv6 only"]
)
def test_a_dual_request_is_partly_granted_on_a_single_family_relay(
    hosts: dict[Family, str], served: Family, missing: Family
) -> None:
    relay = relay_with(public_hosts=hosts)
    bind = Client(relay).begin_allocate(DUAL)
    assert bind.families == (served,)
    answer = answer_in(relay.report_bound(bind.allocation))
    assert [address[0] for address in answer.get_all(XOR_RELAYED_ADDRESS)] == [HOSTS[served]]
    assert answer.get_all(ADDRESS_ERROR_CODE) == [AddressErrorValue(missing, 440)]


@pytest.mark.parametrize(
    ("hosts", "attributes"),
    [
        (ONLY_IPV4, [(REQUESTED_ADDRESS_FAMILY, 2)]),
        (ONLY_IPV6, [(REQUESTED_ADDRESS_FAMILY, 1)]),
        (ONLY_IPV6, []),
        (HOSTS, [(REQUESTED_ADDRESS_FAMILY, 3)]),
        (HOSTS, [(REQUESTED_ADDRESS_FAMILY, 0)]),
    ],
)
def test_an_unsupported_family_gets_440(hosts: dict[Family, str], attributes: list[AttributeValue]) -> None:
    assert refused(Client(relay_with(public_hosts=hosts)), UDP, *attributes) == 440


def test_a_missing_requested_transport_gets_400(client: Client) -> None:
    assert refused(client) == 400


@pytest.mark.parametrize("transport", [0, 6, 16, 18, 255])
def test_a_transport_other_than_udp_gets_442(client: Client, transport: int) -> None:
    assert refused(client, (REQUESTED_TRANSPORT, transport)) == 442


@pytest.mark.parametrize("requested", [IPV4, IPV6])
def test_requested_and_additional_family_together_get_400(client: Client, requested: Family) -> None:
    assert refused(client, UDP, (REQUESTED_ADDRESS_FAMILY, requested), DUAL) == 400


def test_an_additional_family_of_ipv4_gets_400(client: Client) -> None:
    assert refused(client, UDP, (ADDITIONAL_ADDRESS_FAMILY, IPV4)) == 400


@pytest.mark.parametrize(
    "type_", [REQUESTED_TRANSPORT.type, REQUESTED_ADDRESS_FAMILY.type, ADDITIONAL_ADDRESS_FAMILY.type, LIFETIME.type]
)
def test_a_malformed_value_gets_400(relay: Relay, client: Client, type_: int) -> None:
    assert refused(client, (opaque(type_), b"\1\2"), UDP) == 400
    assert not relay.server.allocations.by_id


def test_even_port_without_reservation_gets_an_even_port(relay: Relay) -> None:
    for number in range(20):
        client = Client(relay, (f"203.0.113.{number}", 1), salt=str(number))
        assert client.allocate((EVEN_PORT, False)).port % 2 == 0


def test_even_port_gets_508_when_only_odd_ports_are_left() -> None:
    relay = relay_with(ports=range(50000, 50003))
    for number in range(2):
        Client(relay, (f"203.0.113.{number}", 1), salt=str(number)).allocate((EVEN_PORT, False))
    assert refused(Client(relay), UDP, (EVEN_PORT, False)) == 508
    assert Client(relay).allocate().port == 50001


def test_even_port_with_reservation_gets_508(relay: Relay, client: Client) -> None:
    assert refused(client, UDP, (EVEN_PORT, True)) == 508
    assert not relay.server.allocations.by_id


def test_a_reservation_token_gets_508(relay: Relay, client: Client) -> None:
    assert refused(client, UDP, (RESERVATION_TOKEN, bytes(8))) == 508
    assert not relay.server.allocations.by_id


def test_dont_fragment_is_accepted(client: Client) -> None:
    assert client.allocate((DONT_FRAGMENT, b"")).answer.code is None


def test_an_allocate_without_a_free_port_gets_508() -> None:
    relay = relay_with(ports=range(50000, 50001))
    Client(relay).allocate()
    assert refused(Client(relay, OTHER_CLIENT, salt="other"), UDP) == 508


def test_an_allocate_above_the_quota_gets_486() -> None:
    relay = relay_with(max_allocations=2, ports=range(50000, 50003))
    first = Client(relay)
    first.allocate()
    Client(relay, OTHER_CLIENT, salt="other").begin_allocate()
    third = Client(relay, CLIENT6, salt="third")
    assert refused(third, UDP) == 486
    # The rejected request took no port.
    assert first.refresh(0).code is None
    third.allocate()
    assert refused(Client(relay, salt="fourth"), UDP) == 486


def test_a_lack_of_ports_is_checked_before_the_quota() -> None:
    relay = relay_with(max_allocations=1, ports=range(50000, 50001))
    Client(relay).allocate()
    assert refused(Client(relay, OTHER_CLIENT, salt="other"), UDP) == 508


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ([(REQUESTED_ADDRESS_FAMILY, 3), DUAL, (EVEN_PORT, True)], 400),
        ([(REQUESTED_TRANSPORT, 6), (REQUESTED_ADDRESS_FAMILY, 3), DUAL], 442),
        ([UDP, (REQUESTED_ADDRESS_FAMILY, 3), DUAL, (EVEN_PORT, True)], 400),
        ([UDP, (REQUESTED_ADDRESS_FAMILY, 3), (EVEN_PORT, True), (RESERVATION_TOKEN, bytes(8))], 440),
    ],
)
def test_the_first_failed_check_gives_the_error_code(client: Client, attributes: list[AttributeValue], code: int) -> None:
    assert refused(client, *attributes) == code
    client.allocate()
    assert refused(client, *attributes) == 437


def test_a_second_allocate_from_the_same_address_gets_437(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    assert refused(client, UDP) == 437
    relay.report_bound(bind.allocation)
    assert refused(client, UDP) == 437
    assert refused(Client(relay, salt="other"), UDP) == 437
    assert len(relay.server.allocations.by_id) == 1


def test_the_transaction_id_of_another_client_is_no_retransmission(relay: Relay, client: Client) -> None:
    data = client.write(Method.ALLOCATE, UDP, transaction_id=b"transaction.")
    relay.report_bound(the(BindPort, client.send(data)).allocation)
    other = Client(relay, salt="other")
    assert answer_in(other.send(other.write(Method.ALLOCATE, UDP, transaction_id=b"transaction."))).code == 437


def test_a_retransmission_of_a_pending_allocate_is_dropped(relay: Relay, client: Client) -> None:
    data = client.write(Method.ALLOCATE, UDP)
    bind = the(BindPort, client.send(data))
    assert client.send(data) == []
    assert relay.counters.drops[DropReason.ALLOCATE_UNDER_WAY] == 1
    assert len(of_kind(SendToClient, relay.report_bound(bind.allocation))) == 1


def test_a_retransmitted_allocate_gets_the_same_response(relay: Relay, client: Client) -> None:
    data = client.write(Method.ALLOCATE, UDP, (LIFETIME, 1000), fingerprint=True)
    bind = the(BindPort, client.send(data))
    first = relay.report_bound(bind.allocation)
    relay.pass_time(7)
    assert client.send(data) == first
    client.refresh(3000)
    assert client.send(data) == first
    # Only the refresh extended the lifetime, not the repeated response.
    assert relay.server.poll_timeout() == relay.now.monotonic + 3000


def test_a_retransmission_after_the_end_is_dropped(relay: Relay, client: Client) -> None:
    """A new Allocate is a new request; whoever repeats an old request is not the client."""
    data = client.write(Method.ALLOCATE, UDP)
    first = the(BindPort, client.send(data))
    relay.report_bound(first.allocation)
    relay.pass_time(600)
    assert [type(each) for each in client.send(data)] == [FreeAllocation]
    assert relay.counters.drops[DropReason.REPEATED] == 1
    assert client.begin_allocate().allocation != first.allocation


def test_the_lifetime_counts_from_the_response(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    relay.pass_time(4)
    relay.report_bound(bind.allocation)
    assert relay.server.poll_timeout() == relay.now.monotonic + 600


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (None, 600),
        (0, 600),
        (1, 600),
        (599, 600),
        (600, 600),
        (601, 601),
        (3599, 3599),
        (3600, 3600),
        (3601, 3600),
        (0xFFFFFFFF, 3600),
    ],
)
def test_a_lifetime_is_granted_between_600_and_3600_seconds(
    relay: Relay, client: Client, asked: int | None, granted: int
) -> None:
    allocation = client.allocate(*[] if asked is None else [(LIFETIME, asked)])
    assert allocation.answer.get(LIFETIME) == granted
    relay.pass_time(granted - 0.25)
    assert relay.wake() == []
    relay.pass_time(0.25)
    assert relay.wake() == [FreeAllocation(allocation.id, FreeReason.EXPIRED)]
    assert relay.server.poll_timeout() is None


def test_a_port_in_use_is_replaced_by_another_port(relay: Relay, client: Client) -> None:
    first = client.begin_allocate((REQUESTED_ADDRESS_FAMILY, IPV6))
    (second,) = relay.report_refused(first.allocation)
    assert isinstance(second, BindPort)
    assert (second.allocation, second.families) == (first.allocation, first.families)
    assert second.port != first.port
    assert ports_of(answer_in(relay.report_bound(first.allocation))) == [second.port]


def test_an_even_port_in_use_is_replaced_by_another_even_port(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate((EVEN_PORT, False))
    tried = [bind.port]
    while len(tried) < 50:
        tried.append(the(BindPort, relay.report_refused(bind.allocation)).port)
    assert sorted(tried) == list(range(50000, 50100, 2))
    assert answer_in(relay.report_refused(bind.allocation)).code == 508


def test_an_allocate_gets_508_once_all_ports_are_in_use() -> None:
    relay = relay_with(ports=range(50000, 50003))
    client = Client(relay)
    bind = client.begin_allocate()
    tried = [bind.port, *(the(BindPort, relay.report_refused(bind.allocation)).port for _ in range(2))]
    assert sorted(tried) == [50000, 50001, 50002]
    freed, sent = relay.report_refused(bind.allocation)
    assert freed == FreeAllocation(bind.allocation, FreeReason.REFUSED)
    assert answer_in([sent]).code == 508
    assert answer_in([sent]).message.integrity_holds(client.key)
    assert not relay.server.allocations.by_id
    # All three ports are free again.
    again = client.begin_allocate()
    retried = {again.port, *(the(BindPort, relay.report_refused(again.allocation)).port for _ in range(2))}
    assert retried == {50000, 50001, 50002}


def test_ports_in_use_return_to_the_pool_after_the_response() -> None:
    relay = relay_with(ports=range(50000, 50002))
    first = Client(relay)
    bind = first.begin_allocate()
    second = Client(relay, OTHER_CLIENT, salt="other")
    kept = the(BindPort, relay.report_refused(bind.allocation)).port
    assert refused(second, UDP) == 508
    relay.report_bound(bind.allocation)
    assert {kept, second.allocate().port} == {50000, 50001}


def test_a_resource_error_of_the_machine_gets_508_at_once(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    freed, sent = relay.report_refused(bind.allocation, BindRefusal.MACHINE)
    assert freed == FreeAllocation(bind.allocation, FreeReason.REFUSED)
    assert answer_in([sent]).code == 508
    client.allocate()


def test_an_allocate_gets_508_when_binding_takes_five_seconds(relay: Relay, client: Client) -> None:
    data = client.write(Method.ALLOCATE, UDP, transaction_id=b"transaction.", fingerprint=True)
    bind = the(BindPort, client.send(data))
    relay.pass_time(4.75)
    assert relay.wake() == []
    relay.pass_time(0.25)
    freed, sent = relay.wake()
    assert freed == FreeAllocation(bind.allocation, FreeReason.REFUSED)
    answer = answer_in([sent])
    assert answer.code == 508
    assert answer.message.transaction_id == b"transaction."
    assert answer.message.has_fingerprint
    assert answer.message.integrity_holds(client.key)
    assert relay.report_bound(bind.allocation) == []


def test_retrying_other_ports_does_not_extend_the_five_seconds(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    relay.pass_time(4)
    relay.report_refused(bind.allocation)
    relay.pass_time(1)
    assert answer_in(relay.report_bound(bind.allocation)).code == 508


ENDS = pytest.mark.parametrize(
    ("end", "reason"), [(Relay.report_failed, FreeReason.FAILED), (Relay.kick, FreeReason.KICKED)], ids=["failed", "kicked"]
)


@ENDS
def test_an_allocation_that_ends_while_its_sockets_are_bound_gets_508(
    relay: Relay, client: Client, end: Callable[[Relay, AllocationId], list[Command]], reason: FreeReason
) -> None:
    bind = client.begin_allocate()
    freed, sent = end(relay, bind.allocation)
    assert freed == FreeAllocation(bind.allocation, reason)
    assert answer_in([sent]).code == 508


@ENDS
def test_a_later_end_frees_the_allocation_without_a_response(
    relay: Relay, client: Client, end: Callable[[Relay, AllocationId], list[Command]], reason: FreeReason
) -> None:
    allocation = client.allocate()
    assert end(relay, allocation.id) == [FreeAllocation(allocation.id, reason)]
    assert client.refresh(600).code == 437


def test_a_kick_of_an_ended_allocation_has_no_effect(relay: Relay, client: Client) -> None:
    allocation = client.allocate()
    assert relay.server.handle_kick(allocation.id, relay.now)
    assert not relay.server.handle_kick(allocation.id, relay.now)
    assert client.allocate().id != allocation.id


def test_reports_on_ended_or_bound_allocations_are_ignored(relay: Relay, client: Client) -> None:
    allocation = client.allocate()
    assert relay.report_bound(allocation.id) == []
    assert relay.report_refused(allocation.id) == []
    assert relay.report_refused(allocation.id, BindRefusal.MACHINE) == []
    assert client.refresh(0).code is None
    assert relay.report_bound(allocation.id) == []
    assert relay.report_refused(allocation.id) == []
    assert relay.report_failed(allocation.id) == []


def test_an_allocate_from_a_new_address_replaces_the_usernames_allocation(relay: Relay, client: Client) -> None:
    old = client.allocate()
    client.bind_channel()
    roamed = Client(relay, OTHER_CLIENT)
    freed, bind = roamed.send(roamed.write(Method.ALLOCATE, UDP))
    assert freed == FreeAllocation(old.id, FreeReason.REPLACED)
    assert isinstance(bind, BindPort)
    # Freed before the sockets of the new allocation are bound.
    assert client.send_on_channel(b"data") == []
    assert relay.receive_from_peer(old.id, b"data", PEER) == []
    assert client.refresh(600).code == 437
    relay.report_bound(bind.allocation)
    assert roamed.refresh(600).code is None
    assert set(relay.server.allocations.by_client) == {ClientAddress(OTHER_CLIENT)}


def test_roaming_frees_an_allocation_whose_sockets_are_being_bound(relay: Relay, client: Client) -> None:
    old = client.begin_allocate()
    roamed = Client(relay, OTHER_CLIENT)
    freed, bind = roamed.send(roamed.write(Method.ALLOCATE, UDP))
    assert freed == FreeAllocation(old.allocation, FreeReason.REPLACED)
    assert isinstance(bind, BindPort)
    assert relay.report_bound(old.allocation) == []
    assert answer_in(relay.report_bound(bind.allocation)).client == OTHER_CLIENT


def test_roaming_needs_no_second_port_and_no_second_quota_slot() -> None:
    relay = relay_with(ports=range(50000, 50001), max_allocations=1)
    Client(relay).allocate()
    assert Client(relay, OTHER_CLIENT).allocate().port == 50000


@pytest.mark.parametrize("attributes", [[], [UDP, (EVEN_PORT, True)], [UDP, (REQUESTED_ADDRESS_FAMILY, 3)]])
def test_a_rejected_allocate_from_a_new_address_has_no_effect(
    relay: Relay, client: Client, attributes: list[AttributeValue]
) -> None:
    client.allocate()
    assert Client(relay, OTHER_CLIENT).ask(Method.ALLOCATE, *attributes).code in (400, 440, 508)
    assert client.refresh(600).code is None


def test_usernames_with_different_salts_have_separate_allocations(relay: Relay, client: Client) -> None:
    client.allocate()
    Client(relay, OTHER_CLIENT, salt="other").allocate()
    assert client.refresh(600).code is None
    assert len(relay.server.allocations.by_username) == 2


def test_a_new_allocation_has_no_channels_of_the_previous_allocation(relay: Relay, client: Client) -> None:
    client.allocate()
    client.bind_channel()
    client.refresh(0)
    new = client.allocate()
    assert client.send_on_channel(b"data", CHANNEL) == []
    assert relay.receive_from_peer(new.id, b"data", PEER) == []


def test_an_allocation_is_in_the_tables_while_its_sockets_are_bound(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    assert relay.server.allocations.by_id[bind.allocation].state is AllocationState.BINDING
    assert client.bind_channel().code == 437
    assert client.create_permission(PEER).code == 437
    assert client.refresh(600).code == 437


def test_ports_are_drawn_at_random() -> None:
    def ports(seed: int) -> list[int]:
        relay = relay_with(seed=seed)
        clients = [Client(relay, (f"203.0.113.{n}", 1), salt=str(n)) for n in range(10)]
        return [client.allocate().port for client in clients]

    drawn = ports(1)
    assert len(set(drawn)) == 10
    assert drawn != sorted(drawn)
    assert drawn == ports(1)
    assert drawn != ports(2)


def test_a_rejected_allocate_keeps_the_allocation_under_the_username() -> None:
    """A roaming client must not lose its allocation to a rejected request."""
    relay = relay_with(ports=range(50001, 50002))
    old = Client(relay)
    old.allocate()
    moved = Client(relay, OTHER_CLIENT)
    assert refused(moved, UDP, (EVEN_PORT, False)) == 508
    assert old.address in relay.server.allocations.by_client


def test_a_roaming_client_reuses_the_port_and_slot_of_its_allocation() -> None:
    relay = relay_with(ports=range(50000, 50001), max_allocations=1)
    Client(relay).allocate()
    moved = Client(relay, OTHER_CLIENT)
    moved.allocate()
    assert list(relay.server.allocations.by_client) == [moved.address]


def test_a_refresh_does_not_change_the_creation_time(relay: Relay, client: Client) -> None:
    relay.pass_time(3)
    made_at = relay.now.monotonic
    allocation = relay.server.allocations.by_id[client.allocate().id]
    relay.pass_time(60)
    client.refresh(1200)
    assert allocation.made_at == made_at
    assert relay.server.allocations.by_id[allocation.id].ends == made_at + 60 + 1200
