"""A probe's findings, for people and for programs."""

import json
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from relay.core.addresses import Family, SocketAddress, show
from relay.probe.results import Outcome, Report, Step
from relay.probe.traffic import Direction, Traffic

_STYLES = {Outcome.OK: "green", Outcome.FAILED: "bold red", Outcome.SKIPPED: "yellow"}
_SIGNS = {Outcome.OK: "\N{CHECK MARK}", Outcome.FAILED: "\N{BALLOT X}", Outcome.SKIPPED: "-"}


def write_table(report: Report, console: Console) -> None:
    """Write a report for people: as a table on a terminal, else one line for each step."""
    if not console.is_terminal:
        for line in plain_lines(report):
            # The console would break the line at the width that it believes to have.
            print(line, file=console.file)
        return
    colourful = console.color_system is not None and not console.no_color and console.encoding.startswith("utf")
    table = Table("Step", "Result", "Detail", title=Text(_heading(report)), title_justify="left", title_style="bold")
    for step in report.steps:
        table.add_row(Text(step.label), _result(step, signed=colourful), Text(step.detail))
    console.print(table)
    for line in _conclusion(report):
        console.print(Text(line, style=_STYLES[Outcome.FAILED if report.failures else Outcome.OK]))


def plain_lines(report: Report) -> Iterator[str]:
    """Give the lines of a report without a terminal: heading, steps, conclusion."""
    yield _heading(report)
    width = max(len(step.label) for step in report.steps)
    for step in report.steps:
        yield f"{step.label:<{width}}  {_word(step):<7}  {step.detail}"
    yield from _conclusion(report)


def as_json(report: Report) -> str:
    """Write a report as one JSON object; times are in milliseconds, lifetimes in seconds, absent values null."""
    allocated = report.allocated
    failures = report.failures
    return json.dumps(
        {
            "target": report.target,
            "server": _address(report.server),
            "ok": not failures,
            "failed_step": failures[0].name if failures else None,
            "advice": failures[0].advice if failures else None,
            "mapped_address": _address(report.bound.mapped_address) if report.bound else None,
            "binding_rtt_ms": _ms(report.bound.rtt) if report.bound else None,
            "realm": report.realm,
            "software": allocated.software if allocated else None,
            "lifetime_s": allocated.lifetime if allocated else None,
            "relayed_addresses": _by_family(
                {family: show(address) for family, address in allocated.relayed_addresses.items()} if allocated else {}
            ),
            "address_errors": _by_family(allocated.missing_families if allocated else {}),
            "packets": _by_family({family: _traffic(traffic) for family, traffic in report.traffic.items()}),
            "steps": [_step(step) for step in report.steps],
        },
        indent=2,
    )


class TerminalWatcher:
    """Shows on a terminal's standard error how far a probe has come, and clears that away at the end; else nothing."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        """Show that a step begins."""
        self._progress.update(self._task, description=title, total=None, completed=0)

    def packets(self, sent: int, count: int) -> None:
        """Show how many packets have been sent."""
        self._progress.update(self._task, total=count, completed=sent)


def standard_output() -> Console:
    """Give the console of standard output, which makes nothing of its own of what it is given."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _heading(report: Report) -> str:
    if report.server is None or report.target == show(report.server):
        return f"Probe of {report.target}/udp"
    return f"Probe of {report.target}/udp at {show(report.server)}"


def _conclusion(report: Report) -> Iterator[str]:
    failures = report.failures
    if not failures:
        skipped = any(step.outcome is Outcome.SKIPPED for step in report.steps)
        yield "Nothing failed; some was skipped." if skipped else "All is well."
        return
    yield f"Failed: {', '.join(step.label for step in failures)}: {failures[0].detail}; {failures[0].advice}"


def _result(step: Step, *, signed: bool) -> Text:
    words = f"{_SIGNS[step.outcome]} {_word(step)}" if signed else _word(step)
    return Text(words, style=_STYLES[step.outcome])


def _word(step: Step) -> str:
    return "FAILED" if step.outcome is Outcome.FAILED else step.outcome.value


def _step(step: Step) -> dict[str, Any]:
    return {
        "step": step.name,
        "family": None if step.family is None else str(step.family).lower(),
        "outcome": step.outcome,
        "detail": step.detail,
        "advice": step.advice or None,
        "code": step.code,
    }


def _traffic(traffic: Traffic) -> dict[str, Any]:
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        "mode": "loop" if traffic.to_peer is None else "peer",
        "to_peer": _direction(traffic.to_peer),
        "to_client": _direction(traffic.to_client),
        "round_trip": _direction(traffic.round_trip),
        "rtt_ms": {name: _ms(traffic.rtt_at(share)) for name, share in shares.items()},
    }


def _direction(direction: Direction | None) -> dict[str, int] | None:
    if direction is None:
        return None
    return {"sent": direction.sent, "received": direction.received, "lost": direction.lost}


def _by_family(values: dict[Family, Any]) -> dict[str, Any]:
    return {str(family).lower(): values.get(family) for family in Family}


def _address(address: SocketAddress | None) -> str | None:
    return None if address is None else show(address)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
