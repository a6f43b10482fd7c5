"""The definitions: stable names, and bounded label sets."""

import re
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import counters
from relay.core.attributes import EVEN_PORT
from relay.core.counters import DropReason
from relay.core.errors import ErrorCode
from relay.core.portal.channel import State
from relay.core.stun import MessageClass, Method, encode
from relay.offload import layout
from relay.offload.datapath import Datapath
from relay.offload.layout import PassReason, Totals
from relay.ops.metrics.metric import Histogram, LabelValue, Metric, MetricKind
from relay.ops.metrics.table import read_table
from relay.ops.totals import RelayState
from tests.support.core import CHANNEL, CLIENT, OTHER_CLIENT, PEER, UDP, Client, channel_data, relay_with
from tests.support.metrics import TABLE, Measured

BY_NAME = {metric.name: metric for metric in TABLE}


def values(name: str, sources: RelayState) -> dict[tuple[LabelValue, ...], float | Histogram]:
    (points,) = (metric.points for metric in read_table(sources) if metric.name == name)
    # Combinations of labels are unique.
    assert len(dict(points)) == len(points)
    return dict(points)


def combinations(sources: RelayState) -> set[tuple[str, tuple[LabelValue, ...]]]:
    return {(metric.name, labels) for metric in read_table(sources) for labels, _ in metric.points}


def label_values(name: str, label: str) -> set[LabelValue]:
    at = BY_NAME[name].labels.index(label)
    return {labels[at] for labels, _ in BY_NAME[name].points}


def nonzero(name: str, sources: RelayState) -> dict[tuple[LabelValue, ...], float | Histogram]:
    return {labels: value for labels, value in values(name, sources).items() if value}


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_definition_is_well_formed(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", metric.name)
    assert metric.name.split(".")[0] in {"relay", "process"}
    assert re.fullmatch(r"By|s|\{[a-z_]+\}", metric.unit)
    assert re.fullmatch(r"[A-Z0-9][^\n]+\.", metric.description)
    assert metric.points
    for labels, value in metric.points:
        assert len(labels) == len(metric.labels)
        assert isinstance(value, Histogram) is (metric.kind is MetricKind.HISTOGRAM)
        if isinstance(value, Histogram):
            assert len(value.counts) == len(metric.bounds) + 1


def test_names_are_unique() -> None:
    assert not [name for name, count in Counter(metric.name for metric in TABLE).items() if count > 1]


def test_metrics_of_existing_dashboards_keep_their_names_and_labels() -> None:
    known = {
        "relay.active_allocations": ("{allocation}", MetricKind.GAUGE, ()),
        "relay.responses": ("{response}", MetricKind.COUNTER, ("response_class", "message_type", "error_code")),
        "relay.packet.size": ("By", MetricKind.HISTOGRAM, ("relay.datapath",)),
    }
    for name, (unit, kind, labels) in known.items():
        metric = BY_NAME[name]
        assert (metric.unit, metric.kind, metric.labels) == (unit, kind, labels)
    assert label_values("relay.packet.size", "relay.datapath") == {"userspace", "xdp"}
    assert label_values("relay.responses", "message_type") == {
        *("binding", "allocate", "refresh", "createpermission", "channelbind"),
    }


def test_both_data_paths_use_the_same_size_buckets() -> None:
    assert (counters.SIZE_STEPS, 1 << counters.SIZE_SHIFT) == (layout.SIZES, layout.SIZE_STEP)
    assert BY_NAME["relay.packet.size"].bounds == tuple(range(127, 1920, 128))


def test_every_drop_reason_error_code_and_portal_state_has_a_label() -> None:
    assert {reason.value for reason in DropReason} < label_values("relay.drops", "reason")
    assert {int(code) for code in ErrorCode} < label_values("relay.responses", "error_code")
    assert {state.value for state in State} < label_values("relay.portal.state", "state")


@given(
    st.lists(st.binary(max_size=60), max_size=10),
    st.dictionaries(st.text(max_size=5) | st.sampled_from(["EPERM", "ENOMEM", "E2BIG", "RuntimeError"]), st.integers(1, 9)),
)
def test_untrusted_input_creates_no_label_sets(garbage: list[bytes], errors: dict[str, int]) -> None:
    measured = Measured()
    before = combinations(measured.sources)
    relay = measured.relay
    client = Client(relay)
    allocation = client.allocate().id
    client.bind_channel()
    for data in garbage:
        relay.receive(data, CLIENT)
        relay.receive(channel_data(CHANNEL, data), CLIENT)
        relay.receive_from_peer(allocation, data, PEER)
    for method in (*Method, 0x123):
        relay.receive(encode(MessageClass.REQUEST, method, bytes(12), []), OTHER_CLIENT)
    measured.carried_out.bind_errors.update(errors)
    measured.carried_out.udp.send_errors.update(errors)
    measured.joins_a_portal = False
    assert combinations(measured.sources) == before
    for name in ("relay.bind_failures", "relay.send_failures"):
        counted = [value for value in values(name, measured.sources).values() if not isinstance(value, Histogram)]
        assert sum(counted) == sum(errors.values())


def test_relayed_packets_are_counted_by_direction_and_size(measured: Measured) -> None:
    relay, client = measured.relay, Client(measured.relay)
    allocation = client.allocate().id
    client.bind_channel()
    for size in (100, 1200):
        client.send_on_channel(bytes(size))
    relay.receive_from_peer(allocation, bytes(1200), PEER)
    assert nonzero("relay.relayed.packets", measured.sources) == {
        ("to_peer", "userspace"): 2,
        ("to_client", "userspace"): 1,
    }
    assert nonzero("relay.relayed.bytes", measured.sources) == {
        ("to_peer", "userspace"): 1300,
        ("to_client", "userspace"): 1200,
    }
    sizes = values("relay.packet.size", measured.sources)[("userspace",)]
    assert isinstance(sizes, Histogram)
    assert sizes.total == 2500
    assert {at: count for at, count in enumerate(sizes.counts) if count} == {0: 1, 9: 2}


def test_requests_are_counted_by_method_and_response(measured: Measured) -> None:
    client = Client(measured.relay)
    client.allocate()
    client.refresh(600)
    client.bind_channel(1)
    assert nonzero("relay.responses", measured.sources) == {
        ("error", "allocate", 401): 1,
        ("success", "allocate", ""): 1,
        ("success", "refresh", ""): 1,
        ("error", "channelbind", 400): 1,
    }
    assert nonzero("relay.nonces", measured.sources) == {("ours",): 3}
    assert nonzero("relay.active_allocations", measured.sources) == {(): 1}
    client.refresh(0)
    assert nonzero("relay.active_allocations", measured.sources) == {}
    assert nonzero("relay.allocations.freed", measured.sources) == {("deleted",): 1}


def test_refusals_are_counted_by_cause(measured: Measured) -> None:
    client, other = Client(measured.relay), Client(measured.relay, OTHER_CLIENT, salt="other")
    assert client.ask(Method.ALLOCATE, UDP, (EVEN_PORT, True)).code == 508
    client.allocate()
    measured.relay.server.handle_drain(measured.relay.now)
    assert other.ask(Method.ALLOCATE, UDP).code == 508
    measured.relay.server.handle_resume(measured.relay.now)
    full = Measured(relay_with(ports=range(50000, 50001), max_allocations=1))
    Client(full.relay).allocate()
    assert Client(full.relay, OTHER_CLIENT, salt="other").ask(Method.ALLOCATE, UDP).code == 508
    assert nonzero("relay.refusals", measured.sources) == {("reservation",): 1, ("draining",): 1}
    assert nonzero("relay.refusals", full.sources) == {("ports",): 1}


def test_each_limit_has_its_used_part(measured: Measured) -> None:
    client = Client(measured.relay)
    client.allocate()
    client.bind_channel()
    ports = measured.relay.server.free_port_count + 1
    config = replace(
        measured.sources.config, max_allocations=10, max_channels_in_all=30, lowest_port=50000, highest_port=49999 + ports
    )
    sources = measured.sources._replace(config=config, free_ports=lambda: measured.relay.server.free_port_count)
    used, limits = values("relay.capacity.used", sources), values("relay.capacity.limit", sources)
    assert list(used) == list(limits) == [("allocations",), ("ports",), ("channels",), ("descriptors",)]
    assert list(used.values())[:3] == [1, 1, 1]
    assert list(limits.values())[:3] == [10, ports, 30]
    assert 0 < used["descriptors",] < limits["descriptors",]  # type: ignore[operator]


def test_a_drain_shows_its_end(measured: Measured) -> None:
    assert values("relay.drain.end_time", measured.sources) == {(): 0}
    until = values("relay.drain.end_time", measured.sources._replace(ends=lambda: time.monotonic() + 60))[()]
    assert until == pytest.approx(time.time() + 60, abs=30)


def test_withheld_responses_are_counted_by_method_and_code(measured: Measured) -> None:
    answers = ((Method.BINDING, None), (Method.ALLOCATE, 401), (Method.ALLOCATE, 438))
    measured.relay.counters.withheld.update(dict.fromkeys(answers, 1))
    assert nonzero("relay.responses.withheld", measured.sources) == {
        ("binding", ""): 1,
        ("allocate", 401): 1,
        ("allocate", 438): 1,
    }


def test_an_unlisted_error_is_counted_as_other(measured: Measured) -> None:
    measured.carried_out.bind_errors.update({"EMFILE": 2, "ENETRESET": 3, "unknown": 1})
    assert nonzero("relay.bind_failures", measured.sources) == {("EMFILE",): 2, ("other",): 4}


def test_exactly_one_portal_state_is_current(measured: Measured) -> None:
    assert nonzero("relay.portal.state", measured.sources) == {("idle",): 1}
    measured.portal.start(measured.relay.now)
    assert nonzero("relay.portal.state", measured.sources) == {("connecting",): 1}
    measured.joins_a_portal = False
    assert nonzero("relay.portal.state", measured.sources) == {("standalone",): 1}


def test_drops_include_losses_in_inbox_and_sender(measured: Measured) -> None:
    measured.inbox.dropped = 2
    measured.carried_out.late_sends = 3
    measured.relay.receive(b"", CLIENT)
    assert nonzero("relay.drops", measured.sources) == {("empty",): 1, ("late",): 2, ("allocation_gone",): 3}
    measured.kernel_drops = 4
    assert nonzero("relay.receive_buffer.drops", measured.sources) == {(): 4}


def test_metrics_exist_before_the_inbox(measured: Measured) -> None:
    sources = measured.sources._replace(inbox=lambda: None)
    assert combinations(sources) == combinations(measured.sources)


def test_kernel_and_userspace_traffic_are_counted_separately(measured: Measured) -> None:
    client = Client(measured.relay)
    client.allocate()
    client.bind_channel()
    client.send_on_channel(bytes(100))
    sizes = {"to_peer": (2, *[0] * 15), "to_client": (*[0] * 15, 3)}
    totals = Totals(
        {"to_peer": 2, "to_client": 3},
        {"to_peer": 200, "to_client": 6000},
        sizes,
        dict.fromkeys(PassReason, 0) | {PassReason.NO_CHANNEL_DATA: 4},
    )
    kernel = SimpleNamespace(
        program=SimpleNamespace(totals=lambda: totals),
        channels=SimpleNamespace(installed={"one": 1}, refused=5, failures=6),
        devices=SimpleNamespace(modes={"eth0": "native", "eth1": None}, failures={"eth1": "no such interface"}, stalls=7),
    )
    sources = measured.sources._replace(datapath=cast(Datapath, kernel))
    assert combinations(sources) == combinations(measured.sources)
    assert nonzero("relay.relayed.packets", sources) == {
        ("to_peer", "userspace"): 1,
        ("to_peer", "xdp"): 2,
        ("to_client", "xdp"): 3,
    }
    assert values("relay.relayed.bytes", sources)[("to_client", "xdp")] == 6000
    by_kernel = values("relay.packet.size", sources)[("xdp",)]
    assert by_kernel == Histogram([2, *[0] * 14, 3], 6200)
    assert nonzero("relay.xdp.passed", sources) == {("no_channel_data",): 4}
    assert nonzero("relay.xdp.channels", sources) == {(): 1}
    assert nonzero("relay.xdp.channels.refused", sources) == {(): 5}
    assert nonzero("relay.xdp.table_failures", sources) == {(): 6}
    assert nonzero("relay.xdp.stalls", sources) == {(): 7}
    assert nonzero("relay.xdp.interfaces", sources) == {("attached",): 1, ("failed",): 1}
