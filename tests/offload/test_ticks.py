"""The ticks in which the kernel's program counts time, beside the clock in which the relay does."""

import itertools
import struct
import time

import pytest

from relay.offload import ticks
from relay.offload.bpf import Program
from relay.offload.ticks import Ticks
from tests.offload.conftest import needs_bpf

LATE = 25
"""Ticks; a tenth of a second or less."""


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
            # An interrupt may come late, by as much as the host of a virtual machine has other work.
            assert (counted - before + LATE) & 0xFFFFFFFF <= after - before + LATE + 1


@needs_bpf
def test_a_measurement_that_is_held_up_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that is busy: each second time here, between a tick's beginning and the look at the clock."""
    undisturbed = ticks.measure()
    held_up = itertools.cycle((True, False))
    see = ticks._see_beginning

    def see_late(low: Program) -> ticks._Beginning:
        seen = see(low)
        return seen._replace(within=0.5, at=seen.at + 0.5) if next(held_up) else seen

    monkeypatch.setattr(ticks, "_see_beginning", see_late)
    assert abs(ticks.measure().epoch - undisturbed.epoch) < LATE / undisturbed.per_second


@needs_bpf
def test_it_is_measured_alike_again_and_again() -> None:
    first, second = ticks.measure(), ticks.measure()
    assert first.per_second == second.per_second
    assert abs(first.epoch - second.epoch) < LATE / first.per_second
