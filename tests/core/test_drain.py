"""Draining: a server that is about to end makes no allocation any more, and says once when none is left."""

from collections.abc import Callable

import pytest

from relay.core.addresses import AllocationId
from relay.core.allocations import AllocationState
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    XOR_MAPPED_ADDRESS,
    XOR_RELAYED_ADDRESS,
)
from relay.core.commands import BindPort, Command, Drained, FreeAllocation, SendToClient, SendToPeer
from relay.core.counters import FreeReason
from relay.core.lifecycle import BindRefusal
from relay.core.stun import Method
from tests.core.driver import (
    CHANNEL,
    CLIENT,
    HOSTS,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    UDP,
    Allocated,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    of_kind,
    relay_with,
    the,
)


def drain(relay: Relay) -> list[Command]:
    relay.server.handle_drain(relay.now)
    return relay.server.drain()


def refused(client: Client) -> int | None:
    return client.ask(Method.ALLOCATE, UDP).code


@pytest.fixture
def other(relay: Relay) -> Client:
    return Client(relay, OTHER_CLIENT, salt="other")


@pytest.fixture
def allocated(relay: Relay, client: Client) -> Allocated:
    """The allocation of the client, on a server that drains."""
    allocated = client.allocate()
    assert drain(relay) == []
    return allocated


def test_an_empty_server_is_drained_at_once(relay: Relay) -> None:
    assert drain(relay) == [Drained()]
    assert relay.server.poll_timeout() is None


def test_a_server_whose_last_allocation_is_gone_is_drained_at_once(relay: Relay, client: Client) -> None:
    client.allocate()
    client.refresh(0)
    assert drain(relay) == [Drained()]


def test_what_has_expired_unseen_is_not_waited_for(relay: Relay, client: Client) -> None:
    allocation = client.allocate()
    relay.pass_time(600)
    assert drain(relay) == [FreeAllocation(allocation.id, FreeReason.EXPIRED), Drained()]
    assert relay.server.poll_timeout() is None


def test_without_a_drain_nothing_is_said_of_it(relay: Relay, client: Client) -> None:
    client.allocate()
    assert of_kind(Drained, client.send(client.write(Method.REFRESH, (LIFETIME, 0)))) == []
    client.allocate()
    relay.pass_time(600)
    assert of_kind(Drained, relay.wake()) == []


def test_a_new_allocation_gets_508(relay: Relay, allocated: Allocated, other: Client) -> None:
    assert refused(other) == 508
    assert list(relay.server.allocations.by_id) == [allocated.id]
    assert relay.counters.allocations_made == 1


def test_508_goes_on_after_the_server_is_drained(relay: Relay, client: Client) -> None:
    drain(relay)
    assert refused(client) == 508
    relay.pass_time(10_000)
    client.take_nonce()
    assert refused(client) == 508


def test_a_drain_takes_no_port_and_no_place() -> None:
    """508 is said because of the drain: everything is free."""
    relay = relay_with(max_allocations=1, ports=range(50000, 50001))
    first = Client(relay)
    first.allocate()
    drain(relay)
    assert first.refresh(0).code is None
    assert refused(Client(relay, OTHER_CLIENT, salt="other")) == 508


@pytest.mark.parametrize(("attributes", "code"), [((), 400), (((REQUESTED_TRANSPORT, 6),), 442)])
def test_what_is_wrong_with_a_request_is_found_before_the_drain(
    relay: Relay, client: Client, attributes: tuple[AttributeValue, ...], code: int
) -> None:
    drain(relay)
    assert client.ask(Method.ALLOCATE, *attributes).code == code


def test_strangers_are_challenged_and_told_their_address_as_ever(relay: Relay, allocated: Allocated, other: Client) -> None:
    del allocated
    assert Client(relay, OTHER_CLIENT, valid_for=-1, salt="expired").ask(Method.ALLOCATE, UDP).code == 401
    assert other.ask(Method.BINDING).get(XOR_MAPPED_ADDRESS) == OTHER_CLIENT


def test_a_repeated_allocate_is_answered_with_what_was_granted(relay: Relay, client: Client) -> None:
    request = client.write(Method.ALLOCATE, UDP)
    bind = the(BindPort, client.send(request))
    first = answer_in(relay.report_bound(bind.allocation))
    drain(relay)
    again = answer_in(client.send(request))
    assert again.code is None
    assert (
        again.get_all(XOR_RELAYED_ADDRESS) == first.get_all(XOR_RELAYED_ADDRESS) == [(next(iter(HOSTS.values())), bind.port)]
    )
    # Another transaction of the same client: it has an allocation, and that is what it is told.
    assert refused(client) == 437


def test_an_allocation_goes_on_in_every_way(relay: Relay, client: Client) -> None:
    allocation = client.allocate()
    client.bind_channel(CHANNEL, PEER)
    drain(relay)
    for _ in range(10):
        relay.pass_time(500)
        client.take_nonce()
        assert client.refresh(600).get(LIFETIME) == 600
        assert client.bind_channel(CHANNEL, PEER).code is None
        assert client.bind_channel(OTHER_CHANNEL, OTHER_PEER).code is None
        assert client.create_permission(PEER).code is None
        assert the(SendToPeer, client.send_on_channel(b"there", OTHER_CHANNEL)).peer == OTHER_PEER
        assert the(SendToClient, relay.receive_from_peer(allocation.id, b"back", PEER)).client == CLIENT


def delete(_: Relay, client: Client, __: Allocated) -> list[Command]:
    return client.send(client.write(Method.REFRESH, (LIFETIME, 0)))


def expire(relay: Relay, _: Client, __: Allocated) -> list[Command]:
    relay.pass_time(600)
    return relay.wake()


def fail(relay: Relay, _: Client, allocated: Allocated) -> list[Command]:
    return relay.report_failed(allocated.id)


def expire_unseen(relay: Relay, client: Client, _: Allocated) -> list[Command]:
    """A datagram comes before the wake-up."""
    relay.pass_time(600)
    return client.send_on_channel(b"late")


ENDS = [(delete, FreeReason.DELETED), (expire, FreeReason.EXPIRED), (fail, FreeReason.FAILED)]
End = Callable[[Relay, Client, Allocated], list[Command]]


@pytest.mark.parametrize(("end", "reason"), [*ENDS, (expire_unseen, FreeReason.EXPIRED)])
def test_the_end_of_the_last_allocation_is_told_once(
    relay: Relay, client: Client, allocated: Allocated, end: End, reason: FreeReason
) -> None:
    commands = end(relay, client, allocated)
    assert commands[0] == FreeAllocation(allocated.id, reason)
    assert of_kind(Drained, commands) == [Drained()]
    assert commands.index(FreeAllocation(allocated.id, reason)) < commands.index(Drained())
    for _ in range(2):
        assert of_kind(Drained, end(relay, client, allocated)) == []
    assert refused(client) == 508
    assert of_kind(Drained, relay.wake()) == []


@pytest.mark.parametrize(("end", "reason"), ENDS)
def test_the_end_of_an_allocation_that_is_not_the_last_is_not_told(
    relay: Relay, client: Client, other: Client, end: End, reason: FreeReason
) -> None:
    first, second = client.allocate(), other.allocate((LIFETIME, 3600))
    drain(relay)
    commands = end(relay, client, first)
    assert the(FreeAllocation, commands).reason is reason
    assert of_kind(Drained, commands) == []
    assert of_kind(Drained, delete(relay, other, second)) == [Drained()]


def test_two_that_expire_at_the_same_moment_are_told_once(relay: Relay, client: Client, other: Client) -> None:
    first, second = client.allocate(), other.allocate()
    drain(relay)
    relay.pass_time(600)
    *freed, last = relay.wake()
    assert freed == [FreeAllocation(each.id, FreeReason.EXPIRED) for each in (first, second)]
    assert last == Drained()


def test_a_family_that_is_deleted_is_not_the_end(relay: Relay, client: Client) -> None:
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    drain(relay)
    half = client.send(client.write(Method.REFRESH, (LIFETIME, 0), (REQUESTED_ADDRESS_FAMILY, 1)))
    assert of_kind(Drained, half) == []
    rest = client.send(client.write(Method.REFRESH, (LIFETIME, 0), (REQUESTED_ADDRESS_FAMILY, 2)))
    assert of_kind(Drained, rest) == [Drained()]


@pytest.mark.parametrize("times", [2, 5])
def test_a_drain_is_wished_for_once(relay: Relay, client: Client, times: int) -> None:
    allocated = client.allocate()
    assert [drain(relay) for _ in range(times)] == [[]] * times
    assert of_kind(Drained, delete(relay, client, allocated)) == [Drained()]
    assert drain(relay) == []


def test_a_drained_server_is_not_drained_again(relay: Relay) -> None:
    assert drain(relay) == [Drained()]
    assert drain(relay) == []


def test_an_allocation_whose_sockets_are_not_bound_yet_is_waited_for_and_granted(relay: Relay, client: Client) -> None:
    request = client.write(Method.ALLOCATE, UDP)
    bind = the(BindPort, client.send(request))
    assert drain(relay) == []
    # Neither refused nor begun anew: the answer is under way.
    assert client.send(request) == []
    assert answer_in(relay.report_bound(bind.allocation)).code is None
    assert client.bind_channel().code is None
    freed, drained, answer = delete(relay, client, Allocated(bind.allocation, bind.port, client.refresh(600)))
    assert freed == FreeAllocation(bind.allocation, FreeReason.DELETED)
    assert drained == Drained()
    assert answer_in([answer]).code is None


def test_a_port_that_is_refused_while_draining_is_followed_by_another(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate()
    drain(relay)
    retried = the(BindPort, relay.report_refused(bind.allocation))
    assert retried.port != bind.port
    assert answer_in(relay.report_bound(bind.allocation)).code is None


def refuse_machine(relay: Relay, allocation: AllocationId) -> list[Command]:
    return relay.report_refused(allocation, BindRefusal.MACHINE)


def never_report(relay: Relay, _: AllocationId) -> list[Command]:
    relay.pass_time(5)
    return relay.wake()


def fail_binding(relay: Relay, allocation: AllocationId) -> list[Command]:
    return relay.report_failed(allocation)


@pytest.mark.parametrize("end", [refuse_machine, never_report, fail_binding])
def test_an_allocation_that_comes_to_nothing_is_refused_and_was_the_last(
    relay: Relay, client: Client, end: Callable[[Relay, AllocationId], list[Command]]
) -> None:
    bind = client.begin_allocate()
    drain(relay)
    assert relay.server.allocations.by_id[bind.allocation].state is AllocationState.BINDING
    commands = end(relay, bind.allocation)
    assert answer_in(commands).code == 508
    assert of_kind(Drained, commands) == [Drained()]
    assert relay.server.poll_timeout() is None


def test_an_allocation_without_any_port_left_is_the_last_too() -> None:
    relay = relay_with(ports=range(50000, 50001))
    bind = Client(relay).begin_allocate()
    drain(relay)
    commands = relay.report_refused(bind.allocation)
    assert answer_in(commands).code == 508
    assert of_kind(Drained, commands) == [Drained()]


def test_a_client_that_moves_gets_508_and_keeps_what_it_had(relay: Relay, client: Client, allocated: Allocated) -> None:
    client.bind_channel()
    moved = Client(relay, OTHER_CLIENT)
    assert moved.credential == client.credential
    (refusal,) = moved.send(moved.write(Method.ALLOCATE, UDP))
    assert answer_in([refusal]).code == 508
    assert the(SendToPeer, client.send_on_channel(b"still there")).allocation == allocated.id
    assert the(SendToClient, relay.receive_from_peer(allocated.id, b"still here", PEER)).client == CLIENT
    assert client.refresh(600).code is None


def test_a_drain_moves_no_expiry(relay: Relay, client: Client) -> None:
    client.allocate()
    client.bind_channel()
    ends = relay.server.poll_timeout()
    relay.pass_time(100)
    drain(relay)
    assert relay.server.poll_timeout() == ends
