"""``GET /metrics``: the table as Prometheus reads it.

A scrape reads some 250 numbers, whatever the number of allocations, and takes 5 ms to write them; what the kernel dropped it
has to ask of each socket, at 4 µs. Other threads get their turn in between. Whoever asks again soon gets the same answer
again: so however often it is asked for, that is all that it takes of `MOST_TIME`.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Final

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from relay.ops.http.endpoint import Page, Query
from relay.ops.metrics.metric import Histogram, Kind, LabelValue, Metric, Point
from relay.ops.metrics.sources import Look, Sources
from relay.ops.metrics.table import TABLE
from relay.ops.threads import yield_cpu

FRESH_FOR: Final = 0.25
"""Seconds for which an answer is good enough, at the least."""

MOST_TIME: Final = 1 / 20
"""Of the time, for answers."""

LONGEST_FRESH_FOR: Final = 5.0
"""Seconds, even if the machine is so busy that an answer takes long."""

_UNITS: Final = {"s": "seconds", "By": "bytes"}
"""As Prometheus spells them; words in braces are left out."""


def name_of(metric: Metric) -> str:
    """Give a metric's name, as OpenTelemetry's rules for Prometheus make it; without ``_total`` and the like behind."""
    name = metric.name.replace(".", "_")
    unit = _UNITS.get(metric.unit)
    return name if unit is None or name.endswith(f"_{unit}") else f"{name}_{unit}"


def label_of(label: str) -> str:
    """Give the name of a label, likewise."""
    return label.replace(".", "_")


class MetricsPage:
    """Answers scrapes, of as many threads as there are.

    Args:
        sources: what is read.
        clock: gives monotonic seconds.
    """

    def __init__(self, sources: Sources, clock: Callable[[], float] = time.monotonic) -> None:
        self._sources = sources
        self._clock = clock
        self._lock = threading.Lock()
        self._page: Page | None = None
        self._fresh_until = 0.0

    def __call__(self, _: Query) -> Page:
        """Answer a request."""
        with self._lock:
            began = self._clock()
            if self._page is None or began >= self._fresh_until:
                self._page = Page(HTTPStatus.OK, generate_latest(self).decode(), CONTENT_TYPE_PLAIN_0_0_4)
                took = self._clock() - began
                self._fresh_until = began + min(max(took / MOST_TIME, FRESH_FOR), LONGEST_FRESH_FOR)
            return self._page

    def collect(self) -> Iterator[Family]:
        """Read all metrics, as `prometheus_client` wants them."""
        look = Look(self._sources)
        for metric in TABLE:
            yield _family(metric, metric.read(look))
            yield_cpu()


def _family(metric: Metric, points: Iterable[Point]) -> Family:
    name, labels = name_of(metric), [label_of(label) for label in metric.labels]
    if metric.kind is Kind.HISTOGRAM:
        sizes = HistogramMetricFamily(name, metric.description, labels=labels)
        for values, value in points:
            assert isinstance(value, Histogram)  # noqa: S101 - the table has it so
            sizes.add_metric(_texts(values), list(_buckets(metric.bounds, value.counts)), value.total)
        return sizes
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.kind is Kind.COUNTER:
        family = CounterMetricFamily(name, metric.description, labels=labels)
    else:
        family = GaugeMetricFamily(name, metric.description, labels=labels)
    for values, value in points:
        assert not isinstance(value, Histogram)  # noqa: S101 - likewise
        family.add_metric(_texts(values), value)
    return family


def _texts(values: Sequence[LabelValue]) -> list[str]:
    return [str(value) for value in values]


def _buckets(bounds: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[str, float]]:
    """Add up counts: Prometheus has in each bucket what is in the smaller ones, too."""
    reached = 0
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        reached += count
        yield bound, reached
