"""The results as tables: on the terminal, and for the README; and as a plot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks.offload.cases import FLOWS, SIZES, Kind, all_cases
from benchmarks.offload.rows import NAMES, SHOWN, Cells, Row, cells, sections
from benchmarks.plot import Group, Panel, svg
from benchmarks.results import Results
from benchmarks.servers import DIRECT

PLOT: Final = "offload.svg"
_MARKS: Final = {True: "met", False: "MISSED", None: ""}
_README_MARKS: Final = {True: " ✓", False: " ✗", None: ""}
_MOST_LOST: Final = 0.1
_LEAST_RUNNING: Final = 0.95
"""The share of its CPU that the load should have had."""

_WAYS: Final = {"up": "client → peer", "down": "peer → client"}
_METRICS: Final = {"cpu_ns": "CPU a packet, ns", "rate": "packets a second (longer is better)"}


def print_tables(results: Results, console: Console) -> None:
    """Print all tables, then what went wrong, and what makes figures doubtful."""
    for section in sections():
        rows = [row for row in section.rows if results.has(row.case)]
        if rows:
            console.print(_table(section.title, rows, results), markup=False)
            console.print(f"{section.note}\n", style="dim", markup=False)
    for line in (*_failures(results), *_doubts(results)):
        console.print(line, highlight=False, markup=False)
    console.print(about(results), highlight=False, markup=False)


def markdown(results: Results) -> str:
    """Give the rows of the README, as a table of Markdown with a line about the machine."""
    shown = [name for name in SHOWN if name in results.servers()]
    heads = ["", *(NAMES[name] for name in shown), "native ÷ plain C", "target"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for section in sections():
        rows = [row for row in section.rows if row.readme and results.has(row.case)]
        lines += [_line(_markdown_cells(row, cells(row, results), shown)) for row in rows]
    return "\n".join([*lines, "", about(results)])


def write_chart(results: Results, directory: Path) -> list[Path]:
    """Draw what there is of packets, and give the file."""
    names = [name for name in SHOWN if name in results.servers()]
    panels = [
        Panel(f"{way}, {title} (logarithmic)", _groups(results, names, direction, metric), logarithmic=True)
        for metric, title in _METRICS.items()
        for direction, way in _WAYS.items()
    ]
    known = [panel for panel in panels if panel.groups]
    if not known:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / PLOT
    file.write_text(svg("Relaying in the kernel", [NAMES[name] for name in names], known), encoding="utf-8")
    return [file]


def about(results: Results) -> str:
    """Say what it was measured on, and how."""
    machine, rounds = results.about["machine"], results.about["plan"]["rounds"]
    counted = "one round" if rounds == 1 else f"medians of {rounds} rounds"
    return (
        f"{machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, veth between three namespaces; "
        f"{counted}; revision {machine['revision']}, {machine['date']}."
    )


def _groups(results: Results, names: list[str], direction: str, metric: str) -> list[Group]:
    groups = [
        Group(
            f"{size} B, {'1 flow' if flows == 1 else f'{flows:,} flows'}",
            [results.figure(f"saturated-{direction}-{size}-{flows}", name, metric) for name in names],
        )
        for flows in FLOWS
        for size in SIZES
    ]
    return [group for group in groups if any(group.figures)]


def _table(title: str, rows: list[Row], results: Results) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for head in (*SHOWN, "native/plain C", "target", ""):
        table.add_column(head, justify="right")
    for row in rows:
        shown = cells(row, results)
        style = "red" if shown.met is False else ""
        table.add_row(row.title, *shown.subjects, shown.ratio, shown.target, _MARKS[shown.met], style=style)
    return table


def _failures(results: Results) -> Iterator[str]:
    for case in all_cases():
        for name in (DIRECT, *SHOWN):
            for reason in dict.fromkeys(results.failures(case.name, name)):
                yield f"Failed: {case.name}, {name}: {reason}"


def _doubts(results: Results) -> Iterator[str]:
    saturated = [case.name for case in all_cases() if case.kind is Kind.SATURATED]
    lost = [each for each in results.all_values("loss", saturated) if each[2] > _MOST_LOST]
    if lost:
        yield "Lost: " + "; ".join(f"{case}, {name}: {loss:.1f} %" for case, name, loss in lost)
    values = results.all_values("running", saturated)
    low = [each for each in values if each[2] < _LEAST_RUNNING]
    if low:
        case, name, share = min(low, key=lambda each: each[2])
        yield (
            f"Doubtful: packets a second, as the load had its CPU for too little of the time in {len(low)} of {len(values)} "
            f"measurements (at worst {share:.0%}, {case}, {name}): does anything else run here?"
        )


def _markdown_cells(row: Row, shown: Cells, names: list[str]) -> list[str]:
    by_name = dict(zip(SHOWN, shown.subjects, strict=True))
    figures = (by_name[name].partition(" (")[0] for name in names)
    return [row.readme, *figures, shown.ratio, shown.target + _README_MARKS[shown.met]]


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |".replace("|  |", "| |")
