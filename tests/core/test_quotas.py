"""Limits per client, per address and in total."""

from relay.core.addresses import PeerAddress, SocketAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, XOR_PEER_ADDRESS
from relay.core.commands import BindPort
from relay.core.errors import ErrorCode
from relay.core.events import Limit, LimitReached
from relay.core.stun import Method
from tests.support.core import CLIENT, OTHER_CLIENT, PEER, PEER6, UDP, Client, Relay, answer_in, of_kind, relay_with


def peers(count: int) -> list[PeerAddress]:
    return [PeerAddress((PEER[0], PEER[1] + number)) for number in range(count)]


def clients(relay: Relay, *addresses: SocketAddress) -> list[Client]:
    return [Client(relay, address, salt=str(number)) for number, address in enumerate(addresses)]


def allocate(client: Client) -> int | None:
    """Request an allocation, and return the error code."""
    commands = client.send(client.write(Method.ALLOCATE, UDP))
    for bind in of_kind(BindPort, commands):
        commands = client.relay.report_bound(bind.allocation)
    return answer_in(commands).code


def test_an_allocation_above_the_quota_gets_486() -> None:
    relay = relay_with(max_allocations=2)
    assert [allocate(each) for each in clients(relay, CLIENT, OTHER_CLIENT, ("203.0.113.7", 1))] == [None, None, 486]


def test_a_channel_above_the_limit_gets_508_and_refreshes_succeed() -> None:
    relay = relay_with(max_channels=2)
    client = Client(relay)
    client.allocate()
    first, second, third = peers(3)
    assert client.bind_channel(0x4000, first).code is None
    assert client.bind_channel(0x4001, second).code is None
    assert client.bind_channel(0x4002, third).code == 508
    assert client.bind_channel(0x4000, first).code is None
    # Errors of the request itself are unchanged.
    assert client.bind_channel(0x4002, first).code == 400
    assert client.ask(Method.CREATE_PERMISSION, (XOR_PEER_ADDRESS, third)).code is None


def test_channels_of_all_allocations_are_limited_but_each_is_assured_a_few() -> None:
    relay = relay_with(max_channels_in_all=20)
    greedy, modest = clients(relay, CLIENT, OTHER_CLIENT)
    for each in (greedy, modest):
        each.allocate()
    every = peers(32)
    assert [greedy.bind_channel(0x4000 + n, peer).code for n, peer in enumerate(every)] == [None] * 20 + [508] * 12
    assert greedy.bind_channel(0x4000, every[0]).code is None
    relay.watch(LimitReached)
    assert [modest.bind_channel(0x4000 + n, peer).code for n, peer in enumerate(every)] == [None] * 16 + [508] * 16
    assert relay.take_events() == [LimitReached(modest.address, Limit.CHANNELS_IN_ALL, ErrorCode.INSUFFICIENT_CAPACITY)] * 16
    greedy.refresh(0)
    assert modest.bind_channel(0x4010, every[16]).code is None


def test_a_channel_in_its_grace_period_counts_toward_the_limit() -> None:
    relay = relay_with(max_channels=1)
    client = Client(relay)
    client.allocate()
    client.refresh(3600)
    first, second = peers(2)
    client.bind_channel(0x4000, first)
    relay.pass_time(899)
    assert client.bind_channel(0x4001, second).code == 508
    relay.pass_time(1)
    assert client.bind_channel(0x4001, second).code is None


def test_by_default_an_allocation_may_bind_all_channel_numbers() -> None:
    relay = relay_with()
    client = Client(relay)
    client.allocate()
    every = peers(4097)
    codes = [client.bind_channel(0x4000 + number, peer).code for number, peer in enumerate(every)]
    assert codes == [None] * 4096 + [508]


def test_the_allocation_limit_of_an_address_covers_all_ports() -> None:
    relay = relay_with(max_allocations_per_address=2)
    here = clients(relay, *((CLIENT[0], port) for port in (1, 2, 3)))
    assert [allocate(each) for each in here] == [None, None, 486]
    elsewhere = Client(relay, OTHER_CLIENT, salt="elsewhere")
    assert allocate(elsewhere) is None
    here[0].refresh(0)
    assert allocate(here[2]) is None


def test_an_ipv6_address_counts_by_its_first_64_bits() -> None:
    relay = relay_with(max_allocations_per_address=1)
    addresses: list[SocketAddress] = [
        ("2001:db8:5::1", 1000, 0, 0),
        ("2001:db8:5:0:1::", 1000, 0, 0),
        ("2001:db8:5:1::1", 1000, 0, 0),
    ]
    assert [allocate(each) for each in clients(relay, *addresses)] == [None, 486, None]


def test_a_client_on_a_new_port_reuses_its_own_slot() -> None:
    relay = relay_with(max_allocations_per_address=1)
    assert allocate(Client(relay, (CLIENT[0], 1))) is None
    assert allocate(Client(relay, (CLIENT[0], 2))) is None


def test_roaming_to_an_address_at_its_limit_keeps_the_allocation() -> None:
    relay = relay_with(max_allocations_per_address=1)
    assert allocate(Client(relay, CLIENT)) is None
    assert allocate(Client(relay, (OTHER_CLIENT[0], 1), salt="other")) is None
    assert allocate(Client(relay, OTHER_CLIENT)) == 486
    assert Client(relay, CLIENT).refresh(600).code is None


def test_a_failed_allocation_does_not_count_toward_the_limit() -> None:
    relay = relay_with(max_allocations_per_address=1)
    Client(relay, CLIENT).begin_allocate()
    next_door = Client(relay, (CLIENT[0], 2), salt="other")
    assert allocate(next_door) == 486
    relay.pass_time(5)
    assert allocate(next_door) is None


def test_by_default_allocations_per_address_are_not_limited() -> None:
    relay = relay_with()
    here = clients(relay, *((CLIENT[0], port) for port in range(1, 41)))
    assert [allocate(each) for each in here] == [None] * 40


def test_channels_of_both_families_count_together() -> None:
    relay = relay_with(max_channels=1)
    client = Client(relay)
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    assert client.bind_channel(0x4000, PEER).code is None
    assert client.bind_channel(0x4001, PEER6).code == 508
