"""The page about metrics matches the definitions of all metrics."""

from docs.metric_table import PAGE, page
from tests.support.metrics import TABLE


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(PAGE.read_text()), "docs/metrics.md is not what the definitions say: make docs"


def test_the_page_has_every_metric() -> None:
    text = PAGE.read_text()
    for metric in TABLE:
        assert f"| `{metric.name}` |" in text
        assert metric.description in text
