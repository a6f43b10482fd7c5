"""Runners of the XDP program for single packets: under sanitizers, and in the kernel."""

import contextlib
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Protocol, Self

from benchmarks.offload import runs
from relay.offload import bpf, elf, layout
from tests.support.offload.model import SECOND, Outcome, Tables, Totals, Usage, Verdict, key_of
from tests.support.offload.tables import entries

HEADROOM: Final = 256
"""Bytes in front of a packet, as most drivers have them."""
ENTRIES: Final = 64
"""Of each table, and of `usage`, which has two for each channel; indices beyond have none."""

_HERE: Final = Path(__file__).parent
_SOURCES: Final = Path(layout.__file__).parent
_SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")

_CLIENTS, _PEERS, _NEXT_HOPS, _WAYS, _USAGE, _SETTINGS, _TOTALS = range(7)
"""Tables, as host.c numbers them."""
_ZERO: Final = bytes(4)
_CLOCK: Final = 6
"""CLOCK_MONOTONIC_COARSE (linux/time.h)."""


class Runner(Protocol):
    """A loaded program.

    Attributes:
        slack: maximum difference in ns between `now` and the program's time.
    """

    slack: int

    def load(self, tables: Tables) -> None:
        """Set the tables and reset the counters."""

    def now(self) -> int: ...

    def run(self, frame: bytes, ifindex: int = 1) -> Outcome:
        """Return the result for a packet. A runner that does not know the target of a redirect returns -1."""

    def usage(self, index: int) -> Usage: ...

    def totals(self) -> Totals: ...

    def nudged(self, destination: bytes) -> int:
        """The time at which a packet was last left to the sockets for this next hop."""


def packed(tables: Tables, now: int) -> dict[str, dict[bytes, bytes]]:
    """Return the content of the maps: values by key."""
    places = tables.places()
    ways = {place: tables.way_of(host) for host, place in places.items()}
    return {
        "clients": {
            key_of(end): each.packed(places[end[0]], of_peer=False, now=now) for end, each in tables.clients.items()
        },
        "peers": {key_of(end): each.packed(places[end[0]], of_peer=True, now=now) for end, each in tables.peers.items()},
        "next_hops": {destination: each.packed(destination) for destination, each in tables.next_hops.items()},
        "ways": {struct.pack("=I", place): layout.NO_WAY if way is None else way.packed() for place, way in ways.items()},
    }


def build_host(folder: Path) -> Path:
    """Compile the program for this machine, with sanitizers.

    Raises:
        FileNotFoundError: gcc is missing.
        subprocess.CalledProcessError: compilation failed.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise FileNotFoundError("gcc")
    program = folder / "host"
    sources = ("-I", str(_SOURCES), str(_HERE / "host.c"), "-o", str(program))
    subprocess.run([gcc, "-O1", "-g", *_WARNINGS, *_SANITIZERS, *sources], check=True)
    return program


class HostRunner:
    """The program as an ordinary process: host.c runs the program."""

    slack = 0

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process = self._start()
        self._clock = 0
        self.set_clock(10_000 * SECOND)

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
        for table, content in enumerate(packed(tables, self._clock).values()):
            for key, value in content.items():
                self._tell("s", key + value, table)
        self._tell("s", _ZERO + tables.settings.packed(), _SETTINGS)

    def now(self) -> int:
        return self._clock

    def set_clock(self, now: int) -> None:
        self._clock = now
        self._tell("t", struct.pack("=Q", now))

    @contextlib.contextmanager
    def at(self, now: int) -> Iterator[None]:
        """Set another time for the duration of a context."""
        before = self._clock
        self.set_clock(now)
        try:
            yield
        finally:
            self.set_clock(before)

    def set_headroom(self, headroom: int) -> None:
        """Set the bytes before packets, until tables are loaded."""
        self._tell("h", struct.pack("=I", headroom))

    def run(self, frame: bytes, ifindex: int = 1) -> Outcome:
        self._tell("r", struct.pack("=I", ifindex) + frame)
        verdict, redirected_to, length = struct.unpack("=III", self._answer(12))
        return Outcome(Verdict(verdict), self._answer(length), redirected_to)

    def usage(self, index: int) -> Usage:
        return Usage(*layout.USAGE.unpack(self._get(_USAGE, struct.pack("=I", index), layout.USAGE.size)))

    def totals(self) -> Totals:
        return Totals.of(self._get(_TOTALS, _ZERO, layout.TOTALS.size))

    def nudged(self, destination: bytes) -> int:
        return int(layout.NEXT_HOP.unpack(self._get(_NEXT_HOPS, destination, layout.NEXT_HOP.size))[-1])

    def layout(self) -> dict[str, int]:
        """Offsets of fields as "structure.field", sizes of structures by name, and constants as "= name"."""
        self._tell("l")
        lines = iter(self._out.readline, b"\n")
        return {name: int(number) for name, number in (line.decode().rsplit(" ", 1) for line in lines)}

    def _get(self, table: int, key: bytes, size: int) -> bytes:
        self._tell("g", key, table)
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
        """Report the end of the process. The next test, or the next attempt with a smaller packet, starts a new process."""
        errors = self._process.communicate(timeout=60)[1]
        self._process = self._start()
        raise AssertionError(errors.decode(errors="replace"))


class KernelRunner:
    """The program in the kernel, which the verifier has taken."""

    # This process may be held up.
    slack = 20 * SECOND

    def __init__(self, compiled: bytes) -> None:
        """Load the program.

        Raises:
            OSError: the kernel rejects the program.
        """
        parsed = elf.parse(compiled)
        self._content: dict[str, dict[bytes, bytes]] = {}
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
        for name, content in self._content.items():
            if name != "ways":
                self._maps[name].delete(list(content))
        self._content = packed(tables, self.now())
        for name, content in self._content.items():
            self._maps[name].update(content)
        unused = bytes(self._maps["usage"].size)
        self._maps["usage"].update({struct.pack("=I", index): unused for index in range(ENTRIES)})
        self._maps["settings"].update({_ZERO: tables.settings.packed()})
        self._maps["totals"].update({_ZERO: bytes(self._maps["totals"].size)})

    def now(self) -> int:
        return time.clock_gettime_ns(_CLOCK)

    def run(self, frame: bytes, ifindex: int = 1) -> Outcome:
        outcome = runs.run(self._program, frame, ifindex=ifindex)
        verdict = Verdict(outcome.verdict)
        return Outcome(verdict, outcome.data, -1 if verdict is Verdict.REDIRECT else 0)

    def usage(self, index: int) -> Usage:
        packets, octets, last = zip(*map(layout.USAGE.unpack, self._per_cpu("usage", index)), strict=True)
        return Usage(sum(packets), sum(octets), max(last))

    def totals(self) -> Totals:
        parts = map(layout.TOTALS.unpack, self._per_cpu("totals", 0))
        return Totals.of(layout.TOTALS.pack(*map(sum, zip(*parts, strict=True))))

    def nudged(self, destination: bytes) -> int:
        return int(layout.NEXT_HOP.unpack(entries(self._maps["next_hops"].fd, 16, layout.NEXT_HOP.size)[destination])[-1])

    def _per_cpu(self, name: str, index: int) -> tuple[bytes, ...]:
        table = self._maps[name]
        value, size = table.lookup(index, 1), table.definition.value_size
        return tuple(value[at : at + size] for at in range(0, len(value), table.stride))

    def _close_maps(self) -> None:
        for each in self._maps.values():
            each.close()
