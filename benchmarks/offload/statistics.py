"""Run time of BPF programs, as measured by the kernel.

The kernel reads a clock before and after each run, and the run time includes these readings. Their cost is measured with an
empty program, and subtracted.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.offload.runs import run
from relay.offload.bpf import Program

_SWITCH: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
_XDP: Final = "6"
"""BPF_PROG_TYPE_XDP."""

_EMPTY: Final = bytes.fromhex("b700000002000000 9500000000000000")
"""Instructions of a program that returns XDP_PASS."""
_EMPTY_RUNS: Final = 100_000


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Count and time all runs of BPF programs on this machine meanwhile."""
    before = _SWITCH.read_text(encoding="ascii")
    _SWITCH.write_text("1", encoding="ascii")
    try:
        yield
    finally:
        _SWITCH.write_text(before, encoding="ascii")


def runs_of(pid: int) -> tuple[int, int]:
    """Return run time in ns and number of runs of all XDP programs of a process, since statistics are enabled."""
    programs = {}
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = file.read_text(encoding="ascii")
        except FileNotFoundError:
            # The process has closed the descriptor meanwhile.
            continue
        fields = dict(line.split(":\t") for line in text.splitlines() if ":\t" in line)
        if fields.get("prog_type") == _XDP:
            programs[fields["prog_id"]] = (int(fields["run_time_ns"]), int(fields["run_cnt"]))
    return sum(found[0] for found in programs.values()), sum(found[1] for found in programs.values())


def clock_ns() -> float:
    """Return the run time of an empty program, which is the cost of the clock readings."""
    before = runs_of(os.getpid())
    with Program(_EMPTY, license="MIT", name="empty") as empty:
        run(empty, bytes(64), repeat=_EMPTY_RUNS)
        after = runs_of(os.getpid())
    return (after[0] - before[0]) / (after[1] - before[1])
