"""Offload is switched off and on while packets flow, by an operator and by the relay's end."""

import contextlib
import re
import signal
from pathlib import Path
from typing import Final

import pytest

from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, Lab, running, talk
from tests.support.offload.stream import Stream
from tests.support.offload.topology import row
from tests.support.waiting import wait_until

pytestmark = [needs_bpf, pytest.mark.usefixtures("object_file")]

GONE: Final = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}


def test_switching_off_and_on_loses_no_packets(lab: Lab) -> None:
    # On a busy machine, the sockets drop packets.
    before = lab.relay.dropped()

    def dropped() -> int:
        return lab.relay.dropped() - before

    with talk(lab.relay, lab.network) as way, Stream(way, dropped=dropped) as stream:
        for _ in range(5):
            stream.wait_for(200)
            assert lab.relay.detach()["xdp_attached"] == {"r0": None, "r1": None}
            assert "xdp" not in lab.network.relay.links()
            counts = lab.relay.counts()
            stream.wait_for(200)
            assert lab.relay.counts() == counts, "the sockets relay everything"
            assert lab.relay.attach()["xdp_attached"] == {"r0": lab.mode, "r1": lab.mode}
            wait_until(lambda counts=counts: sum(lab.relay.counts().since(counts)[:2]) > 200)  # type: ignore[misc]
    assert stream.doubled() == 0
    assert stream.lost() <= dropped()


def test_a_repeated_switch_has_no_effect(lab: Lab) -> None:
    with talk(lab.relay, lab.network) as way:
        lab.relay.detach()
        lab.relay.detach()
        way.both()
        lab.relay.attach()
        lab.relay.attach()
        way.wait_for_kernel()
    assert lab.relay.state()["xdp_failures"] == {}


def test_no_thread_keeps_the_capabilities_for_loading_programs(lab: Lab) -> None:
    with talk(lab.relay, lab.network):
        seen = []
        for thread in Path(f"/proc/{lab.relay.program.process.pid}/task").iterdir():
            # A thread of the HTTP server may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                seen.append((thread / "status").read_text())
        assert len(seen) > 5
        for status in seen:
            sets = {name: int(value, 16) for name, value in re.findall(r"Cap(\w+):\s+(\w+)", status)}
            for name, number in GONE.items():
                held = [kind for kind, value in sets.items() if value >> number & 1]
                assert held == [], f"{name} of {status.splitlines()[0]}"


def test_switching_works_after_capabilities_are_dropped(lab: Lab) -> None:
    """A new interface of the same name must get the program, too."""
    lab.relay.detach()
    assert lab.relay.attach()["xdp_failures"] == {}


@pytest.mark.parametrize("mode", MODES)
def test_the_program_of_a_killed_relay_is_detached(tmp_path: Path, mode: str) -> None:
    """`running` checks the same for a stopped relay."""
    with row() as network, running(network.relay, tmp_path, mode) as relay:
        assert network.relay.links().count("xdp") >= 2
        relay.program.stop(signal.SIGKILL)
        assert "xdp" not in network.relay.links()
