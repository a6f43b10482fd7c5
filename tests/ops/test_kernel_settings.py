"""Startup warnings about kernel settings that will cause problems, with the command that fixes each."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from relay.config import Config
from relay.net.udp import RECEIVE_BUFFER
from relay.ops.kernel_settings import Finding, findings
from tests.support.machine import Machine, new_machines
from tests.support.program import Program

FULL = Config(public_ip4=IPv4Address("192.0.2.1"))
"""A relay with as many allocations as there are ports: 16,384."""

SMALL = replace(FULL, max_allocations=1000)

UNIT_LIMIT = "sys/fs/cgroup/system.slice/firezone-relay.service"

COMMON = {
    "proc/loadavg": "0.20 0.18 0.12 1/300 11206",
    "kernel.pid_max": "4194304",
    "kernel.threads-max": "62000",
    "vm.max_map_count": "65530",
    "proc/self/cgroup": "0::/system.slice/firezone-relay.service",
    f"{UNIT_LIMIT}/pids.max": "20000",
    f"{UNIT_LIMIT}/pids.current": "1",
    "net.ipv4.ip_local_port_range": "32768\t60999",
    "net.ipv4.ip_local_reserved_ports": "49152-65535",
    "net.netfilter.nf_conntrack_count": "500",
    "net.netfilter.nf_conntrack_max": "262144",
}
"""A machine of 8 GiB with the project's unit and sysctl file: files, and settings by name."""


class MachineFiles:
    """Files of a machine, in a directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._monkeypatch = monkeypatch
        self.limit_user(31_000)

    def limit_user(self, threads: int | None) -> None:
        self._monkeypatch.setattr("relay.ops.kernel_settings.user_threads", lambda: threads)

    def findings(
        self, differences: Mapping[str, str], config: Config = FULL, *, receive_buffer: int = RECEIVE_BUFFER
    ) -> list[Finding]:
        """Return the warnings for a machine with some differences from the common machine."""
        for name, text in {**COMMON, **differences}.items():
            path = self.root / (name if "/" in name else f"proc/sys/{name.replace('.', '/')}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return list(findings(config, receive_buffer, self.root))

    def finding(self, differences: Mapping[str, str], config: Config = FULL) -> Finding:
        """Return the only warning."""
        (found,) = self.findings(differences, config)
        return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineFiles:
    return MachineFiles(tmp_path, monkeypatch)


def test_a_tuned_machine_causes_no_warning(machine: MachineFiles) -> None:
    assert machine.findings({}) == []


def test_missing_files_cause_no_warning(machine: MachineFiles) -> None:
    """A sandbox may hide all files."""
    machine.limit_user(None)
    assert list(findings(FULL, RECEIVE_BUFFER, machine.root)) == []


def test_the_fix_for_rmem_max_is_the_requested_buffer(machine: MachineFiles) -> None:
    (found,) = machine.findings({}, receive_buffer=212_992)
    assert found.has == "212992"
    assert found.mend == f"sysctl -w net.core.rmem_max={RECEIVE_BUFFER}"


def test_thread_limits_count_all_threads_of_the_machine(machine: MachineFiles) -> None:
    needed = 16_384 + 80

    def load(threads: int) -> dict[str, str]:
        return {"kernel.pid_max": "32768", "proc/loadavg": f"0.20 0.18 0.12 1/{threads} 11206"}

    assert machine.findings(load(32_768 - needed)) == []
    found = machine.finding(load(32_768 - needed + 1))
    assert (found.setting, found.needs) == ("kernel.pid_max", "32769")
    assert found.mend == "sysctl -w kernel.pid_max=4194304"
    found = machine.finding({"kernel.threads-max": "15700"})
    assert (found.setting, found.needs) == ("kernel.threads-max", f"{needed + 300}")
    assert found.mend == "sysctl -w kernel.threads-max=21000"


def test_the_fix_for_rlimit_nproc_is_ulimit_or_the_unit(machine: MachineFiles) -> None:
    machine.limit_user(4096)
    found = machine.finding({})
    assert (found.setting, found.has) == ("RLIMIT_NPROC", "4096")
    assert found.mend == "ulimit -u 20000  # or LimitNPROC=20000 in the unit"
    assert machine.findings({}, SMALL) == []


def test_max_map_count_includes_maps_of_threads(machine: MachineFiles) -> None:
    assert machine.finding({"vm.max_map_count": "32768"}).mend == "sysctl -w vm.max_map_count=61000"


def test_the_fix_for_a_units_pids_limit_is_tasks_max(machine: MachineFiles) -> None:
    found = machine.finding({f"{UNIT_LIMIT}/pids.max": "4915"})
    assert (found.setting, found.has) == (f"{machine.root}/{UNIT_LIMIT}/pids.max", "4915")
    assert found.mend == "systemctl set-property firezone-relay.service TasksMax=20000"


def test_the_pids_limit_counts_existing_threads_of_the_cgroup(machine: MachineFiles) -> None:
    needed = 16_384 + 80
    limit = {f"{UNIT_LIMIT}/pids.max": f"{needed + 10}"}
    assert machine.findings({**limit, f"{UNIT_LIMIT}/pids.current": "10"}) == []
    assert machine.finding({**limit, f"{UNIT_LIMIT}/pids.current": "11"}).needs == f"{needed + 11}"


def test_the_fix_for_a_containers_pids_limit_is_outside(machine: MachineFiles) -> None:
    mend = machine.finding({"proc/self/cgroup": "0::/", "sys/fs/cgroup/pids.max": "1024"}).mend
    assert mend.startswith(f"echo 20000 >{machine.root}/sys/fs/cgroup/pids.max")
    assert "--pids-limit 20000" in mend
    assert "podPidsLimit" in mend


@pytest.mark.parametrize(
    "differences",
    [
        {"kernel.pid_max": "8000"},
        {"kernel.threads-max": "8000"},
        {"vm.max_map_count": "8000"},
        {f"{UNIT_LIMIT}/pids.max": "8000"},
        {"net.ipv4.ip_local_reserved_ports": ""},
        {"net.netfilter.nf_conntrack_max": "8000"},
    ],
)
def test_a_small_relay_gets_no_warning_for_limits_of_a_full_relay(
    machine: MachineFiles, differences: dict[str, str]
) -> None:
    assert machine.finding(differences)
    assert machine.findings(differences, SMALL) == []


@pytest.mark.parametrize(
    ("local", "reserved", "command"),
    [
        ("32768 60999", "", "sysctl -w net.ipv4.ip_local_reserved_ports=49152-65535"),
        ("32768 60999", "8080,9148", "sysctl -w net.ipv4.ip_local_reserved_ports=8080,9148,49152-65535"),
        ("32768 60999", "49000-49151,50000-51000", "sysctl -w net.ipv4.ip_local_reserved_ports=49000-65535"),
        ("1024 65535", "49152-65534", "sysctl -w net.ipv4.ip_local_reserved_ports=49152-65535"),
        # Reserving nearly all of the range would leave other programs without ports.
        ("49152 65535", "", "sysctl -w net.ipv4.ip_local_port_range='32768 49151'"),
        ("48000 65535", "", "sysctl -w net.ipv4.ip_local_port_range='32768 49151'"),
    ],
)
def test_the_fix_for_an_overlapping_ephemeral_range_excludes_relay_ports(
    machine: MachineFiles, local: str, reserved: str, command: str
) -> None:
    found = machine.finding(
        {"net.ipv4.ip_local_port_range": local.replace(" ", "\t"), "net.ipv4.ip_local_reserved_ports": reserved}
    )
    assert (found.has, found.needs) == (local, "none of 49152-65535")
    assert shlex.split(found.mend) == shlex.split(command)


def test_the_ephemeral_range_moves_to_the_larger_free_range(machine: MachineFiles) -> None:
    low = replace(FULL, lowest_port=2000, highest_port=3000)
    found = machine.finding({"net.ipv4.ip_local_port_range": "2000 3000", "net.ipv4.ip_local_reserved_ports": ""}, low)
    assert shlex.split(found.mend)[-1] == "net.ipv4.ip_local_port_range=3001 19384"


def test_an_overlap_with_enough_free_ports_causes_no_warning(machine: MachineFiles) -> None:
    contested = {"net.ipv4.ip_local_reserved_ports": ""}
    outside = 65536 - 61000
    assert machine.findings(contested, replace(FULL, max_allocations=outside)) == []
    assert machine.findings(contested, replace(FULL, max_allocations=outside + 1)) != []


def test_a_small_conntrack_table_matters_only_with_tracked_connections(machine: MachineFiles) -> None:
    unused = {"net.netfilter.nf_conntrack_count": "0", "net.netfilter.nf_conntrack_max": "4096"}
    assert machine.findings(unused) == []
    found = machine.finding({"net.netfilter.nf_conntrack_max": "65536"})
    assert found.needs == f"{500 + 4 * 16_384}"
    assert found.mend == "sysctl -w net.netfilter.nf_conntrack_max=80000"


@pytest.mark.parametrize(
    ("groups", "limits", "tightest", "limit"),
    [
        (
            "0::/system.slice/relay.service",
            {"system.slice/relay.service": "10000", "system.slice": "max"},
            "relay.service",
            10_000,
        ),
        (
            "0::/system.slice/relay.service",
            {"system.slice/relay.service": "10000", "system.slice": "900"},
            "system.slice",
            900,
        ),
        # The host's path inside a container, where the container's cgroup is mounted at the root.
        ("0::/kubepods/pod1/abc", {".": "1024"}, "cgroup", 1024),
        ("0::/", {".": "1024"}, "cgroup", 1024),
        ("9:name=systemd:/\n8:pids:/docker/abc\n0::/", {"pids/docker/abc": "1024", "pids": "max"}, "abc", 1024),
    ],
)
def test_the_cgroup_with_the_lowest_pids_limit_applies(
    machine: MachineFiles, groups: str, limits: dict[str, str], tightest: str, limit: int
) -> None:
    files = {f"sys/fs/cgroup/{name}/pids.max": text for name, text in limits.items()}
    used = {f"sys/fs/cgroup/{name}/pids.current": "7" for name in limits}
    found = machine.finding({"proc/self/cgroup": groups, **files, **used})
    assert Path(found.setting).parent.name == tightest
    assert (found.has, found.needs) == (f"{limit}", f"{16_384 + 80 + 7}")


@pytest.mark.skipif(os.geteuid() != 0, reason="who is no root can't become another user")
def test_rlimit_nproc_does_not_apply_to_root() -> None:
    code = """
import os, resource
from relay.ops.kernel_settings import user_threads
resource.setrlimit(resource.RLIMIT_NPROC, (4096, 8192))
print(user_threads())
os.seteuid(65534)
print(user_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["None", "4096"]


@pytest.fixture
def network() -> Iterator[Machine]:
    """A network namespace with the default ephemeral port range."""
    with new_machines(1) as (made,):
        made.configure()
        made.run("sysctl", "-w", "net.ipv4.ip_local_port_range=32768 60999", "net.ipv4.ip_local_reserved_ports=8080")
        yield made


def test_the_suggested_command_removes_the_warning(network: Machine) -> None:
    """Run the program with the kernel's default settings, before and after the suggested command."""

    def commands(allocations: int) -> list[str]:
        with network.entered():
            program = Program("--log-format", "json", "--max-allocations", f"{allocations}", hosts=("127.0.0.1",))
        with closing(program):
            program.wait_until_ready()
            assert program.stop() == 0
            lines = [json.loads(line) for line in program.log.splitlines()]
        return [line["mend"] for line in lines if str(line.get("setting", "")).startswith("net.ipv4")]

    assert commands(4000) == []
    (mend,) = commands(16_384)
    assert mend == "sysctl -w net.ipv4.ip_local_reserved_ports=8080,49152-65535"
    network.run(*shlex.split(mend))
    assert commands(16_384) == []
