"""Export of metrics by OpenTelemetry's library. Import needs the extra ``otlp``.

The library's instruments count events, and accept no histogram that is already counted. So this module builds the library's
data from the table, and uses only its exporter: gRPC, TLS, headers, compression, retries, and their variables.
"""

import logging
import time
from typing import Any, Final

from grpc import StatusCode
from opentelemetry.exporter.otlp.proto.grpc import exporter as library
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from relay import __version__
from relay.config import Config
from relay.ops.metrics.metric import Histogram, Metric, MetricKind
from relay.ops.metrics.table import read_table
from relay.ops.totals import RelayState, RelayTotals

_SCOPE: Final = InstrumentationScope("relay", __version__)
_NANOSECONDS: Final = 1_000_000_000
_LIBRARIES: Final = ("opentelemetry", "grpc")


class _FailureFilter(logging.Filter):
    """Filter that keeps the status of a failed export and suppresses the record, which may quote text of the collector."""

    def __init__(self) -> None:
        super().__init__()
        self.status = "failed"

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the status; return false."""
        values = record.args if isinstance(record.args, tuple) else ()
        self.status = next((value.name.lower() for value in values if isinstance(value, StatusCode)), self.status)
        return False


class OtlpCollector:
    """Connection to a collector, over gRPC. Without an endpoint, the library reads the URL from the environment.

    Raises:
        Exception: the library rejects its environment variables.
    """

    def __init__(self, endpoint: str | None, state: RelayState) -> None:
        self._state = state
        self._failure = _FailureFilter()
        # Before the library's own filter, which drops repeated records.
        library.logger.filters.insert(0, self._failure)
        for name in _LIBRARIES:
            logging.getLogger(name).addHandler(logging.NullHandler())
            logging.getLogger(name).propagate = False
        self._resource = _resource(state.config)
        self._started_at = int(RelayTotals(state).process.started_at * _NANOSECONDS)
        self._exporter = OTLPMetricExporter(endpoint=endpoint)

    def push(self) -> str | None:
        """Send all current metrics. Return None on success, else the reason in a word."""
        self._failure.status = "failed"
        result = self._exporter.export(self._measure())
        return None if result is sdk.MetricExportResult.SUCCESS else self._failure.status

    def close(self) -> None:
        """Cancel a push in progress and close the connection."""
        self._exporter.shutdown()
        library.logger.removeFilter(self._failure)

    def _measure(self) -> sdk.MetricsData:
        times = (self._started_at, time.time_ns())
        metrics = [_convert(metric, times) for metric in read_table(self._state)]
        scope = sdk.ScopeMetrics(_SCOPE, metrics, "")
        return sdk.MetricsData([sdk.ResourceMetrics(self._resource, [scope], "")])


def _resource(config: Config) -> Resource:
    """Return the attributes of this relay. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence."""
    name, addresses = config.name or "", [*config.public_hosts.values()]
    ours = {
        "service.namespace": "firezone",
        "service.name": "relay",
        "service.version": __version__,
        "service.instance.id": name or addresses[0],
        "relay.name": name,
        "relay.public_addresses": addresses,
    }
    return Resource({name: value for name, value in ours.items() if value}).merge(OTELResourceDetector().detect())


def _convert(metric: Metric, times: tuple[int, int]) -> sdk.Metric:
    """Return a metric as the library's data. Counters and histograms count from the start of the process."""
    # The minimum and maximum are unknown: None omits them.
    unknown: Any = None
    data_points: list[Any] = []
    for values, value in metric.points:
        # Without empty values, the type of an attribute is the same in all points.
        attributes = {label: each for label, each in zip(metric.labels, values, strict=True) if each != ""}
        if isinstance(value, Histogram):
            counts, total = value.counts, value.total
            data_points.append(
                sdk.HistogramDataPoint(attributes, *times, sum(counts), total, counts, metric.bounds, unknown, unknown)
            )
        else:
            data_points.append(sdk.NumberDataPoint(attributes, *times, value))
    cumulative = sdk.AggregationTemporality.CUMULATIVE
    data: Any
    if metric.kind is MetricKind.HISTOGRAM:
        data = sdk.Histogram(data_points, cumulative)
    elif metric.kind is MetricKind.COUNTER:
        data = sdk.Sum(data_points, cumulative, is_monotonic=True)
    else:
        data = sdk.Gauge(data_points)
    return sdk.Metric(metric.name, metric.description, metric.unit, data)
