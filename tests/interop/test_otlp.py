"""Metrics pushed by the program to a collector over gRPC, and failures of the collector."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE, Metric

from relay import __version__
from relay.ops.metrics.metric import MetricKind
from relay.ops.metrics.push import LAST_PUSH_TIMEOUT
from tests.support.collector import Collector, attributes_of
from tests.support.metrics import TABLE
from tests.support.process import COMMAND
from tests.support.program import Program, ProgramStarter
from tests.support.turn_client import TurnClient, udp_socket

SOON = {"OTEL_METRIC_EXPORT_INTERVAL": "100"}
EVIL = "\x1b[31mevil\n{}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as opened:
        yield opened


def value(metric: Metric, **labels: object) -> float:
    """Return the value with exactly these labels."""
    points = metric.gauge.data_points or metric.sum.data_points
    (point,) = [point for point in points if attributes_of(point.attributes) == labels]
    return float(point.as_int if point.HasField("as_int") else point.as_double)


def relay_something(program: Program) -> None:
    """Allocate, and relay a packet of 1200 bytes each way."""
    with TurnClient((program.host, 3478), program.credential) as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        client.bind_channel(0x4000, peer.getsockname())
        client.send(0x4000, bytes(1200))
        peer.recv(2000)
        peer.sendto(bytes(1200), relayed[:2])
        client.receive()


def test_a_collector_receives_the_metrics(start_program: ProgramStarter, collector: Collector) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8", "--otlp-grpc-endpoint", collector.endpoint, variables=SOON)
    relay_something(program)
    # The next push was measured later.
    collector.wait_for_pushes(len(collector.requests) + 2)
    pushed = collector.metrics()
    assert list(pushed) == [metric.name for metric in TABLE]
    for metric in TABLE:
        assert (pushed[metric.name].unit, pushed[metric.name].description) == (metric.unit, metric.description)
        kinds = {MetricKind.COUNTER: "sum", MetricKind.GAUGE: "gauge", MetricKind.HISTOGRAM: "histogram"}
        assert pushed[metric.name].WhichOneof("data") == kinds[metric.kind]
    assert value(pushed["relay.active_allocations"]) == 1
    assert value(pushed["relay.responses"], response_class="error", message_type="allocate", error_code=401) == value(
        pushed["relay.responses"], response_class="success", message_type="allocate"
    )
    for direction in ("to_peer", "to_client"):
        labels = {"relay.direction": direction, "relay.datapath": "userspace"}
        assert value(pushed["relay.relayed.bytes"], **labels) == 1200
    assert program.stop() == 0


def test_counters_and_histograms_count_from_the_start_of_the_process(
    start_program: ProgramStarter, collector: Collector
) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8", variables=SOON | {"OTLP_GRPC_ENDPOINT": collector.endpoint})
    relay_something(program)
    collector.wait_for_pushes(len(collector.requests) + 2)
    pushed = collector.metrics()
    sizes = pushed["relay.packet.size"].histogram
    packets = pushed["relay.relayed.packets"].sum
    assert {sizes.aggregation_temporality, packets.aggregation_temporality} == {AGGREGATION_TEMPORALITY_CUMULATIVE}
    assert packets.is_monotonic
    (point,) = [each for each in sizes.data_points if attributes_of(each.attributes) == {"relay.datapath": "userspace"}]
    assert (point.count, point.sum) == (2, 2400)
    assert {at: count for at, count in enumerate(point.bucket_counts) if count} == {9: 2}
    assert list(point.explicit_bounds) == [*range(127, 1920, 128)]
    assert not point.HasField("min")
    started_at = value(pushed["process.start_time"])
    for each in (point, packets.data_points[0]):
        assert each.start_time_unix_nano == pytest.approx(started_at * 1e9, abs=1e6)
        assert each.time_unix_nano > each.start_time_unix_nano


def test_the_last_values_are_pushed_at_the_end(start_program: ProgramStarter, collector: Collector) -> None:
    program = start_program(
        "--allow-peer",
        "127.0.0.0/8",
        variables={"OTLP_GRPC_ENDPOINT": collector.endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "1500"},
    )
    collector.wait_for_pushes(1)
    relay_something(program)
    began = time.monotonic()
    assert program.stop() == 0
    # On a busy machine the push may exceed its limit; then the relay does not wait for it.
    took_too_long = time.monotonic() - began > LAST_PUSH_TIMEOUT
    assert value(collector.metrics()["relay.allocations.made"]) == 1 or took_too_long


def test_opentelemetry_variables_apply(start_program: ProgramStarter, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    key, chain = certificate.private_key_pem.bytes(), b"".join(each.bytes() for each in certificate.cert_chain_pems)
    with Collector(credentials=grpc.ssl_server_credentials([(key, chain)])) as collector:
        program = start_program(
            variables=SOON
            | {
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"https://localhost:{collector.port}",
                "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "ca.pem"),
                "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20letmein,x-tenant=a",
                "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
                "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test,service.namespace=elsewhere",
                "OTEL_SERVICE_NAME": "frankfurt-1",
                "FIREZONE_NAME": "frankfurt-1-a",
            }
        )
        collector.wait_for_pushes(1)
        metadata = collector.metadata[0]
        assert (metadata["authorization"], metadata["x-tenant"]) == ("Bearer letmein", "a")
        resource = collector.resource()
        assert resource == {
            "service.instance.id": "frankfurt-1-a",
            "relay.name": "frankfurt-1-a",
            "relay.public_addresses": [program.host],
            "service.name": "frankfurt-1",
            "service.namespace": "elsewhere",
            "service.version": __version__,
            "deployment.environment": "test",
        }
        assert program.stop() == 0
    assert "letmein" not in program.log


def test_an_unreachable_collector_delays_nothing_and_is_logged_once(start_program: ProgramStarter) -> None:
    with socket.socket() as taken:
        # Bound without listen: the port is reserved, and connections are refused.
        taken.bind(("127.0.0.1", 0))
        program = start_program(
            "--allow-peer",
            "127.0.0.0/8",
            variables=SOON
            | {"OTLP_GRPC_ENDPOINT": f"127.0.0.1:{taken.getsockname()[1]}", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2"},
        )
        relay_something(program)
        program.wait_for_log("could not be pushed")
        relay_something(program)
        assert program.stop() == 0
    assert program.log.count("could not be pushed") == 1
    assert "Traceback" not in program.log


def test_a_hanging_collector_does_not_delay_the_exit(start_program: ProgramStarter) -> None:
    hangs, held, never = threading.Event(), threading.Event(), threading.Event()

    def answer(_: grpc.ServicerContext) -> ExportMetricsServiceResponse:
        if hangs.is_set():
            held.set()
            never.wait(1000)
        return ExportMetricsServiceResponse()

    with Collector(answers=answer) as collector:
        program = start_program(
            variables=SOON | {"OTLP_GRPC_ENDPOINT": collector.endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "600"}
        )
        try:
            collector.wait_for_pushes(2)
            hangs.set()
            assert held.wait(30)
            # Ten minutes would be too long.
            assert program.stop() == 0
        finally:
            never.set()


def test_messages_of_a_collector_are_not_logged(start_program: ProgramStarter) -> None:
    def refuse(context: grpc.ServicerContext) -> ExportMetricsServiceResponse:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, EVIL)
        raise AssertionError

    with Collector(answers=refuse) as collector:
        program = start_program(variables=SOON | {"OTLP_GRPC_ENDPOINT": collector.endpoint})
        program.wait_for_log("could not be pushed")
        collector.wait_for_pushes(3)
        assert program.stop() == 0
    assert "permission_denied" in program.log
    assert "evil" not in program.log
    assert program.log.count("could not be pushed") == 1


def test_a_server_without_grpc_is_a_failed_push(start_program: ProgramStarter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def babble() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(EVIL.encode() * 1000)

        babbler = threading.Thread(target=babble)
        babbler.start()
        program = start_program(
            "--allow-peer",
            "127.0.0.0/8",
            variables=SOON
            | {"OTLP_GRPC_ENDPOINT": f"127.0.0.1:{listening.getsockname()[1]}", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5"},
        )
        program.wait_for_log("could not be pushed")
        relay_something(program)
        assert program.stop() == 0
        listening.shutdown(socket.SHUT_RDWR)
    babbler.join(30)
    assert "evil" not in program.log


def test_pushes_without_the_extra_name_the_package_to_install(tmp_path: Path) -> None:
    # Simulates a missing extra: the first module found cannot be imported.
    (tmp_path / "opentelemetry.py").write_text("raise ImportError")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    done = subprocess.run(
        [*COMMAND, "--standalone", "--public-ip4-addr", "127.81.0.2", "--otlp-grpc-endpoint", "[::1]:4317"],
        env={"PYTHONPATH": path, "ALLOW_ROOT": "1", "HEALTH_CHECK_ADDR": "127.0.0.1:0", "CONTROL_ENDPOINT": "127.0.0.1:0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert line.startswith("firezone-relay: ")
    assert f"install it in {sys.prefix}" in line


def test_an_attribute_has_one_type_in_all_points_of_a_metric(start_program: ProgramStarter, collector: Collector) -> None:
    start_program(variables=SOON | {"OTLP_GRPC_ENDPOINT": collector.endpoint})
    collector.wait_for_pushes(1)
    for metric in collector.metrics().values():
        types: dict[str, set[type]] = {}
        for point in (*metric.gauge.data_points, *metric.sum.data_points, *metric.histogram.data_points):
            for name, each in attributes_of(point.attributes).items():
                types.setdefault(name, set()).add(type(each))
        assert all(len(each) == 1 for each in types.values()), metric.name


def test_a_relay_without_a_name_is_known_by_its_address_after_a_restart(
    start_program: ProgramStarter, collector: Collector
) -> None:
    hosts = ("127.7.7.7",)
    for _ in range(2):
        pushes = len(collector.requests)
        program = start_program(hosts=hosts, variables=SOON | {"OTLP_GRPC_ENDPOINT": collector.endpoint})
        collector.wait_for_pushes(pushes + 1)
        assert collector.resource()["service.instance.id"] == "127.7.7.7"
        assert program.stop() == 0
