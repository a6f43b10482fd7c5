"""The tables of both suites: rows with targets, on the terminal and as Markdown."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.cases import FLOWS, GENERIC, NATIVE, SOCKETS, Case, Kind, all_cases
from benchmarks.results import Figure, Results
from benchmarks.servers import COTURN, PLAIN, RELAY

WIDTH = 200
_MARKS = {True: "✓", False: "✗", None: ""}


@dataclass(frozen=True)
class Target:
    """Limit for the relay's median, or for its ratio to another server."""

    limit: float
    unit: str = ""
    at_least: bool = False
    times: str = ""
    """Name of the other server; "" for a limit of the relay's own figure."""

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{f' × {self.times}' if self.times else self.unit}"

    def is_met(self, figure: Figure | None, ratio: Figure | None) -> bool | None:
        """Compare the median with the limit; return None without a median."""
        judged = ratio if self.times else figure
        if judged is None:
            return None
        return judged.median >= self.limit if self.at_least else judged.median <= self.limit


class Row(NamedTuple):
    """A metric of a case."""

    case: str
    title: str
    metric: str
    target: Target | None = None
    in_readme: bool = False
    factor: float = 1


class Table(NamedTuple):
    """The table of a suite."""

    title: str
    columns: dict[str, str]
    """Headings by server."""
    compared: tuple[str, str]
    rows: tuple[Row, ...]

    def figure(self, row: Row, results: Results, server: str) -> Figure | None:
        """Return the figure of a server in the unit of the row."""
        figure = results.figure(row.case, server, row.metric)
        return figure and Figure(*(row.factor * value for value in figure))

    def cells(self, row: Row, results: Results, *, spread: bool) -> list[str]:
        """Return the cells of a row: title, one cell for each server, ratio, target, mark."""
        ratio = results.ratio(row.case, row.metric, self.compared)
        met = row.target.is_met(self.figure(row, results, self.compared[0]), ratio) if row.target else None
        return [
            row.title,
            *(self._cell(row, results, server, spread=spread) for server in self.columns),
            "" if ratio is None else f"{ratio.median:.3g}",
            "" if row.target is None else str(row.target),
            _MARKS[met],
        ]

    def measured(self, results: Results) -> list[Row]:
        """Return the rows of measured cases."""
        return [row for row in self.rows if results.has(row.case)]

    def markdown(self, results: Results) -> str:
        """Return the rows for the README, as a Markdown table."""
        heads = ["", *self.columns.values(), " ÷ ".join(self.compared), "target"]
        lines = [heads, ["---"] * len(heads)]
        for row in self.measured(results):
            if row.in_readme:
                *cells, target, mark = self.cells(row, results, spread=False)
                lines.append([*cells, f"{target} {mark}".strip()])
        return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)

    def print(self, results: Results, console: Console) -> None:
        """Print the table with the spreads."""
        rows = self.measured(results)
        if not rows:
            return
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        table.add_column("")
        for head in (*self.columns.values(), " ÷ ".join(self.compared), "target", ""):
            table.add_column(head, justify="right")
        for row in rows:
            cells = self.cells(row, results, spread=True)
            table.add_row(*cells, style="red" if cells[-1] == _MARKS[False] else "")
        console.print(table, markup=False)

    def _cell(self, row: Row, results: Results, server: str, *, spread: bool) -> str:
        figure = self.figure(row, results, server)
        if figure is None:
            return "failed" if results.has(row.case, server) else "–"
        if not spread or figure.least == figure.most:
            return number(figure.median)
        return f"{number(figure.median)} ({number(figure.least)}–{number(figure.most)})"


def tables() -> tuple[Table, ...]:
    """Return the tables of both suites."""
    cases = all_cases()
    loopback = [case for case in cases if not case.is_offload and case.direction]
    return (
        Table(
            "Without offload, on loopback",
            {RELAY: "this relay", COTURN: "coturn", PLAIN: "plain C"},
            (RELAY, COTURN),
            (
                *(_cpu_row(case) for case in loopback if case.kind not in {Kind.OVERLOAD, Kind.BUSY}),
                *(_rate_row(case) for case in loopback if case.kind in {Kind.SATURATED, Kind.BATCHES}),
                *_delay_rows(loopback, Kind.PACED),
                *(row for case in loopback if case.kind is Kind.BUSY for row in _busy_rows(case)),
                *(row for case in loopback if case.kind is Kind.OVERLOAD for row in _overload_rows(case)),
                *_allocation_rows(),
            ),
        ),
        Table(
            "With offload, between three network namespaces",
            {NATIVE: "offload, native", GENERIC: "offload, generic", SOCKETS: "its sockets"}
            | {COTURN: "coturn", PLAIN: "plain C"},
            (NATIVE, PLAIN),
            tuple(_offload_rows([case for case in cases if case.is_offload])),
        ),
    )


def number(value: float) -> str:
    """Format a number with about three digits."""
    for limit, digits in ((10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def _cpu_row(case: Case) -> Row:
    limit = {Kind.BATCHES: 0.25, Kind.PACED: 1.5}.get(case.kind)
    if case.kind is Kind.SATURATED:
        limit = 2.0 if case.flows > FLOWS else 1.0
    target = None if limit is None else Target(limit, times=COTURN)
    in_readme = case.flows == FLOWS and case.rate != 2000
    if case.size != 1200:
        in_readme = in_readme and case.kind is Kind.SATURATED
    elif case.flows > FLOWS:
        in_readme = True
    return Row(case.name, f"CPU a packet, {case.title}, µs", "cpu_us", target, in_readme)


def _rate_row(case: Case) -> Row:
    batches = case.kind is Kind.BATCHES
    target = Target(5, at_least=True, times=COTURN) if batches else None
    in_readme = case.flows == FLOWS and case.size == 1200 and (batches or case.direction == "up")
    return Row(case.name, f"Packets/s, {case.title}, thousands", "rate", target, in_readme, factor=1e-3)


def _delay_rows(cases: list[Case], kind: Kind) -> Iterator[Row]:
    for quantile in ("p50", "p99"):
        for case in cases:
            if case.kind is kind:
                title = f"Added delay {quantile}, {case.title}, µs"
                yield Row(case.name, title, f"added_{quantile}", in_readme=case.is_offload)


def _busy_rows(case: Case) -> Iterator[Row]:
    yield Row(case.name, f"Delay p90, {case.title}, µs", "p90", Target(300, " µs"))
    yield Row(case.name, f"Delay p99, {case.title}, µs", "p99", Target(1.5, times=COTURN))


def _overload_rows(case: Case) -> Iterator[Row]:
    yield Row(case.name, f"{case.title}: goodput, %", "goodput", Target(90, " %", at_least=True), in_readme=True)
    yield Row(case.name, f"{case.title}: delay p99, ms", "p99_ms", Target(20, " ms"), in_readme=True)


def _allocation_rows() -> Iterator[Row]:
    name, as_fast = "allocations", Target(1, at_least=True, times=COTURN)
    yield Row(name, "Requests/s, one after another: Allocate", "per_second", as_fast, in_readme=True)
    yield Row(name, "Requests/s, one after another: Refresh", "refreshes_per_second", as_fast, in_readme=True)
    yield Row(name, "CPU, one after another, µs: Allocate", "cpu_us")
    yield Row(name, "CPU, one after another, µs: Refresh", "refresh_cpu_us")
    name = "all-ports"
    yield Row(name, "All ports: allocations at once", "count", in_readme=True)
    yield Row(name, "CPU, all ports, µs: Allocate", "cpu_us", Target(200, " µs"), in_readme=True)
    yield Row(name, "CPU, all ports, µs: one packet to each at once", "burst_cpu_us", Target(40, " µs"), in_readme=True)
    yield Row(name, "All ports: lost of one packet to each at once, %", "burst_loss")
    yield Row("allocations", "Memory an allocation, KB: kernel included", "memory_kb")
    yield Row("allocations", "Memory an allocation, KB: resident part", "resident_kb")
    yield Row(name, "Memory an allocation, KB: all ports, kernel included", "memory_kb", Target(50, " KB"), in_readme=True)
    yield Row(name, "Memory an allocation, KB: all ports, resident part", "resident_kb")
    yield Row("allocations", "Time, ms: start to first answer", "start_ms", in_readme=True)
    yield Row("allocations", "Time, ms: SIGTERM to end", "stop_ms")
    yield Row(name, "Time, ms: to make all", "make_s", factor=1000)
    yield Row(name, "Time, ms: SIGTERM to end with all ports", "stop_s", Target(5000, " ms"), in_readme=True, factor=1000)


def _offload_rows(cases: list[Case]) -> Iterator[Row]:
    saturated = [case for case in cases if case.kind is Kind.OFFLOAD]
    for case in saturated:
        target = Target(5, at_least=True, times=PLAIN) if case.size == 200 else None
        yield Row(case.name, f"Packets/s, {case.title}, thousands", "rate", target, case.size == 200, factor=1e-3)
    for case in saturated:
        target = Target(1 / 8, times=PLAIN) if case.size == 200 else None
        yield Row(case.name, f"CPU a packet, {case.title}, ns", "cpu_ns", target, case.size == 200)
    for case in (case for case in cases if case.kind is Kind.OFFLOAD_PROGRAM):
        yield Row(case.name, f"The program itself, {case.title}, ns", "program_ns", Target(250, " ns"), in_readme=True)
        yield Row(case.name, "– with the kernel's clock reading", "measured_ns")
    yield from _delay_rows(cases, Kind.OFFLOAD_DELAY)
    for case in (case for case in cases if case.kind is Kind.OFFLOAD_CHANNELS):
        for action, limit in (("install", 100), ("remove", 50)):
            yield Row(case.name, f"{case.title}: {action}, ms", f"{action}_ms", Target(limit, " ms"), in_readme=True)
        yield Row(case.name, f"{case.title}: refresh, ms", "refresh_ms")
