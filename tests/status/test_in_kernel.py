"""The status page of a relay with offload contains kernel traffic."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay.status.model import AllocationStatus, Status
from relay.tools.control import read
from tests.support.offload.fixtures import needs_bpf, object_file
from tests.support.offload.relays import Lab, running, talk
from tests.support.offload.topology import row
from tests.support.requirements import needs_ipv6
from tests.support.waiting import wait_until

__all__ = ("object_file",)

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]


@pytest.fixture
def lab(tmp_path: Path, object_file: bytes) -> Iterator[Lab]:
    del object_file
    with row() as network:
        network.know_all()
        with running(network.relay, tmp_path, "driver") as relay:
            yield Lab(network, relay, "driver")


def status_of(lab: Lab) -> Status:
    answer: Any = lab.relay.ask("/status")
    return read(Status, answer)


def metrics_of(lab: Lab) -> tuple[dict[str, float], dict[float, float]]:
    """Return the packets relayed by the kernel, by direction and by the smallest bound above their size."""
    samples = [
        sample
        for family in text_string_to_metric_families(lab.relay.read("/metrics").decode())
        for sample in family.samples
        if sample.labels.get("relay_datapath") == "xdp"
    ]
    packets = {each.labels["relay_direction"]: each.value for each in samples if each.name == "relay_relayed_packets_total"}
    sizes = {float(each.labels["le"]): each.value for each in samples if each.name == "relay_packet_size_bytes_bucket"}
    least = min(bound for bound, count in sizes.items() if count)
    return packets, {least: sizes[least]}


def test_an_offloaded_channel_shows_kernel_and_userspace_traffic(lab: Lab) -> None:
    before = status_of(lab)["totals"]["to_peer"]
    with talk(lab.relay, lab.network) as way:
        for _ in range(10):
            way.both()
        lab.relay.detach()
        for _ in range(3):
            way.both()
        lab.relay.attach()
        host, port = way.client.address
        to_peer, to_client = way.by_kernel()

        def rows() -> list[AllocationStatus]:
            """Return the values of this client."""
            return [each for each in status_of(lab)["allocations"] if each["client"] == f"{host}:{port}"]

        # Scan and kernel counters may be a second old.
        wait_until(lambda: [each["to_client"]["xdp_packets"] for each in rows()] == [to_client])
        (shown,) = rows()
        assert shown["to_peer"]["xdp_packets"] == to_peer
        (channel,) = shown["channels"]
        assert channel["to_peer"] == shown["to_peer"]
        assert channel["to_peer"]["packets"] >= channel["to_peer"]["xdp_packets"] + 3
        assert channel["to_peer"]["xdp_packets"] >= 10
        assert channel["to_peer"]["bytes"] == channel["to_peer"]["packets"] * 100
        status = status_of(lab)
        assert status["totals"]["to_peer"]["xdp_packets"] - before["xdp_packets"] == to_peer
        assert status["data_paths"]["xdp"] == {
            "interfaces": {"r0": lab.mode, "r1": lab.mode},
            "failures": {},
            "channels": 1,
            "channels_refused": 0,
        }
        packets, sizes = metrics_of(lab)
        assert packets == {"to_peer": to_peer, "to_client": to_client}
        assert sizes == {127.0: to_peer + to_client}, "payloads of 100 bytes"
