"""The override for Firezone's compose file: its environment and commands start a relay that relays, in the same networks."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from relay.core.addresses import Family, socket_address
from relay.system.shutdown import STOP_TIMEOUT
from tests.support.machine import Machine, wait_until_up
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import WITHIN, Offloading
from tests.support.offload.topology import Host, configure, connect
from tests.support.requirements import HAS_IPV6
from tests.support.scripted_portal import ScriptedPortal
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until

TOP: Final = Path(__file__).parents[2]

TOKEN: Final = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_throw.away~token"
PORTAL_PORT: Final = 8081

# The facts of Firezone's docker-compose.yml and scripts/compose/relay.yml (August 2026) that the override doesn't change.
ENVIRONMENT: Final = {
    "FIREZONE_TOKEN": TOKEN,
    "RUST_LOG": "debug",
    "RUST_BACKTRACE": "1",
    "FIREZONE_API_URL": f"ws://portal:{PORTAL_PORT}",
    "OTLP_GRPC_ENDPOINT": "otel:4317",
    "EBPF_OFFLOADING": "eth0",
}
HEALTH_CHECK: Final = "curl --fail http://localhost:8080/readyz"
PORTAL: Final = {Family.IPV4: "203.0.113.10", Family.IPV6: "203:0:113::10"}
CLIENT: Final = {Family.IPV4: "203.0.113.201", Family.IPV6: "203:0:113::201"}
PEER: Final = {Family.IPV4: "203.0.113.202", Family.IPV6: "203:0:113::202"}


class Place(NamedTuple):
    """The addresses of a relay's container and of the router in front of it."""

    inside: dict[Family, str]
    gateway: dict[Family, str]
    public: dict[Family, str]


PLACES: Final = {
    f"relay-{n}": Place(
        {Family.IPV4: f"172.29.{n}.100", Family.IPV6: f"172:29:{n}::100"},
        {Family.IPV4: f"172.29.{n}.254", Family.IPV6: f"172:29:{n}::254"},
        {Family.IPV4: f"203.0.113.10{n}", Family.IPV6: f"203:0:113::10{n}"},
    )
    for n in (1, 2)
}

PAYLOAD: Final = bytes(range(200))

PACKAGES: Final = {"curl": "curl", "ethtool": "ethtool", "ip": "iproute2"}
"""The Debian package of each program."""

NAT: Final = """
table ip nat {{
    chain before {{
        type nat hook prerouting priority dstnat
        iifname "internet" udp dport {{ 3478, 49152-65535 }} dnat to {ip4}
    }}
    chain after {{ type nat hook postrouting priority srcnat; oifname "internet" masquerade; }}
}}
table ip6 nat {{
    chain before {{
        type nat hook prerouting priority dstnat
        iifname "internet" udp dport {{ 3478, 49152-65535 }} dnat to {ip6}
    }}
    chain after {{ type nat hook postrouting priority srcnat; oifname "internet" masquerade; }}
}}
"""


class _Loader(yaml.SafeLoader):
    """A loader that knows the tags of Docker Compose."""


_Loader.add_constructor("!reset", lambda *_: None)


def services() -> dict[str, dict[str, Any]]:
    loaded = yaml.load((TOP / "deploy" / "firezone-compose.yml").read_text(), _Loader)  # noqa: S506 - a safe loader
    found: dict[str, dict[str, Any]] = loaded["services"]
    return found


def script(service: dict[str, Any]) -> str:
    """Return the shell script of a service."""
    shell, flag, text = service["command"]
    assert (shell, flag) == ("sh", "-c")
    assert "$" not in text, "Compose would replace a variable"
    return str(text)


def programs(text: str) -> set[str]:
    """Return the programs of a shell script with one command per line."""
    words = [shlex.split(line.removeprefix("exec ")) for line in text.splitlines()]
    return {each[0] for each in words if each} - {"set"}


def test_the_override_replaces_both_relays_and_nothing_else() -> None:
    assert services().keys() == PLACES.keys()
    first, second = services().values()
    assert first | {"command": None} == second | {"command": None}
    assert script(first).replace(".1.", ".2.").replace(":1:", ":2:") == script(second)
    assert first["build"] is None, "the build of the Rust relay"
    assert first["pull_policy"] == "never"


@pytest.mark.parametrize("name", PLACES)
def test_the_image_has_the_programs_of_the_commands_and_of_the_health_check(name: str) -> None:
    dockerfile = (TOP / "Dockerfile").read_text()
    final = dockerfile.rpartition("\nFROM ")[2]
    installed = re.search(r"apt-get install --yes --no-install-recommends ([a-z0-9 ]+) &&", final)
    assert installed is not None
    needed = programs(script(services()[name])) | programs(HEALTH_CHECK)
    assert {PACKAGES[each] for each in needed - {"firezone-relay"}} == set(installed[1].split())
    assert re.search(r"(?m)^ENV PATH=/opt/firezone-relay/bin:\$PATH$", final)
    assert "python -m venv --without-pip /opt/firezone-relay" in dockerfile
    assert "ENTRYPOINT" not in final, "it would take the command for its arguments"
    assert re.search(r'(?m)^CMD \["firezone-relay"\]$', final)


def test_the_image_can_push_metrics() -> None:
    assert "ARG REQUIREMENTS=otlp\n" in (TOP / "Dockerfile").read_text()
    assert "opentelemetry-exporter-otlp-proto-grpc==" in (TOP / "requirements" / "otlp.txt").read_text()


class Network(NamedTuple):
    """The container, its router, and the machines of the public network, which are one machine here."""

    container: Host
    router: Host
    internet: Host


@pytest.fixture(params=PLACES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def network(name: str, object_file: bytes) -> Iterator[Network]:
    del object_file
    for program in ("ip", "nft", "curl", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"THE COMPOSE FILE IS NOT RUN: {program} is not installed (apt-get install iproute2 nftables curl)")
    if not HAS_IPV6:
        pytest.skip("THE COMPOSE FILE IS NOT RUN: this machine has no IPv6")
    place = PLACES[name]
    with contextlib.ExitStack() as stack:
        try:
            made = Network(Host(), Host(), Host())
        except OSError as error:
            pytest.skip(f"THE COMPOSE FILE IS NOT RUN: networks take root ({error.strerror})")
        for each in made:
            stack.callback(each.close)
            each.ip("link set lo up")
        connect(made.container, "eth0", made.router, "internal")
        connect(made.router, "internet", made.internet, "eth0")
        configure(made.container, "eth0", place.inside)
        configure(made.router, "internal", place.gateway)
        configure(made.router, "internet", place.public)
        configure(made.internet, "eth0", PORTAL, CLIENT, PEER)
        made.router.set_knob("ipv4/ip_forward", 1)
        made.router.set_knob("ipv6/conf/all/forwarding", 1)
        made.router.run("nft", "-f", "-", text=NAT.format(ip4=place.inside[Family.IPV4], ip6=place.inside[Family.IPV6]))
        wait_until_up(*made)
        yield made


@pytest.fixture
def portal(network: Network) -> Iterator[ScriptedPortal]:
    with contextlib.ExitStack() as stack:
        with network.internet.entered():
            made = stack.enter_context(ScriptedPortal(host=PORTAL[Family.IPV4], port=PORTAL_PORT))
        yield made


class Container:
    """A service of the compose file, without an engine: its environment, command, user and network."""

    def __init__(self, machine: Machine, name: str, folder: Path) -> None:
        service, place = services()[name], PLACES[name]
        programs_of_image = folder / "bin"
        programs_of_image.mkdir()
        self._write(programs_of_image / "firezone-relay", f'exec "{sys.executable}" -m relay "$@"')
        # Not everywhere installed. The links of these tests have complete checksums from the start.
        self._write(programs_of_image / "ethtool", f'echo "$@" >>{folder}/ethtool')
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{PORTAL[Family.IPV4]} portal\n")
        self._folder = folder
        self._machine = machine
        self._environment = {
            "PATH": f"{programs_of_image}:{os.environ['PATH']}",
            "PYTHONPATH": str(TOP),
            **ENVIRONMENT,
            "PUBLIC_IP4_ADDR": place.public[Family.IPV4],
            "PUBLIC_IP6_ADDR": place.public[Family.IPV6],
            **service["environment"],
            # An engine permits more descriptors than some machines of tests.
            "MAX_ALLOCATIONS": "2000",
        }
        # `extra_hosts` of Firezone's file.
        own_hosts = 'mount --bind "$0" /etc/hosts && exec "$@"'
        with (folder / "log").open("w") as log, machine.entered():
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", own_hosts, str(folder / "hosts"), *service["command"]],
                env=self._environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    @property
    def ethtool(self) -> str:
        """The arguments of ethtool."""
        return (self._folder / "ethtool").read_text()

    def is_healthy(self) -> bool:
        """Run the health check, as an engine would."""
        assert self.process.poll() is None, self.log
        with self._machine.entered():
            checked = subprocess.run(
                ["sh", "-c", HEALTH_CHECK], env=self._environment, capture_output=True, timeout=60, check=False
            )
        return checked.returncode == 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


@pytest.fixture
def container(network: Network, portal: ScriptedPortal, name: str, tmp_path: Path) -> Iterator[Container]:
    with contextlib.closing(Container(network.container, name, tmp_path)) as made:
        portal.wait_until_joined()
        yield made


def relay_packets(network: Network, portal: ScriptedPortal, public: str, family: Family) -> None:
    """Relay packets between a client and a peer on the public network, both ways, until the kernel relays them."""
    with network.internet.entered():
        client = TurnClient((public, 3478), portal.mint(f"salt of {family.name}"), CLIENT[family])
        peer = udp_socket(PEER[family])
    with client, peer:
        (relayed,) = client.allocate(family=family)
        assert relayed[0] == public
        host, port, *_ = peer.getsockname()
        assert client.bind_channel(0x4000, socket_address(host, port)) is None
        kernel = Offloading(network.container, ("127.0.0.1", 9999))
        before, until = kernel.counts(), time.monotonic() + WITHIN
        while not all(after > earlier for after, earlier in zip(kernel.counts()[:2], before[:2], strict=True)):
            assert time.monotonic() < until, f"the kernel does not relay: {kernel.state()}"
            client.send(0x4000, PAYLOAD)
            data, source = peer.recvfrom(len(PAYLOAD) + 1)
            assert (data, source[:2]) == (PAYLOAD, relayed[:2])
            peer.sendto(PAYLOAD, relayed[:2])
            assert client.receive() == (0x4000, PAYLOAD)


@needs_bpf
def test_the_relay_of_the_compose_file_relays(
    network: Network, portal: ScriptedPortal, container: Container, name: str
) -> None:
    wait_until(container.is_healthy)
    public = PLACES[name].public
    joined = portal.wait_until_joined()
    assert joined.headers["X-Authorization"] == f"Bearer {TOKEN}"
    assert (joined.query["ipv4"], joined.query["ipv6"]) == tuple(public.values())
    assert container.ethtool == "-K eth0 tx off\n"
    for family in Family:
        relay_packets(network, portal, public[family], family)
    # RUST_LOG is in force, and one line names the variables without effect.
    assert " DEBUG " in container.log
    assert len(re.findall("RUST_BACKTRACE", container.log)) == 1
    container.process.terminate()
    assert container.process.wait(STOP_TIMEOUT) == 0, container.log
    portal.wait_until_left()
    assert not container.log.count("Traceback"), container.log
