"""What the process takes of its machine, beside what another library finds."""

import gc
import os
import subprocess
import sys

import psutil
import pytest

from relay.ops.metrics import process
from relay.ops.metrics.process import read_process


def test_the_figures_are_those_of_this_process() -> None:
    # What is garbage keeps its descriptors until it is collected.
    gc.collect()
    other = psutil.Process()
    found = read_process()
    # Those of other tests may be about to end.
    while found.threads != other.num_threads():
        found = read_process()
    # The other one counts the one by which it lists them; but not those that threads of other tests have for whom they wait
    # to accept: the kernel takes the number first.
    assert 0 <= found.descriptors - (other.num_fds() - 1) < found.threads
    assert found.started_at == pytest.approx(other.create_time(), abs=2)
    assert found.virtual == pytest.approx(other.memory_info().vms, rel=0.2)
    assert found.resident == pytest.approx(other.memory_info().rss, rel=0.2)
    assert found.user_seconds == pytest.approx(other.cpu_times().user, abs=1)
    assert found.system_seconds == pytest.approx(other.cpu_times().system, abs=1)
    assert found.most_descriptors == other.rlimit(psutil.RLIMIT_NOFILE)[0]


COUNT = """
import os, threading
from relay.ops.metrics.process import read_process
before = read_process()
opened = [os.dup(0) for _ in range(150)]
ends = threading.Event()
for _ in range(3):
    threading.Thread(target=ends.wait).start()
now = read_process()
ends.set()
print(now.descriptors - before.descriptors, now.threads - before.threads)
"""


def test_descriptors_and_threads_are_counted_one_by_one() -> None:
    """In a process of its own, in which nothing ends that other tests have begun."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["150", "3"]


def test_a_kernel_that_does_not_count_descriptors_has_them_listed() -> None:
    opened = [os.dup(0) for _ in range(150)]
    assert process._list_descriptors() == psutil.Process().num_fds() - 1
    for number in opened:
        os.close(number)
