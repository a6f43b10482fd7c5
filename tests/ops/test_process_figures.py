"""Resource usage of the process, compared with psutil."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from relay.ops.process import count_descriptors, read_process


def test_the_figures_match_psutil() -> None:
    # Garbage keeps descriptors open until its collection.
    gc.collect()
    other = psutil.Process()
    found = read_process()
    # Threads of other tests may be ending.
    while found.threads != other.num_threads():
        found = read_process()
    # psutil counts its directory descriptor, but not the descriptors reserved by threads of other tests in accept(): the
    # kernel reserves the number first.
    assert 0 <= found.descriptors - (other.num_fds() - 1) < found.threads
    assert found.started_at == pytest.approx(other.create_time(), abs=2)
    assert found.virtual == pytest.approx(other.memory_info().vms, rel=0.2)
    assert found.resident == pytest.approx(other.memory_info().rss, rel=0.2)
    assert found.cpu_seconds == pytest.approx(sum(other.cpu_times()[:2]), abs=1)
    assert found.max_descriptors == other.rlimit(psutil.RLIMIT_NOFILE)[0]


COUNT = """
import os, threading
from relay.ops.process import read_process
before = read_process()
opened = [os.dup(0) for _ in range(150)]
ends = threading.Event()
for _ in range(3):
    threading.Thread(target=ends.wait).start()
now = read_process()
ends.set()
print(now.descriptors - before.descriptors, now.threads - before.threads)
"""


def test_descriptors_and_threads_are_counted_exactly() -> None:
    """Run in a separate process, without threads of other tests."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["150", "3"]


def test_descriptors_are_listed_if_the_kernel_does_not_count_them() -> None:
    # This directory also has an entry per descriptor, and its size is always 0.
    uncounted = "/proc/self/fdinfo"
    assert Path(uncounted).stat().st_size == 0
    opened = [os.dup(0) for _ in range(150)]
    assert count_descriptors(uncounted) == psutil.Process().num_fds() - 1
    for number in opened:
        os.close(number)
