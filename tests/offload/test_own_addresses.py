"""Addresses of the relay's machine, several or late, with sockets and with offload."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from relay.core.addresses import Family, SocketAddress, socket_address
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, SERVICE, WITHIN, Offloading, Running, Talk, credential, running
from tests.support.offload.topology import CLIENT, PEER, RELAY, Row, row
from tests.support.program import Program
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until

pytestmark = needs_ipv6

SECOND: Final = {Family.IPV4: "10.77.1.77", Family.IPV6: "fd77:1::77"}
"""A further address of the relay's interface to the client."""
INNER: Final = {Family.IPV4: "10.77.2.1", Family.IPV6: "fd77:2::1"}
"""The address of another interface of the relay."""
ELSEWHERE: Final = {Family.IPV4: "203.0.113.77", Family.IPV6: "2001:db8:77::77"}
"""The public address, which only a NAT has at first."""
SIZE: Final = 100


class Place(NamedTuple):
    network: Row
    relay: Offloading | None
    """None without offload."""
    program: Program


@pytest.fixture(params=["sockets", *(pytest.param(mode, marks=needs_bpf) for mode in MODES)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A relay that is bound to all addresses, because a NAT has its public address."""
    folder, public = tmp_path_factory.mktemp("relay"), tuple(ELSEWHERE.values())
    with row() as network, contextlib.ExitStack() as stack:
        network.relay.ip(*(f"addr add {host}/{_bits(host)} dev r0" for host in SECOND.values()))
        network.know_all()
        if request.param == "sockets":
            (folder / "secret").write_text("secret of those in the kernel")
            with network.relay.entered():
                options = ("--relay-secret-file", str(folder / "secret"), "--health-check-addr", "127.0.0.1:0")
                program = Program(*options, hosts=public)
            stack.callback(program.close)
            program.wait_until_ready()
            yield Place(network, None, program)
        else:
            relay: Running = stack.enter_context(running(network.relay, folder, request.param, public=public))
            yield Place(network, relay, relay.program)


def _bits(host: str) -> int:
    return 128 if ":" in host else 32


def client_of(place: Place, asked: str) -> TurnClient:
    family = Family.IPV6 if ":" in asked else Family.IPV4
    with place.network.client.entered():
        client = TurnClient((asked, SERVICE), credential(), CLIENT[family])
    # A connected socket receives nothing from other addresses.
    client.socket.connect((asked, SERVICE))
    return client


def preferred(place: Place, destination: str) -> str:
    """Return the source address that the route prefers."""
    with place.network.relay.udp("::" if ":" in destination else "0.0.0.0") as any_socket:
        any_socket.connect((destination, 9))
        host: str = any_socket.getsockname()[0]
        return host


def peer_of(place: Place, family: Family) -> socket.socket:
    return place.network.peer.udp(PEER[family])


def exchange_data(client: TurnClient, peer: socket.socket, relayed: SocketAddress) -> SocketAddress:
    """Relay a packet each way, and return the address from which the peer got it."""
    client.send(0x4001, bytes(SIZE))
    data, (host, port, *_) = peer.recvfrom(2000)
    assert data == bytes(SIZE)
    peer.sendto(bytes(SIZE), relayed)
    assert client.receive() == (0x4001, bytes(SIZE))
    return host, port


def wait_for_kernel(relay: Offloading, exchange: Callable[[], None]) -> None:
    """Wait until the kernel relays both ways."""

    def is_in_kernel() -> bool:
        before = relay.counts()
        exchange()
        return relay.counts().since(before)[:2] == (1, 1)

    wait_until(is_in_kernel, WITHIN)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("asked", [RELAY, SECOND, INNER], ids=["first", "second", "of-another-interface"])
def test_responses_and_data_leave_from_the_address_that_the_client_asked(
    place: Place, asked: dict[Family, str], family: Family
) -> None:
    with client_of(place, asked[family]) as client, peer_of(place, family) as peer:
        (relayed,) = client.allocate(family=family)
        assert client.bind_channel(0x4001, socket_address(*peer.getsockname()[:2])) is None
        # Behind the NAT.
        at = (INNER[family], relayed[1])

        def exchange() -> None:
            assert exchange_data(client, peer, at)[1] == relayed[1]

        exchange()
        if place.relay is None:
            # A train, and a traffic class.
            for level, kind, value in ((17, 103, SIZE), (socket.IPPROTO_IP, socket.IP_TOS, 0xB8)):
                if family is Family.IPV6 and level == socket.IPPROTO_IP:
                    level, kind = socket.IPPROTO_IPV6, socket.IPV6_TCLASS  # noqa: PLW2901
                peer.setsockopt(level, kind, value)
            peer.sendto(bytes(10 * SIZE), at)
            for _ in range(10):
                assert client.receive() == (0x4001, bytes(SIZE))
        elif asked[family] == preferred(place, CLIENT[family]):
            wait_for_kernel(place.relay, exchange)
        else:
            # The kernel would send from the preferred address.
            before = place.relay.counts()
            for _ in range(5):
                exchange()
            assert place.relay.counts().since(before)[:2] == (0, 0)


@pytest.mark.parametrize("family", Family)
def test_a_public_address_that_comes_late_is_the_source_of_relayed_packets_without_a_restart(
    place: Place, family: Family
) -> None:
    public = ELSEWHERE[family]
    place.network.relay.ip(f"addr add {public}/{_bits(public)} dev r0{' nodad' * (':' in public)}")
    wait_until(lambda: f"relayed packets leave from it address={public}" in " ".join(place.program.log.split()), WITHIN)
    with client_of(place, public) as client, peer_of(place, family) as peer:
        (relayed,) = client.allocate(family=family)
        assert relayed[0] == public
        assert client.bind_channel(0x4001, socket_address(*peer.getsockname()[:2])) is None

        def exchange() -> None:
            assert exchange_data(client, peer, relayed[:2]) == relayed[:2]

        for _ in range(5):
            exchange()
        if place.relay is not None:
            wait_for_kernel(place.relay, exchange)


@needs_bpf
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_relays_nothing_to_an_address_that_arrives(tmp_path: Path, mode: str) -> None:
    """The peer's address moves to the relay's machine, on which other services must be out of reach."""
    with row() as network:
        network.know_all()
        with running(network.relay, tmp_path, mode) as relay, relay.client(network.client) as client:
            with network.peer.udp(PEER[Family.IPV4]) as peer:
                way = Talk(relay, client, peer)
                way.wait_for_kernel()
                port = peer.getsockname()[1]
            network.relay.ip(f"addr add {PEER[Family.IPV4]}/32 dev lo")
            wait_until(lambda: relay.state()["xdp_channels"] == 0, WITHIN)
            with network.relay.udp(PEER[Family.IPV4], port) as service:
                before = relay.counts()
                client.send(way.number, bytes(SIZE))
                # The relay has handled the packet when it responds.
                assert client.bind_channel(way.number, (PEER[Family.IPV4], port)) == 403
                service.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    service.recv(2000)
                assert relay.counts().since(before)[:2] == (0, 0)
