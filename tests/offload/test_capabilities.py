"""Capabilities, in processes of their own: what is given up doesn't come back."""

import os
import subprocess
import sys
import threading

import pytest

from relay.offload import capabilities
from tests.offload.conftest import needs_bpf

PRINT_MISSING = "print(*capabilities.missing())"
ALL = "CAP_NET_ADMIN CAP_PERFMON CAP_BPF"


def run(*lines: str) -> str:
    """Run a few lines of Python elsewhere, and tell what they print."""
    text = "\n".join(["import os, subprocess, sys, threading", "from relay.offload import capabilities", *lines])
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_bpf
def test_nothing_is_missing_where_programs_can_be_loaded() -> None:
    assert capabilities.missing() == ()


@needs_bpf
def test_what_is_dropped_is_missing() -> None:
    assert run("capabilities.drop()", PRINT_MISSING) == ALL


@needs_bpf
def test_a_thread_that_is_started_thereafter_misses_it_too() -> None:
    started = "thread = threading.Thread(target=lambda: print(*capabilities.missing()))"
    assert run("capabilities.drop()", started, "thread.start()", "thread.join()") == ALL


@needs_bpf
def test_a_program_that_is_run_thereafter_misses_it_too() -> None:
    text = f"from relay.offload import capabilities; {PRINT_MISSING}"
    assert run("capabilities.drop()", f"subprocess.run([sys.executable, '-c', {text!r}], check=True)") == ALL


@needs_bpf
def test_other_capabilities_are_kept() -> None:
    show = "print([line for line in open('/proc/thread-self/status') if line.startswith('CapEff')][0].split()[1])"
    before, after = run(show, "capabilities.drop()", show).split()
    dropped = sum(1 << number for number in (12, 21, 38, 39))
    assert int(after, 16) == int(before, 16) & ~dropped


@needs_bpf
def test_sys_admin_stands_in_for_what_was_part_of_it() -> None:
    """Of a process that is left with it alone, only the network's capability is missing."""
    only = "libc.capset(ctypes.byref(capabilities._Header(capabilities._VERSION, 0)), capabilities._Sets(1 << 21, 1 << 21))"
    assert run("import ctypes", "libc = ctypes.CDLL(None)", f"assert {only} == 0", PRINT_MISSING) == "CAP_NET_ADMIN"


@pytest.mark.skipif(os.geteuid() != 0, reason="without root, who one is can't be changed")
def test_a_user_without_any_lacks_all() -> None:
    assert run("os.setuid(65534)", PRINT_MISSING) == ALL


@pytest.mark.skipif(os.geteuid() != 0, reason="without root, who one is can't be changed")
def test_a_user_without_any_can_drop_them() -> None:
    assert run("os.setuid(65534)", "capabilities.drop()", PRINT_MISSING) == ALL


@needs_bpf
def test_a_thread_that_runs_already_keeps_its_own() -> None:
    """So this very process drops nothing."""
    told: list[tuple[str, ...]] = []

    def drop() -> None:
        capabilities.drop()
        told.append(capabilities.missing())

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    assert told == [tuple(ALL.split())]
    assert capabilities.missing() == ()
