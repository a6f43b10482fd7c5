"""What clients and peers get is the same, byte for byte, whether the kernel relays it or the sockets do."""

import select
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final

import pytest

from relay.core.addresses import Family
from tests.conftest import needs_ipv6
from tests.interop.test_trains import CLASS_OPTIONS
from tests.offload.conftest import needs_bpf
from tests.offload.relays import SERVICE, Counts, Lab, talk
from tests.offload.topology import PEER, RELAY, ROUTE_MTU, Capture, Seen
from tests.turn_client import TurnClient

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

LINK_MTU: Final = 1500
IP: Final = {Family.IPV4: 20, Family.IPV6: 40}
UDP: Final = 8
HEADER: Final = 4
SHORTEST: Final = 60 - 14
"""Bytes of the shortest IP packet that fills a frame."""
CLASSES: Final = (0, 0xB8, 0x02, 0x03, 0xFF)

BOTH: Final = [pytest.param((one, other), id=f"{one.name}-{other.name}") for one in Family for other in Family]


def sizes(sender: Family, receiver: Family, *, strip: int, put: int) -> dict[int, str]:
    """Give sizes of payloads, with why the sockets relay them; "" if the kernel does.

    Args:
        sender: of what arrives at the relay.
        receiver: of what it sends.
        strip: bytes that are taken off.
        put: bytes that come on.
    """
    longest = ROUTE_MTU - IP[receiver] - UDP - put
    shortest = max(0, SHORTEST - IP[receiver] - UDP - put)
    longest_sent = LINK_MTU - IP[sender] - UDP - strip
    edges = {0, 1, shortest - 1, shortest, 127, 128, 1199, longest - 1, longest, longest + 1, longest_sent, longest_sent + 1}
    return {size: reason(size, longest, shortest, longest_sent) for size in sorted(edges) if size >= 0}


def reason(size: int, longest: int, shortest: int, longest_sent: int) -> str:
    if size > longest_sent:
        return "fragments"  # are looked at by nobody
    if size > longest:
        return "too_long"
    return "short_frame" if size < shortest else ""


def payload(size: int, traffic_class: int) -> bytes:
    return (b"%04d/%02x " % (size, traffic_class) * (size // 8 + 1))[:size]


Send = Callable[[bytes, int], None]


def sent_with_class(sock: socket.socket, data: bytes, to: tuple[str, int], traffic_class: int) -> None:
    level, kind, _ = CLASS_OPTIONS[Family.IPV6 if sock.family == socket.AF_INET6 else Family.IPV4]
    sock.sendmsg([data], [(level, kind, traffic_class.to_bytes(4, "little"))], 0, to)


def exchanged(send: Send, receiver: socket.socket, capture: Capture, all_sizes: dict[int, str]) -> list[Seen]:
    """Send payloads of all sizes one after the other; give the packets that the receiver's machine got."""
    capture.take()
    for size in all_sizes:
        for traffic_class in CLASSES:
            send(payload(size, traffic_class), traffic_class)
            assert receiver.recv(65535).endswith(payload(size, traffic_class))
    return capture.take()


def check_same(lab: Lab, send: Send, receiver: socket.socket, capture: Capture, all_sizes: dict[int, str]) -> Counts:
    """Compare what arrives while the kernel relays, and while it doesn't; give what it counted while it did."""
    before = lab.relay.counts()
    relayed = exchanged(send, receiver, capture, all_sizes)
    counts = lab.relay.counts().since(before)
    lab.relay.detach()
    try:
        by_sockets = exchanged(send, receiver, capture, all_sizes)
    finally:
        lab.relay.attach()
    assert [each.compared().hex(" ", 4) for each in relayed] == [each.compared().hex(" ", 4) for each in by_sockets]
    for each in (*relayed, *by_sockets):
        if each.is_whole:
            each.check_sums()
    passed = Counter(each for each in all_sizes.values() if each and each != "fragments")
    assert counts.passed == Counter({name: count * len(CLASSES) for name, count in passed.items()})
    return counts


def kernels(all_sizes: dict[int, str]) -> int:
    """How many packets the kernel relays of what is sent of all sizes."""
    return len(CLASSES) * sum(not each for each in all_sizes.values())


def test_peers_get_the_same_from_the_kernel(lab: Lab, families: tuple[Family, Family]) -> None:
    client_family, peer_family = families
    all_sizes = sizes(client_family, peer_family, strip=HEADER, put=0)
    with talk(lab.relay, lab.network, families) as way, Capture(lab.network.peer, "p0") as capture:

        def send(data: bytes, traffic_class: int) -> None:
            frame = way.number.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data
            sent_with_class(way.client.socket, frame, (RELAY[client_family], SERVICE), traffic_class)

        assert check_same(lab, send, way.peer, capture, all_sizes)[:2] == (kernels(all_sizes), 0)


def test_clients_get_the_same_from_the_kernel(lab: Lab, families: tuple[Family, Family]) -> None:
    client_family, peer_family = families
    all_sizes = sizes(peer_family, client_family, strip=0, put=HEADER)
    with talk(lab.relay, lab.network, families) as way, Capture(lab.network.client, "c0") as capture:

        def send(data: bytes, traffic_class: int) -> None:
            sent_with_class(way.peer, data, (way.relayed[0], way.relayed[1]), traffic_class)

        assert check_same(lab, send, way.client.socket, capture, all_sizes)[:2] == (0, kernels(all_sizes))


class Hairpin:
    """Two clients with a channel to each other's relayed address."""

    def __init__(self, lab: Lab, one: TurnClient, other: TurnClient, relayed: Family) -> None:
        self.clients = one, other
        (here,), (there,) = one.allocate(family=relayed), other.allocate(family=relayed)
        assert one.bind_channel(0x4001, there) is None
        assert other.bind_channel(0x4ABC, here) is None
        for _ in range(1000):
            before = lab.relay.counts()
            for sender, number, receiver, far in ((one, 0x4001, other, 0x4ABC), (other, 0x4ABC, one, 0x4001)):
                sender.send(number, b"until the kernel relays it")
                assert receiver.receive() == (far, b"until the kernel relays it")
            if lab.relay.counts().since(before)[:2] == (2, 2):
                return
        pytest.fail("the kernel doesn't relay it")


@pytest.mark.parametrize("relayed", Family, ids=lambda each: f"by-{each.name}")
def test_two_clients_of_one_relay_get_the_same_from_the_kernel(
    lab: Lab, families: tuple[Family, Family], relayed: Family
) -> None:
    client = lab.network.client
    all_sizes = sizes(families[0], families[1], strip=HEADER, put=HEADER)
    with (
        lab.relay.client(client, families[0]) as one,
        lab.relay.client(client, families[1]) as other,
        Capture(client, "c0") as capture,
    ):
        Hairpin(lab, one, other, relayed)

        def send(data: bytes, traffic_class: int) -> None:
            frame = b"\x40\x01" + len(data).to_bytes(2, "big") + data
            sent_with_class(one.socket, frame, (RELAY[families[0]], SERVICE), traffic_class)

        count = kernels(all_sizes)
        assert check_same(lab, send, other.socket, capture, all_sizes)[:2] == (count, count)


@pytest.fixture(params=BOTH)
def families(request: pytest.FixtureRequest) -> tuple[Family, Family]:
    """Of the client and of the peer; or of two clients."""
    found: tuple[Family, Family] = request.param
    return found


def test_what_is_used_of_each_channel_is_told(lab: Lab) -> None:
    with talk(lab.relay, lab.network) as way:

        def usage() -> dict[str, dict[str, float]]:
            host, port = way.client.address
            found: dict[str, dict[str, float]] = lab.relay.ask("/offload/channels")["clients"][f"{host}:{port}"]["0x4123"]
            return found

        before, totals = usage(), lab.relay.state()
        for _ in range(10):
            way.to_peer(bytes(300))
        way.to_client(bytes(40))
        after, later = usage(), lab.relay.state()
    assert after["to_peer"]["packets"] - before["to_peer"]["packets"] == 10
    assert after["to_peer"]["bytes"] - before["to_peer"]["bytes"] == 3000
    assert after["to_client"]["packets"] - before["to_client"]["packets"] == 1
    assert after["to_client"]["bytes"] - before["to_client"]["bytes"] == 40
    assert max(used["idle_seconds"] for used in after.values()) < 2
    assert later["xdp_bytes"]["to_peer"] - totals["xdp_bytes"]["to_peer"] == 3000
    assert later["xdp_sizes"]["to_peer"]["256+"] - totals["xdp_sizes"]["to_peer"].get("256+", 0) == 10


def test_what_the_kernel_does_not_relay_the_sockets_do(lab: Lab) -> None:
    with talk(lab.relay, lab.network) as way:
        for frame, why in (
            (b"\x41\x23\x00\x30" + bytes(48 + 3), "odd_length"),
            (b"\x41\x23\x00\x30" + bytes(48 + 1), "odd_length"),
        ):
            before = lab.relay.counts()
            way.client.socket.sendto(frame, (RELAY[Family.IPV4], SERVICE))
            assert way.peer.recv(65535) == bytes(48)
            assert lab.relay.counts().since(before) == (0, 0, Counter({why: 1}))
        before = lab.relay.counts()
        no_hop_left = (socket.IPPROTO_IP, socket.IP_TTL, (1).to_bytes(4, "little"))
        way.peer.sendmsg([bytes(50)], [no_hop_left], 0, way.relayed[:2])
        assert way.client.receive() == (way.number, bytes(50))
        way.peer.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK: without a UDP checksum
        way.to_client(bytes(60))
        assert lab.relay.counts().since(before) == (0, 0, Counter(last_hop=1, no_checksum=1))


def test_a_stranger_gets_nothing_through_the_kernel(lab: Lab) -> None:
    """Another peer at the same host, and another client, who guess what there is to know."""
    with (
        talk(lab.relay, lab.network) as way,
        lab.network.peer.udp(PEER[Family.IPV4]) as peer,
        lab.relay.client(lab.network.client) as client,
    ):
        before = lab.relay.counts()
        peer.sendto(bytes(100), way.relayed[:2])
        client.send(way.number, bytes(100))
        way.both()
        assert lab.relay.counts().since(before) == (1, 1, Counter(unbound=2))
        assert select.select([way.client.socket, way.peer], [], [], 0)[0] == []
