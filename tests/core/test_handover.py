"""A fresh core reads the state of another core, and goes on in its place."""

import json
from pathlib import Path

import pytest

from relay.core.addresses import AllocationId, ClientAddress, Family
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS
from relay.core.commands import BindPort, SendToClient, SendToPeer
from relay.core.handover import FORMAT
from relay.core.peers import PeerPolicy
from relay.core.stun import Method
from tests.support.core import (
    CHANNEL,
    CLIENT,
    PEER,
    PEER6,
    UDP,
    Client,
    Relay,
    channel_data,
    of_kind,
    read_state,
    relay_with,
    the,
)

RECORDED = Path(__file__).with_name(f"handover-{FORMAT}.json")

DUAL = (ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)
OTHER = ("203.0.113.77", 4000)


def hand_over(relay: Relay, **changes: object) -> None:
    relay.hand_over(relay.begin_handover(), **changes)
    relay.drain()


def test_a_client_goes_on_with_its_nonce_allocation_and_channel() -> None:
    relay = relay_with()
    client = Client(relay)
    id_ = client.allocate().id
    client.bind_channel()
    hand_over(relay)
    (sent,) = of_kind(SendToPeer, client.send_on_channel(b"data"))
    assert sent == SendToPeer(id_, b"data", PEER)
    (received,) = of_kind(SendToClient, relay.receive_from_peer(id_, b"back", PEER))
    assert received.data == channel_data(CHANNEL, b"back")
    assert client.refresh(700).get(LIFETIME) == 700


def test_a_repeated_allocate_gets_the_same_response() -> None:
    relay = relay_with()
    client = Client(relay)
    request = client.write(Method.ALLOCATE, UDP)
    (answer,) = relay.report_bound(the(BindPort, relay.receive(request, CLIENT)).allocation)
    hand_over(relay)
    assert relay.receive(request, CLIENT) == [answer]


def test_an_allocate_that_is_over_stays_over() -> None:
    relay = relay_with()
    client = Client(relay)
    request = client.write(Method.ALLOCATE, UDP)
    relay.report_bound(the(BindPort, relay.receive(request, CLIENT)).allocation)
    client.refresh(0)
    hand_over(relay)
    assert relay.receive(request, CLIENT) == []


def test_ids_and_limits_go_on() -> None:
    relay = relay_with(max_allocations=2, unauthenticated_rate=1, unauthenticated_burst=5)
    first = Client(relay).allocate().id
    hand_over(relay)
    second = Client(relay, OTHER, salt="other").allocate().id
    assert second > first
    third = Client(relay, ("203.0.113.78", 1), salt="third")
    assert third.ask(Method.ALLOCATE, UDP).code == 486
    # The first client has had one of five unauthenticated responses, before the handover.
    assert sum(bool(relay.receive(third.write(Method.BINDING), CLIENT)) for _ in range(6)) == 4


def test_ports_stay_as_they_are_in_another_range() -> None:
    relay = relay_with(ports=range(50000, 50010))
    port = Client(relay).allocate().port
    hand_over(relay, ports=range(50000, 50020))
    assert sorted([*relay.server.free_ports, port]) == list(range(50000, 50020))


def test_changes_during_the_handover_are_part_of_it() -> None:
    relay = relay_with()
    stays, goes = Client(relay), Client(relay, OTHER, salt="goes")
    stays.allocate()
    goes.allocate()
    written = relay.begin_handover()
    assert goes.refresh(0).code is None
    stays.bind_channel()
    comes = Client(relay, ("2001:db8:77::1", 5000, 0, 0), salt="comes")
    comes.allocate(DUAL)
    relay.hand_over(written)
    clients = {each.client for each in relay.server.allocations.by_id.values()}
    assert clients == {ClientAddress(each.address) for each in (stays, comes)}
    assert of_kind(SendToPeer, stays.send_on_channel(b"data"))
    assert comes.bind_channel(peer=PEER6).code is None


def test_a_port_refused_during_the_handover_is_known_to_the_successor() -> None:
    relay = relay_with(ports=range(50000, 50004))
    bind = Client(relay).begin_allocate()
    written = relay.begin_handover()
    again = the(BindPort, relay.report_refused(bind.allocation))
    relay.hand_over(written)
    used = relay.server.allocations.by_id[bind.allocation]
    assert (used.port, used.refused_ports) == (again.port, [bind.port])
    assert sorted([*relay.server.free_ports, used.port, *used.refused_ports]) == list(range(50000, 50004))


def test_early_data_waits_for_its_channel_bind_in_the_successor() -> None:
    relay = relay_with()
    client = Client(relay)
    client.allocate()
    client.send_on_channel(b"early")
    hand_over(relay)
    sent = of_kind(
        SendToPeer, client.send(client.write(Method.CHANNEL_BIND, (CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, PEER)))
    )
    assert [each.data for each in sent] == [b"early"]


def test_the_successor_ends_channels_to_addresses_that_came_to_this_machine_meanwhile() -> None:
    relay = relay_with()
    client = Client(relay)
    client.allocate()
    client.bind_channel()
    hand_over(relay, peers=PeerPolicy(relay_addresses=frozenset((PEER[0],))))
    relay.wake()
    assert of_kind(SendToPeer, client.send_on_channel(b"data")) == []
    assert client.bind_channel().code == 403


def test_drops_of_an_allocation_go_on() -> None:
    relay = relay_with()
    client = Client(relay)
    id_ = client.allocate().id
    client.send_on_channel(b"x", CHANNEL)
    relay.receive_from_peer(id_, b"no channel", PEER)
    drops = relay.server.allocations.by_id[id_].drops
    assert drops
    hand_over(relay)
    assert relay.server.allocations.by_id[id_].drops == drops


def test_later_traffic_is_added_to_the_counts_of_an_allocation() -> None:
    relay = relay_with()
    client = Client(relay)
    id_ = client.allocate().id
    client.bind_channel()
    client.send_on_channel(b"12345")
    assert relay.server.handover.counts(id_) == (1, 5, 0, 0)
    hand_over(relay)
    relay.server.handover.add_counts([[id_, 2, 20, 1, 7], [99, 1, 1, 1, 1]])
    assert relay.server.handover.counts(id_) == (3, 25, 1, 7)


def test_the_recorded_state_of_this_format_can_be_read() -> None:
    """Each released version has a file. A new format needs a new file, and the former must be read for one release."""
    relay = relay_with()
    portions, rest = json.loads(RECORDED.read_text())
    read_state(relay.server, portions, rest)
    clients = [each.client for each in relay.server.allocations.by_id.values()]
    assert clients == [CLIENT, OTHER]
    relay.pass_time(650)
    (sent,) = of_kind(SendToPeer, relay.receive(channel_data(CHANNEL, b"data"), CLIENT))
    assert sent == SendToPeer(AllocationId(1), b"data", PEER)
    assert {family for each in relay.server.allocations.by_id.values() for family in each.families} == set(Family)


@pytest.mark.parametrize("broken", [{}, {"ended": []}, {"ended": [5], "allocations": []}])
def test_an_incomplete_state_is_an_error(broken: dict[str, object]) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        read_state(relay_with().server, [], broken)
