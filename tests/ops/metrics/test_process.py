"""What the process takes of its machine, beside what another library finds."""

import gc
import os
import threading

import psutil
import pytest

from relay.ops.metrics import process
from relay.ops.metrics.process import read_process


def test_the_figures_are_those_of_this_process() -> None:
    # What is garbage keeps its descriptors until it is collected.
    gc.collect()
    other = psutil.Process()
    found = read_process()
    assert found.threads == other.num_threads()
    # The other one counts the one by which it lists them; but not those that threads of other tests have for whom they wait
    # to accept: the kernel takes the number first.
    assert 0 <= found.descriptors - (other.num_fds() - 1) < found.threads
    assert found.started_at == pytest.approx(other.create_time(), abs=2)
    assert found.virtual == pytest.approx(other.memory_info().vms, rel=0.2)
    assert found.resident == pytest.approx(other.memory_info().rss, rel=0.2)
    assert found.user_seconds == pytest.approx(other.cpu_times().user, abs=1)
    assert found.system_seconds == pytest.approx(other.cpu_times().system, abs=1)
    assert found.most_descriptors == other.rlimit(psutil.RLIMIT_NOFILE)[0]


def test_descriptors_and_threads_are_counted_one_by_one() -> None:
    before = read_process()
    opened = [os.dup(0) for _ in range(150)]
    ends = threading.Event()
    waiting = [threading.Thread(target=ends.wait) for _ in range(3)]
    for each in waiting:
        each.start()
    now = read_process()
    ends.set()
    for each in waiting:
        each.join(5)
    for number in opened:
        os.close(number)
    assert (now.descriptors - before.descriptors, now.threads - before.threads) == (150, 3)


def test_a_kernel_that_does_not_count_descriptors_has_them_listed() -> None:
    opened = [os.dup(0) for _ in range(150)]
    assert process._list_descriptors() == psutil.Process().num_fds() - 1
    for number in opened:
        os.close(number)
