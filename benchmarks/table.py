"""The results as tables: on the terminal, and for the README."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from benchmarks.cases import Kind, all_cases
from benchmarks.results import Results
from benchmarks.rows import SHOWN, Cells, Row, cells, sections
from benchmarks.servers import COTURN, DIRECT, RELAY

_MARKS = {True: "met", False: "MISSED", None: ""}
_LEAST = {"server_busy": 0.9, "load_running": 0.95, "offered_times": 1.8, "in_time": 0.99}
"""Shares below which the machine was not quiet enough."""

_LEAST_IDLE = 0.02
_MOST_LOST = 0.1
WIDTH = 160


def print_tables(results: Results, console: Console) -> None:
    """Print all tables, then what went wrong, and what makes figures doubtful."""
    for section in sections():
        rows = [row for row in section.rows if results.has(row.case)]
        if rows:
            console.print(_table(section.title, rows, results), markup=False)
            console.print(f"{section.note}\n" if section.note else "", style="dim", markup=False)
    for line in (*_failures(results), *_losses(results), *_doubts(results)):
        console.print(line, highlight=False, markup=False)
    console.print(_about(results), highlight=False, markup=False)


def markdown(results: Results) -> str:
    """Give the rows of the README, as a table of Markdown with a line about the machine."""
    shown = [server for server in SHOWN if server in results.servers()]
    names = [{RELAY: "this relay"}.get(server, server) for server in shown]
    heads = ["", *names, "relay ÷ coturn", "target"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for section in sections():
        rows = [row for row in section.rows if row.readme and results.has(row.case)]
        lines += [_line(_markdown_cells(row, cells(row, results), shown)) for row in rows]
    return "\n".join([*lines, "", _about(results)])


def _table(title: str, rows: list[Row], results: Results) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    compared = any(len(row.metrics) == 1 for row in rows)
    table.add_column("")
    for head in (*SHOWN, *(("relay/coturn", "target") if compared else ())):
        table.add_column(head, justify="right")
    if compared:
        table.add_column("")
    for row in rows:
        shown = cells(row, results)
        more = (shown.ratio, shown.target, _MARKS[shown.met]) if compared else ()
        table.add_row(row.title, *shown.servers, *more, style="red" if shown.met is False else "")
    return table


def _failures(results: Results) -> Iterator[str]:
    for case in all_cases():
        for server in (DIRECT, *SHOWN):
            for reason in dict.fromkeys(results.failures(case.name, server)):
                yield f"Failed: {case.name}, {server}: {reason}"


def _losses(results: Results) -> Iterator[str]:
    """Say what was lost where nothing should be: CPU time is divided by the packets that arrived."""
    names = [case.name for case in all_cases() if case.has_packets and case.kind is not Kind.OVERLOAD]
    lost = [(case, server, loss) for case, server, loss in results.all_values("loss", names) if loss > _MOST_LOST]
    if lost:
        yield "Lost: " + "; ".join(f"{case}, {server}: {loss:.1f} %" for case, server, loss in lost)


def _doubts(results: Results) -> Iterator[str]:
    """Say where a saturated server was not the limit, and where the load did not keep its times."""
    saturated = {case.name for case in all_cases() if case.kind in {Kind.SATURATED, Kind.TRAINS}}
    paced = {case.name for case in all_cases() if case.is_delay}
    overloaded = {case.name for case in all_cases() if case.kind is Kind.OVERLOAD}
    doubts = (
        (saturated, "server_busy", "saturated servers had their CPU for too little of the time"),
        (saturated | paced, "load_running", "the load generator had its CPU for too little of the time"),
        (overloaded, "offered_times", "servers were not offered twice their best"),
        (paced, "in_time", "too few packets were sent within 1 ms of their time"),
    )
    for cases, metric, text in doubts:
        values = results.all_values(metric, cases)
        low = [each for each in values if each[2] < _LEAST[metric]]
        if low:
            case, server, share = min(low, key=lambda each: each[2])
            worst = f"below {_LEAST[metric]:.0%}; at worst {share:.0%}, {case}, {server}"
            yield f"Doubtful: {text} in {len(low)} of {len(values)} measurements ({worst}): does anything else run here?"
    running = {(case, server): share for case, server, share in results.all_values("load_running", saturated)}
    for case, server, idle in results.all_values("load_idle", saturated):
        if idle < _LEAST_IDLE and running[case, server] > _LEAST["load_running"]:
            yield f"Doubtful: {case}, {server}: the load generator, idle for {idle:.0%} of the time, may be the limit"


def _about(results: Results) -> str:
    about = results.about
    machine, alone = about["machine"], about["generator"]
    coturn = f", coturn {machine[COTURN]}" if COTURN in results.servers() else ""
    packets, in_trains = (alone[name] / 1000 for name in ("packets_per_second", "in_trains_per_second"))
    return (
        f"{machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, CPython {machine['python']}{coturn}; "
        f"{about['places']}; {_counted(about['plan']['rounds'])}; "
        f"revision {machine['revision']}, {machine['date']}. The load generator alone: "
        f"{packets:,.0f} thousand packets/s, {in_trains:,.0f} in trains."
    )


def _counted(rounds: int) -> str:
    return "one round" if rounds == 1 else f"medians of {rounds} rounds (least–most)"


def _markdown_cells(row: Row, shown: Cells, servers: list[str]) -> list[str]:
    by_name = dict(zip(SHOWN, shown.servers, strict=True))
    mark = {True: " ✓", False: " ✗", None: ""}[shown.met]
    return [row.readme, *(by_name[server].partition(" (")[0] for server in servers), shown.ratio, shown.target + mark]


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |".replace("|  |", "| |")
