"""While more arrives than can be taken, whoever has an allocation is heard first."""

from relay.core.addresses import ClientAddress, SocketAddress
from relay.core.attributes import LIFETIME
from relay.core.commands import Command, SendToClient, SendToPeer
from relay.core.counters import DropReason
from relay.core.server import STRANGERS
from relay.core.stun import MessageClass, Method, encode
from relay.core.trains import Arrival
from tests.core.driver import CHANNEL, OTHER_CLIENT, Client, Relay, channel_data, of_kind

BINDING = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])


def strangers(count: int) -> list[Arrival]:
    return [(BINDING, ("203.0.113.200", 1000 + number), 0, 0) for number in range(count)]


def receive(relay: Relay, arrivals: list[Arrival], *, is_flood: bool = True) -> list[Command]:
    relay.server.handle_client_arrivals(arrivals, relay.now, is_flood=is_flood)
    return relay.server.drain()


def answered(commands: list[Command]) -> list[ClientAddress]:
    return [each.client for each in of_kind(SendToClient, commands)]


def refresh(client: Client) -> Arrival:
    return client.write(Method.REFRESH, (LIFETIME, 600)), client.address, 0, 0


def test_only_some_requests_of_strangers_are_looked_at_in_a_flood(relay: Relay) -> None:
    arrivals = strangers(100)
    first: list[SocketAddress] = [each[1] for each in arrivals[:STRANGERS]]
    assert answered(receive(relay, arrivals)) == first
    assert relay.counters.drops[DropReason.FLOOD] == 100 - STRANGERS


def test_who_has_an_allocation_is_answered_behind_any_number_of_strangers(relay: Relay, client: Client) -> None:
    other = Client(relay, OTHER_CLIENT, salt="other")
    for each in (client, other):
        each.allocate()
    commands = receive(relay, [*strangers(60), refresh(client), *strangers(60), refresh(other)])
    assert answered(commands)[STRANGERS:] == [client.address, other.address]
    assert relay.counters.successes[Method.REFRESH] == 2


def test_packets_are_relayed_in_a_flood_as_ever(relay: Relay, client: Client) -> None:
    client.allocate()
    client.bind_channel()
    packet: Arrival = (channel_data(CHANNEL, b"packet"), client.address, 0, 0)
    commands = receive(relay, [*strangers(50), packet, *strangers(50), packet])
    assert b"".join(each.data for each in of_kind(SendToPeer, commands)) == b"packetpacket"


def test_each_batch_has_room_for_some_strangers(relay: Relay) -> None:
    for _ in range(3):
        assert len(answered(receive(relay, strangers(STRANGERS + 1)))) == STRANGERS


def test_without_a_flood_every_stranger_is_answered(relay: Relay) -> None:
    receive(relay, strangers(100))
    assert len(answered(receive(relay, strangers(100), is_flood=False))) == 100
    receive(relay, strangers(100))
    assert len(answered(relay.receive(BINDING, OTHER_CLIENT))) == 1
