"""In a flood, clients with an allocation have priority."""

from relay.core.addresses import ClientAddress, SocketAddress
from relay.core.attributes import LIFETIME
from relay.core.commands import Command, SendToClient, SendToPeer
from relay.core.counters import DropReason
from relay.core.data import Datagram
from relay.core.overload import CLIENT_REQUESTS, UNAUTHENTICATED_REQUESTS
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import CHANNEL, OTHER_CLIENT, Client, Relay, channel_data, of_kind

BINDING = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])


def strangers(count: int) -> list[Datagram]:
    return [(BINDING, ("203.0.113.200", 1000 + number), 0, 0) for number in range(count)]


def receive(relay: Relay, batch: list[Datagram], *, is_flood: bool = True) -> list[Command]:
    return relay.receive_batch(batch, is_flood=is_flood)


def answered(commands: list[Command]) -> list[ClientAddress]:
    return [each.client for each in of_kind(SendToClient, commands)]


def refresh(client: Client) -> Datagram:
    return client.write(Method.REFRESH, (LIFETIME, 600)), client.address, 0, 0


def test_a_flood_limits_unauthenticated_requests_per_batch(relay: Relay) -> None:
    batch = strangers(100)
    first: list[SocketAddress] = [each[1] for each in batch[:UNAUTHENTICATED_REQUESTS]]
    assert answered(receive(relay, batch)) == first
    assert relay.counters.drops[DropReason.FLOOD] == 100 - UNAUTHENTICATED_REQUESTS


def test_a_client_with_an_allocation_gets_a_response_in_a_flood(relay: Relay, client: Client) -> None:
    other = Client(relay, OTHER_CLIENT, salt="other")
    for each in (client, other):
        each.allocate()
    commands = receive(relay, [*strangers(60), refresh(client), *strangers(60), refresh(other)])
    assert answered(commands)[UNAUTHENTICATED_REQUESTS:] == [client.address, other.address]
    assert relay.counters.successes[Method.REFRESH] == 2


def test_packets_are_relayed_in_a_flood(relay: Relay, client: Client) -> None:
    client.allocate()
    client.bind_channel()
    packet: Datagram = (channel_data(CHANNEL, b"packet"), client.address, 0, 0)
    commands = receive(relay, [*strangers(50), packet, *strangers(50), packet])
    assert b"".join(each.data for each in of_kind(SendToPeer, commands)) == b"packetpacket"


def test_the_limit_applies_to_each_batch(relay: Relay) -> None:
    for _ in range(3):
        assert len(answered(receive(relay, strangers(UNAUTHENTICATED_REQUESTS + 1)))) == UNAUTHENTICATED_REQUESTS


def test_without_a_flood_every_request_is_handled(relay: Relay) -> None:
    receive(relay, strangers(100))
    assert len(answered(receive(relay, strangers(100), is_flood=False))) == 100
    receive(relay, strangers(100))
    assert len(answered(relay.receive(BINDING, OTHER_CLIENT))) == 1


def test_requests_behind_channel_data_of_a_gro_batch_are_limited(relay: Relay) -> None:
    data, source, *_ = strangers(1)[0]
    batch: list[Datagram] = [(channel_data(CHANNEL, bytes(len(data) - 4)) + data * 50, source, len(data), 0)]
    assert len(answered(receive(relay, batch))) == UNAUTHENTICATED_REQUESTS
    assert relay.counters.drops[DropReason.FLOOD] == 50 - UNAUTHENTICATED_REQUESTS
    assert relay.counters.drops[DropReason.UNBOUND_CHANNEL] == 1


def test_a_client_has_few_requests_in_a_flood(relay: Relay, client: Client) -> None:
    other = Client(relay, OTHER_CLIENT, salt="other")
    for each in (client, other):
        each.allocate()
    commands = receive(relay, [*(refresh(client) for _ in range(100)), refresh(other)])
    assert answered(commands) == [client.address] * CLIENT_REQUESTS + [other.address]
    assert relay.counters.drops[DropReason.FLOOD] == 100 - CLIENT_REQUESTS
