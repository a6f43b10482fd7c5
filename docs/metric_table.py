"""Makes the table in docs/metrics.md of the definitions: ``python -m docs.metric_table``, or ``make docs``."""

import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

from relay.config import Config
from relay.core.allocations import Allocations
from relay.core.counters import Counters
from relay.core.history import History
from relay.ops.metrics import table
from relay.ops.metrics.metric import LabelValue, Metric, MetricKind
from relay.ops.metrics.prometheus import name_of
from relay.ops.totals import RelayState, RelayTotals, ServerCounters

PAGE = Path(__file__).with_name("metrics.md")
BEGIN, END = "<!-- metrics: begin, made by `make docs` -->", "<!-- metrics: end -->"

GROUPS = {
    "Relayed traffic": table.relaying,
    "Requests": table.requests,
    "Losses": table.losses,
    "In the kernel": table.in_the_kernel,
    "Health": table.health,
    "The process": table.process,
}

IDLE = RelayState(
    config=Config(public_ip4=IPv4Address("192.0.2.1")),
    counters=Counters(),
    tables=Allocations(lambda _: False),
    history=History(),
    carried_out=ServerCounters(),
    kernel_drops=int,
    inbox=lambda: None,
    portal=lambda: None,
    not_ready=tuple,
    datapath=None,
)
"""A relay without clients: each metric has all its points from the start."""

_SUFFIXES = {MetricKind.COUNTER: "_total", MetricKind.GAUGE: "", MetricKind.HISTOGRAM: ""}


def page(text: str) -> str:
    """Return the page with current tables."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN, *_lines(), END + tail])


def _lines() -> Iterator[str]:
    for title, group in GROUPS.items():
        yield f"\n### {title}\n"
        yield "| metric | in Prometheus | description |"
        yield "|---|---|---|"
        for metric in group(RelayTotals(IDLE)):
            name = f"`{name_of(metric)}{_SUFFIXES[metric.kind]}`"
            yield f"| `{metric.name}` | {name} | {metric.description}{_labels(metric)} |"
    yield ""


def _labels(metric: Metric) -> str:
    values = zip(*(labels for labels, _ in metric.points), strict=True)
    listed = {name: dict.fromkeys(each) for name, each in zip(metric.labels, values, strict=True)}
    told = "".join(f" `{name}`: {', '.join(map(_value, each))}." for name, each in listed.items() if len(each) > 1)
    # Labels with one value per process, such as a version.
    if constant := [f"`{name}`" for name, each in listed.items() if len(each) <= 1]:
        told += f" {', '.join(constant)}."
    if metric.bounds:
        told += f" Steps end at {', '.join(map(str, metric.bounds[:2]))} … {metric.bounds[-1]}."
    return told


def _value(value: LabelValue) -> str:
    return f"`{value}`" if value != "" else "empty"


def main() -> None:
    """Write the page, and say where."""
    PAGE.write_text(page(PAGE.read_text()))
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
