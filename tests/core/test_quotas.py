"""How much one client, one address and all together may have."""

from relay.core.addresses import PeerAddress, SocketAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, XOR_PEER_ADDRESS
from relay.core.commands import BindPort
from relay.core.stun import Method
from tests.core.driver import CLIENT, OTHER_CLIENT, PEER, PEER6, UDP, Client, Relay, answer_in, of_kind, relay_with


def peers(count: int) -> list[PeerAddress]:
    return [PeerAddress((PEER[0], PEER[1] + number)) for number in range(count)]


def clients(relay: Relay, *addresses: SocketAddress) -> list[Client]:
    return [Client(relay, address, salt=str(number)) for number, address in enumerate(addresses)]


def allocate(client: Client) -> int | None:
    """Ask for an allocation, and give the error code."""
    commands = client.send(client.write(Method.ALLOCATE, UDP))
    for bind in of_kind(BindPort, commands):
        commands = client.relay.report_bound(bind.allocation)
    return answer_in(commands).code


def test_one_allocation_too_many_gets_486() -> None:
    relay = relay_with(max_allocations=2)
    assert [allocate(each) for each in clients(relay, CLIENT, OTHER_CLIENT, ("203.0.113.7", 1))] == [None, None, 486]


def test_one_channel_too_many_gets_508_and_those_there_are_can_be_refreshed() -> None:
    relay = relay_with(max_channels=2)
    client = Client(relay)
    client.allocate()
    first, second, third = peers(3)
    assert client.bind_channel(0x4000, first).code is None
    assert client.bind_channel(0x4001, second).code is None
    assert client.bind_channel(0x4002, third).code == 508
    assert client.bind_channel(0x4000, first).code is None
    # What is wrong in itself is so still.
    assert client.bind_channel(0x4002, first).code == 400
    assert client.ask(Method.CREATE_PERMISSION, (XOR_PEER_ADDRESS, third)).code is None


def test_a_channel_that_cools_down_counts_until_it_is_gone() -> None:
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


def test_by_default_an_allocation_may_have_every_channel_of_the_rfc() -> None:
    relay = relay_with()
    client = Client(relay)
    client.allocate()
    every = peers(4097)
    codes = [client.bind_channel(0x4000 + number, peer).code for number, peer in enumerate(every)]
    assert codes == [None] * 4096 + [508]


def test_one_address_may_have_so_many_allocations_whatever_their_ports() -> None:
    relay = relay_with(max_allocations_per_address=2)
    here = clients(relay, *((CLIENT[0], port) for port in (1, 2, 3)))
    assert [allocate(each) for each in here] == [None, None, 486]
    elsewhere = Client(relay, OTHER_CLIENT, salt="elsewhere")
    assert allocate(elsewhere) is None
    here[0].refresh(0)
    assert allocate(here[2]) is None


def test_an_ipv6_address_is_counted_by_its_first_64_bits() -> None:
    relay = relay_with(max_allocations_per_address=1)
    addresses: list[SocketAddress] = [
        ("2001:db8:5::1", 1000, 0, 0),
        ("2001:db8:5:0:1::", 1000, 0, 0),
        ("2001:db8:5:1::1", 1000, 0, 0),
    ]
    assert [allocate(each) for each in clients(relay, *addresses)] == [None, 486, None]


def test_a_client_that_comes_back_within_its_address_takes_its_own_place() -> None:
    relay = relay_with(max_allocations_per_address=1)
    assert allocate(Client(relay, (CLIENT[0], 1))) is None
    assert allocate(Client(relay, (CLIENT[0], 2))) is None


def test_a_client_that_roams_to_an_address_that_has_all_it_may_keeps_what_it_had() -> None:
    relay = relay_with(max_allocations_per_address=1)
    assert allocate(Client(relay, CLIENT)) is None
    assert allocate(Client(relay, (OTHER_CLIENT[0], 1), salt="other")) is None
    assert allocate(Client(relay, OTHER_CLIENT)) == 486
    assert Client(relay, CLIENT).refresh(600).code is None


def test_an_allocation_that_never_was_counts_no_longer() -> None:
    relay = relay_with(max_allocations_per_address=1)
    Client(relay, CLIENT).begin_allocate()
    next_door = Client(relay, (CLIENT[0], 2), salt="other")
    assert allocate(next_door) == 486
    relay.pass_time(5)
    assert allocate(next_door) is None


def test_without_being_asked_nobody_limits_allocations_by_address() -> None:
    relay = relay_with()
    here = clients(relay, *((CLIENT[0], port) for port in range(1, 41)))
    assert [allocate(each) for each in here] == [None] * 40


def test_channels_of_both_families_count_together() -> None:
    relay = relay_with(max_channels=1)
    client = Client(relay)
    client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    assert client.bind_channel(0x4000, PEER).code is None
    assert client.bind_channel(0x4001, PEER6).code == 508
