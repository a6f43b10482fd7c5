"""When metrics are pushed, what is said of it, and that nobody waits for it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from relay.config import BadUseError, OtlpConfig
from relay.ops.metrics import push
from relay.ops.metrics.push import QUIET_FOR, Pusher, read_settings
from tests.conftest import PATIENCE, wait_until

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4317"}
FOREVER = 1000.0


class Collector:
    """Counts pushes; a test says what comes of each.

    Args:
        outcome: gives why a push failed, or None; or raises, or waits.
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
    """Push so many times, and give what the log has of it."""
    with capture_logs() as lines:
        for _ in range(count):
            pusher._push()
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
def test_metrics_are_pushed_if_an_endpoint_is_given_and_nothing_forbids_it(
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
def test_what_makes_no_sense_in_the_environment_is_bad_use(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    good = {**ENDPOINT, "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "ca.pem")}
    assert read_settings(None, good) == OtlpConfig(None, 60)
    with pytest.raises(BadUseError, match="OTEL_"):
        read_settings(None, good | variables)


def test_it_is_pushed_each_interval_and_once_more_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "LAST_PUSH_TIMEOUT", PATIENCE)
    collector = Collector()
    pusher = Pusher(collector, 0.01)
    pusher.start()
    wait_until(lambda: collector.pushes >= 3)
    # A moment before its end it is held up, so that what comes after is the last one.
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


def test_nothing_is_pushed_before_the_first_interval_nor_at_the_end_without_a_push_that_arrived() -> None:
    collector = Collector()
    pusher = Pusher(collector, FOREVER)
    pusher.start()
    pusher.stop()
    assert collector.pushes == 0
    assert collector.closed.is_set()


def test_the_end_does_not_wait_for_a_collector_that_does_not_answer() -> None:
    never = threading.Event()
    collector = Collector(lambda: None if never.wait(1000) else "never")
    pusher = Pusher(collector, 0.01)
    pusher.start()
    wait_until(lambda: collector.pushes == 1)
    # The test's own time limit would end it.
    pusher.stop()
    assert collector.closed.is_set()
    never.set()


def test_the_end_does_not_wait_for_a_library_that_does_not_close() -> None:
    class Stuck(Collector):
        def close(self) -> None:
            never.wait(1000)

    never = threading.Event()
    pusher = Pusher(Stuck(), FOREVER)
    pusher.start()
    pusher.stop()
    never.set()


def test_the_log_hears_when_pushing_begins_to_fail_and_when_it_works_again() -> None:
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


def test_a_collector_that_comes_and_goes_fills_no_log() -> None:
    now = 1000.0
    outcomes = iter(["unavailable", None] * 1000)
    pusher = Pusher(Collector(lambda: next(outcomes)), FOREVER, lambda: now)
    assert said(pusher, 1000) == ["warning", "info"]
    now += QUIET_FOR
    assert said(pusher, 1000) == ["warning", "info"]


def test_whatever_the_library_fails_with_is_one_more_push_that_failed() -> None:
    def fail() -> None:
        raise RuntimeError("\x1b[31m a text of the collector's")

    pusher = Pusher(Collector(fail), FOREVER)
    with capture_logs() as lines:
        pusher._push()
    (line,) = lines
    assert line["error"] == "RuntimeError"
    assert "collector's" not in str(line)
