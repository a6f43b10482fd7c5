"""The CPU time that other processes use on the relay's CPUs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relay.net.neighbours import CpuTimes


def test_the_share_of_others_excludes_this_process() -> None:
    before = CpuTimes(taken_at=100.0, busy=50.0, own=7.0)
    assert CpuTimes(taken_at=102.0, busy=52.0, own=8.0).share_of_others(before, cpus=1) == pytest.approx(0.5)
    assert CpuTimes(taken_at=102.0, busy=52.0, own=8.0).share_of_others(before, cpus=2) == pytest.approx(0.25)


def test_the_share_of_others_is_never_negative() -> None:
    """The kernel counts both times in ticks of its own."""
    before = CpuTimes(taken_at=100.0, busy=50.0, own=7.0)
    assert CpuTimes(taken_at=101.0, busy=50.0, own=7.9).share_of_others(before, cpus=1) == 0.0


def test_a_busy_process_on_the_same_cpu_is_seen() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{cpu}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen((sys.executable, "-c", code), stdout=subprocess.PIPE) as neighbour:
        try:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()
            before = CpuTimes.read([cpu])
            time.sleep(0.3)  # the kernel counts in ticks of 10 ms
            assert CpuTimes.read([cpu]).share_of_others(before, cpus=1) > 0.5
        finally:
            neighbour.kill()


def test_a_missing_cpu_is_an_error() -> None:
    missing = len(Path("/proc/stat").read_text(encoding="ascii").splitlines())
    with pytest.raises(ValueError, match=f"cpu{missing}"):
        CpuTimes.read([missing])
