"""Test runs of XDP programs (BPF_PROG_TEST_RUN): single packets, and live frames that the kernel sends."""

import ctypes
from typing import Any, Final, NamedTuple

from relay.offload import syscall
from relay.offload.bpf import Program
from relay.offload.syscall import Command

_LIVE_FRAMES: Final = 1 << 1
_BATCH: Final = 64
"""Frames that the kernel makes before it sends them: the most that a driver takes from its card at a time."""

_GROWTH: Final = 256
"""Bytes by which a test run may extend a packet: the headroom of a program."""


class RunResult(NamedTuple):
    """The result of a test run.

    Attributes:
        verdict: the return value, usually a number of `enum xdp_action`.
        data: the packet after the run.
        nanoseconds: the average duration of a run.
    """

    verdict: int
    data: bytes
    nanoseconds: int


def _u32(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_uint32) for name in names)


class _TestRun(ctypes.Structure):
    _fields_ = (
        *_u32("program", "verdict", "size_in", "size_out"),
        *(("data_in", ctypes.c_char_p), ("data_out", ctypes.c_void_p)),
        *_u32("repeat", "duration", "context_size_in", "context_size_out"),
        *(("context_in", ctypes.c_void_p), ("context_out", ctypes.c_void_p)),
        *_u32("flags", "cpu", "batch_size", "padding"),
    )


class _XdpContext(ctypes.Structure):
    """`struct xdp_md`: the argument of an XDP program."""

    _fields_ = _u32("data", "data_end", "data_meta", "ingress_ifindex", "rx_queue_index", "egress_ifindex")


def run(program: Program, packet: bytes, *, ifindex: int = 0, repeat: int = 1) -> RunResult:
    """Run a program repeatedly on a packet, an Ethernet frame. Each repetition gets the packet of the previous run.

    ``ifindex`` is the receiving interface in this thread's network namespace, 0 for loopback. Some drivers accept only an
    interface with an attached program.

    Raises:
        OSError: EINVAL for an unsuitable packet or interface, EINTR after a signal.
    """
    out = ctypes.create_string_buffer(len(packet) + _GROWTH)
    done = _run(program, packet, ifindex, repeat, data_out=ctypes.addressof(out), size_out=len(out))
    return RunResult(done.verdict, out.raw[: done.size_out], done.duration)


def send_live(program: Program, packet: bytes, *, ifindex: int, repeat: int) -> None:
    """Run a program on copies of a packet, and apply the verdicts: send, redirect or pass each copy.

    Raises:
        OSError: as `run`.
    """
    _run(program, packet, ifindex, repeat, flags=_LIVE_FRAMES, batch_size=_BATCH)


def _run(program: Program, packet: bytes, ifindex: int, repeat: int, **more: int) -> _TestRun:
    context = _XdpContext(data_end=len(packet), ingress_ifindex=ifindex)
    arguments = _TestRun(
        program=program.fd,
        data_in=packet,
        size_in=len(packet),
        context_in=ctypes.addressof(context),
        context_size_in=ctypes.sizeof(context),
        repeat=repeat,
        **more,
    )
    syscall.call(Command.PROG_TEST_RUN, arguments, f"program {program.fd}")
    return arguments
