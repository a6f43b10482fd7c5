"""The systemd unit is valid, and its limits fit the relay."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from relay.cli import EXIT_USAGE
from relay.config import Config
from relay.ops.kernel_settings import findings
from relay.ops.machine import OTHER_DESCRIPTORS
from relay.system.shutdown import STOP_TIMEOUT

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "firezone-relay.service"
OFFLOAD = DEPLOY / "firezone-relay-offload.conf"

LARGEST = Config(public_ip4=IPv4Address("192.0.2.1"), public_ip6=IPv6Address("2001:db8::1"))
"""The relay with the most allocations, on both families."""


def settings(text: str) -> dict[str, list[str]]:
    """Parse a unit. configparser does not support repeated keys."""
    found = defaultdict(list)
    for line in text.splitlines():
        if "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            found[key.strip()].append(value.strip())
    return found


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    return settings(UNIT.read_text())


def one(unit: dict[str, list[str]], key: str) -> str:
    (value,) = unit[key]
    return value


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("offload", [False, True])
def test_systemd_analyze_reports_no_problem(tmp_path: Path, *, offload: bool) -> None:
    copy = tmp_path / UNIT.name
    if offload:
        drop_in = tmp_path / f"{UNIT.name}.d" / "offload.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(OFFLOAD.read_text())
    # The program is not installed at the unit's path.
    copy.write_text(re.sub(r"(?m)^(Exec(Start|Reload))=.*", rf"\1={sys.executable}", UNIT.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_descriptor_limit_fits_all_allocations(unit: dict[str, list[str]]) -> None:
    needed = LARGEST.capacity * len(LARGEST.public_hosts) + OTHER_DESCRIPTORS
    assert needed <= int(one(unit, "LimitNOFILE"))


def test_the_thread_limit_fits_all_allocations_and_some_ending_threads(unit: dict[str, list[str]]) -> None:
    assert LARGEST.capacity + 1000 <= int(one(unit, "TasksMax"))


def test_the_stop_timeout_covers_a_stop_without_a_drain(unit: dict[str, list[str]]) -> None:
    assert int(one(unit, "TimeoutStopSec").removesuffix("s")) >= STOP_TIMEOUT


def test_a_usage_error_is_not_retried(unit: dict[str, list[str]]) -> None:
    assert str(EXIT_USAGE) in one(unit, "RestartPreventExitStatus").split()


def test_the_token_is_read_from_the_systemd_credential(unit: dict[str, list[str]]) -> None:
    name, _, path = one(unit, "LoadCredential").partition(":")
    assert f"FIREZONE_TOKEN=%d/{name}" in unit["Environment"]
    assert path.startswith("/")


def test_the_log_goes_to_the_journal_and_standard_output_does_not(unit: dict[str, list[str]]) -> None:
    # The default for standard error is the target of standard output.
    assert (one(unit, "StandardOutput"), one(unit, "StandardError")) == ("null", "journal")


def test_the_sysctl_file_fixes_all_warnings_of_a_default_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysctl = settings((DEPLOY / "firezone-relay.sysctl.conf").read_text())
    ephemeral = tmp_path / "proc/sys/net/ipv4/ip_local_port_range"
    ephemeral.parent.mkdir(parents=True)
    ephemeral.write_text("32768\t60999\n")
    monkeypatch.setattr("relay.ops.kernel_settings.user_threads", lambda: None)
    asked = dict(found.mend.removeprefix("sysctl -w ").split("=") for found in findings(LARGEST, 212_992, tmp_path))
    assert {key: one(sysctl, key) for key in sysctl} == asked


def test_the_relay_can_read_the_kernel_settings(unit: dict[str, list[str]]) -> None:
    """``ProcSubset=pid`` hides /proc/sys, and the relay would not warn."""
    assert "ProcSubset" not in unit
    assert one(unit, "ProtectKernelTunables") == "yes"


def test_the_offload_capabilities_match_the_relays_requirements() -> None:
    drop_in = settings(OFFLOAD.read_text())
    (bounding,), (ambient,) = drop_in["CapabilityBoundingSet"], drop_in["AmbientCapabilities"]
    assert set(bounding.split()) == set(ambient.split()) == {"CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"}
    assert drop_in["PrivateUsers"] == ["no"], "capabilities of a user namespace are none over the machine's network"
    assert drop_in["SystemCallFilter"] == ["bpf capset"], "both are in what the unit forbids, @privileged"
