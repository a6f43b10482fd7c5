"""Live frames: a BPF program in test mode sends packets from the kernel, and an XDP program counts them at the far end."""

import contextlib
import mmap
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.generator import compile_c
from benchmarks.offload.frames import HEADERS
from benchmarks.offload.network import Namespace
from benchmarks.offload.runs import send_live
from hatch_build import OPTIONS
from relay.offload import elf
from relay.offload.bpf import Map, Program, XdpLink, XdpMode

_MOST_FLOWS: Final = 1024

_SOURCES: Final = Path(__file__).parent
_KERNEL: Final = _SOURCES.parent.parent / "relay" / "offload"
_SENDER, _SINK = "sender", "sink"

_LOAD: Final = struct.Struct("=IIIIIIQQQQQ")
"""`struct load`: interface, flows, window, next flow, length at the far end, credit; sent, lost, waited, seen, seen_at."""
_WINDOW_AT: Final = 8
_CREDIT_AT: Final = 20
_COUNTERS: Final = struct.Struct("=QQQ")
_COUNTERS_AT: Final = 24

_STRIDE: Final = 48
_RUN: Final = 50_000
"""Packets, sent or held back, between two clock readings: about 10 ms."""


class Counters(NamedTuple):
    """Events since the load was prepared."""

    sent: int
    lost: int
    """Packets in flight when nothing had arrived for a while."""
    waited: int
    """Times a packet was held back because the window was full."""
    arrived: int


class Live:
    """The loaded programs with their maps."""

    def __init__(self, directory: Path) -> None:
        """Compile and load the programs."""
        self._maps: dict[str, Map] = {}
        self._frame = b""
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._programs = {name: self._load(directory, name) for name in (_SENDER, _SINK)}
            maps = (self._maps[name] for name in ("loads", "flows", "arrived"))
            self._load_map, self._flows, self._arrived = map(_mapped, maps)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Unload the programs."""
        self._stack.close()

    def sink(self, place: Namespace, interface: str) -> XdpLink:
        """Count and drop the packets that arrive at an interface, until the link is closed."""
        index = place.interface(interface).ifindex
        with place.entered():
            return XdpLink.create(self._programs[_SINK], index, XdpMode.DRIVER)

    def prepare(self, frames: Sequence[bytes], ifindex: int, *, window: int, growth: int) -> None:
        """Prepare the packets of `send`: the first frame of each flow, the interface, and the growth up to the far end.

        The frames are alike behind their headers. The window is the limit of packets in flight.
        """
        self._frame = frames[0]
        for number, each in enumerate(frames):
            self._flows[number * _STRIDE : number * _STRIDE + HEADERS] = each[:HEADERS]
        self._load_map[: _LOAD.size] = _LOAD.pack(ifindex, len(frames), window, 0, len(frames[0]) + growth, 0, 0, 0, 0, 0, 0)
        self._arrived[:8] = bytes(8)

    def set_window(self, window: int) -> None:
        """Change the window; with 0, the sender only waits."""
        self._load_map[_WINDOW_AT : _WINDOW_AT + 4] = window.to_bytes(4, "little")
        self._load_map[_CREDIT_AT : _CREDIT_AT + 4] = bytes(4)

    def send(self, place: Namespace, seconds: float) -> None:
        """Send for some time, as fast as the window permits."""
        end = time.monotonic() + seconds
        with place.entered():
            while time.monotonic() < end:
                send_live(self._programs[_SENDER], self._frame, ifindex=0, repeat=_RUN)

    def counters(self) -> Counters:
        """Return the counters."""
        sent, lost, waited = _COUNTERS.unpack_from(self._load_map, _COUNTERS_AT)
        return Counters(sent, lost, waited, int.from_bytes(self._arrived[:8], "little"))

    def _load(self, directory: Path, name: str) -> Program:
        source, built = str(_SOURCES / f"{name}.c"), directory / f"{name}.o"
        options = (*OPTIONS, "-Wno-unused", "-I", str(_KERNEL), "-c", source, "-o", str(built))
        parsed = elf.parse(compile_c(built, "clang", *options, package="clang").read_bytes())
        for each in parsed.maps:
            if each.name not in self._maps:
                entries = _MOST_FLOWS if each.name == "flows" else each.max_entries
                self._maps[each.name] = self._stack.enter_context(Map(each._replace(max_entries=entries)))
        instructions = parsed.linked({each.name: self._maps[each.name].fd for each in parsed.maps})
        return self._stack.enter_context(Program(instructions, license=parsed.license, name=name))


def _mapped(array: Map) -> memoryview:
    """Return the memory of an array with the flag `BPF_F_MMAPABLE`, whose elements are `stride` bytes apart."""
    size = array.stride * array.definition.max_entries
    return memoryview(mmap.mmap(array.fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
