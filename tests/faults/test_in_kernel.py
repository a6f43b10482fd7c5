"""A relay with offload on a failing machine: existing channels keep relaying, and new channels work afterwards."""

import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from relay.core.addresses import Family
from tests.support.failing import PATIENCE
from tests.support.offload.fixtures import needs_bpf, object_file
from tests.support.offload.relays import SECRET, Lab, Talk, running, talk
from tests.support.offload.topology import PEER, RELAY, row
from tests.support.requirements import needs_ipv6
from tests.support.secrets import Secrets, page, pages_of
from tests.support.waiting import wait_until

__all__ = ["object_file"]

pytestmark = [needs_bpf, needs_ipv6]

PAYLOAD: Final = b"what two peers tell each other, by way of the kernel"

NOTHING_LEAVES: Final = """
table inet fault {
    chain leaving {
        type filter hook output priority 0;
        udp sport 3478-65535 drop
    }
}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, object_file: bytes) -> Iterator[Lab]:
    """A relay with all log events enabled."""
    del object_file
    with row() as network:
        network.know_all()
        network.shorten_routes()
        with running(network.relay, tmp_path_factory.mktemp("relay"), "generic", "--log-filter", "trace") as relay:
            yield Lab(network, relay, "generic")


def assert_serves(lab: Lab) -> None:
    """Check that a new client is served, and then offloaded."""
    with talk(lab.relay, lab.network) as fresh:
        fresh.both()
        assert fresh.client.refresh(0) is None


def test_the_kernel_relays_while_the_process_is_stopped(lab: Lab) -> None:
    process = lab.relay.program.process
    with talk(lab.relay, lab.network) as made:
        process.send_signal(signal.SIGSTOP)
        try:
            # Only the parent process, which is not this process, is notified of the stop.
            threads = list(Path(f"/proc/{process.pid}/task").iterdir())
            wait_until(lambda: all("State:\tT" in (each / "status").read_text() for each in threads))
            for _ in range(100):
                made.both(PAYLOAD)
        finally:
            process.send_signal(signal.SIGCONT)
        assert made.client.refresh(600) is None
        made.both()
    assert_serves(lab)


@pytest.mark.skipif(shutil.which("nft") is None, reason="no firewall to forbid anything: apt-get install nftables")
def test_a_dropping_firewall_blocks_new_clients_but_not_xdp(lab: Lab) -> None:
    machine = lab.network.relay
    with talk(lab.relay, lab.network) as made, lab.relay.client(lab.network.client) as late:
        machine.run("nft", "-f", "-", text=NOTHING_LEAVES)
        try:
            made.both(PAYLOAD)
            late.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                late.allocate()
        finally:
            machine.run("nft", "delete", "table", "inet", "fault")
        late.socket.settimeout(PATIENCE)
        late.allocate()
    assert_serves(lab)


def test_a_process_out_of_descriptors_keeps_its_kernel_channels(lab: Lab) -> None:
    pid = lab.relay.program.process.pid
    with talk(lab.relay, lab.network) as made, lab.relay.client(lab.network.client) as late:
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            with pytest.raises(AssertionError, match="was answered 508"):
                late.allocate()
            made.both(PAYLOAD)
            assert made.client.refresh(600) is None
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        with lab.network.peer.udp(PEER[Family.IPV4]) as peer:
            Talk(lab.relay, late, peer).wait_for_kernel()
    assert_serves(lab)


def test_offload_pages_and_dumps_contain_no_secret(lab: Lab) -> None:
    secrets = Secrets()
    secrets.add("secret of the relay", SECRET)
    secrets.add("payload", PAYLOAD)
    with talk(lab.relay, lab.network) as made:
        secrets.add_credential(made.client.credential)
        made.both(PAYLOAD)
        shown = ""
        with lab.network.relay.entered():
            for path in pages_of(lab.relay.control):
                shown += page(lab.relay.control, "GET", path)
        lab.relay.dropped()
    assert RELAY[Family.IPV4] in shown
    assert "xdp_packets" in shown + lab.relay.log
    assert secrets.found_in(shown + lab.relay.log) == set()
