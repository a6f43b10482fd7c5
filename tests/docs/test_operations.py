"""The commands of the operations page work: its firewall rules accept relay traffic without tracking."""

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from relay.config import HIGHEST_PORT, LOWEST_PORT
from relay.core.addresses import Family
from tests.support.machine import Machine, new_machines, wait_until_up
from tests.support.metrics import TABLE
from tests.support.process import run
from tests.support.program import Program

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
FIREWALL, UNTRACKED = re.findall(r"```nft\n(.*?)```", PAGE.read_text(), re.DOTALL)
RELAY, CLIENT = "198.51.100.7", "198.51.100.50"
COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")

IPTABLES = [line for line in PAGE.read_text().splitlines() if line.startswith("iptables ")]


def program(name: str) -> str:
    """Find programs in directories of root's PATH."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"what the page says is not tried: {name} is NOT INSTALLED")
    return found


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """The machines of a relay and a client, connected by a link."""
    with new_machines(2) as (relay, client):
        relay.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", client.path)
        relay.configure(cable={Family.IPV4: RELAY})
        client.configure(cable={Family.IPV4: CLIENT})
        wait_until_up(relay, client)
        yield relay, client


def test_the_nftables_rules_accept_relay_traffic_untracked(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    relay, client = machines
    secret = tmp_path / "secret"
    secret.write_text("of the firewall")

    def tracked() -> int:
        with relay.entered():
            return int(COUNT.read_text())

    def probe() -> None:
        with client.entered():
            done = run("probe", RELAY, "--relay-secret-file", str(secret), "--count", "5")
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


def test_iptables_accepts_the_iptables_rules(machines: tuple[Machine, Machine]) -> None:
    relay, _ = machines
    assert len(IPTABLES) == 8
    for line in IPTABLES:
        _, *arguments = shlex.split(line)
        relay.run(program("iptables"), *arguments)


def test_all_rule_sets_use_the_relays_ports() -> None:
    ranges = re.findall(r"\b3478, ?(\d+)[-:](\d+)", PAGE.read_text())
    assert len(ranges) == 6
    assert set(ranges) == {(str(LOWEST_PORT), str(HIGHEST_PORT))}


def test_the_documented_alerts_and_their_metrics_exist() -> None:
    rows = re.findall(r"^\| (Relay[^|]+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    rules = yaml.safe_load((PAGE.parents[1] / "deploy" / "prometheus-rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    assert {name for names, _ in rows for name in names.split(", ")} == alerts
    assert {name for _, metrics in rows for name in re.findall(r"`([a-z_.]+)`", metrics)} <= {each.name for each in TABLE}
