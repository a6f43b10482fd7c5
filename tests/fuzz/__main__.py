"""Fuzz each target for some time, and print a table of results.

``python -m tests.fuzz --seconds 60 server`` fuzzes the target ``server``; without a name, all targets. The found inputs are
in ``.fuzz/``, and the next run continues with these inputs. ``--minimise`` copies inputs that reach new code from there
into the tree, and removes redundant inputs. ``--input FILE server`` runs a single input, such as a failure.

``--short`` takes 20 seconds per target. With ``CI`` set, each run tries the same inputs, for about 20 seconds.
"""

import argparse
import functools
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import lines, registry

WORK = Path(".fuzz")
LONGEST_INPUT = 2048
"""Maximum input size in bytes, enough for sequences of some hundred actions."""

MOST_KEPT = 100
"""Maximum number of inputs per target in the tree."""

RUNS = {"stun": 40_000, "server": 2_500, "portal": 60_000, "http": 30_000, "log_filter": 170_000}
"""Number of executions in about `SHORT` seconds, on one CPU and without initial inputs."""

SHORT = 20
"""Seconds."""

_PULSE = 20.0
"""Seconds between two progress lines."""

_STATUS = re.compile(
    r"#(?P<executions>\d+)\s+\S+\s+cov: (?P<edges>\d+) ft: (?P<features>\d+) corp: (?P<inputs>\d+)/.*exec/s: (?P<pace>\d+)"
)
_ROW = "{:<11} {:>8} {:>11} {:>8} {:>7} {:>9} {:>7} {:>14}"


class Outcome(NamedTuple):
    """The result of fuzzing a target."""

    name: str
    seconds: float
    executions: int
    edges: int
    features: int
    inputs: int
    failed: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(registry.TARGETS)}; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} s, or the same inputs in each run where CI is set")
    parser.add_argument("--jobs", type=int, default=1, help="targets at once")
    parser.add_argument("--minimise", action="store_true", help="keep in the tree what reaches new code")
    parser.add_argument("--input", type=Path, help="run this one input only")
    options = parser.parse_args(arguments)
    unknown = set(options.targets) - set(registry.TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(registry.TARGETS)}")
    targets = options.targets or registry.TARGETS
    if options.input is not None:
        for name in targets:
            registry.load(name).run(options.input.read_bytes())
        return 0
    if options.minimise:
        for name in targets:
            print(name, "keeps", minimise(name), "inputs")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print(f"not fuzzed: atheris is not installed; there may be none for Python {platform.python_version()}")
        return 0 if options.short else 1
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.short and os.environ.get("CI"):
            outcomes = list(pool.map(fuzz_the_same, targets))
        else:
            seconds = SHORT if options.short else options.seconds
            outcomes = list(pool.map(lambda name: fuzz(name, WORK / name, f"-max_total_time={seconds}"), targets))
    show(outcomes)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def fuzz_the_same(name: str) -> Outcome:
    """Run a target on inputs determined by the tree alone."""
    # Inputs from earlier runs would change the results.
    with tempfile.TemporaryDirectory() as work:
        # Entropic scheduling, libFuzzer's default, depends on the address space layout.
        return fuzz(name, Path(work), "-seed=1", "-entropic=0", f"-runs={RUNS[name]}")


def fuzz(name: str, work: Path, *how_long: str) -> Outcome:
    """Run a target, and print its progress.

    Args:
        name: the target's name.
        work: the directory of initial inputs and new inputs.
        how_long: libFuzzer's options for the duration.
    """
    for folder in (WORK, work):
        folder.mkdir(parents=True, exist_ok=True)
    for n, seed in enumerate(registry.load(name).SEEDS):
        (work / f"seed-{n}").write_bytes(seed)
    command = [
        sys.executable, "-m", "tests.fuzz.campaign", name, *how_long, f"-max_len={LONGEST_INPUT}",
        "-timeout=20", f"-artifact_prefix={WORK}/{name}-", "-print_final_stats=1", str(work),
        *([str(registry.CORPUS / name)] if (registry.CORPUS / name).is_dir() else []),
    ]  # fmt: skip
    began, told = time.monotonic(), 0.0
    outcome = Outcome(name, 0, 0, 0, 0, 0, failed=False)
    log = WORK / f"{name}.log"
    # Makes the iteration order of sets reproducible.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace") as process,
        log.open("w") as written,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            written.write(line)
            match = _STATUS.match(line)
            if match is None:
                continue
            passed = time.monotonic() - began
            executions, edges, features, inputs = (int(match[key]) for key in ("executions", "edges", "features", "inputs"))
            outcome = Outcome(name, passed, executions, edges, features, inputs, failed=False)
            if passed - told > _PULSE:
                told = passed
                print(f"{name}: {passed:.0f} s, {executions} executions, {edges} edges, {inputs} inputs", flush=True)
    if process.returncode:
        print(f"{name}: FAILED; {log} says how, and the input is {WORK}/{name}-*. To repeat it:")
        print(f"    {sys.executable} -m tests.fuzz --input {WORK}/{name}-crash-... {name}", flush=True)
    return outcome._replace(seconds=time.monotonic() - began, failed=process.returncode != 0)


def show(outcomes: list[Outcome]) -> None:
    """Print the table."""
    print(_ROW.format("target", "seconds", "executions", "exec/s", "edges", "features", "inputs", "lines"))
    for outcome in outcomes:
        target = registry.load(outcome.name)
        inputs = [path.read_bytes() for path in _inputs(outcome.name)]
        reached = lines.arcs(target.MODULES, functools.partial(registry.run_all, target, inputs))
        every = lines.of(target.MODULES)
        covered = every & {(path, line) for path, _, line in reached}
        share = f"{len(covered)}/{len(every)} {len(covered) / len(every):.0%}"
        pace = f"{outcome.executions / max(outcome.seconds, 1):.0f}"
        print(
            _ROW.format(
                outcome.name, f"{outcome.seconds:.0f}", outcome.executions, pace, outcome.edges, outcome.features,
                outcome.inputs, share,
            ),
            flush=True,
        )  # fmt: skip


def minimise(name: str) -> int:
    """Keep the shortest inputs with the same coverage; return their number."""
    target = registry.load(name)
    reached: set[lines.Arc] = set()
    kept: list[tuple[int, bytes]] = []
    for data in sorted({path.read_bytes() for path in _inputs(name)}, key=lambda each: (len(each), each)):
        new = lines.arcs(target.MODULES, functools.partial(target.run, data)) - reached
        if new:
            reached |= new
            kept.append((len(new), data))
    most = sorted(kept, key=lambda each: -each[0])[:MOST_KEPT]
    folder = registry.CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for _, data in most:
        (folder / registry.name_of(data)).write_bytes(data)
    return len(most)


def _inputs(name: str) -> list[Path]:
    folders = [WORK / name, registry.CORPUS / name]
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]


if __name__ == "__main__":
    sys.exit(main())
