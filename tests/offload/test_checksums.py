"""Senders with checksum offload or GSO, and links with GRO."""

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import pytest

from relay.core.addresses import Family
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, SERVICE, Lab, Talk, running, talk
from tests.support.offload.topology import RELAY, Capture, row
from tests.support.requirements import needs_ipv6
from tests.support.udp import SOL_UDP, UDP_GRO, UDP_SEGMENT, receive_whole

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

FAMILIES: Final = [
    pytest.param((Family.IPV4, Family.IPV4), id="IPv4"),
    pytest.param((Family.IPV6, Family.IPV6), id="IPv6"),
    pytest.param((Family.IPV4, Family.IPV6), id="IPv4-IPv6"),
]
NUMBER: Final = 40
SIZE: Final = 1200


@contextlib.contextmanager
def cards_sum(lab: Lab) -> Iterator[None]:
    """Clients and peers leave checksums to their links, which do not complete them. The relay computes checksums."""
    ends = (lab.network.client, "c0"), (lab.network.peer, "p0")
    for host, link in ends:
        host.set_features(link, sums=True)
    try:
        yield
    finally:
        for host, link in ends:
            host.set_features(link, sums=False)


@pytest.fixture(scope="module", params=MODES)
def coalescing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab whose links delay and coalesce received packets."""
    with row() as network:
        network.know_all()
        network.relay.configure(r0={}, r1={})
        network.client.configure(c0={})
        network.peer.configure(p0={})
        with running(network.relay, tmp_path_factory.mktemp("relay"), request.param) as relay:
            yield Lab(network, relay, request.param)


def payloads(size: int = SIZE) -> list[bytes]:
    return [(b"%07d " % number * (size // 8 + 1))[:size] for number in range(NUMBER)]


class Direction(NamedTuple):
    """One direction of a conversation."""

    sender: socket.socket
    to: tuple[str, int]
    receiver: socket.socket
    wrapped: Callable[[bytes], bytes]
    """Return the sent message for a payload."""
    received: Callable[[bytes], bytes]
    """Return the received message for a payload."""


def framed(way: Talk) -> Callable[[bytes], bytes]:
    return lambda payload: struct.pack("!HH", way.number, len(payload)) + payload


def directions(way: Talk, families: tuple[Family, Family]) -> tuple[Direction, Direction]:
    client, server = way.client.socket, (RELAY[families[0]], SERVICE)
    return (
        Direction(client, server, way.peer, framed(way), bytes),
        Direction(way.peer, (way.relayed[0], way.relayed[1]), client, bytes, framed(way)),
    )


def send_train(direction: Direction, all_: list[bytes]) -> None:
    datagrams = [direction.wrapped(each) for each in all_]
    segment = (SOL_UDP, UDP_SEGMENT, struct.pack("=H", len(datagrams[0])))
    try:
        direction.sender.sendmsg([b"".join(datagrams)], [segment], 0, direction.to)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        pytest.skip("THIS KERNEL SENDS NO TRAINS without a card that sums (it is older than 6.11)")


def check_arrival(direction: Direction, all_: list[bytes]) -> None:
    # A packet that the kernel leaves to the sockets is overtaken.
    expected = sorted(direction.received(each) for each in all_)
    assert sorted(direction.receiver.recv(65535) for _ in all_) == expected


@pytest.mark.parametrize("families", FAMILIES)
def test_packets_without_a_checksum_are_completed(lab: Lab, families: tuple[Family, Family]) -> None:
    with (
        talk(lab.relay, lab.network, families) as way,
        Capture(lab.network.peer, "p0") as at_peer,
        Capture(lab.network.client, "c0") as at_client,
    ):
        before = lab.relay.counts()
        with cards_sum(lab):
            for direction in directions(way, families):
                for each in payloads():
                    direction.sender.sendto(direction.wrapped(each), direction.to)
                check_arrival(direction, payloads())
        counts = lab.relay.counts().since(before)
        assert counts == (0, 0, {"partial_checksum": 2 * NUMBER})
        seen = [*at_peer.take(), *at_client.take()]
        assert len(seen) == 2 * NUMBER
        for packet in seen:
            packet.check_sums()


@pytest.mark.parametrize("summing", [True, False], ids=["by-the-card", "summed"])
@pytest.mark.parametrize("families", FAMILIES)
def test_gso_batches_arrive_as_separate_datagrams(lab: Lab, families: tuple[Family, Family], *, summing: bool) -> None:
    with talk(lab.relay, lab.network, families) as way:
        before = lab.relay.counts()
        with cards_sum(lab) if summing else contextlib.nullcontext():
            for direction in directions(way, families):
                send_train(direction, payloads())
                check_arrival(direction, payloads())
        counts = lab.relay.counts().since(before)
        # On a busy machine, a change of the network may leave a few packets to the sockets.
        assert counts[:2] == (0, 0) if summing else min(counts[:2]) > NUMBER // 2, counts


@pytest.mark.parametrize("families", FAMILIES)
def test_coalesced_datagrams_arrive_separately(coalescing: Lab, families: tuple[Family, Family]) -> None:
    """Behind such a link the generic program gets a batch as one packet, and links may coalesce relayed packets again."""
    with talk(coalescing.relay, coalescing.network, families) as way:
        before = coalescing.relay.counts()
        for direction in directions(way, families):
            for size in (SIZE, 37, 1):
                for each in payloads(size):
                    direction.sender.sendto(direction.wrapped(each), direction.to)
                check_arrival(direction, payloads(size))
        assert sum(coalescing.relay.counts().since(before)[:2]) > 0
        for direction in directions(way, families):
            direction.receiver.setsockopt(SOL_UDP, UDP_GRO, 1)
            for each in payloads():
                direction.sender.sendto(direction.wrapped(each), direction.to)
            arrived = b""
            while len(arrived) < NUMBER * len(direction.received(bytes(SIZE))):
                data, segment = receive_whole(direction.receiver)
                assert segment in (0, len(direction.received(bytes(SIZE))))
                arrived += data
            assert arrived == b"".join(map(direction.received, payloads()))
