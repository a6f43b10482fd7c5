"""The XDP program, made to run on one packet at a time: under sanitizers, and in the kernel."""

import contextlib
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Protocol, Self

from relay.offload import bpf, elf, layout, ticks
from tests.offload.model import SECOND, Hop, Outcome, Tables, Totals, Usage, Verdict, buckets

HEADROOM: Final = 256
"""Bytes in front of a packet, as most drivers have them."""
ENTRIES: Final = 64
"""Of `channels`, `next_hops` and `usage`, which has two for each channel; indices beyond have none."""

_HERE: Final = Path(__file__).parent
_SOURCES: Final = Path(layout.__file__).parent
_SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")

_CHANNELS, _CLIENTS, _PEERS, _NEXT_HOPS, _USAGE, _SETTINGS, _TOTALS = range(7)
"""Tables, as host.c numbers them."""
_ZERO: Final = bytes(4)


class Runner(Protocol):
    """A program that was loaded.

    Attributes:
        slack: how far from `now` the time may be that it takes for now, ns.
    """

    slack: int

    def load(self, tables: Tables) -> None:
        """Have these tables and no counts."""

    def now(self) -> int: ...

    def run(self, frame: bytes, ifindex: int = 1) -> Outcome:
        """Give what became of it. A runner that can't tell where it was redirected to says -1."""

    def usage(self, index: int) -> Usage: ...

    def totals(self) -> Totals: ...

    def nudged(self, index: int) -> int:
        """The tick at which a packet was last left to the sockets for this next hop."""


def build_host(folder: Path) -> Path:
    """Compile the program for this machine, with sanitizers.

    Raises:
        FileNotFoundError: there is no gcc.
        subprocess.CalledProcessError: it doesn't compile.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise FileNotFoundError("gcc")
    program = folder / "host"
    sources = ("-I", str(_SOURCES), str(_HERE / "host.c"), "-o", str(program))
    subprocess.run([gcc, "-O1", "-g", *_WARNINGS, *_SANITIZERS, *sources], check=True)
    return program


class HostRunner:
    """The program as an ordinary one: host.c runs it."""

    slack = 0

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process = self._start()
        self._clock = 0
        self.set_clock(1000 * SECOND)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        errors = self._process.communicate(timeout=60)[1]
        assert self._process.returncode == 0, errors.decode(errors="replace")

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self._program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def load(self, tables: Tables) -> None:
        self._tell("e")
        self.set_clock(self._clock)
        self.set_headroom(HEADROOM)
        for index, channel in tables.channels.items():
            self._tell("s", struct.pack("=I", index) + channel.packed(self._clock), _CHANNELS)
        for table, ends in ((_CLIENTS, tables.clients), (_PEERS, tables.peers)):
            for index, bucket in enumerate(buckets(ends)):
                self._tell("s", struct.pack("=I", index) + bucket, table)
        for index, hop in tables.next_hops.items():
            self._tell("s", struct.pack("=I", index) + hop.packed(), _NEXT_HOPS)
        self._tell("s", _ZERO + tables.settings.packed(), _SETTINGS)

    def now(self) -> int:
        return self._clock

    def set_clock(self, now: int) -> None:
        self._clock = now
        self._tell("t", struct.pack("=Q", now))

    @contextlib.contextmanager
    def at(self, now: int) -> Iterator[None]:
        """Have it another time for a while."""
        before = self._clock
        self.set_clock(now)
        try:
            yield
        finally:
            self.set_clock(before)

    def set_headroom(self, headroom: int) -> None:
        """Bytes that there are in front of packets, until tables are loaded."""
        self._tell("h", struct.pack("=I", headroom))

    def run(self, frame: bytes, ifindex: int = 1) -> Outcome:
        self._tell("r", struct.pack("=I", ifindex) + frame)
        verdict, redirected_to, length = struct.unpack("=III", self._answer(12))
        return Outcome(Verdict(verdict), self._answer(length), redirected_to)

    def usage(self, index: int) -> Usage:
        return Usage(*layout.USAGE.unpack(self._get(_USAGE, index, layout.USAGE.size)))

    def totals(self) -> Totals:
        return Totals.of(self._get(_TOTALS, 0, layout.TOTALS.size))

    def nudged(self, index: int) -> int:
        return int.from_bytes(self._get(_NEXT_HOPS, index, layout.NEXT_HOP_SIZE)[-4:], "little")

    def layout(self) -> dict[str, int]:
        """Offsets of fields as "structure.field", sizes of structures by name, and constants as "= name"."""
        self._tell("l")
        lines = iter(self._out.readline, b"\n")
        return {name: int(number) for name, number in (line.decode().rsplit(" ", 1) for line in lines)}

    def _get(self, table: int, index: int, size: int) -> bytes:
        self._tell("g", struct.pack("=I", index), table)
        return self._answer(size)

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout
        return self._process.stdout

    def _tell(self, what: str, body: bytes = b"", table: int = 0) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(struct.pack("=cBHI", what.encode(), table, 0, len(body)) + body)
            if what in "grl":
                self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self, size: int) -> bytes:
        answer = self._out.read(size)
        if len(answer) != size:
            self._fail()
        return answer

    def _fail(self) -> None:
        """It has ended: say why. The next test, or the next try at a smaller packet, has a new one."""
        errors = self._process.communicate(timeout=60)[1]
        self._process = self._start()
        raise AssertionError(errors.decode(errors="replace"))


class KernelRunner:
    """The program in the kernel, which the verifier has taken."""

    # This process may be held up, and the kernel may have four times as many ticks.
    slack = 20 * SECOND

    def __init__(self, compiled: bytes) -> None:
        """Load it.

        Raises:
            OSError: the kernel won't.
        """
        parsed = elf.parse(compiled)
        self._ticks = ticks.measure()
        self._maps: dict[str, bpf.Map] = {}
        try:
            for each in parsed.maps:
                definition = each if each.name in {"settings", "totals"} else each._replace(max_entries=ENTRIES)
                self._maps[each.name] = bpf.Map(definition)
            instructions = parsed.linked({name: each.fd for name, each in self._maps.items()})
            self._program = bpf.Program(instructions, license=parsed.license, name="relay_test")
        except OSError:
            self._close_maps()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._program.close()
        self._close_maps()

    def load(self, tables: Tables) -> None:
        for name, ends in (("clients", tables.clients), ("peers", tables.peers)):
            for index, bucket in enumerate(buckets(ends)):
                self._maps[name].update(struct.pack("=I", index), bucket)
        empty = bytes(layout.NEXT_HOP_SIZE)
        for index in range(ENTRIES):
            channel = tables.channels.get(index)
            packed = channel.packed(self.now()) if channel else bytes(layout.CHANNEL_SIZE)
            self._maps["channels"].update(struct.pack("=I", index), packed)
            hop: Hop | None = tables.next_hops.get(index)
            self._maps["next_hops"].update(struct.pack("=I", index), hop.packed() if hop else empty)
            self._maps["usage"].update(struct.pack("=I", index), bytes(self._maps["usage"].size))
        self._maps["settings"].update(_ZERO, tables.settings.packed())
        self._maps["totals"].update(_ZERO, bytes(self._maps["totals"].size))

    def now(self) -> int:
        return self._ticks.at(time.monotonic())

    def run(self, frame: bytes, ifindex: int = 1) -> Outcome:
        outcome = self._program.test_run(frame, ifindex=ifindex)
        verdict = Verdict(outcome.verdict)
        return Outcome(verdict, outcome.data, -1 if verdict is Verdict.REDIRECT else 0)

    def usage(self, index: int) -> Usage:
        packets, octets, last = zip(*map(layout.USAGE.unpack, self._per_cpu("usage", index)), strict=True)
        return Usage(sum(packets), sum(octets), max(last))

    def totals(self) -> Totals:
        parts = map(layout.TOTALS.unpack, self._per_cpu("totals", 0))
        return Totals.of(layout.TOTALS.pack(*map(sum, zip(*parts, strict=True))))

    def nudged(self, index: int) -> int:
        value = self._maps["next_hops"].lookup(struct.pack("=I", index))
        assert value
        return int.from_bytes(value[-4:], "little")

    def _per_cpu(self, name: str, index: int) -> tuple[bytes, ...]:
        parts = self._maps[name].lookup_per_cpu(struct.pack("=I", index))
        assert parts
        return parts

    def _close_maps(self) -> None:
        for each in self._maps.values():
            each.close()
