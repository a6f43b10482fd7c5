"""Draining: the server rejects new allocations, and reports once when the last allocation has ended."""

from collections.abc import Callable

import pytest

from relay.core.addresses import AllocationId
from relay.core.allocation import AllocationState
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    ERROR_CODE,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    XOR_MAPPED_ADDRESS,
    XOR_RELAYED_ADDRESS,
    ErrorValue,
)
from relay.core.commands import BindPort, Command, Drained, FreeAllocation, SendToClient, SendToPeer
from relay.core.counters import FreeReason
from relay.core.lifecycle import BindRefusal
from relay.core.stun import Method
from tests.support.core import (
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


def resume(relay: Relay) -> list[Command]:
    relay.server.handle_resume(relay.now)
    return relay.server.drain()


def refused(client: Client) -> int | None:
    return client.ask(Method.ALLOCATE, UDP).code


@pytest.fixture
def other(relay: Relay) -> Client:
    return Client(relay, OTHER_CLIENT, salt="other")


@pytest.fixture
def allocated(relay: Relay, client: Client) -> Allocated:
    """The client's allocation on a draining server."""
    allocated = client.allocate()
    assert drain(relay) == []
    return allocated


def test_an_empty_server_is_drained_at_once(relay: Relay) -> None:
    assert drain(relay) == [Drained()]
    assert relay.server.poll_timeout() is None


def test_a_server_whose_last_allocation_ended_is_drained_at_once(relay: Relay, client: Client) -> None:
    client.allocate()
    client.refresh(0)
    assert drain(relay) == [Drained()]


def test_a_drain_does_not_wait_for_expired_allocations(relay: Relay, client: Client) -> None:
    allocation = client.allocate()
    relay.pass_time(600)
    assert drain(relay) == [FreeAllocation(allocation.id, FreeReason.EXPIRED), Drained()]
    assert relay.server.poll_timeout() is None


def test_without_a_drain_no_drained_command_is_sent(relay: Relay, client: Client) -> None:
    client.allocate()
    assert of_kind(Drained, client.send(client.write(Method.REFRESH, (LIFETIME, 0)))) == []
    client.allocate()
    relay.pass_time(600)
    assert of_kind(Drained, relay.wake()) == []


def test_a_new_allocation_gets_508(relay: Relay, allocated: Allocated, other: Client) -> None:
    assert refused(other) == 508
    assert list(relay.server.allocations.by_id) == [allocated.id]
    assert relay.counters.allocations_made == 1


def test_a_drained_server_still_responds_with_508(relay: Relay, client: Client) -> None:
    drain(relay)
    assert refused(client) == 508
    relay.pass_time(10_000)
    client.take_nonce()
    assert refused(client) == 508


def test_a_drain_uses_no_port_and_no_quota() -> None:
    """The code 508 is due to the drain: all ports are free."""
    relay = relay_with(max_allocations=1, ports=range(50000, 50001))
    first = Client(relay)
    first.allocate()
    drain(relay)
    assert first.refresh(0).code is None
    assert refused(Client(relay, OTHER_CLIENT, salt="other")) == 508


@pytest.mark.parametrize(("attributes", "code"), [((), 400), (((REQUESTED_TRANSPORT, 6),), 442)])
def test_errors_of_a_request_are_checked_before_the_drain(
    relay: Relay, client: Client, attributes: tuple[AttributeValue, ...], code: int
) -> None:
    drain(relay)
    assert client.ask(Method.ALLOCATE, *attributes).code == code


def test_a_draining_server_still_answers_binding_and_sends_challenges(
    relay: Relay, allocated: Allocated, other: Client
) -> None:
    del allocated
    assert Client(relay, OTHER_CLIENT, valid_for=-1, salt="expired").ask(Method.ALLOCATE, UDP).code == 401
    assert other.ask(Method.BINDING).get(XOR_MAPPED_ADDRESS) == OTHER_CLIENT


def test_a_retransmitted_allocate_still_gets_its_response(relay: Relay, client: Client) -> None:
    request = client.write(Method.ALLOCATE, UDP)
    bind = the(BindPort, client.send(request))
    first = answer_in(relay.report_bound(bind.allocation))
    drain(relay)
    again = answer_in(client.send(request))
    assert again.code is None
    assert (
        again.get_all(XOR_RELAYED_ADDRESS) == first.get_all(XOR_RELAYED_ADDRESS) == [(next(iter(HOSTS.values())), bind.port)]
    )
    # Another transaction of the same client gets 437, because the client has an allocation.
    assert refused(client) == 437


def test_an_existing_allocation_keeps_working(relay: Relay, client: Client) -> None:
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


def kick(relay: Relay, _: Client, allocated: Allocated) -> list[Command]:
    return relay.kick(allocated.id)


def expire_unseen(relay: Relay, client: Client, _: Allocated) -> list[Command]:
    """A datagram arrives before the wake-up."""
    relay.pass_time(600)
    return client.send_on_channel(b"late")


ENDS = [(delete, FreeReason.DELETED), (expire, FreeReason.EXPIRED), (fail, FreeReason.FAILED), (kick, FreeReason.KICKED)]
End = Callable[[Relay, Client, Allocated], list[Command]]


@pytest.mark.parametrize(("end", "reason"), [*ENDS, (expire_unseen, FreeReason.EXPIRED)])
def test_the_end_of_the_last_allocation_is_reported_once(
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
def test_the_end_of_an_earlier_allocation_is_not_reported(
    relay: Relay, client: Client, other: Client, end: End, reason: FreeReason
) -> None:
    first, second = client.allocate(), other.allocate((LIFETIME, 3600))
    drain(relay)
    commands = end(relay, client, first)
    assert the(FreeAllocation, commands).reason is reason
    assert of_kind(Drained, commands) == []
    assert of_kind(Drained, delete(relay, other, second)) == [Drained()]


def test_two_simultaneous_expiries_are_reported_once(relay: Relay, client: Client, other: Client) -> None:
    first, second = client.allocate(), other.allocate()
    drain(relay)
    relay.pass_time(600)
    *freed, last = relay.wake()
    assert freed == [FreeAllocation(each.id, FreeReason.EXPIRED) for each in (first, second)]
    assert last == Drained()


def test_deleting_a_family_does_not_end_the_drain(relay: Relay, client: Client) -> None:
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    drain(relay)
    half = client.send(client.write(Method.REFRESH, (LIFETIME, 0), (REQUESTED_ADDRESS_FAMILY, 1)))
    assert of_kind(Drained, half) == []
    rest = client.send(client.write(Method.REFRESH, (LIFETIME, 0), (REQUESTED_ADDRESS_FAMILY, 2)))
    assert of_kind(Drained, rest) == [Drained()]


@pytest.mark.parametrize("times", [2, 5])
def test_a_second_drain_is_ignored(relay: Relay, client: Client, times: int) -> None:
    allocated = client.allocate()
    assert [drain(relay) for _ in range(times)] == [[]] * times
    assert of_kind(Drained, delete(relay, client, allocated)) == [Drained()]
    assert drain(relay) == []


def test_a_drained_server_is_reported_once(relay: Relay) -> None:
    assert drain(relay) == [Drained()]
    assert drain(relay) == []


def test_a_drain_waits_for_and_grants_a_pending_allocation(relay: Relay, client: Client) -> None:
    request = client.write(Method.ALLOCATE, UDP)
    bind = the(BindPort, client.send(request))
    assert drain(relay) == []
    # Neither rejected nor restarted: the response is pending.
    assert client.send(request) == []
    assert answer_in(relay.report_bound(bind.allocation)).code is None
    assert client.bind_channel().code is None
    freed, drained, answer = delete(relay, client, Allocated(bind.allocation, bind.port, client.refresh(600)))
    assert freed == FreeAllocation(bind.allocation, FreeReason.DELETED)
    assert drained == Drained()
    assert answer_in([answer]).code is None


def test_a_port_in_use_while_draining_is_replaced(relay: Relay, client: Client) -> None:
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
def test_a_failed_pending_allocation_gets_508_and_ends_the_drain(
    relay: Relay, client: Client, end: Callable[[Relay, AllocationId], list[Command]]
) -> None:
    bind = client.begin_allocate()
    drain(relay)
    assert relay.server.allocations.by_id[bind.allocation].state is AllocationState.BINDING
    commands = end(relay, bind.allocation)
    assert answer_in(commands).code == 508
    assert of_kind(Drained, commands) == [Drained()]
    assert relay.server.poll_timeout() is None


def test_a_pending_allocation_without_a_free_port_ends_the_drain() -> None:
    relay = relay_with(ports=range(50000, 50001))
    bind = Client(relay).begin_allocate()
    drain(relay)
    commands = relay.report_refused(bind.allocation)
    assert answer_in(commands).code == 508
    assert of_kind(Drained, commands) == [Drained()]


def test_a_roaming_client_gets_508_and_keeps_its_allocation(relay: Relay, client: Client, allocated: Allocated) -> None:
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


def test_after_a_cancelled_drain_clients_allocate_again(relay: Relay, allocated: Allocated, other: Client) -> None:
    assert refused(other) == 508
    assert resume(relay) == []
    assert other.allocate().id != allocated.id
    assert of_kind(Drained, delete(relay, other, allocated)) == []


def test_a_drain_can_be_repeated_after_it_was_cancelled(relay: Relay, client: Client) -> None:
    for _ in range(2):
        assert drain(relay) == [Drained()]
        assert resume(relay) == []
        allocated = client.allocate()
        assert drain(relay) == []
        assert of_kind(Drained, delete(relay, client, allocated)) == [Drained()]
        assert resume(relay) == []


def test_without_a_drain_nothing_is_cancelled(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    assert resume(relay) == []
    assert of_kind(Drained, delete(relay, client, allocated)) == []


def test_a_cancelled_drain_handles_passed_deadlines_first(relay: Relay, allocated: Allocated) -> None:
    relay.pass_time(600)
    assert resume(relay) == [FreeAllocation(allocated.id, FreeReason.EXPIRED), Drained()]


@pytest.mark.parametrize("limit", ["draining", "ports"])
def test_the_phrase_of_a_508_names_its_cause(limit: str) -> None:
    relay = relay_with(ports=range(50000, 50001))
    Client(relay).allocate()
    if limit == "draining":
        drain(relay)
    answer = Client(relay, OTHER_CLIENT, salt="other").ask(Method.ALLOCATE, UDP)
    assert answer.get(ERROR_CODE) == ErrorValue(508, f"Insufficient capacity: {limit}")
