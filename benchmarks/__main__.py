"""What this relay costs, beside coturn and beside system calls alone: ``python -m benchmarks``, or ``make bench``."""

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks.allocations import raise_descriptor_limit
from benchmarks.cases import QUICK, Case, Plan, all_cases
from benchmarks.charts import write_charts
from benchmarks.command_line import chosen, list_cases, results_directory, run
from benchmarks.failure import FailedError
from benchmarks.generator import Generator, NoCompilerError, compiled
from benchmarks.measure import machine
from benchmarks.pinning import Places, on, places
from benchmarks.progress import Said
from benchmarks.report import LATEST
from benchmarks.results import Results
from benchmarks.run import Bench, Run, calibrate
from benchmarks.servers import COTURN, DIRECT, Server, coturn_server, plain_server, relay_server
from benchmarks.table import WIDTH, print_tables

_EPILOG = """\b
python -m benchmarks --list
python -m benchmarks --only saturated-up --only 'paced-*-20000' --rounds 1
python -m benchmarks.report     writes the table of the last full run into README.md

The servers have one CPU to themselves, and the load the others. Nothing else should run meanwhile: CPU times are little
disturbed by other work, but delays and rates are. Exit codes: 0 done, even if servers failed in some cases; 130 ended early;
2 it can't be run as asked.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--quick", is_flag=True, help="One short round, in about a minute: to see whether it works, not for figures.")
@click.option("--rounds", type=click.IntRange(1), help="How often each case is measured.  [default: 3; 1 with --quick]")
@click.option("--only", multiple=True, metavar="NAME", help="Cases whose names begin with this, or match it. Repeatable.")
@click.option("--list", "list_only", is_flag=True, help="Name all cases, and end.")
@click.option(
    "--results",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where latest.json and the plots go.  [default: benchmarks/results, and folders in it for quick and partial runs]",
)
def main(*, quick: bool, rounds: int | None, only: Sequence[str], list_only: bool, directory: Path | None) -> None:
    """Measure this relay, coturn, and a relay in C that does nothing but its system calls.

    Progress is on standard error, the tables on standard output.
    """
    cases = chosen(all_cases(), only)
    if list_only:
        list_cases(cases)
        return
    plan = QUICK if quick else Plan()
    plan = plan if rounds is None else plan._replace(rounds=rounds)
    directory = directory or results_directory(quick=quick, partial=bool(only))
    # Whoever ends this with SIGTERM gets what Ctrl-C does: servers and load are ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = _measure(plan, cases)
    except (NoCompilerError, FailedError) as error:
        raise click.ClickException(str(error)) from error
    results.write(directory / LATEST)
    files = [directory / LATEST, *write_charts(results, directory)]
    print_tables(results, Console(width=WIDTH, highlight=False))
    click.echo(f"Written: {', '.join(str(file) for file in files)}", err=True)


def _measure(plan: Plan, cases: Sequence[Case]) -> Results:
    began, said_to, where = time.monotonic(), Console(stderr=True), places()
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as name, on(where.load):
        load, plain = compiled(Path(name))
        bench = _bench(Path(name), plan, cases, where, (load, plain))
        for line in _remarks(bench):
            said_to.print(line, highlight=False, markup=False)
        coturn = bench.servers.get(COTURN)
        results = Results(
            {
                "machine": machine(None if coturn is None else coturn.version),
                "places": str(where),
                "plan": plan._asdict(),
                "generator": calibrate(bench),
            }
        )
        with Said(said_to, bench.seconds()) as said:
            Run(bench, results, said).run()
    results.about["seconds"] = round(time.monotonic() - began, 1)
    return results


def _bench(directory: Path, plan: Plan, cases: Sequence[Case], where: Places, programs: tuple[Path, Path]) -> Bench:
    load, plain = programs
    found = (Server(DIRECT), relay_server(directory), coturn_server(directory), plain_server(directory, plain))
    servers = {server.name: server for server in found if server is not None}
    return Bench(plan, cases, servers, where, Generator(load, yields=where.shared), raise_descriptor_limit())


def _remarks(bench: Bench) -> list[str]:
    """Say what is missing."""
    remarks = []
    if COTURN not in bench.servers:
        remarks.append("turnserver is not installed, so there is nothing to compare with (Debian: apt-get install coturn)")
    if bench.places.shared:
        remarks.append("only one CPU may be used: load and servers share it, unpinned, and rates and delays say little")
    return remarks


if __name__ == "__main__":
    run(main, "python -m benchmarks")
