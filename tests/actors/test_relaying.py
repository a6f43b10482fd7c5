"""Relay packets through a running relay, over real sockets."""

import pytest

from relay.core.addresses import Family, SocketAddress, socket_address
from relay.core.stun import MessageClass, Method, decode, encode
from tests.support.requirements import needs_ipv6
from tests.support.system import Relay, RelayMaker, hanging
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until

HOST = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
PAIRS = [
    pytest.param((one, other), marks=needs_ipv6 if Family.IPV6 in (one, other) else ()) for one in Family for other in Family
]


def exchange(client: TurnClient, relayed: SocketAddress, peer_host: str, number: int = 0x4000) -> None:
    """Send packets both ways through an allocation, and check their content."""
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
def test_packets_are_relayed_both_ways_between_any_two_families(relay: Relay, families: tuple[Family, Family]) -> None:
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
def test_two_clients_exchange_data_between_relayed_addresses(
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


def test_data_from_a_peer_without_a_channel_is_dropped(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as bound, udp_socket("127.0.0.1") as stranger:
        assert client.bind_channel(0x4000, bound.getsockname()) is None
        stranger.sendto(b"stray", (relayed[0], relayed[1]))
        bound.sendto(b"invited", (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, b"invited")


def test_a_stun_request_on_a_relayed_port_is_relayed_as_data(relay: Relay) -> None:
    """ICE connectivity checks between peers are data for the relay."""
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        check = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
        peer.sendto(check, (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, check)


def test_invalid_datagrams_do_not_stop_responses(relay: Relay) -> None:
    client = relay.client()
    at = relay.system.address_of(Family.IPV4)
    for garbage in (b"", b"\x00", b"\xff" * 1500, b"\x40\x00\xff\xff", b"\x00\x01\x00\x08\x21\x12\xa4\x42" + bytes(12)):
        client.socket.sendto(garbage, (at.host, at.port))
    client.socket.sendto(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []), (at.host, at.port))
    answer = decode(client.socket.recv(1500))
    assert not isinstance(answer, str)
    assert answer.message_class is MessageClass.SUCCESS


def test_drops_of_a_full_receive_buffer_are_counted(relay: Relay) -> None:
    client = relay.client()
    client.allocate()
    with hanging(relay):
        # The reader waits for the core lock with its batch.
        for opened in relay.system.groups[Family.IPV4].data:
            opened.set_receive_buffer(1)
        for _ in range(100):
            client.send(0x4000, bytes(1000))
        wait_until(lambda: relay.system.measured.kernel_drops() > 50)


def test_drops_of_a_relayed_address_stay_counted_after_its_end(relay: Relay) -> None:
    client = relay.client()
    opened = relay.system.server_counters.udp.open
    shared = set(opened)
    (relayed,) = client.allocate()
    (sock,) = opened - shared

    def dropped() -> int:
        return relay.system.measured.kernel_drops()

    with hanging(relay), udp_socket("127.0.0.1") as peer:
        sock.set_receive_buffer(1)
        for _ in range(100):
            peer.sendto(bytes(1000), (relayed[0], relayed[1]))
        wait_until(lambda: dropped() > 50)
        before = dropped()
    assert client.refresh(0) is None
    wait_until(lambda: opened == shared)
    assert dropped() >= before
