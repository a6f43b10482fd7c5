"""Whether those who do the work of this process get in each other's way."""

import pytest

from relay.ops.threads import Load


class Machine:
    """What happens while a thread lets others have the CPU."""

    def __init__(self) -> None:
        self.load = Load(self.pass_time, lambda: self.now)
        self.now = 1000.0
        self.seconds = 0.0
        self.done = 0

    def pass_time(self) -> None:
        self.now += self.seconds
        self.load.work += self.done

    def look(self, seconds: float, done: int) -> bool:
        """Tell whether the load is high when others do so much in so many seconds."""
        self.seconds, self.done = seconds, done
        self.load.look()
        return self.load.is_high


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_the_load_is_high_while_others_have_work_to_do(machine: Machine) -> None:
    assert not machine.load.is_high
    assert machine.look(0.0005, 5)
    assert machine.look(0.02, 400)
    assert not machine.look(0.000001, 0)


def test_one_other_now_and_then_is_no_load(machine: Machine) -> None:
    assert not machine.look(0.0001, 2)


def test_another_process_that_takes_the_cpu_is_no_load_of_this_one(machine: Machine) -> None:
    assert not machine.look(0.003, 0)
    assert not machine.look(0.012, 8)


def test_it_lets_others_have_the_cpu_once(machine: Machine) -> None:
    machine.look(0.0001, 3)
    assert machine.load.work == 3
