"""Settings of the machine that would bite are said at the start, with a command that mends them; no others are."""

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
from tests.interop.conftest import Program
from tests.machine import Machine as Network

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
    """Give the one thing that is said of a machine that differs from the common one."""
    (found,) = findings(config, replace(COMMON, **differences))  # type: ignore[arg-type]
    return found


def test_a_machine_that_was_set_up_is_not_spoken_of() -> None:
    assert findings(FULL, COMMON) == []


def test_what_can_not_be_read_is_not_spoken_of() -> None:
    assert findings(FULL, Machine()) == []


def test_a_small_receive_buffer_is_mended_by_the_value_that_the_relay_asks_for() -> None:
    found = finding(receive_buffer=212_992)
    assert found.has == "212992"
    assert found.mend == f"sysctl -w net.core.rmem_max={RECEIVE_BUFFER}"


def test_threads_of_the_whole_machine_count() -> None:
    needed = 16_384 + 64
    assert findings(FULL, replace(COMMON, pid_max=32_768, tasks=32_768 - needed)) == []
    found = finding(pid_max=32_768, tasks=32_768 - needed + 1)
    assert (found.setting, found.needs) == ("kernel.pid_max", "32769")
    assert found.mend == "sysctl -w kernel.pid_max=4194304"
    found = finding(threads_max=15_700)
    assert (found.setting, found.needs) == ("kernel.threads-max", f"{needed + 300}")
    assert found.mend == "sysctl -w kernel.threads-max=21000"


def test_a_users_limit_on_threads_is_mended_by_the_shell_or_the_unit() -> None:
    found = finding(user_threads=4096)
    assert (found.setting, found.has) == ("RLIMIT_NPROC", "4096")
    assert found.mend == "ulimit -u 20000  # or LimitNPROC=20000 in the unit"


def test_memory_maps_of_threads_are_counted() -> None:
    assert finding(max_map_count=32_768).mend == "sysctl -w vm.max_map_count=61000"


def test_a_units_limit_on_threads_is_mended_by_systemd() -> None:
    file = "/sys/fs/cgroup/system.slice/firezone-relay.service/pids.max"
    found = finding(task_limit=TaskLimit(file, 4915, 3))
    assert (found.setting, found.has) == (file, "4915")
    assert found.mend == "systemctl set-property firezone-relay.service TasksMax=20000"


def test_threads_that_the_control_group_has_already_count() -> None:
    needed = 16_384 + 64
    file = "/sys/fs/cgroup/pids.max"
    assert findings(FULL, replace(COMMON, task_limit=TaskLimit(file, needed + 10, 10))) == []
    assert finding(task_limit=TaskLimit(file, needed + 10, 11)).needs == f"{needed + 11}"


def test_a_containers_limit_on_threads_is_mended_from_outside() -> None:
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
def test_what_bites_a_full_relay_only_is_not_said_to_a_small_one(differences: dict[str, object]) -> None:
    assert finding(FULL, **differences)
    assert findings(SMALL, replace(COMMON, **differences)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("local", "reserved", "command"),
    [
        ("32768 60999", "", "sysctl -w net.ipv4.ip_local_reserved_ports=49152-65535"),
        ("32768 60999", "8080,9148", "sysctl -w net.ipv4.ip_local_reserved_ports=8080,9148,49152-65535"),
        ("32768 60999", "49000-49151,50000-51000", "sysctl -w net.ipv4.ip_local_reserved_ports=49000-65535"),
        ("1024 65535", "49152-65534", "sysctl -w net.ipv4.ip_local_reserved_ports=49152-65535"),
        # To take out what is all they have, or nearly, would leave other programs without ports.
        ("49152 65535", "", "sysctl -w net.ipv4.ip_local_port_range='32768 49151'"),
        ("48000 65535", "", "sysctl -w net.ipv4.ip_local_port_range='32768 49151'"),
    ],
)
def test_ports_that_other_programs_are_given_are_taken_out_of_their_range(local: str, reserved: str, command: str) -> None:
    first, last = map(int, local.split())
    ranges = tuple(
        range(int(ends[0]), int(ends[-1]) + 1) for ends in (each.split("-") for each in reserved.split(",")) if ends[0]
    )
    found = finding(local_ports=range(first, last + 1), reserved_ports=ranges)
    assert found.has == local
    assert shlex.split(found.mend) == shlex.split(command)


def test_where_there_are_more_ports_below_or_above_is_where_the_others_go() -> None:
    low = replace(FULL, lowest_port=2000, highest_port=3000)
    found = finding(low, local_ports=range(2000, 3001), reserved_ports=())
    assert shlex.split(found.mend)[-1] == "net.ipv4.ip_local_port_range=3001 19384"


def test_ports_are_no_matter_while_enough_are_not_given_out() -> None:
    contested = replace(COMMON, reserved_ports=())
    outside = 65536 - 61000
    assert findings(replace(FULL, max_allocations=outside), contested) == []
    assert findings(replace(FULL, max_allocations=outside + 1), contested) != []


def test_a_table_of_connections_is_small_only_where_connections_are_tracked() -> None:
    assert findings(FULL, replace(COMMON, most_tracked=4096, tracked=0)) == []
    found = finding(most_tracked=65_536)
    assert found.needs == f"{500 + 4 * 16_384}"
    assert found.mend == "sysctl -w net.netfilter.nf_conntrack_max=80000"


def test_what_a_machine_has_is_read_from_its_files(tmp_path: Path) -> None:
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
        # The host's path, seen from inside of a container, where the container's group is at the top.
        ("0::/kubepods/pod1/abc", {".": "1024"}, "cgroup", 1024),
        ("0::/", {".": "1024"}, "cgroup", 1024),
        ("9:name=systemd:/\n8:pids:/docker/abc\n0::/", {"pids/docker/abc": "1024", "pids": "max"}, "abc", 1024),
    ],
)
def test_the_limit_that_counts_is_that_of_the_control_group_with_the_least_room(
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
def test_a_users_limit_on_threads_counts_unless_that_user_is_root() -> None:
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


def test_no_file_that_is_missing_is_missed(tmp_path: Path) -> None:
    """As in a sandbox that shows nothing of the machine."""
    machine = read_machine(RECEIVE_BUFFER, tmp_path)
    assert replace(machine, user_threads=None) == Machine()


@pytest.fixture
def network() -> Iterator[Network]:
    """A network whose ports are given out as on a fresh machine."""
    try:
        made = Network()
    except OSError as error:
        pytest.skip(f"no network of its own can be made here: {error}")
    with closing(made):
        made.configure()
        made.run("sysctl", "-w", "net.ipv4.ip_local_port_range=32768 60999", "net.ipv4.ip_local_reserved_ports=8080")
        yield made


def test_the_command_that_it_says_ends_the_warning(network: Network) -> None:
    """All of the program, on a network with the kernel's own settings, before and after doing what it says."""

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
