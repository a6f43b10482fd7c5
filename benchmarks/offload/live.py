"""Live frames: the kernel sends a packet as often as told, and another of its programs counts those that arrive."""

import contextlib
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from benchmarks.generator import NoCompilerError
from benchmarks.offload.frames import HEADERS
from benchmarks.offload.network import Namespace
from hatch_build import OPTIONS
from relay.offload import elf
from relay.offload.bpf import Link, Map, Program, XdpMode

MOST_FLOWS: Final = 1024

_SOURCES: Final = Path(__file__).parent
_KERNEL: Final = _SOURCES.parent.parent / "relay" / "offload"
_COMPILE_SECONDS: Final = 60
_SENDER, _SINK = "sender", "sink"

_LOAD: Final = struct.Struct("=IIIIIIQQQQQ")
"""`struct load`: interface, flows, packets that may be under way, next flow, length of a frame that arrives, credit; sent,
lost, waited, seen, seen at."""
_WINDOW_AT: Final = 8
_CREDIT_AT: Final = 20
_COUNTERS: Final = struct.Struct("=QQQ")
_COUNTERS_AT: Final = 24

_STRIDE: Final = 48
_BATCH: Final = 64
"""Frames that the kernel makes before it sends them: as many as a driver takes from its card in one go."""

_RUN: Final = 50_000
"""Packets, sent or held back, between two looks at the clock: some 10 ms."""


class Counters(NamedTuple):
    """What has happened since the load was set up."""

    sent: int
    lost: int
    """Given up since nothing arrived for a while."""
    waited: int
    """How often a packet was not sent, since as many as may be were under way."""
    arrived: int

    def __sub__(self, other: tuple[int, ...]) -> "Counters":
        return Counters(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


class Live:
    """The programs, loaded, and what they share. Use it as a context."""

    def __init__(self, directory: Path) -> None:
        """Compile and load them.

        Raises:
            NoCompilerError: there is no clang.
            OSError: the kernel does not take them.
        """
        self._maps: dict[str, Map] = {}
        self._frame = b""
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._programs = {name: self._load(directory, name) for name in (_SENDER, _SINK)}
            self._load_map, self._flows, self._arrived = (
                memoryview(self._maps[name].mapped()) for name in ("loads", "flows", "arrived")
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def sink(self, place: Namespace, interface: str) -> Link:
        """Have packets counted where they arrive, until the link is closed; they go no further."""
        index = place.interface(interface).ifindex
        with place.entered():
            return Link(self._programs[_SINK], index, XdpMode.DRIVER)

    def prepare(self, frames: Sequence[bytes], ifindex: int, *, window: int, arriving: int) -> None:
        """Set up what `send` sends.

        Args:
            frames: the first packet of each flow; all are alike behind their headers.
            ifindex: the interface to send from.
            window: packets that may be under way at once.
            arriving: bytes of a frame as it arrives.
        """
        self._frame = frames[0]
        for number, each in enumerate(frames):
            self._flows[number * _STRIDE : number * _STRIDE + HEADERS] = each[:HEADERS]
        self._load_map[: _LOAD.size] = _LOAD.pack(ifindex, len(frames), window, 0, arriving, 0, 0, 0, 0, 0, 0)
        self._arrived[:8] = bytes(8)

    def set_window(self, window: int) -> None:
        """Have another number of packets under way from now on; with 0, whoever sends only waits."""
        self._load_map[_WINDOW_AT : _WINDOW_AT + 4] = window.to_bytes(4, "little")
        self._load_map[_CREDIT_AT : _CREDIT_AT + 4] = bytes(4)

    def send(self, place: Namespace, seconds: float) -> None:
        """Send for some time, as fast as the window allows."""
        end = time.monotonic() + seconds
        with place.entered():
            while time.monotonic() < end:
                self._programs[_SENDER].send_live(self._frame, ifindex=0, repeat=_RUN, batch_size=_BATCH)

    def send_once(self, place: Namespace, packets: int) -> None:
        """Send some packets, one after another into each flow, whether they arrive or not."""
        with place.entered():
            self._programs[_SENDER].send_live(self._frame, ifindex=0, repeat=packets, batch_size=_BATCH)

    def counters(self) -> Counters:
        """Tell what has happened so far."""
        sent, lost, waited = _COUNTERS.unpack_from(self._load_map, _COUNTERS_AT)
        return Counters(sent, lost, waited, int.from_bytes(self._arrived[:8], "little"))

    def _load(self, directory: Path, name: str) -> Program:
        parsed = elf.parse(_compiled(directory, name))
        for each in parsed.maps:
            if each.name not in self._maps:
                entries = MOST_FLOWS if each.name == "flows" else each.max_entries
                self._maps[each.name] = self._stack.enter_context(Map(each._replace(max_entries=entries)))
        instructions = parsed.linked({each.name: self._maps[each.name].fd for each in parsed.maps})
        return self._stack.enter_context(Program(instructions, license=parsed.license, name=name))


def _compiled(directory: Path, name: str) -> bytes:
    clang = shutil.which("clang")
    if clang is None:
        raise NoCompilerError(
            "packets are sent by a program for the kernel, which takes clang (Debian: apt-get install clang)"
        )
    built = directory / f"{name}.o"
    command = (clang, *OPTIONS, "-Wno-unused", "-I", str(_KERNEL), "-c", str(_SOURCES / f"{name}.c"), "-o", str(built))
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    if done.returncode:
        raise NoCompilerError(
            f"clang can't compile {name}.c: {(done.stderr.strip().splitlines() or ['it said nothing'])[0]}"
        )
    return built.read_bytes()
