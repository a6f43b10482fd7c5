"""What the core has the kernel relay: told before the client is, and for as long as the sockets would relay it."""

from collections.abc import Iterable

import pytest

from relay.core.addresses import ChannelNumber, ClientAddress, Family, PeerAddress
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    XOR_PEER_ADDRESS,
)
from relay.core.commands import (
    OFFLOAD_COMMANDS,
    BindPort,
    Command,
    ExtendAllocation,
    FreeAllocation,
    InstallChannel,
    OffloadCommand,
    RemoveChannel,
    SendToClient,
    StopAllocation,
)
from relay.core.counters import FreeReason
from relay.core.lifecycle import BindRefusal
from relay.core.stun import Method
from tests.core.driver import (
    CHANNEL,
    CLIENT,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    PEER6,
    UDP,
    Allocated,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    relay_with,
    the,
)

DUAL = (ADDITIONAL_ADDRESS_FAMILY, 2)
IPV4, BOTH = (Family.IPV4,), (Family.IPV4, Family.IPV6)
ADDRESS = ClientAddress(CLIENT)


@pytest.fixture
def relay() -> Relay:
    return relay_with(offloads=True)


@pytest.fixture
def client(relay: Relay) -> Client:
    return Client(relay)


def told(commands: Iterable[Command]) -> list[Command]:
    """What the kernel is told, and the marks of where other things happen: their order is what counts."""
    kept = (*OFFLOAD_COMMANDS, SendToClient, FreeAllocation, BindPort)
    return [
        SendToClient(b"", each.client) if isinstance(each, SendToClient) else each
        for each in commands
        if isinstance(each, kept)
    ]


def for_kernel(commands: Iterable[Command]) -> list[OffloadCommand]:
    return [each for each in commands if isinstance(each, OFFLOAD_COMMANDS)]


ANSWER = SendToClient(b"", ADDRESS)


def bind(client: Client, number: int = CHANNEL, peer: PeerAddress = PEER) -> list[Command]:
    return client.send(client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer)))


def refresh(client: Client, lifetime: int, *attributes: AttributeValue) -> list[Command]:
    return client.send(client.write(Method.REFRESH, (LIFETIME, lifetime), *attributes))


def installed(allocated: Allocated, until: float, number: int = CHANNEL, peer: PeerAddress = PEER) -> InstallChannel:
    return InstallChannel(ADDRESS, ChannelNumber(number), allocated.port, peer, until)


def removed(allocated: Allocated, number: int = CHANNEL, peer: PeerAddress = PEER) -> RemoveChannel:
    return RemoveChannel(ADDRESS, ChannelNumber(number), allocated.port, peer)


def test_without_a_kernel_that_relays_none_of_it_comes() -> None:
    relay = relay_with()
    client = Client(relay)
    begun = client.begin_allocate(DUAL)
    commands = relay.report_bound(begun.allocation)
    commands += bind(client) + refresh(client, 600) + bind(client, OTHER_CHANNEL, PEER6)
    relay.pass_time(599)
    commands += refresh(client, 3600) + refresh(client, 0, (REQUESTED_ADDRESS_FAMILY, Family.IPV6))
    relay.pass_time(2)
    commands += relay.wake() + bind(client) + refresh(client, 0)
    assert for_kernel(commands) == []
    assert relay.counters.channels_bound == 3


def test_an_allocation_may_relay_from_its_answer_to_its_end(relay: Relay, client: Client) -> None:
    assert for_kernel(client.send(client.write(Method.ALLOCATE, UDP, DUAL, (LIFETIME, 700)))) == []
    (allocation,) = relay.server.allocations.by_id.values()
    relay.pass_time(1)
    extend = ExtendAllocation(allocation.port, BOTH, relay.now.monotonic + 700)
    assert told(relay.report_bound(allocation.id)) == [extend, ANSWER]
    assert relay.server.poll_timeout() == extend.until


def test_a_repeated_allocate_tells_the_kernel_nothing(relay: Relay, client: Client) -> None:
    data = client.write(Method.ALLOCATE, UDP)
    begun = the(BindPort, client.send(data))
    relay.report_bound(begun.allocation)
    relay.pass_time(10)
    assert told(client.send(data)) == [ANSWER]


def test_a_refreshed_allocation_goes_on_before_its_client_is_told(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    relay.pass_time(100)
    until = relay.now.monotonic + 1200
    assert told(refresh(client, 1200)) == [ExtendAllocation(allocated.port, IPV4, until), ANSWER]


def test_a_refresh_may_bring_the_end_nearer(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    refresh(client, 3600)
    assert told(refresh(client, 600)) == [ExtendAllocation(allocated.port, IPV4, relay.now.monotonic + 600), ANSWER]


def test_a_bound_channel_is_installed_before_its_client_is_told(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    relay.pass_time(1)
    until = relay.now.monotonic + 600
    assert told(bind(client)) == [installed(allocated, until), ANSWER]


def test_a_refreshed_channel_comes_again_with_its_new_end(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    bind(client)
    relay.pass_time(300)
    assert told(bind(client)) == [installed(allocated, relay.now.monotonic + 600), ANSWER]


@pytest.mark.parametrize(("number", "peer"), [(CHANNEL, OTHER_PEER), (OTHER_CHANNEL, PEER), (0x3FFF, OTHER_PEER)])
def test_a_channel_that_is_refused_tells_the_kernel_nothing(client: Client, number: int, peer: PeerAddress) -> None:
    client.allocate()
    bind(client)
    assert told(bind(client, number, peer)) == [ANSWER]


def test_a_channel_that_expires_is_removed_and_comes_back_if_it_is_refreshed_in_its_cool_down(
    relay: Relay, client: Client
) -> None:
    allocated = client.allocate()
    refresh(client, 3600)
    bind(client)
    relay.pass_time(600)
    assert told(relay.wake()) == [removed(allocated)]
    relay.pass_time(299)
    assert told(bind(client)) == [installed(allocated, relay.now.monotonic + 600), ANSWER]


def test_a_channel_that_is_refreshed_too_late_and_unseen_is_removed_first(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    refresh(client, 3600)
    bind(client)
    relay.pass_time(650)
    assert told(bind(client)) == [removed(allocated), installed(allocated, relay.now.monotonic + 600), ANSWER]


def test_the_end_of_a_cool_down_tells_the_kernel_nothing(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    refresh(client, 3600)
    bind(client)
    relay.pass_time(600)
    relay.wake()
    relay.pass_time(300)
    assert relay.wake() == []
    assert not relay.server.allocations.by_client[ADDRESS].channels
    until = relay.now.monotonic + 600
    assert told(bind(client, OTHER_CHANNEL)) == [installed(allocated, until, OTHER_CHANNEL), ANSWER]


def test_a_deleted_allocation_is_stopped_and_its_live_channels_removed_before_its_client_is_told(
    relay: Relay, client: Client
) -> None:
    allocated = client.allocate(DUAL)
    refresh(client, 3600)
    bind(client)
    relay.pass_time(600)
    bind(client, OTHER_CHANNEL, PEER6)
    assert told(refresh(client, 0)) == [
        StopAllocation(allocated.port, BOTH),
        removed(allocated, OTHER_CHANNEL, PEER6),
        FreeAllocation(allocated.id, FreeReason.DELETED),
        ANSWER,
    ]


def test_an_allocation_that_expires_is_stopped_and_its_channels_removed(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    relay.pass_time(1)
    bind(client)
    relay.pass_time(599)
    assert for_kernel(relay.wake()) == [StopAllocation(allocated.port, IPV4), removed(allocated)]


def test_an_allocation_whose_sockets_fail_is_stopped_and_its_channels_removed(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    bind(client)
    commands = for_kernel(relay.report_failed(allocated.id))
    assert commands == [StopAllocation(allocated.port, IPV4), removed(allocated)]


def test_a_client_that_moves_has_its_old_allocation_stopped_before_a_port_is_bound(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    bind(client)
    moved = Client(relay, OTHER_CLIENT)
    begun = told(moved.send(moved.write(Method.ALLOCATE, UDP)))
    assert begun[:2] == [StopAllocation(allocated.port, IPV4), removed(allocated)]
    assert [type(each) for each in begun[2:]] == [FreeAllocation, BindPort]


def test_one_port_for_all_is_stopped_before_it_goes_on_for_the_next() -> None:
    relay = relay_with(offloads=True, ports=range(50000, 50001))
    client = Client(relay)
    allocated = client.allocate()
    bind(client)
    moved = Client(relay, OTHER_CLIENT)
    begun = moved.send(moved.write(Method.ALLOCATE, UDP))
    bound = relay.report_bound(the(BindPort, begun).allocation)
    assert for_kernel(begun + bound) == [
        StopAllocation(allocated.port, IPV4),
        removed(allocated),
        ExtendAllocation(allocated.port, IPV4, relay.now.monotonic + 600),
    ]


def test_a_deleted_family_is_stopped_alone_with_its_channels(relay: Relay, client: Client) -> None:
    allocated = client.allocate(DUAL)
    bind(client)
    bind(client, OTHER_CHANNEL, PEER6)
    assert told(refresh(client, 0, (REQUESTED_ADDRESS_FAMILY, Family.IPV6))) == [
        StopAllocation(allocated.port, (Family.IPV6,)),
        removed(allocated, OTHER_CHANNEL, PEER6),
        ANSWER,
    ]
    assert for_kernel(refresh(client, 600)) == [ExtendAllocation(allocated.port, IPV4, relay.now.monotonic + 600)]
    assert for_kernel(refresh(client, 0)) == [StopAllocation(allocated.port, IPV4), removed(allocated)]


def test_a_family_that_is_deleted_before_it_was_there_tells_the_kernel_nothing(relay: Relay, client: Client) -> None:
    begun = client.begin_allocate(DUAL)
    assert told(refresh(client, 0, (REQUESTED_ADDRESS_FAMILY, Family.IPV6))) == [ANSWER]
    extend = ExtendAllocation(begun.port, IPV4, relay.now.monotonic + 600)
    assert for_kernel(relay.report_bound(begun.allocation)) == [extend]


def test_only_the_port_that_was_bound_may_relay(relay: Relay, client: Client) -> None:
    begun = client.begin_allocate()
    again = relay.report_refused(begun.allocation)
    assert for_kernel(again) == []
    bound = relay.report_bound(begun.allocation)
    port = the(BindPort, again).port
    assert port != begun.port
    assert for_kernel(bound) == [ExtendAllocation(port, IPV4, relay.now.monotonic + 600)]
    assert answer_in(bound).code is None


@pytest.mark.parametrize("end", ["refused", "failed", "late", "deleted"])
def test_an_allocation_that_never_was_tells_the_kernel_nothing(relay: Relay, client: Client, end: str) -> None:
    begun = client.begin_allocate()
    match end:
        case "refused":
            commands = relay.report_refused(begun.allocation, BindRefusal.MACHINE)
        case "failed":
            commands = relay.report_failed(begun.allocation)
        case "late":
            relay.pass_time(5)
            commands = relay.wake()
        case _:
            commands = refresh(client, 0)
    assert [type(each) for each in told(commands)] == [FreeAllocation, SendToClient]
    assert for_kernel(relay.report_bound(begun.allocation)) == []


def test_what_ends_at_once_is_told_in_the_order_in_which_it_ends(relay: Relay, client: Client) -> None:
    """The sockets relay by the same deadlines, so none may be late for the kernel."""
    allocated = client.allocate()
    bind(client)
    relay.pass_time(1)
    other = Client(relay, OTHER_CLIENT, salt="other")
    others = other.allocate()
    refresh(client, 3600)
    relay.pass_time(700)
    assert for_kernel(relay.wake()) == [removed(allocated), StopAllocation(others.port, IPV4)]
