"""Capabilities, in separate threads and processes: dropped capabilities do not return."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from relay.offload import capabilities
from tests.support.offload.fixtures import needs_bpf
from tests.support.privileges import (
    CAP_BPF,
    CAP_NET_ADMIN,
    CAP_PERFMON,
    CAP_SYS_ADMIN,
    EVERY_CAPABILITY,
    give_up,
    in_a_thread,
)

IMPORT = "from relay.offload import capabilities"
PRINT_MISSING = "print(*capabilities.missing())"
ALL = ("CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF")


def run(*lines: str) -> tuple[str, ...]:
    """Run lines of Python in a separate process, and return the printed words."""
    text = "\n".join(["import os", IMPORT, *lines])
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.split())


def missing_after_drop() -> tuple[str, ...]:
    capabilities.drop()
    return capabilities.missing()


@needs_bpf
def test_no_capability_is_missing_where_programs_can_be_loaded() -> None:
    assert capabilities.missing() == ()


@needs_bpf
def test_dropped_capabilities_are_missing_in_this_thread_only() -> None:
    assert in_a_thread(missing_after_drop) == ALL
    assert capabilities.missing() == ()


@needs_bpf
def test_a_thread_started_later_inherits_the_drop() -> None:
    def start_another() -> tuple[str, ...]:
        capabilities.drop()
        return in_a_thread(capabilities.missing)

    assert in_a_thread(start_another) == ALL


@needs_bpf
def test_a_program_executed_later_inherits_the_drop() -> None:
    def run_another() -> tuple[str, ...]:
        capabilities.drop()
        return run(PRINT_MISSING)

    assert in_a_thread(run_another) == ALL


def effective() -> int:
    """Return the capabilities of this thread, one bit each."""
    (line,) = (each for each in Path("/proc/thread-self/status").read_text().splitlines() if each.startswith("CapEff"))
    return int(line.split()[1], 16)


@needs_bpf
def test_other_capabilities_are_kept() -> None:
    def drop() -> int:
        capabilities.drop()
        return effective()

    dropped = sum(1 << number for number in (CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF))
    assert in_a_thread(drop) == effective() & ~dropped


@needs_bpf
def test_sys_admin_includes_bpf_and_perfmon() -> None:
    """A thread with only CAP_SYS_ADMIN lacks only CAP_NET_ADMIN."""

    def keep_sys_admin() -> tuple[str, ...]:
        give_up(set(EVERY_CAPABILITY) - {CAP_SYS_ADMIN})
        return capabilities.missing()

    assert in_a_thread(keep_sys_admin) == ("CAP_NET_ADMIN",)


@pytest.mark.skipif(os.geteuid() != 0, reason="without root, who one is can't be changed")
def test_a_user_without_capabilities_lacks_all_and_can_drop_them() -> None:
    assert run("os.setuid(65534)", PRINT_MISSING, "capabilities.drop()", PRINT_MISSING) == ALL * 2


@needs_bpf
def test_a_running_thread_keeps_its_capabilities() -> None:
    """So this very process drops nothing."""
    started, dropped = threading.Event(), threading.Event()

    def wait() -> tuple[str, ...]:
        started.set()
        assert dropped.wait(60)
        return capabilities.missing()

    def drop_beside_another() -> tuple[str, ...]:
        found: list[tuple[str, ...]] = []
        other = threading.Thread(target=lambda: found.append(wait()))
        other.start()
        assert started.wait(60)
        capabilities.drop()
        dropped.set()
        other.join()
        return found[0]

    assert in_a_thread(drop_beside_another) == ()
