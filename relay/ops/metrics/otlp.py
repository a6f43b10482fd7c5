"""Metrics as OpenTelemetry's library sends them. Only who has the extra ``otlp`` can import this.

The library's own instruments count when they are told to; and they take no histogram that has been counted already. So its
data are made here, from the table, and only its exporter is used: that knows gRPC, TLS, headers, compression and retries,
and the variables for all of them.
"""

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Final

from grpc import StatusCode
from opentelemetry.exporter.otlp.proto.grpc import exporter as library
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from relay import __version__
from relay.ops.metrics.metric import Histogram, Kind, LabelValue, Metric, Point
from relay.ops.metrics.sources import Look, Sources
from relay.ops.metrics.table import TABLE
from relay.ops.threads import yield_cpu

_SCOPE: Final = InstrumentationScope("relay", __version__)
_NANOSECONDS: Final = 1_000_000_000
_LIBRARIES: Final = ("opentelemetry", "grpc")


class _LastWord(logging.Filter):
    """Keeps why the library says that it failed, a status and never a text that a collector wrote; and keeps it quiet."""

    def __init__(self) -> None:
        super().__init__()
        self.status = "failed"

    def filter(self, record: logging.LogRecord) -> bool:
        """Look at what would be logged."""
        values = record.args if isinstance(record.args, tuple) else ()
        self.status = next((value.name.lower() for value in values if isinstance(value, StatusCode)), self.status)
        return False


class OtlpCollector:
    """A collector that is spoken to over gRPC.

    Args:
        endpoint: its URL; None leaves it to the library to find it in the environment.
        sources: what is measured.

    Raises:
        Exception: the library does not take what the environment has.
    """

    def __init__(self, endpoint: str | None, sources: Sources) -> None:
        self._sources = sources
        self._heard = _LastWord()
        # First: the library's own filter leaves out what it has said before.
        library.logger.filters.insert(0, self._heard)
        for name in _LIBRARIES:
            logging.getLogger(name).addHandler(logging.NullHandler())
            logging.getLogger(name).propagate = False
        self._resource = _resource()
        self._started_at = int(Look(sources).process.started_at * _NANOSECONDS)
        self._exporter = OTLPMetricExporter(endpoint=endpoint)

    def push(self) -> str | None:
        """Send all metrics as they are now; None if they arrived, else why not, in a word."""
        self._heard.status = "failed"
        result = self._exporter.export(self._measure())
        return None if result is sdk.MetricExportResult.SUCCESS else self._heard.status

    def close(self) -> None:
        """Call off what is under way, and take no more."""
        self._exporter.shutdown()
        library.logger.removeFilter(self._heard)

    def _measure(self) -> sdk.MetricsData:
        look, now = Look(self._sources), time.time_ns()
        metrics = []
        for metric in TABLE:
            metrics.append(_written(metric, metric.read(look), (self._started_at, now)))
            yield_cpu()
        scope = sdk.ScopeMetrics(_SCOPE, metrics, "")
        return sdk.MetricsData([sdk.ResourceMetrics(self._resource, [scope], "")])


def _resource() -> Resource:
    """Give what is measured: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come before what is said here."""
    ours = {
        "service.namespace": "firezone",
        "service.name": "relay",
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    return Resource(ours).merge(OTELResourceDetector().detect())


def _written(metric: Metric, points: Iterable[Point], times: tuple[int, int]) -> sdk.Metric:
    """Make the library's data of a metric. Counters and histograms count from the start of the process."""
    labels = tuple(metric.labels)
    data: Any
    if metric.kind is Kind.HISTOGRAM:
        sizes = [_sizes(metric, _attributes(labels, values), value, times) for values, value in points]
        data = sdk.Histogram(sizes, sdk.AggregationTemporality.CUMULATIVE)
    else:
        numbers = [_number(_attributes(labels, values), value, times) for values, value in points]
        if metric.kind is Kind.COUNTER:
            data = sdk.Sum(numbers, sdk.AggregationTemporality.CUMULATIVE, is_monotonic=True)
        else:
            data = sdk.Gauge(numbers)
    return sdk.Metric(metric.name, metric.description, metric.unit, data)


def _attributes(labels: Sequence[str], values: Sequence[LabelValue]) -> dict[str, LabelValue]:
    return dict(zip(labels, values, strict=True))


def _number(attributes: dict[str, LabelValue], value: float | Histogram, times: tuple[int, int]) -> sdk.NumberDataPoint:
    assert not isinstance(value, Histogram)  # noqa: S101 - the table has it so
    return sdk.NumberDataPoint(attributes, *times, value)


def _sizes(
    metric: Metric, attributes: dict[str, LabelValue], value: float | Histogram, times: tuple[int, int]
) -> sdk.HistogramDataPoint:
    assert isinstance(value, Histogram)  # noqa: S101 - likewise
    # The smallest and the largest are not kept: None leaves them out of what is sent.
    unknown: Any = None
    return sdk.HistogramDataPoint(
        attributes, *times, sum(value.counts), value.total, value.counts, metric.bounds, unknown, unknown
    )
