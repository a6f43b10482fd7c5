"""The ticks in which the kernel's program counts time, beside the clock in which the relay does."""

import struct
import time

import pytest

from relay.offload import ticks
from relay.offload.bpf import Program
from relay.offload.ticks import Ticks
from tests.offload.conftest import needs_bpf


def test_a_moment_within_a_tick_is_that_tick() -> None:
    counted = Ticks(epoch=-10.0, per_second=250.0)
    assert [counted.at(seconds) for seconds in (0, 0.0039, 0.0041, 1)] == [2500, 2500, 2501, 2750]
    assert counted.seconds(2501) == pytest.approx(0.004)


@needs_bpf
def test_the_kernel_counts_as_was_measured() -> None:
    """To a tick: the program compares with deadlines that were told in these."""
    measured = ticks.measure()
    assert 100 <= measured.per_second <= 1000
    # It gives the lower half of what it counts.
    reading = b"\x85\x00\x00\x00" + struct.pack("<I", 118) + b"\x95" + bytes(7)
    with Program(reading, license="Dual MIT/GPL") as program:
        for _ in range(100):
            before = measured.at(time.monotonic())
            counted = program.test_run(bytes(60)).verdict
            after = measured.at(time.monotonic())
            # An interrupt may come late.
            assert (counted - before + 2) & 0xFFFFFFFF <= after - before + 3


@needs_bpf
def test_it_is_measured_alike_again_and_again() -> None:
    first, second = ticks.measure(), ticks.measure()
    assert first.per_second == second.per_second
    assert abs(first.epoch - second.epoch) < 2 / first.per_second
