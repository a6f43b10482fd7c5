"""Detection of contention between the threads of this process."""

import pytest

from relay.net.threads import Load


class Machine:
    """Simulates the work of other threads during a yield."""

    def __init__(self) -> None:
        self.load = Load(self.pass_time, lambda: self.now)
        self.now = 1000.0
        self.seconds = 0.0
        self.done = 0

    def pass_time(self) -> None:
        self.now += self.seconds
        self.load.work += self.done

    def look(self, seconds: float, done: int) -> bool:
        """Return whether the load is high if other threads do some work in some seconds."""
        self.seconds, self.done = seconds, done
        self.load.check()
        return self.load.is_high


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_the_load_is_high_while_other_threads_have_work(machine: Machine) -> None:
    assert not machine.load.is_high
    assert machine.look(0.0005, 5)
    assert machine.look(0.02, 400)
    assert not machine.look(0.000001, 0)


def test_an_occasional_other_thread_is_not_high_load(machine: Machine) -> None:
    assert not machine.look(0.0001, 2)


def test_cpu_use_of_another_process_is_not_high_load(machine: Machine) -> None:
    assert not machine.look(0.003, 0)
    assert not machine.look(0.012, 8)


def test_a_look_yields_the_cpu_once(machine: Machine) -> None:
    machine.look(0.0001, 3)
    assert machine.load.work == 3


def test_readers_do_not_yield_to_a_busy_neighbour(machine: Machine) -> None:
    """A neighbour keeps the CPU for a time slice of 3 ms, and packets wait meanwhile."""
    assert machine.look(0.0005, 5)
    machine.load.set_preempts(preempts=True)
    before = machine.now
    assert not machine.look(0.0005, 5)
    assert machine.now == before
