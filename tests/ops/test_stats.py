"""The line about relayed traffic: every ten seconds, and only if something was relayed."""

import threading
import time

import pytest

from relay.ops.logs.stats import MANY_DROPS, PERIOD, Flow, StatsLine, report
from tests.support.log_lines import KeptLog, log
from tests.support.waiting import wait_until

__all__ = ["log"]

NOTHING: Flow = dict.fromkeys(
    (
        *("to_peer_packets", "to_peer_bytes", "to_client_packets", "to_client_bytes", "kernel_packets", "drops"),
        *("allocations", "channels"),
    ),
    0,
)


class Traffic:
    """Traffic set by a test, and the stats line that reads it."""

    def __init__(self) -> None:
        self.flow: Flow | None = NOTHING
        self.also = 0
        self.stats = StatsLine(self._read, self._count)
        self._now = time.monotonic()

    def _read(self) -> Flow:
        if self.flow is None:
            raise OSError("unreadable")
        return self.flow

    def _count(self) -> None:
        self.also += 1

    def look(self, seconds: float = PERIOD) -> None:
        """End a period."""
        self._now += seconds
        self.stats.end_period(self._now)


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


def test_nothing_is_logged_without_traffic(log: KeptLog, traffic: Traffic) -> None:
    traffic.flow = {**NOTHING, "allocations": 5, "channels": 5, "drops": MANY_DROPS - 1}
    for _ in range(3):
        traffic.look()
    assert log.take() == []


def test_the_traffic_of_a_period_is_logged_with_rates(log: KeptLog, traffic: Traffic) -> None:
    traffic.flow = dict(zip(NOTHING, (1000, 1_000_000, 3000, 250_000, 0, 7, 20, 30), strict=True))
    traffic.look()
    traffic.flow = dict(zip(NOTHING, (1500, 1_500_000, 3000, 250_000, 0, 7, 21, 31), strict=True))
    traffic.look(5.0)
    traffic.look()
    first, second = log.take()
    assert first | {"timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "target": "relay.ops.stats",
        "event": "relayed",
        "seconds": 10.0,
        "packets_per_second": 400,
        "megabits_per_second": 1.0,
        "to_peer_packets": 1000,
        "to_peer_bytes": 1_000_000,
        "to_client_packets": 3000,
        "to_client_bytes": 250_000,
        "drops": 7,
        "allocations": 20,
        "channels": 30,
    }
    assert (second["to_peer_packets"], second["packets_per_second"], second["drops"]) == (500, 100, 0)
    assert second["megabits_per_second"] == 0.8


def test_kernel_packets_are_logged_once_the_kernel_has_relayed_any() -> None:
    after = {**NOTHING, "to_peer_packets": 10, "to_peer_bytes": 100, "kernel_packets": 8}
    told = report(NOTHING, after, 10)
    assert told is not None
    assert told["kernel_packets"] == 8
    assert told["to_peer_packets"] == 10
    assert "kernel_packets" not in (report(NOTHING, {**after, "kernel_packets": 0}, 10) or {})


def test_many_drops_are_logged_without_traffic(log: KeptLog, traffic: Traffic) -> None:
    traffic.flow = {**NOTHING, "drops": MANY_DROPS}
    traffic.look()
    traffic.look()
    (entry,) = log.take()
    assert entry["drops"] == MANY_DROPS


def test_unreadable_counters_are_logged_once_and_read_again(log: KeptLog, traffic: Traffic) -> None:
    traffic.flow = None
    traffic.look()
    traffic.look()
    traffic.flow = {**NOTHING, "to_peer_packets": 5}
    traffic.look()
    assert [entry["event"] for entry in log.take()] == [
        "the traffic can't be read: please report this; further failures are not logged",
        "relayed",
    ]


def test_the_thread_ends_each_period_until_it_is_stopped(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ops.logs.stats.PERIOD", 0.01)
    before = set(threading.enumerate())
    traffic.stats.start()
    wait_until(lambda: traffic.also >= 2)
    traffic.stats.stop()
    assert set(threading.enumerate()) <= before


def test_the_thread_stops_at_once(traffic: Traffic) -> None:
    before = set(threading.enumerate())
    traffic.stats.start()
    traffic.stats.stop()
    assert set(threading.enumerate()) <= before
    assert traffic.also == 0
