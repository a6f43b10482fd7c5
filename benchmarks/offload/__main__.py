"""What relaying in the kernel costs, beside sockets: ``python -m benchmarks.offload``, or ``make bench``."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks.allocations import raise_descriptor_limit
from benchmarks.command_line import chosen, list_cases, results_directory, run
from benchmarks.failure import FailedError
from benchmarks.generator import Generator, NoCompilerError, compiled
from benchmarks.measure import machine
from benchmarks.offload.cases import QUICK, Case, Plan, all_cases
from benchmarks.offload.live import Live
from benchmarks.offload.network import Network
from benchmarks.offload.run import Bench, Run
from benchmarks.offload.subjects import Subject, subjects
from benchmarks.offload.table import print_tables, write_chart
from benchmarks.pinning import on, places
from benchmarks.progress import Said
from benchmarks.report import OFFLOAD
from benchmarks.results import Results
from benchmarks.servers import COTURN
from benchmarks.table import WIDTH
from relay.offload import capabilities, elf

_TOOLS = {
    "ip": "iproute2",
    "ethtool": "ethtool",
    "sysctl": "procps",
    "setpriv": "util-linux",
    "clang": "clang",
    "cc": "gcc libc6-dev",
}
"""Programs, and the Debian packages that have them."""

_EPILOG = """\b
python -m benchmarks.offload --list
python -m benchmarks.offload --only saturated-up-200 --rounds 1

It takes root: it makes three network namespaces, which are gone when it ends, however it ends. One CPU sends, and does the
kernel's work; another has the processes that are measured. Exit codes: 0 done, even if something failed in some cases; 130
ended early; 2 it can't be run as asked.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--quick", is_flag=True, help="One short round: to see whether it works, not for figures.")
@click.option("--rounds", type=click.IntRange(1), help="How often each case is measured.  [default: 5; 1 with --quick]")
@click.option("--only", multiple=True, metavar="NAME", help="Cases whose names begin with this, or match it. Repeatable.")
@click.option("--list", "list_only", is_flag=True, help="Name all cases, and end.")
@click.option("--if-possible", is_flag=True, help="Where it can't be run, say why, and end as if it had been.")
@click.option(
    "--results",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where offload.json and the plot go.  [default: benchmarks/results, and folders in it for quick and partial runs]",
)
def main(
    *, quick: bool, rounds: int | None, only: Sequence[str], list_only: bool, if_possible: bool, directory: Path | None
) -> None:
    """Measure the relay with the kernel's help and without, coturn, and a relay in C of system calls alone.

    Progress is on standard error, the tables on standard output.
    """
    cases = chosen(all_cases(), only)
    if list_only:
        list_cases(cases)
        return
    reason = _why_not()
    if reason and if_possible:
        click.echo(f"Left out, relaying in the kernel: {reason}", err=True)
        return
    if reason:
        raise click.ClickException(reason)
    plan = QUICK if quick else Plan()
    plan = plan if rounds is None else plan._replace(rounds=rounds)
    directory = directory or results_directory(quick=quick, partial=bool(only))
    # Whoever ends this with SIGTERM gets what Ctrl-C does: all that was started is ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = _measure(plan, cases)
    except (NoCompilerError, FailedError, OSError) as error:
        raise click.ClickException(str(error)) from error
    results.write(directory / OFFLOAD)
    files = [directory / OFFLOAD, *write_chart(results, directory)]
    print_tables(results, Console(width=WIDTH, highlight=False))
    click.echo(f"Written: {', '.join(str(file) for file in files)}", err=True)


def _measure(plan: Plan, cases: Sequence[Case]) -> Results:
    began, said_to, where = time.monotonic(), Console(stderr=True), places()
    raise_descriptor_limit()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
        stack.enter_context(on({min(where.load)}))
        load, plain = compiled(directory)
        found = subjects(directory, plain)
        _remark(found, said_to, shared=where.shared)
        network = stack.enter_context(Network())
        live = stack.enter_context(Live(directory))
        bench = Bench(plan, cases, found, where, Generator(load, yields=where.shared), live, network)
        coturn = found.get(COTURN)
        results = Results(
            {"machine": machine(coturn.version if coturn else None), "places": str(where), "plan": plan._asdict()}
        )
        Run(bench, results, stack.enter_context(Said(said_to, bench.seconds()))).run()
    results.about["seconds"] = round(time.monotonic() - began, 1)
    return results


def _remark(found: dict[str, Subject], said_to: Console, *, shared: bool) -> None:
    """Say what is missing."""
    if COTURN not in found:
        said_to.print("turnserver is not installed (Debian: apt-get install coturn)", highlight=False)
    if shared:
        said_to.print("only one CPU may be used: load and relays share it, and packets a second say little", highlight=False)


def _why_not() -> str:
    """Say what is missing without which nothing can be measured; "" if nothing is."""
    if os.geteuid() != 0:
        return "network namespaces and programs in the kernel take root"
    lacking = capabilities.missing()
    if lacking:
        return f"nothing can be loaded into the kernel without {' and '.join(lacking)}"
    tools = [f"{tool} (Debian: apt-get install {package})" for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if tools:
        return f"not installed: {', '.join(tools)}"
    try:
        elf.packaged()
    except elf.NotBuiltError as error:
        return f"{error}: python hatch_build.py builds it"
    return ""


if __name__ == "__main__":
    run(main, "python -m benchmarks.offload")
