"""Metrics pushed by the program itself to a collector over gRPC, and what a bad one can do to it."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE, Metric

from relay import __version__
from relay.ops.metrics.metric import Kind
from relay.ops.metrics.table import TABLE
from tests.collector import Collector, attributes_of
from tests.interop.conftest import Program, ProgramStarter
from tests.turn_client import TurnClient, udp_socket

SOON = {"OTEL_METRIC_EXPORT_INTERVAL": "100"}
EVIL = "\x1b[31mevil\n{}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as opened:
        yield opened


def value(metric: Metric, **labels: object) -> float:
    """Give the value that has these labels, and no others."""
    points = metric.gauge.data_points or metric.sum.data_points
    (point,) = [point for point in points if attributes_of(point.attributes) == labels]
    return float(point.as_int if point.HasField("as_int") else point.as_double)


def relay_something(program: Program) -> None:
    """Have it make an allocation, and relay a packet of 1200 bytes each way."""
    with TurnClient((program.host, 3478), program.credential) as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        client.bind_channel(0x4000, peer.getsockname())
        client.send(0x4000, bytes(1200))
        peer.recv(2000)
        peer.sendto(bytes(1200), relayed[:2])
        client.receive()


def test_a_collector_gets_what_the_relay_did(start_program: ProgramStarter, collector: Collector) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8", "--otlp-grpc-endpoint", collector.endpoint, variables=SOON)
    relay_something(program)
    # The one that follows was measured after that.
    collector.wait_for_pushes(len(collector.requests) + 2)
    pushed = collector.metrics()
    assert list(pushed) == [metric.name for metric in TABLE]
    for metric in TABLE:
        assert (pushed[metric.name].unit, pushed[metric.name].description) == (metric.unit, metric.description)
        kinds = {Kind.COUNTER: "sum", Kind.GAUGE: "gauge", Kind.HISTOGRAM: "histogram"}
        assert pushed[metric.name].WhichOneof("data") == kinds[metric.kind]
    assert value(pushed["relay.active_allocations"]) == 1
    assert value(pushed["relay.responses"], response_class="error", message_type="allocate", error_code=401) == value(
        pushed["relay.responses"], response_class="success", message_type="allocate", error_code=""
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
    assert program.stop() == 0
    assert value(collector.metrics()["relay.allocations.made"]) == 1


def test_the_variables_of_opentelemetry_are_honoured(start_program: ProgramStarter, tmp_path: Path) -> None:
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
            }
        )
        collector.wait_for_pushes(1)
        metadata = collector.metadata[0]
        assert (metadata["authorization"], metadata["x-tenant"]) == ("Bearer letmein", "a")
        resource = collector.resource()
        assert len(resource.pop("service.instance.id")) == 36
        assert resource == {
            "service.name": "frankfurt-1",
            "service.namespace": "elsewhere",
            "service.version": __version__,
            "deployment.environment": "test",
        }
        assert program.stop() == 0
    assert "letmein" not in program.log


def test_a_collector_that_is_not_there_keeps_nothing_waiting_and_fills_no_log(start_program: ProgramStarter) -> None:
    with socket.socket() as taken:
        # Bound, and not listened at: nobody else gets it, and whoever connects is refused.
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


def test_a_collector_that_stops_answering_does_not_hold_up_the_end(start_program: ProgramStarter) -> None:
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
            # Ten minutes would be too much.
            assert program.stop() == 0
        finally:
            never.set()


def test_what_a_collector_says_gets_into_no_log(start_program: ProgramStarter) -> None:
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


def test_what_does_not_even_speak_grpc_is_a_collector_that_fails(start_program: ProgramStarter) -> None:
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


def test_whoever_asks_for_pushes_without_the_extra_is_told_what_to_install(tmp_path: Path) -> None:
    # As it is for whoever has not installed it: what is found first can't be imported.
    (tmp_path / "opentelemetry.py").write_text("raise ImportError")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "relay",
            "--standalone",
            "--public-ip4-addr",
            "127.81.0.2",
            "--otlp-grpc-endpoint",
            "[::1]:4317",
        ],
        env={"PYTHONPATH": path, "ALLOW_ROOT": "1", "HEALTH_CHECK_ADDR": "127.0.0.1:0", "CONTROL_ENDPOINT": "127.0.0.1:0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert line.startswith("firezone-relay: ")
    assert "pip install 'firezone-relay[otlp]'" in line
