"""Short overload: other clients are served, and the relay recovers. `test_floods.py` has long floods."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from benchmarks.floods import Bystander, flooding
from benchmarks.measure import memory
from relay.core.stun import Method
from relay.system.shutdown import STOP_TIMEOUT
from tests.support.flood import Flow, FlowMaker, flooded_program, floods, make_flow, running, seconds_for, server_of
from tests.support.program import Program
from tests.support.turn_client import code_of

__all__ = ["flooded_program", "make_flow"]

MIB = 1024


@floods
def test_other_clients_are_served_during_a_flood_and_all_after_it(make_flow: FlowMaker, sender: str, count: int) -> None:
    flooded, other = make_flow(), make_flow()
    flood = flooded.flood(sender, count)
    # The client of a flooding peer may not find its responses in the data.
    for each in (flooded, other) if sender == "client" else (other,):
        assert each.client.refresh(600) is None
        assert code_of(each.client.request(Method.BINDING)) is None
    newcomer = make_flow()
    if sender == "peer":
        other.pass_through()
    assert not flood.is_over
    flood.stop()
    for each in (flooded, other, newcomer, make_flow()):
        each.pass_through()
        assert each.client.refresh(0) is None


def test_a_relay_stops_within_its_timeout_during_a_flood(tmp_path: Path) -> None:
    with running(tmp_path) as program, contextlib.ExitStack() as stack:
        flood = Flow(program, stack).flood("peer", 50)
        assert seconds_for(program.stop) < STOP_TIMEOUT, "as a supervisor is told"
        assert program.process.returncode == 0
        assert not flood.is_over


def test_a_flood_from_spoofed_sources_uses_no_memory_and_ends_no_session(flooded_program: Program) -> None:
    server, pid = server_of(flooded_program), flooded_program.process.pid
    before = memory(pid).resident
    with Bystander(server, 0) as bystander:
        assert bystander.begin() is not None
        with flooding(server.address, sources=5000, rate=5000, seconds=60):
            for number in range(1, 4):
                assert bystander.refresh() is not None
                with Bystander(server, number) as newcomer:
                    assert newcomer.begin() is not None
            assert memory(pid).resident - before < 16 * MIB
        assert bystander.refresh() is not None


def kernel_drops(program: Program) -> int:
    """Request a dump, and return the number of datagrams dropped by full receive buffers."""
    return program.counted("relay.receive_buffer.drops")[""]


@pytest.mark.parametrize("sender", ["client", "peer"])
def test_kernel_drops_while_the_process_is_stopped_are_counted(
    flooded_program: Program, make_flow: FlowMaker, sender: str
) -> None:
    flow = make_flow()
    before = kernel_drops(flooded_program)
    os.kill(flooded_program.process.pid, signal.SIGSTOP)
    try:
        for _ in range(12_000):
            if sender == "client":
                flow.client.send(0x4000, bytes(1000))
            else:
                flow.peer.sendto(bytes(1000), flow.relayed[:2])
    finally:
        os.kill(flooded_program.process.pid, signal.SIGCONT)
    # The receive buffer (at most 4 MiB) holds less than half of the datagrams.
    assert 1000 < kernel_drops(flooded_program) - before < 12_000
    flow.pass_through()
    assert flow.client.refresh(600) is None
