"""Dashboard and alerts use existing metrics: each query is compared with a scrape of a running relay."""

import http.client
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from relay.ops.metrics.metric import MetricKind
from relay.ops.metrics.prometheus import name_of
from tests.support.metrics import TABLE
from tests.support.program import Program
from tests.support.turn_client import TurnClient, udp_socket

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())["groups"] for rule in group["rules"]
]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

OF_PROMETHEUS = {"instance", "job"}
"""Labels added by Prometheus to each series."""

Series: TypeAlias = Mapping[str, list[dict[str, str]]]
"""Labels of each series, by metric name."""


class Query(NamedTuple):
    where: str
    text: str
    shown: str
    """The text with ``{{label}}`` for labels of the result."""


def panel_queries() -> Iterator[Query]:
    for panel in PANELS:
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "5m").replace("$__range", "3h").replace("$instance", ".*")
            yield Query(panel["title"], text, target["legendFormat"])


def rule_queries() -> Iterator[Query]:
    for rule in RULES:
        said = " ".join(rule["annotations"].values())
        yield Query(rule["alert"], rule["expr"], re.sub(r"\{\{ *\$labels\.(\w+) *\}\}", r"{{\1}}", said))


QUERIES = [*panel_queries(), *rule_queries()]


@pytest.fixture(scope="module")
def series() -> Iterator[Series]:
    """Scrape a relay with a client that has sent and received."""
    program = Program("--allow-peer", "127.0.0.0/8")
    try:
        program.wait_until_ready()
        with TurnClient((program.host, 3478), program.credential) as client, udp_socket("127.0.0.1") as peer:
            (relayed,) = client.allocate()
            client.bind_channel(0x4000, peer.getsockname())
            client.send(0x4000, b"to the peer")
            peer.recv(100)
            peer.sendto(b"to the client", relayed[:2])
            client.receive()
            yield scrape(program)
    finally:
        program.close()


def scrape(program: Program) -> Series:
    found = re.search(r"control=\S*?:(\d+)", program.log)
    assert found is not None
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    series: dict[str, list[dict[str, str]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series[sample.name].append(sample.labels)
    return series


def nodes(query: promql.Expr) -> list[promql.Expr]:
    """Return all nodes of a query, the root first."""
    found: list[promql.Expr] = []
    promql.walk(query, found.append)
    return found


def selectors(query: promql.Expr) -> list[promql.VectorSelector]:
    every = nodes(query)
    inner = [node.vector_selector for node in every if isinstance(node, promql.MatrixSelector)]
    return inner + [node for node in every if isinstance(node, promql.VectorSelector)]


def matches(matcher: promql.Matcher, value: str) -> bool:
    if matcher.op in (promql.MatchOp.Equal, promql.MatchOp.NotEqual):
        alike = matcher.value == value
    else:
        alike = re.fullmatch(matcher.value, value) is not None
    return alike is (matcher.op in (promql.MatchOp.Equal, promql.MatchOp.Re))


def labels_of(query: promql.Expr, series: Series) -> set[str]:
    """Return the labels common to all series selected by an expression."""
    named = [set[str]().union(*series[selector.name or ""]) for selector in selectors(query)]
    return OF_PROMETHEUS | (set.intersection(*named) if named else set())


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.where}: {query.text}"[:80])
def test_a_query_selects_exported_metrics(query: Query, series: Series) -> None:
    parsed = promql.parse(query.text)
    assert selectors(parsed)
    for selector in selectors(parsed):
        if selector.name == "up":
            # Made by Prometheus for each target.
            continue
        assert selector.name in series
        left = series[selector.name or ""]
        for matcher in selector.matchers.matchers:
            if matcher.name not in OF_PROMETHEUS:
                left = [labels for labels in left if matches(matcher, labels[matcher.name])]
        assert left, f"nothing is left of {selector}"
    grouped = [node for node in nodes(parsed) if isinstance(node, promql.AggregateExpr)]
    for node in grouped:
        assert node.modifier is None or set(node.modifier.labels) <= labels_of(node.expr, series)
    # The legend may use only labels kept by the outermost aggregation.
    kept = labels_of(parsed, series) if not grouped else set(grouped[0].modifier.labels if grouped[0].modifier else ())
    assert set(re.findall(r"\{\{(\w+)\}\}", query.shown)) <= kept


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_every_metric_is_on_the_dashboard_according_to_its_type(metric: Any) -> None:  # noqa: ANN401 - a Metric
    suffix = {MetricKind.COUNTER: "_total", MetricKind.GAUGE: "", MetricKind.HISTOGRAM: "_bucket"}[metric.kind]
    name = name_of(metric) + suffix
    asked = [query for query in panel_queries() if re.search(rf"\b{name}\b", query.text)]
    assert asked
    for query in asked:
        # The raw value of a counter is useless: a restart resets the counter.
        assert metric.kind is MetricKind.GAUGE or re.search(r"(rate|increase)\(", query.text)


def test_panel_ids_and_data_sources_are_unique() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_the_relay_variable_lists_relays_with_a_version(series: Series) -> None:
    (variable,) = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "instance"]
    assert variable["definition"] == "label_values(relay_info, instance)"
    assert "relay_info" in series


def test_every_alert_has_a_severity_and_an_instance() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert "$labels.instance" in rule["annotations"]["summary"] or rule["expr"].startswith("absent(")
