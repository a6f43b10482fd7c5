"""``GET /metrics``: all metrics in Prometheus's text format.

A scrape reads some 250 numbers, whatever the number of allocations, and takes 1 ms. The kernel's drop counter costs 4 µs per
socket. Other threads run in between. Responses are cached, so scrapes never use more than `MAX_TIME`, however
frequent they are.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from itertools import accumulate
from typing import Final

from relay.ops.http.messages import Page, Query
from relay.ops.metrics.metric import Histogram, LabelValue, Metric, MetricKind
from relay.ops.metrics.table import read_table
from relay.ops.totals import RelayState

FRESH_FOR: Final = 0.25
"""Minimum lifetime of a cached response, in seconds."""

MAX_TIME: Final = 1 / 20
"""Share of the time that is spent on responses, at most."""

MAX_FRESH_FOR: Final = 5.0
"""Maximum lifetime of a cached response, in seconds, on a machine so busy that a response takes long."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_UNITS: Final = {"s": "seconds", "By": "bytes"}
"""Units as Prometheus spells them. Units in braces are omitted."""

_USUAL: Final = {
    "process.cpu.time": "process_cpu_seconds",
    "process.memory.usage": "process_resident_memory_bytes",
    "process.memory.virtual": "process_virtual_memory_bytes",
    "process.thread.count": "process_threads",
    "process.unix.file_descriptor.count": "process_open_fds",
    "process.unix.file_descriptor.limit": "process_max_fds",
}
"""The usual names in Prometheus, where they do not follow from the names."""


def name_of(metric: Metric) -> str:
    """Return the name of a metric by OpenTelemetry's rules for Prometheus, without a suffix such as ``_total``."""
    if metric.name in _USUAL:
        return _USUAL[metric.name]
    name = metric.name.replace(".", "_")
    unit = _UNITS.get(metric.unit)
    return name if unit is None or name.endswith(f"_{unit}") else f"{name}_{unit}"


def label_of(label: str) -> str:
    """Return the name of a label by the same rules."""
    return label.replace(".", "_")


class MetricsPage:
    """The page. Any number of threads may call it."""

    def __init__(self, state: RelayState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._clock = clock
        self._lock = threading.Lock()
        self._page: Page | None = None
        self._fresh_until = 0.0

    def __call__(self, _: Query) -> Page:
        """Return a response, from the cache if it is fresh."""
        with self._lock:
            began = self._clock()
            if self._page is None or began >= self._fresh_until:
                self._page = Page(HTTPStatus.OK, "".join(_lines(read_table(self._state))), CONTENT_TYPE)
                took = self._clock() - began
                self._fresh_until = began + min(max(took / MAX_TIME, FRESH_FOR), MAX_FRESH_FOR)
            return self._page


def _lines(metrics: Iterable[Metric]) -> Iterator[str]:
    """Yield all lines. Names and descriptions are constants without characters that the format escapes."""
    for metric in metrics:
        name = name_of(metric) + ("_total" if metric.kind is MetricKind.COUNTER else "")
        yield f"# HELP {name} {metric.description}\n# TYPE {name} {metric.kind.value}\n"
        for values, value in metric.points:
            labels = [f'{label_of(label)}="{_escape(each)}"' for label, each in zip(metric.labels, values, strict=True)]
            if isinstance(value, Histogram):
                # Each bucket includes all smaller buckets.
                for bound, count in zip((*metric.bounds, "+Inf"), accumulate(value.counts), strict=True):
                    yield _sample(f"{name}_bucket", [*labels, f'le="{bound}"'], count)
                yield _sample(f"{name}_count", labels, sum(value.counts))
                yield _sample(f"{name}_sum", labels, value.total)
            else:
                yield _sample(name, labels, value)


def _escape(value: LabelValue) -> str:
    # Only the name of the relay has such characters.
    return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _sample(name: str, labels: list[str], value: float) -> str:
    return f"{name}{{{','.join(sorted(labels))}}} {float(value)}\n" if labels else f"{name} {float(value)}\n"
