"""The program asks the cloud that it runs in, at the address where each of them is."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import HAS_IPV6, needs_ipv6
from tests.discovery.stand_in import Asked, Cloud, Said, StandIn, aws, azure, gce
from tests.machine import Machine

AT = ("169.254.169.254", 80)
IP6 = "2600:1900:4010:9c::1"


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine in a cloud: what it asks there stays there."""
    try:
        made = Machine()
    except OSError as error:
        pytest.skip(f"NO MACHINE in a cloud can be made here ({error.strerror}): run as root")
    with contextlib.closing(made):
        made.run("ip", "link", "set", "lo", "up")
        made.run("ip", "addr", "add", f"{AT[0]}/32", "dev", "lo")
        if HAS_IPV6:
            made.run("ip", "addr", "add", f"{IP6}/128", "dev", "lo", "nodad")
        yield made


@contextlib.contextmanager
def started(
    machine: Machine, cloud: Cloud, *options: str, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], StandIn]]:
    """Start a relay in a cloud."""
    with machine.entered():
        service = StandIn(cloud, AT)
    with contextlib.closing(service):
        process = subprocess.Popen(
            [
                *("nsenter", f"--net={machine.path}", sys.executable, "-m", "relay", "--standalone", "--log-format", "json"),
                *(
                    "--health-address",
                    "127.0.0.1:0",
                    "--control-address",
                    "127.0.0.1:0",
                    "--max-allocations",
                    "100",
                    *options,
                ),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=dict(os.environ) | variables,
            text=True,
        )
        try:
            yield process, service
        finally:
            process.kill()
            process.communicate()


def addresses(process: subprocess.Popen[str]) -> tuple[list[str], list[str]]:
    """Wait until it is ready, and give where it listens and what it announces."""
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
def test_a_relay_in_a_cloud_announces_what_the_cloud_says_and_listens_everywhere(
    machine: Machine, method: str, cloud: Cloud, address: str
) -> None:
    options = ("--listen-address-discovery-method", method)
    with started(machine, cloud, *options, HTTP_PROXY="http://127.0.0.1:1") as (process, _):
        clients, relayed = addresses(process)
        assert (clients[0], relayed[0]) == ("0.0.0.0:3478", address)
        process.terminate()
        assert process.wait(60) == 0


@needs_ipv6
def test_the_public_ipv6_address_is_bound_since_the_machine_has_it(machine: Machine) -> None:
    with started(machine, gce(), LISTEN_ADDRESS_DISCOVERY_METHOD="gce_metadata") as (process, _):
        assert addresses(process) == (["0.0.0.0:3478", f"[{IP6}]:3478"], ["34.76.12.9", IP6])


@needs_ipv6
def test_addresses_that_are_given_win(machine: Machine) -> None:
    options = ("--listen-address-discovery-method", "gce_metadata", "--public-ip4-addr", AT[0])
    with started(machine, gce(), *options, PUBLIC_IP6_ADDR=IP6) as (process, service):
        assert addresses(process)[1] == [AT[0], IP6]
        assert service.asked == []


def test_another_cloud_is_bad_use_in_one_line(machine: Machine) -> None:
    def nothing(_: Asked) -> Said:
        return Said(404, "<html>Not Found</html>")

    with started(machine, nothing, "--listen-address-discovery-method", "azure_imds") as (process, _):
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = said.splitlines()
    assert line.startswith("firezone-relay: no public address by azure_imds: 169.254.169.254 answers 404")
