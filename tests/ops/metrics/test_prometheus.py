"""The scraped page: how long a response is cached."""

from relay.ops.metrics.prometheus import FRESH_FOR, MAX_FRESH_FOR, MAX_TIME, MetricsPage
from tests.support.metrics import Measured


def test_a_scrape_is_cached_briefly(measured: Measured) -> None:
    now = 1000.0
    page = MetricsPage(measured.sources, lambda: now)
    first = page({})
    measured.kernel_drops = 7
    now += FRESH_FOR * 0.9
    assert page({}) is first
    now += FRESH_FOR * 0.1
    assert "relay_receive_buffer_drops_total 7.0" in str(page({}).body)
    assert "relay_receive_buffer_drops_total 0.0" in str(first.body)


def test_a_slow_scrape_is_cached_longer(measured: Measured) -> None:
    """With thousands of sockets a scrape is slow."""
    now, takes = 1000.0, 0.1

    def drops() -> int:
        nonlocal now
        now += takes
        return 0

    page = MetricsPage(measured.sources._replace(kernel_drops=drops), lambda: now)
    began = now
    first = page({})
    now = began + takes / MAX_TIME - 0.001
    assert page({}) is first
    now = began + takes / MAX_TIME + 0.001
    takes = 1000.0
    began = now
    second = page({})
    assert second is not first
    now = max(now, began + MAX_FRESH_FOR)
    assert page({}) is not second
