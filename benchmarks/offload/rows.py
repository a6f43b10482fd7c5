"""The rows of the report on the kernel's part: which figure of which case, of whom, and what it should be."""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.offload.cases import Case, Kind, all_cases
from benchmarks.offload.subjects import ALL, GENERIC, NATIVE, USERSPACE
from benchmarks.results import Figure, Results
from benchmarks.rows import Target, number
from benchmarks.servers import COTURN, PLAIN

SHOWN = ALL
COMPARED = (NATIVE, PLAIN)
_TARGET_SIZE = 200
_README_CASES = frozenset(f"saturated-{way}-200-{flows}" for way in ("up", "down") for flows in (1, 1000))


class Row(NamedTuple):
    """One figure of one case; of several metrics, only the medians are shown."""

    case: str
    title: str
    metrics: tuple[str, ...]
    target: Target | None = None
    readme: str = ""
    """What it is called in the README; "" if it is not there."""
    factor: float = 1
    compared: bool = False
    """Whether native is compared with the plain relay; then the target is about that."""


class Section(NamedTuple):
    """Rows about one thing."""

    title: str
    note: str
    rows: tuple[Row, ...]


class Cells(NamedTuple):
    """What a row shows."""

    subjects: tuple[str, ...]
    ratio: str
    target: str
    met: bool | None


def sections() -> tuple[Section, ...]:
    """Give all rows, in the order of the report."""
    cases = all_cases()
    saturated = [case for case in cases if case.kind is Kind.SATURATED]
    return (
        Section(
            "Packets a second, in thousands",
            "That arrived. Where the kernel relays, one CPU makes, relays and counts them; the others have a second one.",
            tuple(_rate_row(case) for case in saturated),
        ),
        Section(
            "CPU a packet, ns",
            "Of the kernel and of the process, above what it costs to send the packet to the relay's interface.",
            tuple(_cpu_row(case) for case in saturated),
        ),
        Section(
            "The program itself, ns a run",
            "As the kernel measures it, less what measuring takes, which a program that does nothing tells.",
            tuple(row for case in cases if case.kind is Kind.PROGRAM for row in _program_rows(case)),
        ),
        Section(
            "Added delay, µs: p50 / p99",
            "Less the same quantile of the way through the same machines without any relay, forwarded by the kernel.",
            tuple(
                Row(case.name, case.title, ("added_p50", "added_p99"), None, f"Added delay p50 / p99, {case.title}, µs")
                for case in cases
                if case.kind is Kind.DELAY
            ),
        ),
        Section(
            "Channels, ms for all of them",
            "Both directions, by the relay's own code, in one go.",
            tuple(row for case in cases if case.kind is Kind.BINDINGS for row in _binding_rows(case)),
        ),
    )


def cells(row: Row, results: Results) -> Cells:
    """Say what a row shows."""
    ratio = results.ratio(row.case, row.metrics[0], *COMPARED) if row.compared else None
    judged = ratio if row.compared else results.figure(row.case, NATIVE, row.metrics[0])
    return Cells(
        tuple(_cell(row, results, subject) for subject in SHOWN),
        "" if ratio is None else f"{ratio.median:.3g}",
        "" if row.target is None else str(row.target),
        None if row.target is None else row.target.is_met(judged, None),
    )


def _cell(row: Row, results: Results, subject: str) -> str:
    figures = [results.figure(row.case, subject, metric) for metric in row.metrics]
    shown = [Figure(*(row.factor * value for value in figure)) for figure in figures if figure is not None]
    if len(shown) < len(figures):
        return "failed" if results.was_tried(row.case, subject) else "–"
    text = " / ".join(number(figure.median) for figure in shown)
    if len(shown) == 1 and shown[0].least < shown[0].most:
        text += f" ({number(shown[0].least)}–{number(shown[0].most)})"
    return text


def _rate_row(case: Case) -> Row:
    target = Target(5, at_least=True, unit=" × plain C") if case.size == _TARGET_SIZE else None
    readme = f"Packets/s, {case.title}, thousands" if case.name in _README_CASES else ""
    return Row(case.name, case.title, ("rate",), target, readme, factor=1e-3, compared=True)


def _cpu_row(case: Case) -> Row:
    target = Target(1 / 8, unit=" × plain C") if case.size == _TARGET_SIZE else None
    readme = f"CPU a packet, {case.title}, ns" if case.name in _README_CASES else ""
    return Row(case.name, case.title, ("cpu_ns",), target, readme, compared=True)


def _program_rows(case: Case) -> Iterator[Row]:
    target = Target(120, unit=" ns")
    yield Row(case.name, case.title, ("program_ns",), target, f"The program itself, {case.title}, ns")
    yield Row(case.name, "— with the kernel's reading of a clock", ("measured_ns",))
    yield Row(case.name, "— which alone takes", ("clock_ns",))


def _binding_rows(case: Case) -> Iterator[Row]:
    limit = Target(50, unit=" ms")
    for what in ("install", "remove"):
        title = f"{case.title}: {what}"
        yield Row(case.name, title, (f"{what}_ms",), limit, f"{title}, ms" if case.name == "bindings-distinct" else "")
    yield Row(case.name, f"{case.title}: refresh", ("refresh_ms",))


NAMES = {
    NATIVE: "offload, native",
    GENERIC: "offload, generic",
    USERSPACE: "its sockets",
    COTURN: "coturn",
    PLAIN: "plain C",
}
