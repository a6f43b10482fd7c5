"""Pushes of metrics: times, log events, and no delay at the end."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.config import OtlpConfig, UsageError
from relay.ops.metrics.push import QUIET_FOR, Pusher, read_settings
from tests.support.log_lines import capture_logs
from tests.support.waiting import PATIENCE, wait_until

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4317"}
FOREVER = 1000.0


class Collector:
    """Counts pushes, with outcomes chosen by a test.

    Args:
        outcome: returns the reason of a failure or None for a success; may raise or wait.
    """

    def __init__(self, outcome: Callable[[], str | None] = lambda: None) -> None:
        self.outcome = outcome
        self.pushes = 0
        self.closed = threading.Event()

    def push(self) -> str | None:
        self.pushes += 1
        return self.outcome()

    def close(self) -> None:
        self.closed.set()


def said(pusher: Pusher, count: int) -> list[str]:
    """Push some times, and return the levels of the log events."""
    with capture_logs() as lines:
        for _ in range(count):
            pusher.push()
    return [str(line["log_level"]) for line in lines]


@pytest.mark.parametrize(
    ("endpoint", "variables", "expected"),
    [
        (None, {}, None),
        (None, {"OTEL_SERVICE_NAME": "relay", "OTEL_METRIC_EXPORT_INTERVAL": "nonsense"}, None),
        ("http://127.0.0.1:4317", {}, OtlpConfig("http://127.0.0.1:4317", 60)),
        (None, ENDPOINT, OtlpConfig(None, 60)),
        (None, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "localhost:4317"}, OtlpConfig(None, 60)),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
        (
            "http://127.0.0.1:4317",
            {**ENDPOINT, "OTEL_METRIC_EXPORT_INTERVAL": "100"},
            OtlpConfig("http://127.0.0.1:4317", 0.1),
        ),
        (None, {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, OtlpConfig(None, 60)),
        (None, {**ENDPOINT, "OTEL_METRICS_EXPORTER": "otlp"}, OtlpConfig(None, 60)),
        (None, {**ENDPOINT, "OTEL_METRICS_EXPORTER": "none"}, None),
        ("http://127.0.0.1:4317", {"OTEL_SDK_DISABLED": "TRUE"}, None),
    ],
)
def test_pushing_requires_an_endpoint_and_no_opt_out(
    endpoint: str | None, variables: dict[str, str], expected: OtlpConfig | None
) -> None:
    assert read_settings(endpoint, variables) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        {"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/json"},
        {"OTEL_METRIC_EXPORT_INTERVAL": "0"},
        {"OTEL_METRIC_EXPORT_INTERVAL": "-1000"},
        {"OTEL_METRIC_EXPORT_INTERVAL": "1e9"},
        {"OTEL_METRIC_EXPORT_INTERVAL": "9" * 10_000},
        {"OTEL_METRIC_EXPORT_INTERVAL": "\u0661\u0660\u0660\u0660"},
        {"OTEL_EXPORTER_OTLP_CERTIFICATE": "/nowhere/ca.pem"},
        {"OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY": "/"},
    ],
    ids=lambda variables: next(iter(variables.items()))[1][:20],
)
def test_an_invalid_variable_is_a_usage_error(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    good = {**ENDPOINT, "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "ca.pem")}
    assert read_settings(None, good) == OtlpConfig(None, 60)
    with pytest.raises(UsageError, match="OTEL_"):
        read_settings(None, good | variables)


def test_metrics_are_pushed_each_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    monkeypatch.setattr("relay.ops.metrics.push.LAST_PUSH_TIMEOUT", PATIENCE)
    pusher = Pusher(collector, 0.01)
    pusher.start()
    wait_until(lambda: collector.pushes >= 3)
    # Block a push shortly before the stop, so that the next push is the last.
    held, gate = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        gate.wait(PATIENCE)

    collector.outcome = hold
    assert held.wait(PATIENCE)
    before = collector.pushes
    threading.Timer(0.05, gate.set).start()
    pusher.stop()
    assert collector.pushes == before + 1
    assert collector.closed.is_set()


def test_nothing_is_pushed_before_the_first_interval() -> None:
    collector = Collector()
    pusher = Pusher(collector, FOREVER)
    pusher.start()
    pusher.stop()
    assert collector.pushes == 0
    assert collector.closed.is_set()


def test_stop_does_not_wait_for_a_hanging_push(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    collector = Collector(lambda: None if never.wait(1000) else "never")
    monkeypatch.setattr("relay.ops.metrics.push.STOP_TIMEOUT", 0.02)
    pusher = Pusher(collector, 0.01)
    pusher.start()
    wait_until(lambda: collector.pushes == 1)
    # A stop without a timeout would exceed the time limit of the test.
    pusher.stop()
    assert collector.closed.is_set()
    never.set()


def test_stop_does_not_wait_for_a_hanging_close(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Collector):
        def close(self) -> None:
            never.wait(1000)

    never = threading.Event()
    monkeypatch.setattr("relay.ops.metrics.push.STOP_TIMEOUT", 0.02)
    pusher = Pusher(Stuck(), FOREVER)
    pusher.start()
    pusher.stop()
    never.set()


def test_the_first_failure_and_the_recovery_are_logged() -> None:
    now = 1000.0
    collector = Collector()
    pusher = Pusher(collector, FOREVER, lambda: now)
    assert said(pusher, 3) == []
    collector.outcome = lambda: "unavailable"
    assert said(pusher, 1000) == ["warning"]
    now += 10 * QUIET_FOR
    assert said(pusher, 1000) == []
    collector.outcome = lambda: None
    assert said(pusher, 3) == ["info"]


def test_a_flapping_collector_is_logged_at_a_limited_rate() -> None:
    now = 1000.0
    outcomes = iter(["unavailable", None] * 1000)
    pusher = Pusher(Collector(lambda: next(outcomes)), FOREVER, lambda: now)
    assert said(pusher, 1000) == ["warning", "info"]
    now += QUIET_FOR
    assert said(pusher, 1000) == ["warning", "info"]


def test_any_exception_of_the_library_is_a_failed_push() -> None:
    def fail() -> None:
        raise RuntimeError("\x1b[31m a text of the collector's")

    pusher = Pusher(Collector(fail), FOREVER)
    with capture_logs() as lines:
        pusher.push()
    (line,) = lines
    assert line["error"] == "RuntimeError"
    assert "collector's" not in str(line)
