"""The kernel's part is taken away and given back while packets flow, by an operator and by the relay's end."""

import contextlib
import re
import signal
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import wait_until
from tests.offload.conftest import needs_bpf
from tests.offload.relays import MODES, Lab, running, talk
from tests.offload.stream import Stream
from tests.offload.topology import row

pytestmark = [needs_bpf, pytest.mark.usefixtures("object_file")]

GONE: Final = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}


def test_switched_off_and_on_while_packets_flow_none_is_lost(lab: Lab) -> None:
    with talk(lab.relay, lab.network) as way, Stream(way, per_second=1000) as stream:
        for _ in range(5):
            stream.wait_for(200)
            assert lab.relay.detach()["xdp_attached"] == {"r0": None, "r1": None}
            assert "xdp" not in lab.network.relay.links()
            before = lab.relay.counts()
            stream.wait_for(200)
            assert lab.relay.counts() == before, "the sockets relay everything"
            assert lab.relay.attach()["xdp_attached"] == {"r0": lab.mode, "r1": lab.mode}
            wait_until(lambda before=before: sum(lab.relay.counts().since(before)[:2]) > 200)  # type: ignore[misc]
    assert stream.doubled() == 0
    # On a machine that is busy, the sockets drop what they can't relay in time.
    assert stream.lost() <= lab.relay.dropped()


def test_each_switch_may_be_asked_for_twice(lab: Lab) -> None:
    with talk(lab.relay, lab.network) as way:
        lab.relay.detach()
        lab.relay.detach()
        way.both()
        lab.relay.attach()
        lab.relay.attach()
        way.wait_for_kernel()
    assert lab.relay.state()["xdp_failures"] == {}


def test_no_thread_keeps_what_loading_the_program_took(lab: Lab) -> None:
    with talk(lab.relay, lab.network):
        seen = []
        for thread in Path(f"/proc/{lab.relay.program.process.pid}/task").iterdir():
            # One that served a page may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                seen.append((thread / "status").read_text())
        assert len(seen) > 5
        for status in seen:
            sets = {name: int(value, 16) for name, value in re.findall(r"Cap(\w+):\s+(\w+)", status)}
            for name, number in GONE.items():
                held = [kind for kind, value in sets.items() if value >> number & 1]
                assert held == [], f"{name} of {status.splitlines()[0]}"


def test_it_can_be_switched_without_the_capabilities_that_it_has_given_up(lab: Lab) -> None:
    """Also interfaces that come back have to get the program."""
    lab.relay.detach()
    assert lab.relay.attach()["xdp_failures"] == {}


@pytest.mark.parametrize("mode", MODES)
def test_the_program_goes_with_a_relay_that_is_killed(tmp_path: Path, mode: str) -> None:
    """And with one that is stopped, which `running` sees to."""
    with row() as network, running(network.relay, tmp_path, mode) as relay:
        assert network.relay.links().count("xdp") >= 2
        relay.program.stop(signal.SIGKILL)
        assert "xdp" not in network.relay.links()
