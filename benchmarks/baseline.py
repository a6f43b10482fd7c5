"""What this relay costs beside coturn: CPU for each packet, CPU and memory for each allocation, and time to start.

Run it from the root of the checkout: ``python -m benchmarks.baseline``. Both servers take turns in all measurements, on one
CPU, with the load on another; what counts are the ratios, since a machine's other work disturbs both alike.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from benchmarks.load import TICK_SECONDS, Direction, Flow, Route, Traffic, allocate, offer, opened_flows
from benchmarks.measure import cpu_ns, machine, memory
from benchmarks.servers import NotReadyError, Running, Server, coturn_server, relay_server, started

FLOWS = 20
SIZES = (172, 1200)
"""Payloads: 20 ms of telephony (G.711 with RTP), and what a tunnel's full packets come near to."""

WARM_UP_SECONDS = 0.3
WARM_UP_ALLOCATIONS = 20
SETTLE_SECONDS = 0.3
"""After the last allocation: threads and sockets are still being set up when it is answered."""

WIDTH = 125


class Plan(NamedTuple):
    """How much to measure."""

    seconds: float
    rounds: int
    rate: int
    allocations: int
    starts: int


class Sample(NamedTuple):
    """One measurement."""

    value: float
    traffic: Traffic | None = None


class Row:
    """The samples of one case, by server, one for each round (or start)."""

    def __init__(self) -> None:
        self.samples: defaultdict[str, list[Sample]] = defaultdict(list)

    def median(self, server: str) -> float | None:
        """Give the median of a server's values."""
        return _median(sample.value for sample in self.samples[server])

    def ratio(self) -> float | None:
        """Give the median of relay to coturn; each ratio is of two measurements made one after the other."""
        pairs = zip(self.samples["relay"], self.samples["coturn"], strict=False)
        return _median(ours.value / theirs.value for ours, theirs in pairs if theirs.value)

    def traffic(self, server: str) -> list[Traffic]:
        """Give what was sent, if this is about packets."""
        return [sample.traffic for sample in self.samples[server] if sample.traffic is not None]


class Bench:
    """Runs the cases and keeps what they give."""

    def __init__(self, plan: Plan, servers: list[Server], server_cpu: int) -> None:
        self.rows: defaultdict[str, Row] = defaultdict(Row)
        self._plan = plan
        self._servers = servers
        self._server_cpu = server_cpu
        self._began = time.perf_counter()

    def run(self) -> None:
        """Run everything; the first start of each server fills caches and is not counted."""
        for server in self._servers:
            with started(server, self._server_cpu):
                pass
        for number in range(1, self._plan.rounds + 1):
            self._say(f"round {number} of {self._plan.rounds}")
            self._measure_packets()
            self._measure_allocations()
            self._measure_starts()

    def _measure_packets(self) -> None:
        """Have both servers run at once, the one idle while the other is measured, so that they alternate quickly."""
        with contextlib.ExitStack() as stack:
            running = [(server, stack.enter_context(started(server, self._server_cpu))) for server in self._servers]
            flows = {server.name: stack.enter_context(opened_flows(server, FLOWS)) for server in self._servers}
            for direction in Direction:
                for size in SIZES:
                    for server, process in running:
                        sample = self._relay_packets(process, flows[server.name], direction, size)
                        self._keep(f"CPU/packet {direction} {size} B, µs", server, sample)

    def _relay_packets(self, process: Running, flows: list[Flow], direction: Direction, size: int) -> Sample:
        route = Route(flows, direction, size)
        offer(route, self._plan.rate, WARM_UP_SECONDS)
        before = cpu_ns(process.pid)
        traffic = offer(route, self._plan.rate, self._plan.seconds)
        used = cpu_ns(process.pid) - before
        return Sample(used / 1000 / max(traffic.arrived, 1), traffic)

    def _measure_allocations(self) -> None:
        for server in self._servers:
            with started(server, self._server_cpu) as process, contextlib.ExitStack() as stack:
                allocate(stack, server, range(WARM_UP_ALLOCATIONS))
                time.sleep(SETTLE_SECONDS)
                cpu, before = cpu_ns(process.pid), memory(process.pid)
                count = self._plan.allocations
                seconds = allocate(stack, server, range(WARM_UP_ALLOCATIONS, WARM_UP_ALLOCATIONS + count))
                time.sleep(SETTLE_SECONDS)
                used, after = cpu_ns(process.pid) - cpu, memory(process.pid)
            for name, value in {
                "CPU/allocation, µs": used / 1000 / count,
                "RSS/allocation, KB": (after.rss - before.rss) / count,
                "PSS/allocation, KB": (after.pss - before.pss) / count,
                "Stacks+page tables/allocation, KB": (after.kernel - before.kernel) / count,
                "Allocations in series, 1/s": count / seconds,
            }.items():
                self._keep(name, server, Sample(value))

    def _measure_starts(self) -> None:
        for _ in range(self._plan.starts):
            for server in self._servers:
                with started(server, self._server_cpu) as process:
                    self._keep("Start to first answer, ms", server, Sample(process.start_ms))

    def _keep(self, case: str, server: Server, sample: Sample) -> None:
        self.rows[case].samples[server.name].append(sample)
        traffic = "" if sample.traffic is None else f", loss {sample.traffic.loss:.2f} %, {sample.traffic.rate:.0f}/s"
        self._say(f"{case}: {server.name} {sample.value:.2f}{traffic}")

    def _say(self, text: str) -> None:
        click.echo(f"{time.perf_counter() - self._began:6.1f} s  {text}", err=True)


def table_of(rows: dict[str, Row], names: list[str]) -> Table:
    """Lay out the medians."""
    compared = len(names) > 1
    table = Table(title=f"Medians{'; ratio = median of relay/coturn by round' if compared else ''}", title_justify="left")
    table.add_column("case")
    for name in [
        *names,
        *(["ratio"] if compared else []),
        *(f"loss %\n{name}" for name in names),
        *(f"sent/s\n{name}" for name in names),
    ]:
        table.add_column(name, justify="right")
    for case, row in rows.items():
        traffic = {name: row.traffic(name) for name in names}
        cells = [_number(row.median(name), 1) for name in names]
        cells += [_number(row.ratio(), 2)] if compared else []
        cells += [_number(_median(each.loss for each in traffic[name]), 2) for name in names]
        cells += [_number(_median(each.rate for each in traffic[name]), 0) for name in names]
        table.add_row(case, *cells)
    return table


def generator_line(rows: dict[str, Row], rate: int) -> str:
    """Say how near to its own limit the generator was."""
    runs = [each for row in rows.values() for name in row.samples for each in row.traffic(name)]
    limit = min(run.rate / run.busy for run in runs)
    busiest = max(run.busy for run in runs)
    late = [100 * run.late * rate * TICK_SECONDS / run.sent for run in runs]
    return (
        f"Load: {FLOWS} flows, bursts of {rate / 1000:g} packets each ms; the generator used at most {busiest:.0%} of its "
        f"CPU (so its limit is near {limit:.0f}/s). Bursts over 1 ms late: {statistics.median(late):.1f} %, "
        f"at worst {max(late):.1f} %."
    )


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _as_json(rows: dict[str, Row], names: list[str]) -> dict[str, object]:
    return {
        case: {
            "ratio": row.ratio(),
            "medians": {name: row.median(name) for name in names},
            "samples": {name: [_sample(each) for each in row.samples[name]] for name in names},
        }
        for case, row in rows.items()
    }


def _sample(sample: Sample) -> dict[str, float]:
    traffic = sample.traffic
    more = {} if traffic is None else {**traffic._asdict(), "rate": traffic.rate, "loss_percent": traffic.loss}
    return {"value": sample.value, **more}


@contextlib.contextmanager
def _pinned_load() -> Iterator[int]:
    """Stay on the first CPU that this process may use, ahead of other work if allowed; give the last, for the servers."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) == 1:
        click.echo("only one CPU may be used: load and server share it, and the results say little", err=True)
    os.sched_setaffinity(0, cpus[:1])
    # Other work on its CPU would make its bursts late. The servers don't inherit this.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield cpus[-1]
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, cpus)


@click.command(context_settings={"show_default": True})
@click.option("--seconds", type=click.FloatRange(0.1, 20), default=5.0, help="Of load, for each measurement.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="How often everything is measured.")
@click.option("--rate", type=click.IntRange(1000), default=20_000, help="Packets offered in a second, over all flows.")
@click.option("--quick", is_flag=True, show_default=False, help="Half a minute in all; replaces --seconds and --rounds.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all samples to this file.")
def main(*, seconds: float, rounds: int, rate: int, quick: bool, json_path: Path | None) -> None:
    """Measure this relay beside coturn, if that is installed. Progress is on stderr, the table on stdout."""
    plan = Plan(seconds, rounds, rate, allocations=1000, starts=3)
    if quick:
        plan = Plan(rate=rate, seconds=0.8, rounds=2, allocations=300, starts=2)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as directory, _pinned_load() as server_cpu:
        coturn = coturn_server(Path(directory))
        if coturn is None:
            click.echo("turnserver is not installed: there is nothing to compare with", err=True)
        servers = [relay_server(Path(directory)), *([] if coturn is None else [coturn])]
        bench = Bench(plan, servers, server_cpu)
        try:
            bench.run()
        except NotReadyError as error:
            raise click.ClickException(str(error)) from error
    about = machine(None if coturn is None else coturn.version) | {"load average before": f"{load_before:.1f}"}
    _report(bench.rows, [server.name for server in servers], plan, about, json_path)


def _report(rows: dict[str, Row], names: list[str], plan: Plan, about: dict[str, str], json_path: Path | None) -> None:
    console = Console(width=WIDTH, highlight=False)
    console.print(table_of(rows, names))
    console.print(generator_line(rows, plan.rate))
    console.print("Machine: " + ", ".join(f"{name} {value}" for name, value in about.items()))
    if json_path is not None:
        document = {"machine": about, "plan": plan._asdict(), "cases": _as_json(rows, names)}
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
