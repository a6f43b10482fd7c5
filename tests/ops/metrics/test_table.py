"""The definitions: names that others know, and label sets that nobody can make grow."""

import re
from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import counters
from relay.core.authentication import ErrorCode
from relay.core.counters import DropReason
from relay.core.portal.channel import State
from relay.core.stun import MessageClass, Method, encode
from relay.offload import layout
from relay.offload.datapath import Datapath
from relay.offload.layout import PassReason
from relay.offload.program import Totals
from relay.ops.metrics.metric import Histogram, Kind, LabelValue, Metric
from relay.ops.metrics.sources import Look, Sources
from relay.ops.metrics.table import TABLE
from tests.core.driver import CHANNEL, CLIENT, OTHER_CLIENT, PEER, Client, channel_data
from tests.ops.metrics.conftest import Measured

BY_NAME = {metric.name: metric for metric in TABLE}


def values(metric: Metric | str, sources: Sources) -> dict[tuple[LabelValue, ...], float | Histogram]:
    read = list((BY_NAME[metric] if isinstance(metric, str) else metric).read(Look(sources)))
    # No combination of labels comes twice.
    assert len(dict(read)) == len(read)
    return dict(read)


def combinations(sources: Sources) -> set[tuple[str, tuple[LabelValue, ...]]]:
    return {(metric.name, labels) for metric in TABLE for labels in values(metric, sources)}


def nonzero(metric: str, sources: Sources) -> dict[tuple[LabelValue, ...], float | Histogram]:
    return {labels: value for labels, value in values(metric, sources).items() if value}


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_definition_is_well_formed(metric: Metric, measured: Measured) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", metric.name)
    assert metric.name.split(".")[0] in {"relay", "process"}
    assert re.fullmatch(r"By|s|\{[a-z_]+\}", metric.unit)
    assert re.fullmatch(r"[A-Z0-9][^\n]+\.", metric.description)
    read = values(metric, measured.sources)
    assert read
    for labels, value in read.items():
        assert labels in set(product(*metric.labels.values()))
        assert isinstance(value, Histogram) is (metric.kind is Kind.HISTOGRAM)
        if isinstance(value, Histogram):
            assert len(value.counts) == len(metric.bounds) + 1


def test_no_name_is_given_twice() -> None:
    assert not [name for name, count in Counter(metric.name for metric in TABLE).items() if count > 1]


def test_the_metrics_that_dashboards_know_are_what_they_expect() -> None:
    known = {
        "relay.active_allocations": ("{allocation}", Kind.GAUGE, ()),
        "relay.responses": ("{response}", Kind.COUNTER, ("response_class", "message_type", "error_code")),
        "relay.packet.size": ("By", Kind.HISTOGRAM, ("relay.datapath",)),
    }
    for name, (unit, kind, labels) in known.items():
        metric = BY_NAME[name]
        assert (metric.unit, metric.kind, tuple(metric.labels)) == (unit, kind, labels)
    assert BY_NAME["relay.packet.size"].labels == {"relay.datapath": ("userspace", "xdp")}
    assert BY_NAME["relay.responses"].labels["message_type"] == (
        "binding",
        "allocate",
        "refresh",
        "createpermission",
        "channelbind",
    )


def test_both_data_paths_count_sizes_in_the_same_steps() -> None:
    assert (counters.SIZE_STEPS, 1 << counters.SIZE_SHIFT) == (layout.SIZES, layout.SIZE_STEP)
    assert BY_NAME["relay.packet.size"].bounds == tuple(range(127, 1920, 128))


def test_every_drop_reason_and_error_code_and_portal_state_has_its_label() -> None:
    assert {reason.value for reason in DropReason} < set(BY_NAME["relay.drops"].labels["reason"])
    assert {int(code) for code in ErrorCode} < set(BY_NAME["relay.responses"].labels["error_code"])
    assert {state.value for state in State} < set(BY_NAME["relay.portal.state"].labels["state"])


@given(
    st.lists(st.binary(max_size=60), max_size=10),
    st.dictionaries(st.text(max_size=5) | st.sampled_from(["EPERM", "ENOMEM", "E2BIG", "RuntimeError"]), st.integers(1, 9)),
)
def test_nothing_that_others_send_makes_there_be_more_of_them(garbage: list[bytes], errors: dict[str, int]) -> None:
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


def test_what_is_relayed_is_counted_by_direction_and_size(measured: Measured) -> None:
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


def test_requests_are_counted_by_what_was_asked_and_answered(measured: Measured) -> None:
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
    assert nonzero("relay.allocations.refused", measured.sources) == {(401,): 1}
    assert nonzero("relay.nonces", measured.sources) == {("ours",): 3}
    assert nonzero("relay.active_allocations", measured.sources) == {(): 1}
    client.refresh(0)
    assert nonzero("relay.active_allocations", measured.sources) == {}
    assert nonzero("relay.allocations.freed", measured.sources) == {("deleted",): 1}


def test_answers_that_were_withheld_are_counted_by_method_and_code(measured: Measured) -> None:
    counted = measured.relay.counters
    counted.count_withheld(Method.BINDING, None)
    counted.count_withheld(Method.ALLOCATE, 401)
    counted.count_withheld(Method.ALLOCATE, 438)
    assert nonzero("relay.responses.withheld", measured.sources) == {
        ("binding", ""): 1,
        ("allocate", 401): 1,
        ("allocate", 438): 1,
    }


def test_an_error_without_a_name_of_its_own_is_counted_as_another(measured: Measured) -> None:
    measured.carried_out.bind_errors.update({"EMFILE": 2, "ENETRESET": 3, "unknown": 1})
    assert nonzero("relay.bind_failures", measured.sources) == {("EMFILE",): 2, ("other",): 4}


def test_one_state_of_the_portal_is_the_present_one(measured: Measured) -> None:
    assert nonzero("relay.portal.state", measured.sources) == {("idle",): 1}
    measured.portal.start(measured.relay.now)
    assert nonzero("relay.portal.state", measured.sources) == {("connecting",): 1}
    measured.joins_a_portal = False
    assert nonzero("relay.portal.state", measured.sources) == {("standalone",): 1}


def test_what_is_lost_on_the_way_is_among_the_drops(measured: Measured) -> None:
    measured.inbox.dropped = 2
    measured.carried_out.late_sends = 3
    measured.relay.receive(b"", CLIENT)
    assert nonzero("relay.drops", measured.sources) == {("empty",): 1, ("late",): 2, ("allocation_gone",): 3}
    measured.kernel_drops = 4
    assert nonzero("relay.receive_buffer.drops", measured.sources) == {(): 4}


def test_a_relay_that_starts_has_no_inbox_yet(measured: Measured) -> None:
    sources = measured.sources._replace(inbox=lambda: None)
    assert combinations(sources) == combinations(measured.sources)


def test_what_the_kernel_relays_is_told_beside_what_the_relay_does(measured: Measured) -> None:
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
        devices=SimpleNamespace(modes={"eth0": "native", "eth1": None}, failures={"eth1": "no such interface"}),
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
    assert nonzero("relay.xdp.interfaces", sources) == {("attached",): 1, ("failed",): 1}
