"""Output of a probe, for people and for programs."""

import json
import os
from typing import Any

import click

from relay.core.addresses import Family, SocketAddress, show
from relay.tools.probe.results import Outcome, Report, Step
from relay.tools.probe.traffic import Traffic

_COLORS = {Outcome.OK: "green", Outcome.FAILED: "red", Outcome.SKIPPED: "yellow"}
_LABEL_WIDTH = 16


def write_step(report: Report, step: Step) -> None:
    """Write a line about a step, below the heading if it is the first."""
    if step is report.steps[0]:
        at = show(report.server) if report.server is not None else report.target
        _write(f"Probe of {report.target}/udp" + (f" at {at}" if at != report.target else ""))
    word = click.style(f"{_word(step):<7}", fg=_COLORS[step.outcome], bold=step.outcome is Outcome.FAILED)
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
    failures = report.failures
    return json.dumps(
        {
            "target": report.target,
            "server": _address(report.server),
            "ok": not failures,
            "failed_step": failures[0].name if failures else None,
            "advice": failures[0].advice if failures else None,
            "mapped_address": _address(report.mapped_address),
            "binding_rtt_ms": _ms(report.binding_rtt),
            "realm": report.realm,
            "software": allocated.software if allocated else None,
            "lifetime_s": allocated.lifetime if allocated else None,
            "relayed_addresses": _by_family(
                {family: show(address) for family, address in allocated.relayed_addresses.items()} if allocated else {}
            ),
            "address_errors": _by_family(allocated.missing_families if allocated else {}),
            "path_mtu": _by_family(report.path_mtu),
            "packets": _by_family({family: _traffic(traffic) for family, traffic in report.traffic.items()}),
            "steps": [_step(step) for step in report.steps],
        },
        indent=2,
    )


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
    ways = {"to_peer": traffic.to_peer, "to_client": traffic.to_client, "round_trip": traffic.round_trip}
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        "mode": "loop" if traffic.to_peer is None else "peer",
        **{name: way and {**way._asdict(), "lost": way.lost} for name, way in ways.items()},
        "rtt_ms": {name: _ms(traffic.rtt_at(share)) for name, share in shares.items()},
    }


def _by_family(values: dict[Family, Any]) -> dict[str, Any]:
    return {str(family).lower(): values.get(family) for family in Family}


def _address(address: SocketAddress | None) -> str | None:
    return None if address is None else show(address)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
