"""The command probes a relay from outside: behind a NAT, with wrong public addresses, and with addresses that nobody has."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.support.machine import wait_until_up
from tests.support.offload.topology import Host, configure, connect, hosts
from tests.support.program import Program
from tests.support.requirements import needs_ipv6

pytestmark = needs_ipv6

PUBLIC: Final = "203.0.113.1"
"""Of the NAT, which sends no packet back to the side from which the packet came."""
PUBLIC6: Final = "2001:db8:77::1"
OUTSIDE: Final = ("203.0.113.2", "2001:db8:77::2")
GATEWAY: Final = ("10.77.5.1", "fd77:5::1")
INSIDE: Final = ("10.77.5.2", "fd77:5::2")
NOBODY: Final = ("203.0.113.99", "2001:db8:77::99")
SECONDS: Final = 60


class Result(NamedTuple):
    code: int
    lines: list[str]


Probe = Callable[..., Result]


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Host, Host]]:
    """A machine outside, and a machine behind the NAT."""
    with hosts("outside", "nat", "inside") as (outside, nat, inside):
        connect(nat, "outer", outside, "c0")
        connect(inside, "r0", nat, "inner")
        configure(outside, "c0", *OUTSIDE)
        configure(nat, "outer", PUBLIC, PUBLIC6)
        configure(nat, "inner", *GATEWAY)
        configure(inside, "r0", *INSIDE)
        inside.ip(*(f"route add default via {each}" for each in GATEWAY))
        # Packets to private addresses are lost.
        outside.ip(f"route add 10.0.0.0/8 via {NOBODY[0]}")
        nat.set_knob("ipv4/ip_forward", 1)
        nat.set_knob("ipv6/conf/all/forwarding", 1)
        rules = "\n".join(
            f"""table {kind} nat {{
                chain before {{
                    type nat hook prerouting priority -100
                    iifname "outer" {kind} daddr {public} meta l4proto udp dnat to {private}
                }}
                chain after {{ type nat hook postrouting priority 100; oifname "outer" snat to {public}; }}
            }}"""
            for kind, public, private in (("ip", PUBLIC, INSIDE[0]), ("ip6", PUBLIC6, INSIDE[1]))
        )
        try:
            nat.run("nft", "-f", "-", text=rules)
        except (AssertionError, FileNotFoundError, subprocess.SubprocessError) as error:
            pytest.skip(f"NO NAT IS TESTED: nft is not installed, or the kernel has no NAT ({error})")
        wait_until_up(outside, nat, inside)
        yield outside, inside


@pytest.fixture
def probe(machines: tuple[Host, Host], tmp_path: Path) -> Iterator[Probe]:
    """Start a relay with public addresses behind the NAT, and probe an address from outside."""
    outside, inside = machines
    secret = tmp_path / "secret"
    secret.write_text("a secret of these tests")
    with contextlib.ExitStack() as stack:

        def start_and_probe(target: str, *public: str) -> Result:
            options = ("--relay-secret-file", str(secret), "--health-check-addr", "127.0.0.1:0")
            with inside.entered():
                program = Program(*options, hosts=public)
            stack.callback(program.close)
            program.wait_until_ready()
            command = ("probe", target, "--relay-secret-file", str(secret), "--count", "10", "--timeout", "3")
            with outside.entered():
                done = subprocess.run(
                    (sys.executable, "-m", "relay", *command), capture_output=True, text=True, timeout=SECONDS, check=False
                )
            assert done.stderr == ""
            return Result(done.returncode, done.stdout.splitlines())

        yield start_and_probe


def test_a_relay_behind_a_nat_without_hairpin_passes_every_step(probe: Probe) -> None:
    code, lines = probe(PUBLIC, PUBLIC, PUBLIC6)
    assert (code, lines[-1]) == (0, "All steps succeeded."), lines


def test_a_private_address_as_public_address_names_the_option(probe: Probe) -> None:
    code, lines = probe(PUBLIC, INSIDE[0])
    assert code == 1
    assert f"the server announces {INSIDE[0]}, but responds at {PUBLIC}: give it --public-ip4-addr {PUBLIC}" in lines[-1]


def test_a_public_address_without_a_route_names_the_option(probe: Probe) -> None:
    code, lines = probe(PUBLIC, "198.51.100.9")
    assert code == 1
    assert f"give it --public-ip4-addr {PUBLIC}" in lines[-1]


def test_an_address_of_the_other_family_that_nobody_has_names_the_option(probe: Probe) -> None:
    code, lines = probe(PUBLIC, PUBLIC, NOBODY[1])
    assert code == 1
    assert "Packets IPv4" in "".join(lines)
    assert f"the server does not respond at {NOBODY[1]}: correct or remove its --public-ip6-addr" in lines[-1]


def test_an_address_that_nobody_has_fails_at_binding(probe: Probe) -> None:
    code, lines = probe(NOBODY[0], PUBLIC)
    assert code == 1
    assert lines[-1].startswith("Failed: Binding")
