"""A network that rejects packets: a firewall, missing routes, missing hosts, and packets above the MTU."""

import errno
import shutil
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from relay.core.counters import FreeReason
from tests.support.failing import CHANNEL, assert_serves, name_of
from tests.support.machine import Machine, new_machines
from tests.support.system import Relay, RelayMaker
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until

HOST: Final = "198.18.0.1"
HOST6: Final = "2001:db8::1"
LONGEST: Final = 65507
"""Bytes of payload in the longest IPv4 datagram."""

RULES: Final = """
table inet fault {
    chain leaving {
        type filter hook output priority 0;
        ip daddr 198.18.4.0/24 udp dport 1-65535 drop
        ip daddr 198.18.5.0/24 reject with icmp type admin-prohibited
    }
}
"""

ROUTES: Final = """
link add far type veth peer name farther
link set farther up
link set far up mtu 1400
addr add 198.18.0.1/32 dev far
addr add 2001:db8::1/128 dev far nodad
route add 198.18.4.0/24 dev far
route add 198.18.5.0/24 dev far
route add unreachable 198.18.1.0/24
route add prohibit 198.18.2.0/24
route add blackhole 198.18.3.0/24
"""


class Refusal(NamedTuple):
    """An unreachable destination, and the error of the kernel."""

    peer: tuple[str, int]
    number: int

    def __str__(self) -> str:
        return f"{name_of(self.number)} {self.peer[0]}"


REFUSALS: Final = [
    Refusal(("198.19.0.1", 9), errno.ENETUNREACH),
    Refusal(("198.18.1.1", 9), errno.EHOSTUNREACH),
    Refusal(("198.18.2.1", 9), errno.EACCES),
    Refusal(("198.18.3.1", 9), errno.EINVAL),
    Refusal(("198.18.4.1", 9), errno.EPERM),
    Refusal(("198.18.5.1", 9), errno.EPERM),
]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with an unconnected link, few routes and a firewall."""
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here: apt-get install iproute2 nftables")
    with new_machines(1) as (made,):
        made.run("ip", "link", "set", "lo", "up")
        made.run("ip", "-batch", "-", text=ROUTES)
        made.run("nft", "-f", "-", text=RULES)
        yield made


@pytest.fixture
def relay(machine: Machine, make_relay: RelayMaker) -> Iterator[Relay]:
    """A relay on this machine; the thread of the test is in the same network namespace."""
    with machine.entered():
        yield make_relay(
            public_ip4=IPv4Address(HOST),
            public_ip6=IPv6Address(HOST6),
            allow_peers=(ip_network("127.0.0.0/8"), ip_network(f"{HOST}/32"), ip_network(f"{HOST6}/128")),
        )


def bound(relay: Relay, peer: tuple[str, int]) -> TurnClient:
    """A client with a channel to a peer."""
    client = relay.client()
    client.allocate()
    assert client.bind_channel(CHANNEL, peer) is None
    return client


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_an_unreachable_peer_loses_only_its_own_packets(relay: Relay, refusal: Refusal) -> None:
    client = bound(relay, refusal.peer)
    with udp_socket(HOST) as peer:
        assert client.bind_channel(CHANNEL + 1, peer.getsockname()) is None
        for each in range(3):
            client.send(CHANNEL, b"lost")
            client.send(CHANNEL + 1, b"%d" % each)
            assert peer.recv(100) == b"%d" % each
    assert relay.system.server_counters.udp.send_errors == {name_of(refusal.number): 3}
    assert client.refresh(600) is None
    assert not relay.system.core.counters.allocations_freed[FreeReason.FAILED]
    assert_serves(relay, HOST)


def icmp_errors() -> int:
    """Return the number of ICMP destination-unreachable messages sent."""
    names, values = (line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if "Icmp:" in line)
    return int(values[names.index("OutDestUnreachs")])


def test_closed_peers_and_clients_do_not_affect_other_clients(relay: Relay) -> None:
    """ICMP errors do not reach the relay, because its sockets are unconnected."""
    with udp_socket(HOST) as gone:
        client, orphan = bound(relay, gone.getsockname()), relay.client()
        (relayed,) = orphan.allocate()
        with udp_socket(HOST) as peer:
            assert orphan.bind_channel(CHANNEL, peer.getsockname()) is None
            assert client.bind_channel(CHANNEL + 1, peer.getsockname()) is None
            gone.close()
            orphan.socket.close()
            before = icmp_errors()
            for each in range(5):
                client.send(CHANNEL, b"to nobody")
                peer.sendto(b"to nobody", relayed[:2])
                client.send(CHANNEL + 1, b"%d" % each)
                assert peer.recv(100) == b"%d" % each
            wait_until(lambda: icmp_errors() >= before + 10)
    assert client.refresh(600) is None
    counters = relay.system.server_counters.udp
    assert (counters.send_errors, counters.receive_errors) == ({}, {})
    assert len(relay.system.core.allocations.by_id) == 2
    assert_serves(relay, HOST)


def test_a_packet_too_long_for_its_header_is_dropped_alone(relay: Relay) -> None:
    """The longest datagram of a peer has no room for the ChannelData header of four bytes."""
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket(HOST) as peer:
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        peer.sendto(bytes(LONGEST), relayed[:2])
        peer.sendto(bytes(LONGEST - 4), relayed[:2])
        assert client.receive() == (CHANNEL, bytes(LONGEST - 4))
    assert relay.system.server_counters.udp.send_errors == {"EMSGSIZE": 1}
    assert_serves(relay, HOST)


def test_the_relay_recovers_after_a_link_failure(relay: Relay, machine: Machine) -> None:
    with udp_socket(HOST) as peer:
        client = bound(relay, peer.getsockname())
        machine.run("ip", "link", "set", "far", "down")
        try:
            client.send(CHANNEL, b"within the machine")
            assert peer.recv(100) == b"within the machine"
            assert client.bind_channel(CHANNEL + 1, ("198.18.4.1", 9)) is None
            client.send(CHANNEL + 1, b"by the link")
            wait_until(lambda: sum(relay.system.server_counters.udp.send_errors.values()) == 1)
        finally:
            machine.run("ip", "-batch", "-", text="link set far up")
    assert_serves(relay, HOST)
