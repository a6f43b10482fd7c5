"""A collector of metrics: a gRPC server with OpenTelemetry's service, which stores received metrics."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tests.support.waiting import wait_until

WAIT_SECONDS = 30


class Collector(MetricsServiceServicer):
    """Listens on loopback. A context manager.

    Args:
        port: 0 for a free port.
        credentials: for TLS.
        answers: returns the response to a push; may raise or wait.
    """

    def __init__(
        self,
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
        answers: Callable[[grpc.ServicerContext], ExportMetricsServiceResponse] | None = None,
    ) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.is_asked = threading.Event()
        self._answers = answers or (lambda _: ExportMetricsServiceResponse())
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_MetricsServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        at = f"127.0.0.1:{port}"
        self.port: int = (
            self._server.add_insecure_port(at) if credentials is None else self._server.add_secure_port(at, credentials)
        )

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait(WAIT_SECONDS)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def Export(  # noqa: N802 - gRPC's name
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        """Receive a push."""
        self.metadata.append(dict(context.invocation_metadata()))
        self.requests.append(request)
        self.is_asked.set()
        return self._answers(context)

    def wait_for_pushes(self, count: int) -> None:
        """Wait for a minimum number of pushes."""
        wait_until(lambda: len(self.requests) >= count, WAIT_SECONDS)

    def resource(self) -> dict[str, Any]:
        """Return the resource attributes of the last push."""
        (pushed,) = self.requests[-1].resource_metrics
        return attributes_of(pushed.resource.attributes)

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of the last push, by name."""
        return {metric.name: metric for metric in metrics_of(self.requests[-1])}


def metrics_of(request: ExportMetricsServiceRequest) -> Iterator[Metric]:
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            yield from scope.metrics


def attributes_of(pairs: Any) -> dict[str, Any]:  # noqa: ANN401 - a repeated KeyValue
    def value(pair: KeyValue) -> object:
        kind = pair.value.WhichOneof("value") or "string_value"
        if kind == "array_value":
            return [each.string_value for each in pair.value.array_value.values]
        return getattr(pair.value, kind)

    return {pair.key: value(pair) for pair in pairs}
