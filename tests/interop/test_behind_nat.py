"""Two clients of one relay reach each other, although the NAT in front of the relay returns none of the relay's packets."""

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Final, NamedTuple

import pytest

from relay.core.addresses import Family, show, socket_address
from tests.support.machine import wait_until_up
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import Offloading, credential, running
from tests.support.offload.topology import Host, configure, connect, hosts
from tests.support.program import Program
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until

pytestmark = needs_ipv6

PUBLIC: Final = {Family.IPV4: "203.0.113.1", Family.IPV6: "2001:db8:77::1"}
"""Of the NAT, on the side of the clients."""
CLIENT: Final = {Family.IPV4: "203.0.113.2", Family.IPV6: "2001:db8:77::2"}
GATEWAY: Final = {Family.IPV4: "10.77.5.1", Family.IPV6: "fd77:5::1"}
RELAY: Final = {Family.IPV4: "10.77.5.2", Family.IPV6: "fd77:5::2"}
PACKETS: Final = 20
KINDS: Final = {Family.IPV4: "ip", Family.IPV6: "ip6"}


class Place(NamedTuple):
    """Clients, and a relay behind a NAT."""

    client: Host
    relay: Offloading | None
    """The relay with offload."""


@pytest.fixture(scope="module", params=["sockets", pytest.param("generic", marks=needs_bpf)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("relay")
    with hosts("client", "nat", "relay") as (client, nat, relay), contextlib.ExitStack() as stack:
        connect(nat, "outer", client, "c0")
        connect(relay, "r0", nat, "inner")
        configure(client, "c0", CLIENT)
        configure(nat, "outer", PUBLIC)
        configure(nat, "inner", GATEWAY)
        configure(relay, "r0", RELAY)
        relay.ip(*(f"route add default via {each}" for each in GATEWAY.values()))
        nat.set_knob("ipv4/ip_forward", 1)
        nat.set_knob("ipv6/conf/all/forwarding", 1)
        try:
            for family, kind in KINDS.items():
                nat.run("nft", "-f", "-", text=_translation(kind, PUBLIC[family], RELAY[family]))
        except (AssertionError, FileNotFoundError, subprocess.SubprocessError) as error:
            pytest.skip(f"NO NAT IS TESTED: nft is not installed, or the kernel has no NAT ({error})")
        wait_until_up(client, nat, relay)
        if request.param == "sockets":
            (folder / "secret").write_text("secret of those in the kernel")
            with relay.entered():
                options = ("--relay-secret-file", str(folder / "secret"), "--health-check-addr", "127.0.0.1:0")
                program = Program(*options, hosts=tuple(PUBLIC.values()))
            stack.callback(program.close)
            program.wait_until_ready()
            yield Place(client, None)
        else:
            yield Place(
                client, stack.enter_context(running(relay, folder, "generic", links="r0", public=tuple(PUBLIC.values())))
            )


def _translation(kind: str, public: str, private: str) -> str:
    return f"""table {kind} nat {{
        chain before {{ type nat hook prerouting priority -100; iifname "outer" meta l4proto udp dnat to {private}; }}
        chain after {{ type nat hook postrouting priority 100; oifname "outer" snat to {public}; }}
    }}"""


@pytest.mark.parametrize("relayed", Family, ids=lambda each: f"by-{each.name}")
@pytest.mark.parametrize("other", Family, ids=lambda each: f"to-{each.name}")
@pytest.mark.parametrize("one", Family, ids=lambda each: f"from-{each.name}")
def test_all_packets_between_two_clients_arrive(place: Place, one: Family, other: Family, relayed: Family) -> None:
    with _client(place, one) as here, _client(place, other) as there:
        (relayed_here,), (relayed_there,) = here.allocate(family=relayed), there.allocate(family=relayed)
        assert {relayed_here[0], relayed_there[0]} == {PUBLIC[relayed]}
        assert here.bind_channel(0x4001, relayed_there) is None
        assert there.bind_channel(0x4ABC, relayed_here) is None
        before = None if place.relay is None else place.relay.counts()
        for number in range(PACKETS):
            here.send(0x4001, bytes(number))
            assert there.receive() == (0x4ABC, bytes(number))
            there.send(0x4ABC, bytes(1000 + number))
            assert here.receive() == (0x4001, bytes(1000 + number))
        if place.relay is not None and before is not None:
            # The sockets relay short packets, and the packets before the neighbour is known.
            assert min(place.relay.counts().since(before)[:2]) > 0
            wait_until(lambda: _by_kernel(place.relay, here) > 0)


def test_a_peer_outside_is_reached_through_the_nat(place: Place) -> None:
    with _client(place, Family.IPV4) as client, place.client.udp(CLIENT[Family.IPV4]) as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(0x4001, peer.getsockname()) is None
        for number in range(PACKETS):
            client.send(0x4001, bytes(100 + number))
            assert peer.recvfrom(2000) == (bytes(100 + number), relayed[:2])
            peer.sendto(bytes(200 + number), relayed[:2])
            assert client.receive() == (0x4001, bytes(200 + number))


def _by_kernel(relay: Offloading | None, client: TurnClient) -> int:
    """Return the packets of a client to its peers that the kernel relayed, as the status page shows."""
    assert relay is not None
    address = socket_address(*client.address)
    rows = [each for each in relay.ask("/status")["allocations"] if each["client"] == show(address)]
    return sum(int(each["to_peer"]["xdp_packets"]) for each in rows)


def _client(place: Place, family: Family) -> TurnClient:
    with place.client.entered():
        return TurnClient((PUBLIC[family], 3478), credential(), CLIENT[family])
