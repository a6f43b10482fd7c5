"""Measure the relay beside coturn and a minimal relay in C: ``python -m benchmarks``, or ``make bench``."""

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks.allocations import raise_descriptor_limit
from benchmarks.cases import QUICK, Case, Plan, chosen
from benchmarks.doubts import doubts
from benchmarks.generator import Generator, compile_programs
from benchmarks.loopback import LoopbackSuite
from benchmarks.measure import MeasurementError, machine
from benchmarks.offload.suite import offload_suite
from benchmarks.pinning import on, places
from benchmarks.report import FOLDER, description, write
from benchmarks.results import Results
from benchmarks.servers import coturn_version
from benchmarks.tables import WIDTH, tables

_EPILOG = """\b
python -m benchmarks --list
python -m benchmarks --only saturated-up --only 'paced-*-20000' --rounds 1
python -m benchmarks --only offload     relaying in the kernel; needs root, clang, iproute2 and ethtool
python -m benchmarks.report             tables of the last full run, for benchmarks/README.md

A full run writes JSON and a plot to benchmarks/results. Stop all other work first: rates and delays suffer most.
Exit codes: 0 done, even with failures in some cases; 1 cannot run, or interrupted; 2 usage error.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--quick", is_flag=True, help="One short round in two minutes, as a check and not for figures.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of each case.  [default: 3; 1 with --quick]")
@click.option(
    "--only", multiple=True, metavar="NAME", help="Cases with a name that begins with NAME or matches. Repeatable."
)
@click.option("--list", "list_only", is_flag=True, help="List all cases, and end.")
def main(*, quick: bool, rounds: int | None, only: Sequence[str], list_only: bool) -> None:
    """Measure this relay, coturn, and a relay in C that makes only the necessary system calls.

    Progress goes to standard error, the tables to standard output.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(width=WIDTH, highlight=False)
    plan = QUICK if quick else Plan()
    try:
        cases = chosen(only)
        if list_only:
            for case in cases:
                click.echo(f"{case.name:<24}  {case.title}")
            return
        results = _measure(cases, plan._replace(rounds=rounds or plan.rounds))
    except (MeasurementError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for path in () if quick or only else write(results, FOLDER):
        click.echo(f"written: {path}", err=True)
    for table in tables():
        table.print(results, console)
    for line in (*doubts(results), description(results)):
        console.print(line, markup=False, soft_wrap=True)


def _measure(cases: Sequence[Case], plan: Plan) -> Results:
    began, where = time.monotonic(), places()

    def report(line: str) -> None:
        passed = round(time.monotonic() - began)
        click.echo(f"{passed // 60:2d}:{passed % 60:02d}  {line}", err=True)

    raise_descriptor_limit()
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as name, on(where.load):
        programs = Path(name)
        compile_programs(programs)
        generator = Generator(programs / "load", yields=where.shared)
        loopback = LoopbackSuite([case for case in cases if not case.is_offload], plan, where, generator, programs)
        version = coturn_version()
        if version == "not installed":
            report("no comparison with coturn: turnserver is not installed (Debian: apt-get install coturn)")
        if where.shared:
            report("load and servers share the only CPU: rates and delays mean little")
        results = Results(
            {"machine": machine(version), "places": str(where), "plan": plan._asdict(), "generator": loopback.calibrate()}
        )
        loopback.run(results, report)
        offloaded = [case for case in cases if case.is_offload]
        if offloaded:
            try:
                with offload_suite(offloaded, plan, where, generator, programs) as suite:
                    suite.run(results, report)
            except MeasurementError as error:
                report(f"left out, relaying in the kernel: {error}")
    return results


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
