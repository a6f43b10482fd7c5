"""Clients and peers get the same bytes from the kernel and from the sockets."""

import ipaddress
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Final

import pytest

from relay.core.addresses import Family
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.packets import checksum_of, pseudo_header, sum_of
from tests.support.offload.relays import SERVICE, Lab, talk
from tests.support.offload.topology import PEER, RELAY, ROUTE_MTU, Capture, Seen
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TurnClient
from tests.support.udp import CLASS_OPTIONS

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

LINK_MTU: Final = 1500
IP: Final = {Family.IPV4: 20, Family.IPV6: 40}
UDP: Final = 8
HEADER: Final = 4
SHORTEST: Final = 60 - 14
"""Bytes of the shortest IP packet without padding."""
IPV4_PREFIX: Final = bytes(10) + b"\xff\xff"
"""Of an IPv4 address mapped to IPv6."""
CLASSES: Final = (0, 0xB8, 0x02, 0x03, 0xFF)

BOTH: Final = [pytest.param((one, other), id=f"{one.name}-{other.name}") for one in Family for other in Family]


def sizes(sender: Family, receiver: Family, *, strip: int, put: int) -> dict[int, str]:
    """Return sizes of payloads, with the reason for relaying by the sockets, or "" for the kernel.

    Args:
        sender: family of packets to the relay.
        receiver: family of packets from the relay.
        strip: removed bytes.
        put: added bytes.
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


Send = Callable[[bytes, int], bool]
"""Sends a payload with a traffic class, and returns whether the checksum looks partial."""


def looks_partial(source: tuple[str, int], to: tuple[str, int], data: bytes) -> bool:
    """Return whether the complete checksum equals the sum of the pseudo header, as 1 of 65,535 does."""
    here, there = (ipaddress.ip_address(host).packed for host, _ in (source, to))
    if ":" not in to[0]:
        here, there = IPV4_PREFIX + here, IPV4_PREFIX + there
    pseudo = pseudo_header(here, there, UDP + len(data))
    header = struct.pack(">4H", source[1], to[1], UDP + len(data), 0)
    return checksum_of(pseudo, header, data) == (sum_of(pseudo) or 0xFFFF)


def sent_with_class(sock: socket.socket, data: bytes, to: tuple[str, int], traffic_class: int) -> bool:
    level, kind, _ = CLASS_OPTIONS[Family.IPV6 if sock.family == socket.AF_INET6 else Family.IPV4]
    sock.sendmsg([data], [(level, kind, traffic_class.to_bytes(4, "little"))], 0, to)
    return looks_partial(sock.getsockname()[:2], to, data)


def exchanged(
    send: Send, receiver: socket.socket, capture: Capture, all_sizes: dict[int, str]
) -> tuple[list[Seen], Counter[str]]:
    """Send payloads of all sizes in sequence.

    Return the packets on the receiver's machine, and the number of packets by the reason for which the kernel passes them.
    """
    capture.take()
    reasons: Counter[str] = Counter()
    for size, passed_for in all_sizes.items():
        for traffic_class in CLASSES:
            is_ambiguous = send(payload(size, traffic_class), traffic_class)
            reasons["partial_checksum" if is_ambiguous and passed_for != "fragments" else passed_for] += 1
            assert receiver.recv(65535).endswith(payload(size, traffic_class))
    return capture.take(), reasons


def check_same(
    lab: Lab, send: Send, receiver: socket.socket, capture: Capture, all_sizes: dict[int, str], ways: tuple[int, int]
) -> None:
    """Compare packets with and without relaying by the kernel, and the kernel's counters to peers and to clients."""
    before = lab.relay.counts()
    relayed, reasons = exchanged(send, receiver, capture, all_sizes)
    counts = lab.relay.counts().since(before)
    lab.relay.detach()
    try:
        by_sockets, _ = exchanged(send, receiver, capture, all_sizes)
    finally:
        lab.relay.attach()
    assert [each.compared().hex(" ", 4) for each in relayed] == [each.compared().hex(" ", 4) for each in by_sockets]
    for each in (*relayed, *by_sockets):
        if each.is_whole:
            each.check_sums()
    kernels = reasons.pop("")
    del reasons["fragments"]
    assert counts.passed == reasons
    assert counts[:2] == (ways[0] * kernels, ways[1] * kernels)


def test_peers_get_the_same_bytes_from_the_kernel(lab: Lab, families: tuple[Family, Family]) -> None:
    client_family, peer_family = families
    all_sizes = sizes(client_family, peer_family, strip=HEADER, put=0)
    with talk(lab.relay, lab.network, families) as way, Capture(lab.network.peer, "p0") as capture:

        def send(data: bytes, traffic_class: int) -> bool:
            frame = way.number.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data
            return sent_with_class(way.client.socket, frame, (RELAY[client_family], SERVICE), traffic_class)

        check_same(lab, send, way.peer, capture, all_sizes, (1, 0))


def test_clients_get_the_same_bytes_from_the_kernel(lab: Lab, families: tuple[Family, Family]) -> None:
    client_family, peer_family = families
    all_sizes = sizes(peer_family, client_family, strip=0, put=HEADER)
    with talk(lab.relay, lab.network, families) as way, Capture(lab.network.client, "c0") as capture:

        def send(data: bytes, traffic_class: int) -> bool:
            return sent_with_class(way.peer, data, (way.relayed[0], way.relayed[1]), traffic_class)

        check_same(lab, send, way.client.socket, capture, all_sizes, (0, 1))


def test_the_sockets_relay_a_complete_checksum_that_looks_partial(lab: Lab) -> None:
    with talk(lab.relay, lab.network) as way:
        to = (RELAY[Family.IPV4], SERVICE)
        header = way.number.to_bytes(2, "big") + (100).to_bytes(2, "big")
        source = way.client.socket.getsockname()
        payloads = (number.to_bytes(2, "big") + bytes(98) for number in range(1 << 16))
        ambiguous = next(each for each in payloads if looks_partial(source, to, header + each))
        before = lab.relay.counts()
        assert sent_with_class(way.client.socket, header + ambiguous, to, 0)
        assert way.peer.recv(1000) == ambiguous
        assert lab.relay.counts().since(before).passed == Counter(partial_checksum=1)


class Hairpin:
    """Two clients with channels to the relayed address of each other."""

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
def test_two_clients_of_a_relay_get_the_same_bytes_from_the_kernel(
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

        def send(data: bytes, traffic_class: int) -> bool:
            frame = b"\x40\x01" + len(data).to_bytes(2, "big") + data
            return sent_with_class(one.socket, frame, (RELAY[families[0]], SERVICE), traffic_class)

        check_same(lab, send, other.socket, capture, all_sizes, (1, 1))


@pytest.fixture(params=BOTH)
def families(request: pytest.FixtureRequest) -> tuple[Family, Family]:
    """Families of the client and the peer, or of two clients."""
    found: tuple[Family, Family] = request.param
    return found


def test_usage_is_reported_by_channel(lab: Lab) -> None:
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


def test_the_sockets_relay_packets_passed_by_the_kernel(lab: Lab) -> None:
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


def test_the_kernel_relays_no_packets_of_unauthenticated_senders(lab: Lab) -> None:
    """Another peer on the same host, and another client, guess ports and channel numbers."""
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
