"""The addresses and routes of this machine, in network namespaces."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from relay.core.addresses import Family
from relay.net.routes import has_address, own_addresses, source_toward
from tests.support.machine import Machine, new_machines

SETUP = """
link set lo up
link add near type veth peer name far
link set far up
link set near up
addr add 192.0.2.5/24 dev near
addr add 192.0.2.6/24 dev near
addr add 10.0.0.1 peer 10.0.0.2 dev far
addr add 2001:db8::5/64 dev near nodad
addr add 2001:db8::6/64 dev near nodad
route add local 203.0.113.0/24 dev lo
route add unreachable 198.18.1.0/24
route add prohibit 198.18.2.0/24
route add blackhole 198.18.3.0/24
route add default via 192.0.2.1
"""
ANY, ANY6 = "0.0.0.0", "::"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with new_machines(1) as (made,):
        made.run("ip", "-batch", "-", text=SETUP)
        yield made


def family_of(host: str) -> Family:
    return Family.IPV6 if ":" in host else Family.IPV4


def listed(machine: Machine) -> set[str]:
    """Return the addresses that ip(8) lists."""
    with machine.entered():
        links = json.loads(subprocess.run(("ip", "-json", "addr"), capture_output=True, timeout=60, check=True).stdout)
    return {address["local"] for link in links for address in link["addr_info"]}


def test_own_addresses_are_the_addresses_of_all_interfaces(machine: Machine) -> None:
    with machine.entered():
        found = own_addresses()
    assert found >= {"127.0.0.1", "::1", "192.0.2.5", "192.0.2.6", "10.0.0.1", "2001:db8::5"}
    assert "10.0.0.2" not in found
    assert found == listed(machine)


def test_own_addresses_of_many_interfaces_come_in_several_parts(machine: Machine) -> None:
    hosts = [f"10.{high}.{low}.1" for high in range(1, 5) for low in range(250)]
    machine.run("ip", "-batch", "-", text="\n".join(f"addr add {host}/32 dev near" for host in hosts))
    with machine.entered():
        assert own_addresses() >= {*hosts, "2001:db8::5"}
    machine.run("ip", "-batch", "-", text="\n".join(f"addr del {host}/32 dev near" for host in hosts))
    with machine.entered():
        assert not own_addresses().intersection(hosts)


@pytest.mark.parametrize(
    ("bound", "destination", "source"),
    [
        (ANY, "198.51.100.1", "192.0.2.5"),
        ("192.0.2.6", "198.51.100.1", "192.0.2.6"),
        (ANY, "192.0.2.99", "192.0.2.5"),
        ("192.0.2.99", "198.51.100.1", None),
        (ANY, "198.18.1.1", None),
        (ANY, "198.18.2.1", None),
        (ANY, "198.18.3.1", None),
        ("2001:db8::6", "2001:db8::99", "2001:db8::6"),
        (ANY6, "2001:db8:1::1", None),
    ],
)
def test_the_kernel_tells_the_source_of_packets(machine: Machine, bound: str, destination: str, source: str | None) -> None:
    with machine.entered():
        assert source_toward(family_of(destination), destination, bound) == source


@pytest.mark.parametrize(
    "host",
    ["192.0.2.5", "192.0.2.6", "10.0.0.1", "203.0.113.77", "127.0.0.1", "127.1.2.3", "2001:db8::5", "2001:db8::6", "::1"],
)
def test_addresses_and_local_routes_receive_packets(machine: Machine, host: str) -> None:
    """A second address of a link is as good as the first."""
    with machine.entered():
        assert has_address(family_of(host), host)


@pytest.mark.parametrize("host", ["192.0.2.7", "10.0.0.2", "198.51.100.1", "2001:db8::7", "2001:db8:1::1"])
@pytest.mark.parametrize("nonlocal_bind", [0, 1])
def test_other_addresses_do_not(machine: Machine, host: str, nonlocal_bind: int) -> None:
    """With ip_nonlocal_bind, common beside keepalived, a socket can be bound to any address."""
    for version in ("ipv4", "ipv6"):
        machine.run("sysctl", "-qw", f"net.{version}.ip_nonlocal_bind={nonlocal_bind}")
    with machine.entered():
        assert not has_address(family_of(host), host)


def test_an_address_under_duplicate_detection_does_not(machine: Machine) -> None:
    machine.run("ip", "link", "add", "new", "type", "veth", "peer", "name", "wire")
    machine.run("ip", "addr", "add", "2001:db8::9/64", "dev", "new")
    with machine.entered():
        assert "2001:db8::9" in own_addresses()
        assert not has_address(Family.IPV6, "2001:db8::9")
