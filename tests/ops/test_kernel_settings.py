"""Startup warnings about kernel settings that will cause problems, with the command that fixes each."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from relay.config import Config
from relay.net.udp import RECEIVE_BUFFER
from relay.ops.kernel_settings import Finding, Machine, TaskLimit, findings, read_machine
from tests.support.machine import Machine as Network
from tests.support.program import Program

FULL = Config(public_ip4=IPv4Address("192.0.2.1"))
"""A relay with as many allocations as there are ports: 16,384."""

SMALL = replace(FULL, max_allocations=1000)

COMMON = Machine(
    receive_buffer=RECEIVE_BUFFER,
    tasks=300,
    pid_max=4_194_304,
    threads_max=62_000,
    user_threads=31_000,
    max_map_count=65_530,
    task_limit=TaskLimit("/sys/fs/cgroup/system.slice/firezone-relay.service/pids.max", 20_000, 1),
    local_ports=range(32768, 61000),
    reserved_ports=(range(49152, 65536),),
    tracked=500,
    most_tracked=262_144,
)
"""A machine of 8 GiB with the project's unit and sysctl file."""


def finding(config: Config = FULL, **differences: object) -> Finding:
    """Return the only warning for a machine with some differences from the common machine."""
    (found,) = findings(config, replace(COMMON, **differences))  # type: ignore[arg-type]
    return found


def test_a_tuned_machine_causes_no_warning() -> None:
    assert list(findings(FULL, COMMON)) == []


def test_an_unreadable_setting_causes_no_warning() -> None:
    assert list(findings(FULL, Machine())) == []


def test_the_fix_for_rmem_max_is_the_requested_buffer() -> None:
    found = finding(receive_buffer=212_992)
    assert found.has == "212992"
    assert found.mend == f"sysctl -w net.core.rmem_max={RECEIVE_BUFFER}"


def test_thread_limits_count_all_threads_of_the_machine() -> None:
    needed = 16_384 + 80
    assert list(findings(FULL, replace(COMMON, pid_max=32_768, tasks=32_768 - needed))) == []
    found = finding(pid_max=32_768, tasks=32_768 - needed + 1)
    assert (found.setting, found.needs) == ("kernel.pid_max", "32769")
    assert found.mend == "sysctl -w kernel.pid_max=4194304"
    found = finding(threads_max=15_700)
    assert (found.setting, found.needs) == ("kernel.threads-max", f"{needed + 300}")
    assert found.mend == "sysctl -w kernel.threads-max=21000"


def test_the_fix_for_rlimit_nproc_is_ulimit_or_the_unit() -> None:
    found = finding(user_threads=4096)
    assert (found.setting, found.has) == ("RLIMIT_NPROC", "4096")
    assert found.mend == "ulimit -u 20000  # or LimitNPROC=20000 in the unit"


def test_max_map_count_includes_maps_of_threads() -> None:
    assert finding(max_map_count=32_768).mend == "sysctl -w vm.max_map_count=61000"


def test_the_fix_for_a_units_pids_limit_is_tasks_max() -> None:
    file = "/sys/fs/cgroup/system.slice/firezone-relay.service/pids.max"
    found = finding(task_limit=TaskLimit(file, 4915, 3))
    assert (found.setting, found.has) == (file, "4915")
    assert found.mend == "systemctl set-property firezone-relay.service TasksMax=20000"


def test_the_pids_limit_counts_existing_threads_of_the_cgroup() -> None:
    needed = 16_384 + 80
    file = "/sys/fs/cgroup/pids.max"
    assert list(findings(FULL, replace(COMMON, task_limit=TaskLimit(file, needed + 10, 10)))) == []
    assert finding(task_limit=TaskLimit(file, needed + 10, 11)).needs == f"{needed + 11}"


def test_the_fix_for_a_containers_pids_limit_is_outside() -> None:
    mend = finding(task_limit=TaskLimit("/sys/fs/cgroup/pids.max", 1024, 3)).mend
    assert mend.startswith("echo 20000 >/sys/fs/cgroup/pids.max")
    assert "--pids-limit 20000" in mend
    assert "podPidsLimit" in mend


@pytest.mark.parametrize(
    "differences",
    [
        {"pid_max": 8000},
        {"threads_max": 8000},
        {"user_threads": 8000},
        {"max_map_count": 8000},
        {"task_limit": TaskLimit("/sys/fs/cgroup/pids.max", 8000, 5)},
        {"local_ports": range(32768, 61000), "reserved_ports": ()},
        {"most_tracked": 8000},
    ],
)
def test_a_small_relay_gets_no_warning_for_limits_of_a_full_relay(differences: dict[str, object]) -> None:
    assert finding(FULL, **differences)
    assert list(findings(SMALL, replace(COMMON, **differences))) == []  # type: ignore[arg-type]


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
def test_the_fix_for_an_overlapping_ephemeral_range_excludes_relay_ports(local: str, reserved: str, command: str) -> None:
    first, last = map(int, local.split())
    ranges = tuple(
        range(int(ends[0]), int(ends[-1]) + 1) for ends in (each.split("-") for each in reserved.split(",")) if ends[0]
    )
    found = finding(local_ports=range(first, last + 1), reserved_ports=ranges)
    assert found.has == local
    assert shlex.split(found.mend) == shlex.split(command)


def test_the_ephemeral_range_moves_to_the_larger_free_range() -> None:
    low = replace(FULL, lowest_port=2000, highest_port=3000)
    found = finding(low, local_ports=range(2000, 3001), reserved_ports=())
    assert shlex.split(found.mend)[-1] == "net.ipv4.ip_local_port_range=3001 19384"


def test_an_overlap_with_enough_free_ports_causes_no_warning() -> None:
    contested = replace(COMMON, reserved_ports=())
    outside = 65536 - 61000
    assert list(findings(replace(FULL, max_allocations=outside), contested)) == []
    assert list(findings(replace(FULL, max_allocations=outside + 1), contested)) != []


def test_a_small_conntrack_table_matters_only_with_tracked_connections() -> None:
    assert list(findings(FULL, replace(COMMON, most_tracked=4096, tracked=0))) == []
    found = finding(most_tracked=65_536)
    assert found.needs == f"{500 + 4 * 16_384}"
    assert found.mend == "sysctl -w net.netfilter.nf_conntrack_max=80000"


def test_settings_are_read_from_proc(tmp_path: Path) -> None:
    for name, text in {
        "proc/loadavg": "0.20 0.18 0.12 1/80 11206",
        "proc/sys/kernel/pid_max": "32768",
        "proc/sys/kernel/threads-max": "15701",
        "proc/sys/vm/max_map_count": "65530",
        "proc/sys/net/ipv4/ip_local_port_range": "32768\t60999",
        "proc/sys/net/ipv4/ip_local_reserved_ports": "8080,49152-65535",
        "proc/sys/net/netfilter/nf_conntrack_max": "262144",
        "proc/sys/net/netfilter/nf_conntrack_count": "17",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    machine = read_machine(4096, tmp_path)
    assert replace(machine, user_threads=None) == Machine(
        receive_buffer=4096,
        tasks=80,
        pid_max=32768,
        threads_max=15701,
        max_map_count=65530,
        local_ports=range(32768, 61000),
        reserved_ports=(range(8080, 8081), range(49152, 65536)),
        tracked=17,
        most_tracked=262144,
    )


@pytest.mark.parametrize(
    ("groups", "limits", "tightest", "limit"),
    [
        (
            "0::/system.slice/relay.service",
            {"system.slice/relay.service": "20000", "system.slice": "max"},
            "relay.service",
            20_000,
        ),
        (
            "0::/system.slice/relay.service",
            {"system.slice/relay.service": "20000", "system.slice": "900"},
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
    tmp_path: Path, groups: str, limits: dict[str, str], tightest: str, limit: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    for name, text in limits.items():
        group = tmp_path / "sys/fs/cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "pids.max").write_text(f"{text}\n")
        (group / "pids.current").write_text("7\n")
    found = read_machine(4096, tmp_path).task_limit
    assert found is not None
    assert Path(found.file).parent.name == tightest
    assert (found.limit, found.used) == (limit, 7)


@pytest.mark.skipif(os.geteuid() != 0, reason="who is no root can't become another user")
def test_rlimit_nproc_does_not_apply_to_root() -> None:
    code = """
import os, resource
from relay.ops.kernel_settings import read_machine
resource.setrlimit(resource.RLIMIT_NPROC, (4096, 8192))
print(read_machine(1).user_threads)
os.seteuid(65534)
print(read_machine(1).user_threads)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["None", "4096"]


def test_missing_files_cause_no_warning(tmp_path: Path) -> None:
    """A sandbox may hide all files."""
    machine = read_machine(RECEIVE_BUFFER, tmp_path)
    assert replace(machine, user_threads=None) == Machine()


@pytest.fixture
def network() -> Iterator[Network]:
    """A network namespace with the default ephemeral port range."""
    try:
        made = Network()
    except OSError as error:
        pytest.skip(f"no network of its own can be made here: {error}")
    with closing(made):
        made.configure()
        made.run("sysctl", "-w", "net.ipv4.ip_local_port_range=32768 60999", "net.ipv4.ip_local_reserved_ports=8080")
        yield made


def test_the_suggested_command_removes_the_warning(network: Network) -> None:
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
