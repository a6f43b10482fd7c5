"""Long floods beyond the relay's capacity, with throughput figures. A flooding sender does not starve other clients."""

import contextlib
import time
from pathlib import Path

import pytest

from benchmarks.floods import measure
from relay.core.stun import Method
from relay.system.shutdown import STOP_TIMEOUT
from tests.support.flood import Flow, FlowMaker, flooded_program, floods, make_flow, running, seconds_for, server_of
from tests.support.turn_client import code_of

__all__ = ["flooded_program", "make_flow"]

pytestmark = pytest.mark.long

MIB = 1024


def test_a_flood_from_spoofed_sources_uses_no_memory_and_ends_no_session(tmp_path: Path) -> None:
    with running(tmp_path) as program:
        report = measure(server_of(program), program.process.pid, sources=200_000, rate=10_000, seconds=4)
    assert report.rate > 700, "a flood, even on a busy machine"
    assert report.memory_most - report.memory_before < 16 * MIB
    assert report.memory_after - report.memory_before < 4 * MIB
    for times in (report.refreshes, report.newcomers):
        assert times
        assert None not in times
    # Far more arrive on an idle machine (`python -m benchmarks.floods`).
    assert min(report.during.at_peer, report.during.at_client) > 0.5
    assert min(report.after.at_peer, report.after.at_client) > 0.9


@floods
def test_requests_are_answered_under_a_flood(make_flow: FlowMaker, sender: str, count: int) -> None:
    flooding, other = make_flow(), make_flow()
    # The client of a flooding peer may not find its responses in the data.
    asking = (flooding, other) if sender == "client" else (other,)

    def refresh() -> None:
        for each in asking:
            assert each.client.refresh(600) is None

    def ask_for_own_address() -> None:
        for each in asking:
            assert code_of(each.client.request(Method.BINDING)) is None

    flood = flooding.flood(sender, count)
    waits = []
    for _ in range(20):
        waits += [seconds_for(refresh), seconds_for(ask_for_own_address)]
        # Spread over half a second: a burst of requests might fit in the first moment of the flood.
        time.sleep(0.02)
    # A new client sends two Allocate requests and a ChannelBind.
    waits.append(seconds_for(make_flow) / 3)
    assert not flood.is_over
    # About 7 ms on an idle machine.
    assert max(waits) < 10


@pytest.mark.parametrize("count", [1, 50])
def test_a_peer_flood_on_one_allocation_does_not_starve_another(make_flow: FlowMaker, count: int) -> None:
    flooded, other = make_flow(), make_flow()
    flood = flooded.flood("peer", count)
    at_peer, at_client = other.exchange(100)
    assert not flood.is_over
    # All arrive on an idle machine.
    assert at_peer >= 50
    assert at_client >= 50


@floods
def test_packets_are_relayed_normally_after_a_flood(make_flow: FlowMaker, sender: str, count: int) -> None:
    """Check the flooded flow, another flow and a new flow."""
    flooded, other = make_flow(), make_flow()
    flood = flooded.flood(sender, count)
    other.exchange(50)
    flood.stop()
    for flow in (flooded, other, make_flow()):
        flow.pass_through()
        at_peer, at_client = flow.exchange(50)
        assert at_peer >= 25
        assert at_client >= 25
        assert flow.client.refresh(0) is None


@floods
def test_the_relay_stops_within_its_timeout_during_a_flood(tmp_path: Path, sender: str, count: int) -> None:
    with running(tmp_path) as program, contextlib.ExitStack() as stack:
        flood = Flow(program, stack).flood(sender, count)
        assert seconds_for(program.stop) < STOP_TIMEOUT, "as a supervisor is told"
        assert program.process.returncode == 0
        assert not flood.is_over
