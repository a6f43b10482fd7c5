"""Results of a probe, and their output for people and for programs."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

import click

from relay.core.addresses import Family, SocketAddress, show
from relay.tools.probe.allocation import ProbeAllocations
from relay.tools.probe.client import ProbeError, SkippedError
from relay.tools.probe.traffic import Traffic

_LABEL_WIDTH = 16


class StepName(StrEnum):
    """Steps of a probe, in their order. The values are names in the JSON report."""

    BINDING = "binding"
    CHALLENGE = "challenge"
    ALLOCATE = "allocate"
    CHANNEL_BIND = "channel_bind"
    PEER_PATH = "peer_path"
    PACKETS = "packets"
    PATH_MTU = "path_mtu"
    REFRESH = "refresh"


_LABELS = {StepName.CHANNEL_BIND: "ChannelBind", StepName.PATH_MTU: "Path MTU"}


class Outcome(StrEnum):
    """Outcome of a step."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


_COLORS = {Outcome.OK: "green", Outcome.FAILED: "red", Outcome.SKIPPED: "yellow"}


@dataclass(frozen=True, slots=True)
class Step:
    """Result of a step."""

    name: StepName
    outcome: Outcome
    detail: str
    """The finding, as part of a sentence."""
    family: Family | None = None
    """Family of the relayed address; None for steps without a relayed address."""
    advice: str = ""
    """The fix of a failure."""
    code: int | None = None
    """The error code of the response."""

    @property
    def label(self) -> str:
        """The name for people, from the RFC if possible."""
        words = _LABELS.get(self.name) or self.name.replace("_", " ").capitalize()
        return words if self.family is None else f"{words} {self.family}"


Watcher: TypeAlias = Callable[["Report", Step], object]
"""Receives the report so far, and its latest step."""


@dataclass(slots=True)
class Report:
    """Result of a probe so far."""

    target: str
    """The server as given on the command line."""
    watcher: Watcher
    server: SocketAddress | None = None
    """The address that responded; None if there was no response."""
    mapped_address: SocketAddress | None = None
    """Address of this machine as the server sees it."""
    binding_rtt: float | None = None
    """Seconds."""
    realm: str | None = None
    allocated: ProbeAllocations | None = None
    """The allocations, if the server made an allocation."""
    traffic: dict[Family, Traffic] = field(default_factory=dict)
    path_mtu: dict[Family, int] = field(default_factory=dict)
    """Bytes of the longest IP packet that passed whole, by family of the relayed address."""
    steps: list[Step] = field(default_factory=list)

    @property
    def failures(self) -> list[Step]:
        """The failed steps, in order."""
        return [step for step in self.steps if step.outcome is Outcome.FAILED]

    def add(self, step: Step) -> None:
        """Add the result of a step."""
        self.steps.append(step)
        self.watcher(self, step)

    def fail(self, name: StepName, error: ProbeError, family: Family | None = None) -> None:
        """Add a step that ended with an error."""
        outcome = Outcome.SKIPPED if isinstance(error, SkippedError) else Outcome.FAILED
        self.add(Step(name, outcome, str(error), family, error.advice, error.code))

    def take(self, name: StepName, step: Callable[[], str]) -> bool:
        """Take a step, which returns its finding or raises `ProbeError`. Return whether it succeeded."""
        try:
            finding = step()
        except ProbeError as error:
            self.fail(name, error)
            return False
        self.add(Step(name, Outcome.OK, finding))
        return True


def write_step(report: Report, step: Step) -> None:
    """Write a line about a step, and the heading above the first step."""
    if step is report.steps[0]:
        at = show(report.server) if report.server is not None else report.target
        _write(f"Probe of {report.target}/udp" + (f" at {at}" if at != report.target else ""))
    failed = step.outcome is Outcome.FAILED
    word = click.style(f"{'FAILED' if failed else step.outcome:<7}", fg=_COLORS[step.outcome], bold=failed)
    _write(f"{step.label:<{_LABEL_WIDTH}}  {word}  {step.detail}")


def write_conclusion(report: Report) -> None:
    """Write the last line: the failed steps with the fix of the first."""
    line = "All steps succeeded."
    if failures := report.failures:
        line = f"Failed: {', '.join(step.label for step in failures)}: {failures[0].detail}; {failures[0].advice}"
    elif any(step.outcome is Outcome.SKIPPED for step in report.steps):
        line = "Nothing failed, but steps were skipped."
    _write(click.style(line, fg=_COLORS[Outcome.FAILED if failures else Outcome.OK]))


def _write(line: str) -> None:
    # Without colors by no-color.org; a pipe has none anyway.
    click.echo(line, color=False if os.environ.get("NO_COLOR") else None)


def as_json(report: Report) -> str:
    """Return a report as a JSON object. Times are milliseconds, lifetimes seconds, absent values null."""
    allocated = report.allocated
    failed = next(iter(report.failures), None)
    return json.dumps(
        {
            "target": report.target,
            "server": report.server and show(report.server),
            "ok": failed is None,
            "failed_step": failed and failed.name,
            "advice": failed and failed.advice,
            "mapped_address": report.mapped_address and show(report.mapped_address),
            "binding_rtt_ms": _ms(report.binding_rtt),
            "realm": report.realm,
            "software": allocated and allocated.software,
            "lifetime_s": allocated and allocated.lifetime,
            "relayed_addresses": _by_family(allocated.relayed_addresses if allocated else {}, show),
            "address_errors": _by_family(allocated.missing_families if allocated else {}),
            "path_mtu": _by_family(report.path_mtu),
            "packets": _by_family(report.traffic, _traffic),
            "steps": [_step(step) for step in report.steps],
        },
        indent=2,
    )


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
    ways = {"to_peer": traffic.to_peer, "to_client": traffic.to_client, "round_trip": traffic.round_trip}
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        "mode": "loop" if traffic.to_peer is None else "peer",
        **{name: way and {**way._asdict(), "lost": way.lost} for name, way in ways.items()},
        "rtt_ms": {name: _ms(traffic.rtt_at(share)) for name, share in shares.items()},
    }


def _by_family(values: dict[Family, Any], to_json: Callable[[Any], Any] = lambda value: value) -> dict[str, Any]:
    return {str(family).lower(): to_json(values[family]) if family in values else None for family in Family}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
