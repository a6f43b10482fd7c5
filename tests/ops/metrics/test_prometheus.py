"""The page that is scraped: how often it is written anew."""

from relay.ops.metrics.prometheus import FRESH_FOR, LONGEST_FRESH_FOR, MOST_TIME, MetricsPage
from tests.ops.metrics.conftest import Measured


def test_whoever_scrapes_all_the_time_gets_the_same_answer_for_a_while(measured: Measured) -> None:
    now = 1000.0
    page = MetricsPage(measured.sources, lambda: now)
    first = page({})
    measured.kernel_drops = 7
    now += FRESH_FOR * 0.9
    assert page({}) is first
    now += FRESH_FOR * 0.1
    assert "relay_receive_buffer_drops_total 7.0" in str(page({}).body)
    assert "relay_receive_buffer_drops_total 0.0" in str(first.body)


def test_an_answer_that_took_long_is_given_for_longer(measured: Measured) -> None:
    """As where there are thousands of sockets to be asked."""
    now, takes = 1000.0, 0.1

    def drops() -> int:
        nonlocal now
        now += takes
        return 0

    page = MetricsPage(measured.sources._replace(kernel_drops=drops), lambda: now)
    began = now
    first = page({})
    now = began + takes / MOST_TIME - 0.001
    assert page({}) is first
    now = began + takes / MOST_TIME + 0.001
    takes = 1000.0
    began = now
    second = page({})
    assert second is not first
    now = max(now, began + LONGEST_FRESH_FOR)
    assert page({}) is not second
