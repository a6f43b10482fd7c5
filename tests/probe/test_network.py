"""The command through a router between two machines: path MTU, loss, and firewalls that reject packets."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from relay.core.addresses import Family
from tests.support.machine import Machine, new_machines, wait_until_up
from tests.support.process import run
from tests.support.program import Program
from tests.support.requirements import needs_ipv6

RELAY: Final = "198.51.100.7"
RELAY6: Final = "2001:db8:7::7"
ROUTER, ROUTER6 = "203.0.113.1", "2001:db8::1"
CLIENT, CLIENT6 = "203.0.113.50", "2001:db8::50"

Probe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine, Machine]]:
    """A client, a router and the machine of a relay."""
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here: apt-get install iproute2 nftables")
    with new_machines(3) as (client, router, relay):
        router.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "cable", "netns", client.path)
        router.run("ip", "link", "add", "far", "type", "veth", "peer", "name", "cable", "netns", relay.path)
        router.configure(
            near={Family.IPV4: ROUTER, Family.IPV6: ROUTER6}, far={Family.IPV4: "198.51.100.1", Family.IPV6: "2001:db8:7::1"}
        )
        client.configure(cable={Family.IPV4: CLIENT, Family.IPV6: CLIENT6})
        relay.configure(cable={Family.IPV4: RELAY})
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.icmp_ratelimit=0", "net.ipv6.conf.all.forwarding=1")
        for gateway in (ROUTER, ROUTER6):
            client.run("ip", "route", "add", "default", "via", gateway)
        relay.run("ip", "route", "add", "default", "via", "198.51.100.1")
        wait_until_up(client, router, relay)
        yield client, router, relay


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relay") / "secret"
    path.write_text("the secret of a relay behind a router")
    return path


@pytest.fixture(scope="module")
def _program(machines: tuple[Machine, Machine, Machine], secret: Path) -> Iterator[None]:
    with machines[2].entered():
        program = Program("--relay-secret-file", str(secret), hosts=(RELAY,))
    with contextlib.closing(program):
        program.wait_until_ready()
        yield


@pytest.fixture
def rules(machines: tuple[Machine, Machine, Machine]) -> Iterator[Callable[[Machine, str], None]]:
    """Adds a rule to a firewall, which the end of the test removes."""
    changed: list[Machine] = []

    def add(machine: Machine, rule: str) -> None:
        changed.append(machine)
        hook = "forward" if machine is machines[1] else "input"
        chain = f"chain packets {{\ntype filter hook {hook} priority 0\n{rule}\n}}"
        machine.run("nft", "-f", "-", text=f"table inet test {{\n{chain}\n}}\n")

    yield add
    for machine in changed:
        machine.run("nft", "flush", "ruleset")


@pytest.fixture
def probe(_program: None, machines: tuple[Machine, Machine, Machine], secret: Path) -> Probe:
    def probe(*options: str, server: str = RELAY) -> dict[str, Any]:
        arguments = (*("--relay-secret-file", str(secret), "--count", "50", "--rate", "500", "--json"), *options)
        with machines[0].entered():
            done = run("probe", f"turn:{server}?transport=udp", *arguments)
        report: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if report["ok"] else 1), done.stderr
        return report

    return probe


@pytest.fixture
def set_mtu(machines: tuple[Machine, Machine, Machine]) -> Iterator[Callable[[int], None]]:
    """Changes the MTU between router and relay."""

    def set_mtu(size: int) -> None:
        machines[1].set_mtu("far", size)
        machines[2].set_mtu("cable", size)

    yield set_mtu
    set_mtu(1500)
    # An MTU below 1280 removes the addresses of IPv6.
    machines[1].run("ip", "addr", "replace", "2001:db8:7::1/64", "dev", "far", "nodad")


@pytest.mark.parametrize(("mtu", "ok"), [(1500, True), (1420, True), (1280, True), (1200, False)])
def test_the_path_mtu_is_measured(probe: Probe, set_mtu: Callable[[int], None], mtu: int, ok: bool) -> None:  # noqa: FBT001
    set_mtu(mtu)
    report = probe()
    assert report["path_mtu"] == {"ipv4": mtu, "ipv6": None}
    assert (report["ok"], report["failed_step"]) == ((True, None) if ok else (False, "path_mtu"))
    assert ok or "raise the MTU on the way to 1280 or more" in report["advice"]


def test_the_path_mtu_is_measured_without_icmp(
    probe: Probe, set_mtu: Callable[[int], None], machines: tuple[Machine, ...], rules: Callable[[Machine, str], None]
) -> None:
    set_mtu(1360)
    rules(machines[0], "meta l4proto icmp drop")
    assert probe()["path_mtu"]["ipv4"] == 1360


@pytest.mark.parametrize(("relay", "router"), [(RELAY, ROUTER), pytest.param(RELAY6, ROUTER6, marks=needs_ipv6)])
def test_a_rejecting_firewall_on_the_way_is_named(
    probe: Probe, machines: tuple[Machine, ...], rules: Callable[[Machine, str], None], relay: str, router: str
) -> None:
    rules(machines[1], "udp dport 3478 reject with icmpx admin-prohibited")
    report = probe(server=relay)
    assert report["steps"][0]["detail"].startswith(f"{router} rejects packets (ICMP administratively prohibited) to ")
    assert report["advice"] == f"open the UDP ports in the firewall of {router}, or fix its routes"


@pytest.mark.parametrize(
    ("reject", "reason"),
    [
        ("icmpx admin-prohibited", "administratively prohibited"),
        ("icmp host-prohibited", "host administratively prohibited"),
        ("icmpx port-unreachable", "port unreachable"),
        ("icmpx host-unreachable", "host unreachable"),
    ],
)
def test_a_firewall_that_rejects_the_relayed_ports_is_named(
    probe: Probe, machines: tuple[Machine, ...], rules: Callable[[Machine, str], None], reject: str, reason: str
) -> None:
    rules(machines[2], f"udp dport 49152-65535 reject with {reject}")
    report = probe()
    assert report["failed_step"] == "packets"
    assert report["packets"]["ipv4"]["to_peer"]["received"] == 50
    assert report["packets"]["ipv4"]["to_client"]["received"] == 0
    assert report["advice"].startswith(
        f"{RELAY} rejects packets (ICMP {reason}): open the UDP ports in the firewall of {RELAY}"
    )


def test_a_port_that_the_server_rejects_may_be_closed_or_behind_a_firewall(
    probe: Probe, machines: tuple[Machine, ...], rules: Callable[[Machine, str], None]
) -> None:
    rules(machines[2], "udp dport 3478 reject")
    report = probe()
    assert report["steps"][0]["detail"] == f"nothing listens on {RELAY}:3478/udp (ICMP port unreachable)"
    assert report["advice"].startswith("start the server, check the port, or open it in the server's firewall")


def test_loss_fails_above_the_given_share(
    probe: Probe, machines: tuple[Machine, ...], rules: Callable[[Machine, str], None]
) -> None:
    rules(machines[2], "udp dport 49152-65535 numgen inc mod 10 0 drop")
    report = probe()
    assert report["failed_step"] == "packets"
    assert report["advice"].startswith("loss over 2.0%")
    assert probe("--max-loss", "40")["failed_step"] is None
