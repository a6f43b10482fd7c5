"""A client that sends data right behind its ChannelBind, without waiting for the response, like Firezone's client."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from relay.core.addresses import Family
from tests.support.program import Program, ProgramStarter
from tests.support.requirements import HAS_IPV6, needs_ipv6
from tests.support.turn_client import PACKETS, TurnClient, send_behind_a_bind, udp_socket

BINDS = 20

PAIRS = [
    pytest.param((one, other), marks=needs_ipv6 if Family.IPV6 in (one, other) else (), id=f"{one.name}-{other.name}")
    for one in Family
    for other in Family
]


@pytest.fixture
def program(start_program: ProgramStarter) -> Program:
    return start_program("--allow-peer", "127.0.0.0/8,::1/128", *(("--public-ip6-addr", "::1") if HAS_IPV6 else ()))


def host(program: Program, family: Family) -> str:
    return program.host if family is Family.IPV4 else "::1"


@pytest.fixture(params=PAIRS)
def families(request: pytest.FixtureRequest) -> tuple[Family, Family]:
    client, peer = request.param
    return client, peer


@pytest.fixture
def client(program: Program, families: tuple[Family, Family]) -> Iterator[TurnClient]:
    with TurnClient((host(program, families[0]), 3478), program.credential) as made:
        made.allocate(family=families[1])
        yield made


@pytest.fixture
def peers(program: Program, families: tuple[Family, Family]) -> Iterator[list[socket.socket]]:
    """Peers, all open: a port of a peer must not come again, with another channel."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(udp_socket(host(program, families[1]))) for _ in range(BINDS)]


@pytest.mark.parametrize("behind", [0, 1, 50, PACKETS - 1], ids="after {}".format)
def test_all_data_around_a_channel_bind_arrives_in_order(
    program: Program, client: TurnClient, peers: list[socket.socket], behind: int
) -> None:
    """The ChannelBind is sent first, as clients do, or after some data, as if a network had swapped them."""
    for number, peer in enumerate(peers, 0x4000):
        received = send_behind_a_bind(client, number, peer, behind)
        assert received == [*range(PACKETS)], f"{len(received)} of {PACKETS} at bind {number:#x}: {program.dump()}"


def test_data_behind_the_first_channel_bind_after_a_change_of_credentials_arrives(
    families: tuple[Family, Family], client: TurnClient, peers: list[socket.socket]
) -> None:
    for number, peer in enumerate(peers, 0x4000):
        assert client.refresh(0) is None
        client.allocate(family=families[1])
        received = send_behind_a_bind(client, number, peer)
        assert received == [*range(PACKETS)]
