"""The load generator, ``load.c``, and the plain relay, ``plain.c``: compiled, and run."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.failure import FailedError
from benchmarks.flows import Flow

_SOURCES = Path(__file__).parent
_COMPILE_SECONDS = 60
_GRACE_SECONDS = 20
"""Beyond the time of sending: for what is still under way."""


class NoCompilerError(Exception):
    """There is no C compiler, or it fails. The message is one line."""


class Traffic(NamedTuple):
    """What went in, and what came out; times in µs where nothing else is said."""

    sent: int
    arrived: int
    """In an echo: at the client again."""
    in_time: int
    """Arrived before the last was sent."""
    relayed: int
    """Packets that came out of the server: in an echo, two for each that arrived."""
    refused: int
    """Messages that the kernel did not take."""
    late: int
    """Messages sent over 1 ms late, since the machine was busy."""
    stalls: int
    """How often all packets of a lane were given up."""
    seconds: float
    """Of sending."""
    idle: float
    """The share of that in which there was nothing to do for the generator: where it is 0, the generator is the limit."""
    running: float
    """The share of that in which the generator had its CPU; what is not in it went to other work on this machine."""
    last_ms: float
    """From the first packet sent to the last that arrived."""
    p50: float
    p99: float
    p999: float
    longest: float

    @property
    def rate(self) -> float:
        """Packets that arrived in a second."""
        return self.in_time / self.seconds

    @property
    def loss(self) -> float:
        """The share that never arrived, in percent."""
        return 100 * (self.sent - self.arrived) / max(self.sent, 1)


@dataclass(frozen=True)
class Load:
    """What to send; one of ``window``, ``rate`` and ``once`` says how."""

    direction: str
    size: int
    seconds: float = 0
    window: int = 0
    rate: int = 0
    once: bool = False
    segments: int = 1
    quiet_ms: int = 300
    """What is still under way counts until nothing has arrived for so long."""

    def arguments(self) -> list[str]:
        """Say it as the generator wants to be told."""
        numbers = {
            "size": self.size,
            "segments": self.segments,
            "window": self.window,
            "rate": self.rate,
            "milliseconds": round(self.seconds * 1000),
            "quiet": self.quiet_ms,
        }
        options = [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
        return ["--direction", self.direction, *options, *(["--once"] if self.once else [])]


class Generator:
    """The compiled generator."""

    def __init__(self, program: Path, *, yields: bool) -> None:
        self._program = program
        self._yields = yields

    def run(self, load: Load, flows: Sequence[Flow], peer: int) -> Traffic:
        """Send, and count what arrives; that may be nothing.

        Raises:
            FailedError: the generator itself failed.
        """
        descriptors = [peer, *(flow.client.fileno() for flow in flows)]
        command = [str(self._program), "--peer", str(peer), *load.arguments(), *(["--yield"] if self._yields else [])]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=descriptors
        )
        return _outcome(process, "".join(flow.line() for flow in flows), load.seconds + _GRACE_SECONDS)


def _outcome(process: subprocess.Popen[str], flows: str, seconds: float) -> Traffic:
    try:
        out, err = process.communicate(flows, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise FailedError(f"the load generator was not done after {seconds:.0f} s") from error
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise FailedError(f"the load generator ended with {process.returncode}: {err.strip()}")
    return Traffic(**json.loads(out))


def compiled(directory: Path) -> tuple[Path, Path]:
    """Compile the generator and the plain relay into a directory; give the paths of the two programs.

    Raises:
        NoCompilerError: there is no compiler, or it fails.
    """
    if shutil.which("cc") is None:
        raise NoCompilerError("the benchmarks need a C compiler, cc (Debian: apt-get install gcc libc6-dev)")
    load = _compile(directory / "load", "load.c", "lanes.c")
    return load, _compile(directory / "plain", "plain.c")


def _compile(program: Path, *sources: str) -> Path:
    paths = [str(_SOURCES / source) for source in sources]
    done = subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-o", str(program), *paths, "-lm"],
        capture_output=True,
        text=True,
        timeout=_COMPILE_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        first = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise NoCompilerError(f"cc can't compile {sources[0]} (Debian: apt-get install gcc libc6-dev): {first}")
    return program
