"""The core's commands for offload: sent before the response to the client, with the deadlines of the sockets."""

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
    FreeAllocation,
    InstallChannel,
    OffloadCommand,
    RemoveChannel,
    SendToClient,
)
from relay.core.counters import FreeReason
from relay.core.lifecycle import BindRefusal
from relay.core.stun import Method
from tests.support.core import (
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
    relay_with,
    the,
)

DUAL = (ADDITIONAL_ADDRESS_FAMILY, 2)
ADDRESS = ClientAddress(CLIENT)


@pytest.fixture
def relay() -> Relay:
    return relay_with(offloads=True)


@pytest.fixture
def client(relay: Relay) -> Client:
    return Client(relay)


def told(commands: Iterable[Command]) -> list[Command]:
    """The kernel's commands, and marks of other commands to check the order."""
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


def test_without_offload_no_kernel_commands_are_sent() -> None:
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


def test_an_allocation_without_channels_sends_no_kernel_commands(relay: Relay, client: Client) -> None:
    data = client.write(Method.ALLOCATE, UDP, DUAL)
    begun = the(BindPort, client.send(data))
    assert told(relay.report_bound(begun.allocation)) == [ANSWER]
    relay.pass_time(10)
    assert told(client.send(data)) == [ANSWER]
    assert told(refresh(client, 600)) == [ANSWER]
    assert [type(each) for each in told(refresh(client, 0))] == [FreeAllocation, SendToClient]


def test_a_channel_is_installed_before_the_response_to_its_bind(relay: Relay, client: Client) -> None:
    allocated = client.allocate((LIFETIME, 601))
    relay.pass_time(1)
    until = relay.now.monotonic + 600
    assert told(bind(client)) == [installed(allocated, until), ANSWER]


def test_a_refreshed_channel_is_installed_with_its_new_expiry(relay: Relay, client: Client) -> None:
    allocated = client.allocate((LIFETIME, 3600))
    bind(client)
    relay.pass_time(300)
    assert told(bind(client)) == [installed(allocated, relay.now.monotonic + 600), ANSWER]


def test_a_channel_is_installed_at_most_until_its_allocation_expires(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    end = relay.now.monotonic + 600
    relay.pass_time(1)
    assert told(bind(client)) == [installed(allocated, end), ANSWER]
    relay.pass_time(598.5)
    assert told(bind(client)) == [installed(allocated, end), ANSWER]


def test_truncated_channels_are_extended_with_their_allocation(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    bind(client)
    relay.pass_time(1)
    bind(client, OTHER_CHANNEL, OTHER_PEER)
    until = relay.now.monotonic + 600
    relay.pass_time(100)
    # Only the truncated channel, and only the first time.
    assert told(refresh(client, 600)) == [installed(allocated, until, OTHER_CHANNEL, OTHER_PEER), ANSWER]
    assert told(refresh(client, 3600)) == [ANSWER]


def test_a_refreshed_truncated_channel_is_installed_once(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    for _ in range(3):
        relay.pass_time(100)
        bind(client)
    assert told(refresh(client, 600)) == [installed(allocated, relay.now.monotonic + 600), ANSWER]
    bind(client)
    assert told(refresh(client, 600)) == [ANSWER]


@pytest.mark.parametrize("lifetime", [None, 1, 600])
def test_a_refresh_with_an_earlier_expiry_truncates_no_channel(relay: Relay, client: Client, lifetime: int | None) -> None:
    allocated = client.allocate((LIFETIME, 3600))
    bound = bind(client)
    assert told(bound) == [installed(allocated, relay.now.monotonic + 600), ANSWER]
    shorter = client.write(Method.REFRESH, *([] if lifetime is None else [(LIFETIME, lifetime)]))
    assert told(client.send(shorter)) == [ANSWER]
    assert relay.server.poll_timeout() == relay.now.monotonic + 600


@pytest.mark.parametrize(("number", "peer"), [(CHANNEL, OTHER_PEER), (OTHER_CHANNEL, PEER), (0x3FFF, OTHER_PEER)])
def test_a_rejected_channel_bind_sends_no_kernel_commands(client: Client, number: int, peer: PeerAddress) -> None:
    client.allocate()
    bind(client)
    assert told(bind(client, number, peer)) == [ANSWER]


def test_an_expired_channel_is_removed_and_reinstalled_by_a_refresh(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    refresh(client, 3600)
    bind(client)
    relay.pass_time(600)
    assert told(relay.wake()) == [removed(allocated)]
    relay.pass_time(299)
    assert told(bind(client)) == [installed(allocated, relay.now.monotonic + 600), ANSWER]


def test_a_channel_refreshed_after_an_unnoticed_expiry_is_removed_first(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    refresh(client, 3600)
    bind(client)
    relay.pass_time(650)
    assert told(bind(client)) == [removed(allocated), installed(allocated, relay.now.monotonic + 600), ANSWER]


def test_the_end_of_a_grace_period_sends_no_kernel_commands(relay: Relay, client: Client) -> None:
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


def test_channels_of_a_deleted_allocation_are_removed_before_the_response(relay: Relay, client: Client) -> None:
    allocated = client.allocate(DUAL)
    refresh(client, 3600)
    bind(client)
    relay.pass_time(600)
    bind(client, OTHER_CHANNEL, PEER6)
    assert told(refresh(client, 0)) == [
        removed(allocated, OTHER_CHANNEL, PEER6),
        FreeAllocation(allocated.id, FreeReason.DELETED),
        ANSWER,
    ]


def test_channels_of_an_expired_allocation_are_removed(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    relay.pass_time(1)
    bind(client)
    relay.pass_time(599)
    assert for_kernel(relay.wake()) == [removed(allocated)]


def test_channels_of_an_allocation_with_failed_sockets_are_removed(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    bind(client)
    assert for_kernel(relay.report_failed(allocated.id)) == [removed(allocated)]


def test_channels_of_a_roaming_client_are_removed_before_a_port_is_bound(relay: Relay, client: Client) -> None:
    allocated = client.allocate()
    bind(client)
    moved = Client(relay, OTHER_CLIENT)
    begun = told(moved.send(moved.write(Method.ALLOCATE, UDP)))
    assert begun[:1] == [removed(allocated)]
    assert [type(each) for each in begun[1:]] == [FreeAllocation, BindPort]


def test_deleting_a_family_removes_only_its_channels(client: Client) -> None:
    allocated = client.allocate(DUAL)
    bind(client)
    bind(client, OTHER_CHANNEL, PEER6)
    assert told(refresh(client, 0, (REQUESTED_ADDRESS_FAMILY, Family.IPV6))) == [
        removed(allocated, OTHER_CHANNEL, PEER6),
        ANSWER,
    ]
    assert for_kernel(refresh(client, 0)) == [removed(allocated)]


def test_a_truncated_channel_of_a_deleted_family_is_not_reinstalled(relay: Relay, client: Client) -> None:
    client.allocate(DUAL)
    relay.pass_time(1)
    bind(client, OTHER_CHANNEL, PEER6)
    refresh(client, 0, (REQUESTED_ADDRESS_FAMILY, Family.IPV6))
    assert told(refresh(client, 600)) == [ANSWER]


def test_a_channel_is_installed_for_the_finally_bound_port(relay: Relay, client: Client) -> None:
    begun = client.begin_allocate()
    port = the(BindPort, relay.report_refused(begun.allocation)).port
    relay.report_bound(begun.allocation)
    assert port != begun.port
    assert [each.port for each in for_kernel(bind(client))] == [port]


@pytest.mark.parametrize("end", ["refused", "failed", "late", "deleted"])
def test_a_failed_allocation_sends_no_kernel_commands(relay: Relay, client: Client, end: str) -> None:
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


def test_simultaneous_ends_are_sent_in_the_order_of_their_deadlines(relay: Relay, client: Client) -> None:
    """The sockets use the same deadlines, and no removal may be late."""
    allocated = client.allocate()
    bind(client)
    relay.pass_time(1)
    other = Client(relay, OTHER_CLIENT, salt="other")
    others = other.allocate()
    bind(other)
    refresh(client, 3600)
    relay.pass_time(700)
    assert for_kernel(relay.wake()) == [removed(allocated), removed(others)._replace(client=OTHER_CLIENT)]
