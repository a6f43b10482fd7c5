"""GET /metrics of a running relay with traffic, parsed by Prometheus' parser."""

import http.client
import math
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from relay.ops.metrics.metric import MetricKind
from relay.ops.metrics.prometheus import name_of
from tests.support.metrics import TABLE
from tests.support.system import Relay
from tests.support.turn_client import udp_socket
from tests.support.waiting import wait_until

SUFFIXES = {MetricKind.COUNTER: "_total", MetricKind.GAUGE: "", MetricKind.HISTOGRAM: ""}


def scrape(relay: Relay) -> tuple[str, str]:
    """Return the content type and the text."""
    at = relay.system.http["control"]
    connection = http.client.HTTPConnection(at.host, at.port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.getheader("Content-Type", ""), answer.read().decode()
    finally:
        connection.close()


def samples(relay: Relay) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(scrape(relay)[1])
    read = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in read}
    assert len(found) == len(read)
    return found


def counting(relay: Relay) -> Callable[..., float]:
    """Scrape now, and return a function to look up values."""
    found = samples(relay)
    return lambda name, **labels: found[name, frozenset(labels.items())]


def test_a_scrape_is_in_the_prometheus_text_format(relay: Relay) -> None:
    content_type, text = scrape(relay)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert list(families) == [name_of(metric) for metric in TABLE]
    for metric in TABLE:
        family = families[name_of(metric)]
        assert (family.type, family.documentation) == (metric.kind.value, metric.description)
    assert text.endswith("\n")


def test_names_are_usual_in_prometheus(relay: Relay) -> None:
    names = {name for name, _ in samples(relay)}
    assert {
        "relay_active_allocations",
        "relay_responses_total",
        "relay_packet_size_bytes_bucket",
        "relay_packet_size_bytes_sum",
        "relay_packet_size_bytes_count",
        "relay_relayed_bytes_total",
        "relay_inbox_age_seconds",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
        "process_max_fds",
        "process_start_time_seconds",
    } <= names


def test_a_scrape_counts_requests_and_relayed_packets(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        client.bind_channel(0x4000, peer.getsockname())
        for size in (0, 100, 1200):
            client.send(0x4000, bytes(size))
            assert len(peer.recv(2000)) == size
            peer.sendto(bytes(size), relayed[:2])
            assert client.receive() == (0x4000, bytes(size))
        client.send(0x4001, b"unbound")
        wait_until(lambda: counting(relay)("relay_drops_total", reason="unbound_channel") == 1)
    value = counting(relay)
    assert value("relay_active_allocations") == 1
    assert value("relay_channels") == 1
    for direction in ("to_peer", "to_client"):
        labels = {"relay_direction": direction, "relay_datapath": "userspace"}
        assert value("relay_relayed_packets_total", **labels) == 3
        assert value("relay_relayed_bytes_total", **labels) == 1300
    assert value("relay_packet_size_bytes_sum", relay_datapath="userspace") == 2600
    assert value("relay_packet_size_bytes_count", relay_datapath="userspace") == 6
    for bound, count in (("127", 4), ("1151", 4), ("1279", 6), ("+Inf", 6)):
        assert value("relay_packet_size_bytes_bucket", relay_datapath="userspace", le=bound) == count
    assert value("relay_responses_total", response_class="error", message_type="allocate", error_code="401") == 1
    assert value("relay_responses_total", response_class="success", message_type="channelbind", error_code="") == 1
    assert value("relay_ready") == 1
    assert value("relay_portal_state", state="standalone") == 1


def test_every_value_is_a_plausible_number(relay: Relay) -> None:
    for (name, _), value in samples(relay).items():
        assert math.isfinite(value)
        # The wall clock may be set back.
        assert value >= 0 or name == "relay_wall_clock_moved_seconds"
