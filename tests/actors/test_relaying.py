"""Packets through a running relay, over real sockets."""

from typing import cast

import pytest

from relay.core.addresses import Family, SocketAddress, socket_address
from relay.core.stun import MessageClass, Method, decode, encode
from tests.actors.conftest import Relay, RelayMaker
from tests.conftest import needs_ipv6, wait_until
from tests.turn_client import TurnClient, udp_socket

HOST = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
PAIRS = [
    pytest.param((one, other), marks=needs_ipv6 if Family.IPV6 in (one, other) else ()) for one in Family for other in Family
]


def exchange(client: TurnClient, relayed: SocketAddress, peer_host: str, number: int = 0x4000) -> None:
    """Send packets both ways through an allocation, and see them arrive as they were."""
    with udp_socket(peer_host) as peer:
        host, port, *_ = peer.getsockname()
        assert client.bind_channel(number, socket_address(host, port)) is None
        for payload in (b"", b"x", bytes(range(256)) * 4, bytes(1400)):
            client.send(number, payload)
            data, source = peer.recvfrom(65535)
            assert (data, source[:2]) == (payload, relayed[:2])
            peer.sendto(payload[::-1], (relayed[0], relayed[1]))
            assert client.receive() == (number, payload[::-1])


@pytest.mark.parametrize("families", PAIRS)
def test_packets_go_both_ways_between_any_two_families(relay: Relay, families: tuple[Family, Family]) -> None:
    client_family, peer_family = families
    client = relay.client(client_family)
    (relayed,) = client.allocate(family=peer_family)
    exchange(client, relayed, HOST[peer_family])


@needs_ipv6
def test_a_dual_allocation_relays_in_both_families_from_one_port(relay: Relay) -> None:
    client = relay.client()
    four, six = client.allocate(dual=True)
    assert four[1] == six[1]
    exchange(client, four, "127.0.0.1", 0x4000)
    exchange(client, six, "::1", 0x4001)


@pytest.mark.parametrize("families", PAIRS)
def test_two_clients_of_one_relay_meet_at_their_relayed_addresses(
    make_relay: RelayMaker, families: tuple[Family, Family]
) -> None:
    """Without --allow-peer: the relay's own address is a peer in the allocation range."""
    relay = make_relay(allow_peers=())
    one, other = relay.client(families[0]), relay.client(families[1])
    (relayed_one,), (relayed_other,) = one.allocate(), other.allocate()
    assert one.bind_channel(0x4000, relayed_other) is None
    assert other.bind_channel(0x4FFF, relayed_one) is None
    one.send(0x4000, b"from one")
    assert other.receive() == (0x4FFF, b"from one")
    other.send(0x4FFF, b"from other")
    assert one.receive() == (0x4000, b"from other")


def test_a_peer_that_no_channel_is_bound_to_reaches_nobody(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as bound, udp_socket("127.0.0.1") as stranger:
        assert client.bind_channel(0x4000, bound.getsockname()) is None
        stranger.sendto(b"stray", (relayed[0], relayed[1]))
        bound.sendto(b"invited", (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, b"invited")


def test_a_stun_request_on_a_relayed_port_is_data_like_any_other(relay: Relay) -> None:
    """ICE checks between peers travel through the relay; it has no business with them."""
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        check = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
        peer.sendto(check, (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, check)


def test_garbage_leaves_the_relay_answering(relay: Relay) -> None:
    client = relay.client()
    at = relay.system.address_of(Family.IPV4)
    for garbage in (b"", b"\x00", b"\xff" * 1500, b"\x40\x00\xff\xff", b"\x00\x01\x00\x08\x21\x12\xa4\x42" + bytes(12)):
        client.socket.sendto(garbage, (at.host, at.port))
    client.socket.sendto(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []), (at.host, at.port))
    answer = decode(client.socket.recv(1500))
    assert not isinstance(answer, str)
    assert answer.message_class is MessageClass.SUCCESS


def test_what_the_kernel_drops_for_want_of_room_is_in_the_summary(relay: Relay) -> None:
    client = relay.client()
    client.allocate()
    inbox = relay.system._inbox
    assert inbox is not None
    with inbox.turn:
        # Its reader waits for the turn meanwhile, with what it has read.
        for opened in relay.system._steered[Family.IPV4].data:
            opened.set_receive_buffer(1)
        for _ in range(100):
            client.send(0x4000, bytes(1000))
        wait_until(lambda: cast(int, relay.system.summary()["kernel_drops"]) > 50)


def test_what_a_relayed_address_drops_is_in_the_summary_while_it_is_there_and_afterwards(relay: Relay) -> None:
    client = relay.client()
    opened = relay.system.server_counters.udp.open
    shared = set(opened)
    (relayed,) = client.allocate()
    (sock,) = opened - shared
    inbox = relay.system._inbox
    assert inbox is not None

    def dropped() -> int:
        return cast(int, relay.system.summary()["kernel_drops"])

    with inbox.turn, udp_socket("127.0.0.1") as peer:
        sock.set_receive_buffer(1)
        for _ in range(100):
            peer.sendto(bytes(1000), (relayed[0], relayed[1]))
        wait_until(lambda: dropped() > 50)
        before = dropped()
    assert client.refresh(0) is None
    wait_until(lambda: opened == shared)
    assert dropped() >= before
