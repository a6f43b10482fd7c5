"""Whether this process has hardly a moment without work."""

import pytest

from relay.ops.threads import Load


@pytest.fixture
def load() -> Load:
    return Load(100.0, 10.0)


def test_a_process_that_uses_nearly_all_of_its_cpu_is_busy_until_it_does_not(load: Load) -> None:
    load.look(100.1, 10.09)
    assert load.is_high
    load.look(100.2, 10.18)
    assert load.is_high
    load.look(100.3, 10.22)
    assert not load.is_high


def test_half_a_cpu_is_not_much(load: Load) -> None:
    load.look(100.1, 10.05)
    assert not load.is_high


def test_moments_are_too_short_to_tell(load: Load) -> None:
    load.look(100.001, 10.001)
    assert not load.is_high
    load.look(100.1, 10.002)
    assert not load.is_high
