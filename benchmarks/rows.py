"""The rows of the report: which figure of which case, in what unit, and what it should be."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.cases import FLOWS, Case, Kind, all_cases
from benchmarks.results import Figure, Results
from benchmarks.servers import COTURN, PLAIN, RELAY


@dataclass(frozen=True)
class Target:
    """What the relay's figure should be at most, or at least."""

    limit: float
    times_coturn: bool = False
    at_least: bool = False
    unit: str = ""

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{' × coturn' if self.times_coturn else self.unit}"

    def is_met(self, figure: Figure | None, ratio: Figure | None) -> bool | None:
        """Judge the medians; None if there is nothing to judge."""
        judged = ratio if self.times_coturn else figure
        if judged is None:
            return None
        return judged.median >= self.limit if self.at_least else judged.median <= self.limit


@dataclass(frozen=True)
class Row:
    """One figure of one case; of several metrics, only the medians are shown."""

    case: str
    title: str
    metrics: tuple[str, ...]
    target: Target | None = None
    readme: str = ""
    """What it is called in the README, where there are no sections; "" if it is not there."""
    factor: float = 1
    """By which values are multiplied before they are shown."""


class Section(NamedTuple):
    """Rows about one thing."""

    title: str
    note: str
    rows: tuple[Row, ...]


class Cells(NamedTuple):
    """What a row shows."""

    servers: tuple[str, ...]
    ratio: str
    target: str
    met: bool | None


SHOWN = (RELAY, COTURN, PLAIN)


def sections() -> tuple[Section, ...]:
    """Give all rows, in the order of the report."""
    packets = [case for case in all_cases() if case.has_packets]
    return (
        Section(
            "CPU a packet, µs",
            "All CPU time of the server, user and system, from before the first packet until the last has arrived, by the "
            "packets that arrived. Delivery over loopback is in it, up to the receiver's socket: who sends pays for it.",
            tuple(_cpu_row(case) for case in packets if case.kind is not Kind.OVERLOAD),
        ),
        Section(
            "Packets a second, in thousands",
            "That arrived while packets were sent, as fast as the server takes them, on one CPU.",
            tuple(_rate_row(case) for case in packets if case.kind in {Kind.SATURATED, Kind.TRAINS}),
        ),
        Section(
            "Added delay, µs: p50 / p99 / p99.9",
            "Delay through the server, less the same quantile of a path over loopback without a server.",
            tuple(Row(case.name, case.title, ("added_p50", "added_p99", "added_p999")) for case in packets if case.is_delay),
        ),
        Section(
            "Offered twice its own best",
            "Its best is what it carries when saturated, measured just before.",
            tuple(row for case in packets if case.kind is Kind.OVERLOAD for row in _overload_rows(case)),
        ),
        Section(
            "Allocations, one after another",
            "CPU and memory are differences over all of them; memory is the process's, and the kernel's for it: slab, "
            "stacks of threads, page tables. The client's own time is in both rates, some 0.1 ms for an allocation.",
            tuple(_allocation_rows()),
        ),
        Section("As many allocations as there are ports, or as descriptors allow", "", tuple(_crowd_rows())),
    )


def cells(row: Row, results: Results) -> Cells:
    """Say what a row shows."""
    single = row.metrics[0] if len(row.metrics) == 1 else None
    ratio = results.ratio(row.case, single) if single else None
    relay = results.figure(row.case, RELAY, single) if single else None
    return Cells(
        tuple(_cell(row, results, server) for server in SHOWN),
        "" if ratio is None else f"{ratio.median:.2f}",
        "" if row.target is None else str(row.target),
        None if row.target is None else row.target.is_met(relay, ratio),
    )


def number(value: float) -> str:
    """Write a number with three digits or so."""
    for limit, digits in ((10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def _cell(row: Row, results: Results, server: str) -> str:
    figures = [results.figure(row.case, server, metric) for metric in row.metrics]
    shown = [Figure(*(row.factor * value for value in figure)) for figure in figures if figure is not None]
    if len(shown) < len(figures):
        return "failed" if results.was_tried(row.case, server) else "–"
    text = " / ".join(number(figure.median) for figure in shown)
    if len(shown) == 1 and shown[0].least < shown[0].most:
        text += f" ({number(shown[0].least)}–{number(shown[0].most)})"
    return text


def _cpu_row(case: Case) -> Row:
    limit = {Kind.TRAINS: 0.25, Kind.PACED: 1.5}.get(case.kind)
    if case.kind is Kind.SATURATED:
        limit = {1: 1.0, FLOWS: 1.0, 500: 2.0}.get(case.flows)
    return Row(
        case.name,
        case.title,
        ("cpu_us",),
        None if limit is None else Target(limit, times_coturn=True),
        f"CPU a packet, {case.title}, µs" if case.name in _IN_README else "",
    )


def _rate_row(case: Case) -> Row:
    target = Target(5, times_coturn=True, at_least=True) if case.kind is Kind.TRAINS else None
    readme = f"Packets/s, {case.title}, thousands" if case.name in _RATES_IN_README else ""
    return Row(case.name, case.title, ("rate",), target, readme, factor=1e-3)


def _overload_rows(case: Case) -> Iterator[Row]:
    goodput, delay = f"{case.title}: goodput, %", f"{case.title}: delay p99, ms"
    yield Row(case.name, goodput, ("goodput",), Target(90, at_least=True, unit=" %"), goodput if case.size == 1200 else "")
    yield Row(case.name, delay, ("p99_ms",), Target(20, unit=" ms"), delay if case.size == 1200 else "")


def _allocation_rows() -> Iterator[Row]:
    name, as_fast = "allocations", Target(1, times_coturn=True, at_least=True)
    yield Row(name, "CPU an allocation, µs", ("cpu_us",))
    yield Row(name, "Memory an allocation, kernel included, KB", ("memory_kb",))
    yield Row(name, "— of it resident in the process, KB", ("resident_kb",))
    yield Row(name, "Allocations a second, in series", ("per_second",), as_fast, "Allocations/s, one after another")
    yield Row(name, "Refreshes a second, in series", ("refreshes_per_second",), as_fast, "Refreshes/s, one after another")
    yield Row(name, "CPU a refresh, µs", ("refresh_cpu_us",))
    yield Row(name, "Start to first answer, ms", ("start_ms",), None, "Start to first answer, ms")
    yield Row(name, "SIGTERM to end, ms", ("stop_ms",))


def _crowd_rows() -> Iterator[Row]:
    name, each = "crowd", "One packet to each at once"
    yield Row(name, "Allocations at once", ("count",), None, "All ports: allocations at once")
    yield Row(name, "CPU an allocation, µs", ("cpu_us",), Target(200, unit=" µs"), "All ports: CPU an allocation, µs")
    memory = "Memory an allocation, kernel included, KB"
    yield Row(name, memory, ("memory_kb",), Target(50, unit=" KB"), "All ports: memory an allocation, kernel included, KB")
    yield Row(name, "— of it resident in the process, KB", ("resident_kb",))
    yield Row(name, "Time to make all, s", ("make_s",))
    yield Row(name, "SIGTERM to end, with all of them, s", ("stop_s",), Target(5, unit=" s"), "All ports: SIGTERM to end, s")
    cpu = Target(40, unit=" µs")
    yield Row(
        name, f"{each}: CPU a packet, µs", ("burst_cpu_us",), cpu, "All ports: one packet to each at once, CPU each, µs"
    )
    yield Row(name, f"{each}: lost, %", ("burst_loss",))
    yield Row(name, f"{each}: until the last arrived, ms", ("burst_last_ms",))


_IN_README = frozenset(
    (
        *(f"saturated-{way}-{size}-{FLOWS}" for way in ("up", "down") for size in (172, 1200)),
        *(f"saturated-{way}-1200-500" for way in ("up", "down")),
        *(f"paced-{way}-1200-20000" for way in ("up", "down")),
        *(f"trains-{way}-{FLOWS}" for way in ("up", "down")),
    )
)
_RATES_IN_README = frozenset((f"saturated-up-1200-{FLOWS}", f"trains-up-{FLOWS}", f"trains-down-{FLOWS}"))
