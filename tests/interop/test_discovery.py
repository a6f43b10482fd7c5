"""The program reads its public addresses from the metadata services of clouds, at their real address."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.clouds import Asked, Cloud, Said, StandIn, aws, azure, gce
from tests.support.machine import Machine, new_machines
from tests.support.process import Forked
from tests.support.requirements import HAS_IPV6, needs_ipv6

AT = ("169.254.169.254", 80)
IP6 = "2600:1900:4010:9c::1"


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A network namespace as a cloud machine, so that no request leaves the test."""
    with new_machines(1, "NO MACHINE in a cloud can be made here") as (made,):
        made.run("ip", "link", "set", "lo", "up")
        made.run("ip", "addr", "add", f"{AT[0]}/32", "dev", "lo")
        if HAS_IPV6:
            made.run("ip", "addr", "add", f"{IP6}/128", "dev", "lo", "nodad")
        yield made


@contextlib.contextmanager
def started(machine: Machine, cloud: Cloud, *options: str, **variables: str) -> Iterator[tuple[Forked, StandIn]]:
    """Start a relay in a cloud."""
    with machine.entered():
        service = StandIn(cloud, AT)
    with contextlib.closing(service):
        with machine.entered():
            process = Forked(
                *("--standalone", "--log-format", "json", "--max-allocations", "100"),
                *("--health-check-addr", "127.0.0.1:0", "--control-endpoint", "127.0.0.1:0", *options),
                env=os.environ | variables,
                stdout=subprocess.DEVNULL,
            )
        with process:
            try:
                yield process, service
            finally:
                process.kill()


def addresses(process: Forked) -> tuple[list[str], list[str]]:
    """Wait for the event "ready". Return the relay's addresses for clients and its relayed addresses."""
    assert process.stderr is not None
    for line in process.stderr:
        said = json.loads(line)
        if said["event"] == "ready":
            return said["clients"], said["relayed"]
    raise AssertionError("it ended")


@pytest.mark.parametrize(
    ("method", "cloud", "address"),
    [
        ("gce_metadata", gce(), "34.76.12.9"),
        ("aws_ec2_metadata", aws(), "54.93.12.9"),
        ("azure_imds", azure(), "20.50.12.9"),
    ],
)
def test_a_relay_announces_the_address_of_the_cloud_and_binds_all_addresses(
    machine: Machine, method: str, cloud: Cloud, address: str
) -> None:
    options = ("--listen-address-discovery-method", method)
    with started(machine, cloud, *options, HTTP_PROXY="http://127.0.0.1:1") as (process, _):
        clients, relayed = addresses(process)
        assert (clients[0], relayed[0]) == ("0.0.0.0:3478", address)
        process.terminate()
        assert process.wait(60) == 0


@needs_ipv6
def test_the_public_ipv6_address_is_bound_if_the_machine_has_it(machine: Machine) -> None:
    with started(machine, gce(), LISTEN_ADDRESS_DISCOVERY_METHOD="gce_metadata") as (process, _):
        assert addresses(process) == (["0.0.0.0:3478", f"[{IP6}]:3478"], ["34.76.12.9", IP6])


@needs_ipv6
def test_options_override_discovered_addresses(machine: Machine) -> None:
    options = ("--listen-address-discovery-method", "gce_metadata", "--public-ip4-addr", AT[0])
    with started(machine, gce(), *options, PUBLIC_IP6_ADDR=IP6) as (process, service):
        assert addresses(process)[1] == [AT[0], IP6]
        assert service.asked == []


def test_the_wrong_cloud_is_a_usage_error(machine: Machine) -> None:
    def nothing(_: Asked) -> Said:
        return Said(404, "<html>Not Found</html>")

    with started(machine, nothing, "--listen-address-discovery-method", "azure_imds") as (process, _):
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(60)
    assert process.returncode == 2
    (line,) = said.splitlines()
    assert line.startswith("firezone-relay: no public address by azure_imds: 169.254.169.254 answers 404")
