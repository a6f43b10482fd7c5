"""The load generator, ``load.c``, and the plain relay, ``plain.c``: compilation and runs."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import MeasurementError
from benchmarks.sessions import Flow

_SOURCES = Path(__file__).parent
_COMPILE_SECONDS = 60
_GRACE_SECONDS = 20
"""Added to the sending time, for packets still in flight."""


class Traffic(NamedTuple):
    """Packets in and out of a server; delays in µs."""

    sent: int
    arrived: int
    in_time: int
    """Packets received before the last packet was sent."""
    late: int
    """Messages sent more than 1 ms late, because the machine was busy."""
    seconds: float
    """Sending time."""
    idle: float
    """Idle share of the generator during sending. At 0, the generator is the limit."""
    running: float
    """Share of the sending time with a CPU. Other processes took the rest."""
    last_ms: float
    """From the first packet sent to the last packet received."""
    p50: float
    p90: float
    p99: float

    @property
    def rate(self) -> float:
        """Return the received packets per second of sending."""
        return self.in_time / self.seconds

    @property
    def loss(self) -> float:
        """Return the lost share in percent."""
        return 100 * (self.sent - self.arrived) / max(self.sent, 1)

    def check_arrivals(self) -> None:
        """Check that at least one packet arrived."""
        if not self.arrived:
            raise MeasurementError(f"none of {self.sent:,} packets arrived")


class Load(NamedTuple):
    """A load to generate, by exactly one of ``window``, ``rate`` and ``once``."""

    direction: str
    size: int
    milliseconds: int = 0
    window: int = 0
    rate: int = 0
    once: int = 0
    segments: int = 1
    quiet: int = 300
    """The generator waits for packets in flight until none has arrived for so many milliseconds."""


class Generator:
    """The compiled generator."""

    def __init__(self, program: Path, *, yields: bool) -> None:
        self._program, self._yields = program, yields

    def run(self, load: Load, flows: Sequence[Flow], peer: int) -> Traffic:
        """Send, and count the packets received, possibly none."""
        descriptors = [peer, *(flow.client.fileno() for flow in flows)]
        arguments = {"peer": peer, "yield": int(self._yields), **load._asdict()}
        command = [str(self._program), *(text for name, value in arguments.items() for text in (f"--{name}", str(value)))]
        timeout = load.milliseconds / 1000 + _GRACE_SECONDS
        lines = "".join(flow.line() for flow in flows)
        try:
            done = subprocess.run(
                command, input=lines, capture_output=True, text=True, pass_fds=descriptors, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"the load generator still ran after {timeout:.0f} s") from error
        if done.returncode != 0:
            raise MeasurementError(f"the load generator ended with {done.returncode}: {done.stderr.strip()}")
        return Traffic(**json.loads(done.stdout))


def compile_programs(directory: Path) -> None:
    """Compile the generator and the plain relay into a directory, as ``load`` and ``plain``."""
    for name, sources in (("load", ("load.c", "flows.c")), ("plain", ("plain.c",))):
        paths = (str(_SOURCES / source) for source in sources)
        options = ("-O2", "-Wall", "-Wextra", "-o", str(directory / name), *paths, "-lm")
        compile_c(directory / name, "cc", *options, package="gcc libc6-dev")


def compile_c(program: Path, compiler: str, *arguments: str, package: str) -> Path:
    """Run a C compiler, and return the path of its output."""
    hint = f"(Debian: apt-get install {package})"
    if shutil.which(compiler) is None:
        raise MeasurementError(f"the benchmarks need a C compiler, {compiler} {hint}")
    command = [compiler, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    if done.returncode != 0:
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise MeasurementError(f"{compiler} cannot compile {program.name} {hint}: {first}")
    return program
