"""A request that made or deleted an allocation has no effect when it is repeated."""

import pytest

from relay.core import replays
from relay.core.attributes import LIFETIME
from relay.core.commands import BindPort, FreeAllocation
from relay.core.counters import DropReason
from relay.core.overload import FORGOTTEN
from relay.core.replays import Replays
from relay.core.stun import Method
from tests.support.core import OTHER_CLIENT, UDP, Client, Relay, answer_in, the


@pytest.fixture
def moved(relay: Relay) -> Client:
    """The same user at another address."""
    return Client(relay, OTHER_CLIENT)


def recorded_allocate(relay: Relay, client: Client) -> bytes:
    data = client.write(Method.ALLOCATE, UDP)
    relay.report_bound(the(BindPort, client.send(data)).allocation)
    return data


def test_an_allocate_repeated_from_the_old_address_of_a_roaming_client_changes_nothing(
    relay: Relay, client: Client, moved: Client
) -> None:
    data = recorded_allocate(relay, client)
    allocation = moved.allocate()
    for _ in range(3):
        relay.pass_time(100)
        assert client.send(data) == []
    assert relay.counters.drops[DropReason.REPEATED] == 3
    assert list(relay.server.allocations.by_id) == [allocation.id]


def test_an_allocate_repeated_after_a_deletion_makes_no_allocation(relay: Relay, client: Client) -> None:
    data = recorded_allocate(relay, client)
    client.refresh(0)
    assert client.send(data) == []
    assert not relay.server.allocations.by_id


def test_a_deletion_repeated_after_another_allocate_deletes_nothing(relay: Relay, client: Client) -> None:
    client.allocate()
    data = client.write(Method.REFRESH, (LIFETIME, 0))
    assert len([each for each in client.send(data) if isinstance(each, FreeAllocation)]) == 1
    # As before: a retransmission finds no allocation.
    assert answer_in(client.send(data)).code == 437
    allocation = client.allocate()
    # The client may have lost the first response.
    assert answer_in(client.send(data)).code is None
    assert list(relay.server.allocations.by_id) == [allocation.id]


def test_a_roaming_client_may_return_to_its_old_address(client: Client, moved: Client) -> None:
    client.allocate()
    moved.allocate()
    assert client.allocate().answer.code is None


def test_a_request_is_remembered_while_its_nonce_is_valid() -> None:
    memory = Replays()
    memory.add(b"first", issued=10, now=20.0)
    memory.add(b"second", issued=10, now=3619.0)
    assert b"first" in memory
    memory.add(b"third", issued=3600, now=3620.0)
    assert b"first" not in memory
    assert not memory.is_too_old(10)


def test_many_requests_are_forgotten_in_portions() -> None:
    memory = Replays()
    requests = [number.to_bytes(20, "big") for number in range(2 * FORGOTTEN + 1)]
    for each in requests:
        memory.add(each, issued=10, now=20.0)
    left = []
    for _ in range(3):
        memory.forget(3620.0)
        left.append(sum(each in memory for each in requests))
    assert left == [FORGOTTEN + 1, 1, 0]


def test_a_full_memory_refuses_the_nonces_of_forgotten_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "CAPACITY", 2)
    memory = Replays()
    for second, integrity in enumerate((b"first", b"second", b"third")):
        memory.add(integrity, issued=second, now=float(second))
    assert b"first" not in memory
    assert memory.is_too_old(0)
    assert not memory.is_too_old(1)


def test_a_client_whose_request_may_be_forgotten_gets_a_new_nonce_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, relay: Relay, client: Client
) -> None:
    old = client.nonce
    monkeypatch.setattr(replays, "CAPACITY", 1)
    for number in range(2):
        relay.pass_time(1)
        Client(relay, ("203.0.113.99", 1 + number), salt=str(number)).allocate()
    challenge = answer_in(client.send(client.write(Method.ALLOCATE, UDP)))
    assert challenge.code == 438
    client.take_nonce()
    assert client.nonce != old
    assert client.allocate().answer.code is None
