"""Addresses and routes that come and go, in network namespaces."""

import contextlib
import errno
import json
import re
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any, Final

import pytest

from relay.actors import addresses
from relay.config import UsageError
from relay.net.routes import own_addresses
from relay.system import system
from tests.support.log_lines import KeptLog, log
from tests.support.machine import Machine, new_machines
from tests.support.system import Relay, RelayMaker, ask
from tests.support.turn_client import TIMEOUT, TurnClient, udp_socket
from tests.support.waiting import wait_until

__all__ = ["log"]

HOST: Final = "203.0.113.5"
HOST6: Final = "2001:db8::5"
LATE: Final = "172.17.0.1"
"""The address that Docker gives to docker0."""

CHANNEL: Final = 0x4000
BINDING: Final = bytes.fromhex("000100002112a442") + bytes(12)
"""A Binding request."""

LINKS: Final = f"""
link set lo up
link add near type veth peer name far
link set far up
link set near up
addr add {HOST}/24 dev near
addr add {HOST6}/64 dev near nodad
route add default via 203.0.113.1
-6 route add default via 2001:db8::1
"""


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine of a relay: an address of each family, and a route to the internet."""
    with new_machines(1) as (made,):
        for line in LINKS.strip().splitlines():
            made.run("ip", *line.split())
        yield made


Start = Callable[..., Relay]


@pytest.fixture
def start(machine: Machine, make_relay: RelayMaker, log: KeptLog) -> Iterator[Start]:
    """Start a relay on the machine. The thread of the test is in the same network namespace."""
    assert log is not None
    with machine.entered():
        yield lambda **settings: make_relay(
            **{"public_ip4": IPv4Address(HOST), "public_ip6": IPv6Address(HOST6), "allow_peers": (), **settings}
        )


def readiness(relay: Relay) -> list[str]:
    """Return the reasons in the body of /readyz."""
    status, body = ask(relay.system.http["health"], "/readyz")
    told = json.loads(body)
    assert (status, told["status"]) == ((503, "not ready") if "reasons" in told else (200, "ready"))
    reasons: list[str] = told.get("reasons", [])
    return reasons


class Entries:
    """The entries of a log so far."""

    def __init__(self, log: KeptLog) -> None:
        self._log = log
        self.all: list[dict[str, Any]] = []

    def of(self, event: str) -> list[dict[str, Any]]:
        self.all += self._log.take()
        return [entry for entry in self.all if entry["event"] == event]

    def wait_for(self, event: str) -> dict[str, Any]:
        wait_until(lambda: self.of(event) != [])
        return self.of(event)[-1]

    def wait_for_change(self, address: str, way: str) -> None:
        """Wait until an address has arrived or is gone. Link-local addresses of new interfaces come at any time."""
        wait_until(lambda: any(address in each[way] for each in self.of("addresses of this machine changed")))


@pytest.fixture
def entries(log: KeptLog) -> Entries:
    return Entries(log)


def relays(client: TurnClient, peer: Any) -> bool:  # noqa: ANN401 - a socket
    client.send(CHANNEL, b"data")
    peer.settimeout(0.2)
    try:
        return bool(peer.recv(100) == b"data")
    except TimeoutError:
        return False


def test_an_address_that_arrives_is_no_peer_and_its_going_is_noticed(
    machine: Machine, start: Start, entries: Entries
) -> None:
    relay = start()
    client = relay.client()
    client.allocate()
    elsewhere = (LATE, 3478)
    # As another machine's, the address is a peer like any other.
    assert client.bind_channel(CHANNEL, elsewhere) is None
    machine.run("ip", "addr", "add", f"{LATE}/16", "dev", "far")
    entries.wait_for_change(LATE, "arrived")
    with udp_socket(LATE) as service:
        at = service.getsockname()
        # The server actor may handle a request before the news.
        wait_until(lambda: client.bind_channel(CHANNEL + 1, at) == 403)
        wait_until(lambda: not any(relay.system.core.allocations.live_channels.values()))
        client.send(CHANNEL, b"data")
        assert client.bind_channel(CHANNEL, elsewhere) == 403
    machine.run("ip", "addr", "del", f"{LATE}/16", "dev", "far")
    entries.wait_for_change(LATE, "gone")
    wait_until(lambda: client.bind_channel(CHANNEL, elsewhere) is None)


def test_a_channel_relays_nothing_to_an_address_that_arrived(machine: Machine, start: Start, entries: Entries) -> None:
    relay = start()
    client = relay.client()
    client.allocate()
    assert client.bind_channel(CHANNEL, (LATE, 5000)) is None
    machine.run("ip", "addr", "add", f"{LATE}/16", "dev", "far")
    entries.wait_for_change(LATE, "arrived")
    wait_until(lambda: not any(relay.system.core.allocations.live_channels.values()))
    with contextlib.closing(udp_socket(LATE)) as any_port:
        assert not relays(client, any_port)


def test_a_bound_address_that_goes_makes_the_relay_not_ready(machine: Machine, start: Start, entries: Entries) -> None:
    relay = start(allow_peers=(ip_network(HOST),))
    assert readiness(relay) == []
    machine.run("ip", "addr", "del", f"{HOST}/24", "dev", "near")
    wait_until(lambda: readiness(relay) == ["no_ipv4_address"])
    warned = entries.wait_for("clients can't reach the relay")
    assert (warned["level"], warned["reason"]) == ("warning", "no_ipv4_address")
    assert HOST in warned["mend"]
    control = relay.system.http["control"]
    status = json.loads(ask(control, "/status")[1])
    assert (status["ready"], status["not_ready"]) == (False, ["no_ipv4_address"])
    wait_until(lambda: 'relay_not_ready{reason="no_ipv4_address"} 1.0' in ask(control, "/metrics")[1])
    assert "relay_ready 0.0" in ask(control, "/metrics")[1]
    machine.run("ip", "addr", "add", f"{HOST}/24", "dev", "near")
    machine.run("ip", "route", "replace", "default", "via", "203.0.113.1")
    wait_until(lambda: readiness(relay) == [])
    assert entries.wait_for("clients can reach the relay again")["reason"] == "no_ipv4_address"


@pytest.mark.parametrize(("option", "reason"), [("-4", "no_ipv4_route"), ("-6", "no_ipv6_route")])
def test_without_a_route_the_relay_is_not_ready(
    machine: Machine, start: Start, entries: Entries, option: str, reason: str
) -> None:
    machine.run("ip", option, "route", "del", "default")
    relay = start()
    # From the start on, not from the first look of an actor on.
    assert readiness(relay) == [reason]
    assert entries.wait_for("clients can't reach the relay")["reason"] == reason
    machine.run("ip", option, "route", "add", "default", "via", {"-4": "203.0.113.1", "-6": "2001:db8::1"}[option])
    wait_until(lambda: readiness(relay) == [])


def test_a_relay_of_a_private_network_needs_no_route_to_the_internet(
    machine: Machine, start: Start, entries: Entries
) -> None:
    machine.run("ip", "addr", "add", "10.0.0.5/24", "dev", "near")
    machine.run("ip", "route", "del", "default")
    relay = start(public_ip4=IPv4Address("10.0.0.5"), public_ip6=None)
    assert readiness(relay) == []
    (warned,) = entries.of("the public address is private: clients on the internet can't reach it")
    assert (warned["address"], "--public-ip4-addr" in warned["mend"]) == ("10.0.0.5", True)


def test_a_relay_on_loopback_is_for_trials_and_warns_of_no_address(start: Start, entries: Entries) -> None:
    start(public_ip4=IPv4Address("127.0.0.1"), public_ip6=None)
    assert entries.of("the public address is private: clients on the internet can't reach it") == []


def test_behind_a_nat_a_route_to_the_public_address_is_enough(machine: Machine, start: Start) -> None:
    """Not all networks behind a NAT have a default route, for example that of Firezone's compose file."""
    machine.run("ip", "route", "del", "default")
    relay = start(public_ip4=IPv4Address("198.51.100.1"), public_ip6=None)
    assert readiness(relay) == ["no_ipv4_route"]
    machine.run("ip", "route", "add", "198.51.100.0/24", "via", "203.0.113.1")
    wait_until(lambda: readiness(relay) == [])


def test_a_public_address_that_comes_late_needs_no_restart(machine: Machine, start: Start, entries: Entries) -> None:
    late = "203.0.113.77"
    relay = start(public_ip4=IPv4Address(late), public_ip6=None, allow_peers=(ip_network(HOST),))
    (warned,) = entries.of("the public address is not on this machine: assuming a 1:1 NAT")
    assert (warned["address"], "no restart" in warned["mend"]) == (late, True)
    machine.run("ip", "addr", "add", f"{late}/24", "dev", "near")
    came = entries.wait_for("the public address came: relayed packets leave from it")
    assert (came["level"], came["address"]) == ("info", late)
    with relay.client() as client, contextlib.closing(udp_socket(HOST)) as peer:
        client.server = (late, client.server[1])
        (relayed,) = client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        client.send(CHANNEL, b"data")
        assert peer.recvfrom(100) == (b"data", relayed)
    assert readiness(relay) == []
    machine.run("ip", "addr", "del", f"{late}/24", "dev", "near")
    # From now on, its absence is a failure and no NAT.
    wait_until(lambda: readiness(relay) == ["no_ipv4_address"])


def test_relayed_packets_leave_from_the_public_address_if_all_are_bound(machine: Machine, start: Start) -> None:
    public = "203.0.113.77"
    machine.run("ip", "addr", "add", f"{public}/32", "dev", "near")
    relay = start(
        public_ip4=IPv4Address(public), bind_ip4=IPv4Address("0.0.0.0"), public_ip6=None, allow_peers=(ip_network(HOST),)
    )
    with relay.client() as client, contextlib.closing(udp_socket(HOST)) as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        client.send(CHANNEL, b"data")
        assert peer.recvfrom(100) == (b"data", relayed)


def test_clients_of_a_machine_with_a_second_address_get_responses_from_it(machine: Machine, start: Start) -> None:
    """Also if it came after the start."""
    second = "203.0.113.6"
    relay = start(bind_ip4=IPv4Address("0.0.0.0"), public_ip6=None)
    machine.run("ip", "addr", "add", f"{second}/24", "dev", "near")

    def source() -> str:
        with relay.client() as client:
            client.server = (second, client.server[1])
            client.socket.settimeout(TIMEOUT)
            client.socket.sendto(BINDING, client.server)
            host: str = client.socket.recvfrom(1000)[1][0]
            return host

    wait_until(lambda: source() == second)


def test_a_floating_address_may_be_bound_before_it_arrives(machine: Machine, start: Start) -> None:
    """The relay of a machine in reserve beside keepalived is not ready until the address moves there."""
    floating = "203.0.113.99"
    machine.run("sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1")
    relay = start(public_ip4=IPv4Address(floating), public_ip6=None)
    assert readiness(relay) == ["no_ipv4_address"]
    machine.run("ip", "addr", "add", f"{floating}/32", "dev", "near")
    wait_until(lambda: readiness(relay) == [])
    client = relay.client()
    assert client.allocate()[0][0] == floating


def test_a_machine_that_does_not_list_its_addresses_is_a_usage_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the addresses, clients could reach services of the machine."""

    def forbidden() -> frozenset[str]:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(system, "own_addresses", forbidden)
    with pytest.raises(UsageError, match=r"Operation not permitted.*netlink"):
        start()


def test_a_failed_look_keeps_the_last_state(
    machine: Machine, start: Start, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = start()
    broken: list[object] = [None]

    def failing() -> frozenset[str]:
        if broken:
            raise OSError(errno.EMFILE, "Too many open files")
        return own_addresses()

    monkeypatch.setattr(addresses, "own_addresses", failing)
    entries.wait_for("can't read addresses and routes: changes are not noticed")
    assert readiness(relay) == []
    assert relay.client().allocate()
    broken.clear()
    machine.run("ip", "addr", "add", f"{LATE}/16", "dev", "far")
    entries.wait_for_change(LATE, "arrived")
    assert relay.system.events.empty()


def test_several_addresses_behind_a_nat_are_reported(machine: Machine, start: Start, entries: Entries) -> None:
    machine.run("ip", "addr", "add", "203.0.113.6/24", "dev", "near")
    start(public_ip4=IPv4Address("198.51.100.1"), public_ip6=None)
    (warned,) = entries.of("several addresses: relayed packets may leave from the wrong one")
    assert (warned["addresses"], f"--bind-ip4-addr {HOST}" in warned["mend"]) == ([HOST, "203.0.113.6"], True)


def test_a_relay_whose_addresses_are_in_order_starts_without_a_warning(start: Start, entries: Entries) -> None:
    start()
    entries.wait_for("ready")
    assert not [each for each in entries.all if each["level"] == "warning" and re.search("address|reach", each["event"])]
