"""The systemd unit: systemd understands it, and its numbers are those that the relay needs."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from relay.actors.departure import STOP_TIMEOUT
from relay.cli import BAD_USE
from relay.config import Config
from relay.ops.kernel_settings import Machine, findings
from relay.ops.machine import OTHER_DESCRIPTORS

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "firezone-relay.service"
OFFLOAD = DEPLOY / "firezone-relay-offload.conf"

LARGEST = Config(public_ip4=IPv4Address("192.0.2.1"), public_ip6=IPv6Address("2001:db8::1"))
"""The relay with the most allocations, on both families."""


def settings(text: str) -> dict[str, list[str]]:
    """Read a unit: a key can be there more than once, and configparser does not know that."""
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
def test_systemd_has_nothing_to_say_about_it(tmp_path: Path, *, offload: bool) -> None:
    copy = tmp_path / UNIT.name
    if offload:
        drop_in = tmp_path / f"{UNIT.name}.d" / "offload.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(OFFLOAD.read_text())
    # The program is not installed where the unit has it.
    copy.write_text(re.sub(r"(?m)^ExecStart=.*", f"ExecStart={sys.executable}", UNIT.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_there_are_descriptors_for_all_allocations_on_both_families(unit: dict[str, list[str]]) -> None:
    needed = LARGEST.capacity * len(LARGEST.public_hosts) + OTHER_DESCRIPTORS
    assert needed <= int(one(unit, "LimitNOFILE"))


def test_there_are_threads_for_all_allocations_and_some_that_are_just_ending(unit: dict[str, list[str]]) -> None:
    assert LARGEST.capacity + 1000 <= int(one(unit, "TasksMax"))


def test_a_stop_without_a_drain_is_waited_for_even_if_nobody_asks(unit: dict[str, list[str]]) -> None:
    assert int(one(unit, "TimeoutStopSec").removesuffix("s")) >= STOP_TIMEOUT


def test_bad_use_is_not_tried_again(unit: dict[str, list[str]]) -> None:
    assert str(BAD_USE) in one(unit, "RestartPreventExitStatus").split()


def test_the_token_is_looked_for_where_systemd_puts_it(unit: dict[str, list[str]]) -> None:
    name, _, path = one(unit, "LoadCredential").partition(":")
    assert f"FIREZONE_TOKEN=%d/{name}" in unit["Environment"]
    assert path.startswith("/")


def test_the_log_is_kept_and_what_is_printed_is_not(unit: dict[str, list[str]]) -> None:
    # Unset, standard error goes where standard output goes.
    assert (one(unit, "StandardOutput"), one(unit, "StandardError")) == ("null", "journal")


def test_the_kernel_is_told_what_the_relay_would_say_on_a_fresh_machine() -> None:
    sysctl = settings((DEPLOY / "firezone-relay.sysctl.conf").read_text())
    fresh = Machine(receive_buffer=212_992, local_ports=range(32768, 61000))
    asked = dict(found.mend.removeprefix("sysctl -w ").split("=") for found in findings(LARGEST, fresh))
    assert {key: one(sysctl, key) for key in sysctl} == asked


def test_the_relay_sees_the_settings_that_it_warns_of(unit: dict[str, list[str]]) -> None:
    """With ``ProcSubset=pid`` there is no /proc/sys, and all would look well."""
    assert "ProcSubset" not in unit
    assert one(unit, "ProtectKernelTunables") == "yes"


def test_what_it_may_do_to_relay_in_the_kernel_is_what_the_relay_asks_for() -> None:
    drop_in = settings(OFFLOAD.read_text())
    (bounding,), (ambient,) = drop_in["CapabilityBoundingSet"], drop_in["AmbientCapabilities"]
    assert set(bounding.split()) == set(ambient.split()) == {"CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"}
    assert drop_in["PrivateUsers"] == ["no"], "capabilities of a user namespace are none over the machine's network"
    assert drop_in["SystemCallFilter"] == ["bpf capset"], "both are in what the unit forbids, @privileged"
