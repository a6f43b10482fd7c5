"""The line about relayed traffic: every ten seconds, and only if something was relayed."""

import queue
import threading
from collections.abc import Iterator

import pytest

from relay.ops.logs.log import events_to
from relay.ops.logs.stats import MANY_DROPS, PERIOD, Flow, StatsLine, report
from tests.support.log_lines import KeptLog

NOTHING = Flow(0, 0, 0, 0, 0, 0, 0, 0)
PATIENCE = 30
"""Seconds until a test fails."""


class Pace:
    """Runs the thread of a stats line step by step."""

    def __init__(self) -> None:
        self.now = 100.0
        self.flow = NOTHING
        self.asked: list[float] = []
        self.also = 0
        self._words: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._waiting = threading.Semaphore(0)

    def clock(self) -> float:
        return self.now

    def read(self) -> Flow:
        return self.flow

    def count(self) -> None:
        self.also += 1

    def wait(self, seconds: float) -> bool:
        self.asked.append(seconds)
        self._waiting.release()
        return self._words.get(timeout=PATIENCE)

    def until_it_waits(self) -> None:
        assert self._waiting.acquire(timeout=PATIENCE)

    def look(self, seconds: float = PERIOD) -> None:
        """Advance the clock, and run the thread through one period."""
        self.now += seconds
        self._words.put(False)  # noqa: FBT003 - as an event's wait() says
        self.until_it_waits()

    def end(self) -> None:
        self._words.put(True)  # noqa: FBT003


@pytest.fixture
def log() -> Iterator[KeptLog]:
    kept = KeptLog()
    with events_to(kept):
        yield kept


@pytest.fixture
def pace(log: KeptLog) -> Iterator[Pace]:
    """A started stats line, with its log."""
    assert log.take() == []
    pace = Pace()
    stats = StatsLine(pace.read, pace.count, pace.clock, pace.wait)
    stats.start()
    pace.until_it_waits()
    yield pace
    pace.end()
    stats.stop()


def test_nothing_is_logged_without_traffic(log: KeptLog, pace: Pace) -> None:
    pace.flow = NOTHING._replace(allocations=5, channels=5, drops=MANY_DROPS - 1)
    for _ in range(3):
        pace.look()
    assert log.take() == []
    assert set(pace.asked) == {PERIOD}


def test_the_traffic_of_a_period_is_logged_with_rates(log: KeptLog, pace: Pace) -> None:
    pace.flow = Flow(1000, 1_000_000, 3000, 250_000, 0, 7, 20, 30)
    pace.look()
    pace.flow = Flow(1500, 1_500_000, 3000, 250_000, 0, 7, 21, 31)
    pace.look(5.0)
    pace.look()
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
    before, after = NOTHING, Flow(10, 100, 0, 0, 8, 0, 1, 1)
    told = report(before, after, 10)
    assert told is not None
    assert told["kernel_packets"] == 8
    assert told["to_peer_packets"] == 10
    assert "kernel_packets" not in (report(before, after._replace(kernel_packets=0), 10) or {})


def test_many_drops_are_logged_without_traffic(log: KeptLog, pace: Pace) -> None:
    pace.flow = NOTHING._replace(drops=MANY_DROPS)
    pace.look()
    pace.look()
    (entry,) = log.take()
    assert entry["drops"] == MANY_DROPS


def test_the_periodic_function_is_called_each_period(pace: Pace) -> None:
    pace.look()
    pace.look()
    assert pace.also == 2


def test_unreadable_counters_are_logged_once_and_read_again(log: KeptLog) -> None:
    pace = Pace()
    stats = StatsLine(pace.read, pace.count, pace.clock, pace.wait)
    stats.start()
    pace.until_it_waits()
    pace.flow = None  # type: ignore[assignment]  # unreadable
    pace.look()
    pace.look()
    pace.flow = NOTHING._replace(to_peer_packets=5)
    pace.look()
    pace.end()
    stats.stop()
    assert [entry["event"] for entry in log.take()] == [
        "what flows can't be read: please report this; further times are only counted",
        "relayed",
    ]
    assert stats.bugs == 2


def test_the_thread_stops_at_once() -> None:
    pace = Pace()
    before = set(threading.enumerate())
    stats = StatsLine(pace.read, pace.count)
    stats.start()
    stats.stop()
    assert set(threading.enumerate()) <= before
    assert pace.also == 0
