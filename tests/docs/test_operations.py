"""What the page about operating says to type works: its firewalls let in what the relay needs, and track none of it."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from relay.config import HIGHEST_PORT, LOWEST_PORT
from relay.core.addresses import Family
from relay.ops.metrics.table import TABLE
from tests.interop.conftest import Program
from tests.machine import Machine

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
FIREWALL, UNTRACKED = re.findall(r"```nft\n(.*?)```", PAGE.read_text(), re.DOTALL)
RELAY, CLIENT = "198.51.100.7", "198.51.100.50"
COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")

IPTABLES = [line for line in PAGE.read_text().splitlines() if line.startswith("iptables ")]


def program(name: str) -> str:
    """Find what is in places that only root looks into."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"what the page says is not tried: {name} is NOT INSTALLED")
    return found


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """A relay's machine and a client's, with a cable in between."""
    with contextlib.ExitStack() as stack:
        try:
            relay, client = (stack.enter_context(contextlib.closing(Machine())) for _ in range(2))
        except OSError as error:
            pytest.skip(f"no networks of their own can be made here: {error}")
        relay.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", client.path)
        relay.configure(cable={Family.IPV4: RELAY})
        client.configure(cable={Family.IPV4: CLIENT})
        yield relay, client


def test_its_firewall_lets_in_what_a_client_and_its_peer_send_and_none_of_it_is_tracked(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    relay, client = machines
    secret = tmp_path / "secret"
    secret.write_text("of the firewall")

    def tracked() -> int:
        with relay.entered():
            return int(COUNT.read_text())

    def probe() -> None:
        command = [sys.executable, "-m", "relay", "probe", RELAY, "--relay-secret-file", str(secret), "--count", "5"]
        with client.entered():
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "to peer 5/5, to client 5/5" in done.stdout

    relay.run(program("nft"), "-f", "-", text=FIREWALL)
    with relay.entered():
        started = Program("--relay-secret-file", str(secret), hosts=(RELAY,))
    with contextlib.closing(started):
        started.wait_until_ready()
        probe()
        before = tracked()
        assert before > 0, "by default, they are"
        relay.run(program("nft"), "-f", "-", text=UNTRACKED)
        probe()
        assert tracked() <= before


def test_iptables_takes_the_other_form_of_it(machines: tuple[Machine, Machine]) -> None:
    relay, _ = machines
    assert len(IPTABLES) == 8
    for line in IPTABLES:
        _, *arguments = shlex.split(line)
        relay.run(program("iptables"), *arguments)


def test_all_forms_name_the_ports_that_the_relay_has() -> None:
    ranges = re.findall(r"\b3478, ?(\d+)[-:](\d+)", PAGE.read_text())
    assert len(ranges) == 6
    assert set(ranges) == {(str(LOWEST_PORT), str(HIGHEST_PORT))}


def test_the_alerts_are_those_that_there_are_and_their_metrics_exist() -> None:
    rows = re.findall(r"^\| (Relay[^|]+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    rules = yaml.safe_load((PAGE.parents[1] / "deploy" / "prometheus-rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    assert {name for names, _ in rows for name in names.split(", ")} == alerts
    assert {name for _, metrics in rows for name in re.findall(r"`([a-z_.]+)`", metrics)} <= {each.name for each in TABLE}
