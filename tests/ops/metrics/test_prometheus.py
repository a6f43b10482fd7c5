"""The page that is scraped: how often it is written anew."""

from relay.ops.metrics.prometheus import FRESH_FOR, MetricsPage
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
