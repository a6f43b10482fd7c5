"""What the program itself takes, as the kernel measures it: the time of all its runs, by their number.

The kernel reads a clock before and after each run, which is part of that time. What it comes to is measured in the same
seconds with a program that does nothing, and taken off; all three figures are reported.
"""

import contextlib
import ctypes
import json
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from benchmarks.failure import FailedError
from benchmarks.offload import frames
from benchmarks.offload.cases import WINDOW, Case, Plan
from benchmarks.offload.live import Live
from benchmarks.offload.network import Namespace, Network
from benchmarks.offload.sessions import Session, Way
from benchmarks.packets import Metrics
from relay.offload import syscall
from relay.offload.bpf import Program

_FROM_NUMBER: Final = 13
_INFO: Final = 15
_STATISTICS: Final = 32
"""Commands of bpf(2): BPF_PROG_GET_FD_BY_ID, BPF_OBJ_GET_INFO_BY_FD, BPF_ENABLE_STATS."""

_INFO_SIZE: Final = 208
_RUNS_AT: Final = 192
"""Of `struct bpf_prog_info`: time and number of runs."""

_DO_NOTHING: Final = bytes.fromhex("b700000002000000 9500000000000000")
"""Returns XDP_PASS."""
_EMPTY_RUNS: Final = 100_000

_call = ctypes.CDLL(None, use_errno=True).syscall


class Runs(NamedTuple):
    """How often a program has run since it was loaded, as far as that was counted."""

    nanoseconds: int
    number: int


def measure_program(live: Live, network: Network, case: Case, session: Session, plan: Plan) -> Metrics:
    """Measure one case.

    Raises:
        FailedError: the program did not run.
    """
    way = Way(network, up=case.goes_up)
    sent = session.frames(way, case.flows, frames.payload(case.size))
    with session.relaying(case.direction), statistics():
        link = live.sink(way.sink, network.FAR_END)
        try:
            arriving = frames.frame_length(case.size, channel=not way.up)
            live.prepare(sent, way.source_interface.ifindex, window=WINDOW, arriving=arriving)
            live.send(way.source, plan.warm_up_seconds)
            with attached_program(network.relay, way.relay_end) as fd:
                before = runs(fd)
                live.send(way.source, plan.seconds)
                after = runs(fd)
        finally:
            link.close()
        clock_ns = _empty_ns()
    count = after.number - before.number
    if not count:
        raise FailedError("the program did not run")
    measured_ns = (after.nanoseconds - before.nanoseconds) / count
    return {"measured_ns": measured_ns, "clock_ns": clock_ns, "program_ns": measured_ns - clock_ns}


@contextlib.contextmanager
def statistics() -> Iterator[None]:
    """Have the kernel count and time all runs of programs meanwhile."""
    fd = _bpf(_STATISTICS, struct.pack("=I", 0))
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def attached_program(place: Namespace, interface: str) -> Iterator[int]:
    """Open the program that is attached to an interface.

    Raises:
        FailedError: there is none.
    """
    found = json.loads(place.run("ip", "-json", "link", "show", "dev", interface))[0].get("xdp")
    if not found:
        raise FailedError(f"no program is attached to {interface}")
    fd = _bpf(_FROM_NUMBER, struct.pack("=III", found["prog"]["id"], 0, 0))
    try:
        yield fd
    finally:
        os.close(fd)


def runs(fd: int) -> Runs:
    """Tell how often a program has run."""
    info = ctypes.create_string_buffer(_INFO_SIZE)
    _bpf(_INFO, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)))
    return Runs(*struct.unpack_from("=QQ", info, _RUNS_AT))


def _empty_ns() -> float:
    with Program(_DO_NOTHING, license="MIT", name="nothing") as empty:
        empty.test_run(bytes(64), repeat=_EMPTY_RUNS)
        found = runs(empty.fd)
    return found.nanoseconds / found.number


def _bpf(command: int, arguments: bytes) -> int:
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    result: int = _call(syscall.NUMBER, command, buffer, len(buffer))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf(2), command {command}: {os.strerror(number)}")
    return result
