"""A relay with the XDP offload: attach, detach, and failures of the offload.

Each test runs in its own network namespace. `tests/offload` tests how the program processes packets.
"""

import contextlib
import errno
import gc
import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pykka
import pytest

from relay.actors.messages import ClientDatagrams, Execute, Tick
from relay.actors.offload import REST, OffloadActor
from relay.config import OffloadConfig
from relay.core.allocation import CHANNEL_LIFETIME
from relay.net import threads
from relay.offload import capabilities
from relay.offload.datapath import open_datapath
from relay.offload.netlink import Changes, Monitor, Network
from relay.offload.program import XdpProgram
from relay.system.system import System
from tests.support.log_lines import capture_logs
from tests.support.machine import Machine
from tests.support.offload.fixtures import machine, needs_bpf, object_file
from tests.support.system import CONFIG, JumpingClock, Relay, ask
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until

__all__ = ("machine", "object_file")

pytestmark = [needs_bpf, pytest.mark.usefixtures("object_file", "machine")]

OFFLOAD = OffloadConfig(("near",))
IPV4_ONLY = replace(CONFIG, public_ip6=None, offload=OFFLOAD)
PEER = "127.0.0.1"
FAILED = "offload failed: the sockets relay everything"


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A network namespace with an interface for the program."""
    machine.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    for name in ("near", "far", "lo"):
        # The kernel should not send notifications during a test.
        machine.run("ip", "link", "set", name, "addrgenmode", "none", "up")
    # Later tests use the same threads.
    monkeypatch.setattr(capabilities, "drop", lambda: None)
    with machine.entered():
        yield machine


@contextlib.contextmanager
def offloading_relay() -> Iterator[Relay]:
    clock = JumpingClock()
    datapath = open_datapath(IPV4_ONLY, OFFLOAD)
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(System(IPV4_ONLY, clock, datapath=datapath))
        yield Relay(system, clock, stack)


@pytest.fixture
def offloading(here: Machine) -> Iterator[Relay]:
    """A relay with an attached program."""
    del here
    with offloading_relay() as started:
        assert state(started)["xdp_attached"] == {"near": "generic"}
        yield started


def state(relay: Relay) -> dict[str, Any]:
    """Return the response of `GET /offload`."""
    return page(relay, "GET", "/offload")[1]


def page(relay: Relay, method: str, path: str) -> tuple[int, dict[str, Any]]:
    status, text = ask(relay.system.http["control"], path, method)
    return status, json.loads(text)


def offload_actor() -> pykka.ActorRef[OffloadActor]:
    (found,) = pykka.ActorRegistry.get_by_class(OffloadActor)
    return found


def relays(client: TurnClient, number: int = 0x4000) -> bool:
    """Return whether a new channel relays, in the kernel or in userspace."""
    with udp_socket(PEER) as peer:
        assert client.bind_channel(number, peer.getsockname()) is None
        client.send(number, b"there")
        data, relayed = peer.recvfrom(100)
        peer.sendto(b"back", relayed)
        return data == b"there" and client.receive() == (number, b"back")


def test_channels_are_in_the_kernel_from_the_response_until_deletion(offloading: Relay) -> None:
    client = offloading.client()
    client.allocate()
    assert relays(client, 0x4000)
    assert relays(client, 0x4001)
    assert state(offloading)["xdp_channels"] == 2
    (channels,) = page(offloading, "GET", "/offload/channels")[1]["clients"].values()
    unused = {"packets": 0, "bytes": 0, "idle_seconds": None}
    assert channels == {number: {"to_peer": unused, "to_client": unused} for number in ("0x4000", "0x4001")}
    assert client.refresh(0) is None
    assert state(offloading)["xdp_channels"] == 0
    assert page(offloading, "GET", "/offload/channels")[1] == {"clients": {}}


def test_a_channel_that_expires_in_a_failed_handover_leaves_the_kernel(offloading: Relay) -> None:
    client = offloading.client()
    client.allocate()
    assert relays(client)
    server = offloading.system.server
    server.ask(Execute(lambda actor: actor.freeze()))
    offloading.clock.jump(CHANNEL_LIFETIME)
    server.tell(ClientDatagrams([(b"\x40\0\0\0", client.address, 0, 0)]))
    server.ask(Execute(lambda actor: actor.thaw()))
    assert state(offloading)["xdp_channels"] == 0


def test_a_scrape_reports_kernel_channels_and_interfaces(offloading: Relay) -> None:
    client = offloading.client()
    client.allocate()
    assert relays(client)
    told = ask(offloading.system.http["control"], "/metrics")[1].splitlines()
    assert "relay_xdp_channels 1.0" in told
    assert 'relay_xdp_interfaces{state="attached"} 1.0' in told
    # Packets from this machine to itself pass no interface.
    assert 'relay_relayed_packets_total{relay_datapath="xdp",relay_direction="to_peer"} 0.0' in told


def test_channels_keep_relaying_while_the_program_is_detached(offloading: Relay) -> None:
    client = offloading.client()
    client.allocate()
    for number in (0x4000, 0x4002):
        assert relays(client, number)
        status, told = page(offloading, "POST", "/offload/detach")
        assert (status, told["xdp_attached"]) == (200, {"near": None})
        assert relays(client, number + 1)
        status, told = page(offloading, "POST", "/offload/attach")
        assert (status, told["xdp_attached"]) == (200, {"near": "generic"})
    assert state(offloading)["xdp_channels"] == 4


def test_a_deleted_interface_is_attached_again_once_it_exists(here: Machine, offloading: Relay) -> None:
    here.run("ip", "link", "del", "near")
    wait_until(lambda: state(offloading)["xdp_attached"] == {"near": None})
    here.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    wait_until(lambda: state(offloading)["xdp_attached"] == {"near": "generic"})


def test_interface_changes_do_not_undo_a_detach(here: Machine, offloading: Relay) -> None:
    page(offloading, "POST", "/offload/detach")
    here.run("ip", "link", "set", "near", "mtu", "1400")
    here.run("ip", "addr", "add", "192.0.2.1/24", "dev", "near")
    offload_actor().ask(Changes([], others=False), timeout=30)
    assert state(offloading)["xdp_attached"] == {"near": None}


def check_it_goes_on_without(relay: Relay, log: list[Any]) -> None:
    """Check that the failure is logged once and has no further effect."""
    wait_until(lambda: state(relay)["xdp_attached"] == {"near": None})
    client = relay.client()
    client.allocate()
    assert relays(client)
    status, told = page(relay, "POST", "/offload/attach")
    assert (status, told["xdp_attached"]) == (503, {"near": None})
    assert page(relay, "POST", "/offload/detach")[0] == 503
    assert relay.system.events.empty()
    assert not relay.system.not_ready
    wait_until(lambda: any(entry["event"] == FAILED for entry in log))
    assert [entry["event"] for entry in log if entry["log_level"] in {"error", "critical"}] == [FAILED]


def test_sockets_relay_everything_after_the_netlink_monitor_fails(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without notifications the program could send to an outdated next hop."""
    breaks = threading.Event()
    receive = Monitor.receive

    def receive_until_it_breaks(monitor: Monitor) -> Any:  # noqa: ANN401 - as the real one's
        news = receive(monitor)
        if breaks.is_set() and news is not None:
            raise OSError(errno.EBADF, "broken")
        return news

    monkeypatch.setattr(Monitor, "receive", receive_until_it_breaks)
    with offloading_relay() as started, capture_logs() as log:
        breaks.set()
        here.run("ip", "link", "set", "far", "down")
        check_it_goes_on_without(started, log)


def test_sockets_relay_everything_after_the_offload_actor_fails(offloading: Relay) -> None:
    with capture_logs() as log:
        offload_actor().tell("what is this?")
        check_it_goes_on_without(offloading, log)


def test_sockets_relay_everything_after_a_netlink_request_fails(offloading: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Network) -> Any:  # noqa: ANN401 - never gives anything
        raise OSError(errno.EIO, "the kernel doesn't say")

    monkeypatch.setattr(Network, "links", broken)
    with capture_logs() as log:
        assert page(offloading, "POST", "/offload/attach")[0] == 503
        check_it_goes_on_without(offloading, log)


def test_sockets_relay_everything_after_the_kernel_rejects_a_change(
    offloading: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's tables may still have a channel whose port gets a new owner."""

    def broken(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory for the kernel")

    with capture_logs() as logs:
        client = offloading.client()
        client.allocate()
        assert relays(client)
        monkeypatch.setattr(XdpProgram, "delete_channels", broken)
        assert client.refresh(0) is None
        wait_until(lambda: state(offloading)["xdp_attached"] == {"near": None})
    assert state(offloading)["xdp_table_failures"] == 1
    assert [each["error"] for each in logs if each["event"] == FAILED] == ["OSError: [Errno 12] no memory for the kernel"]
    client.allocate()
    assert relays(client)


def test_route_changes_trigger_rate_limited_lookups(offloading: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    look_up = Network.look_up

    def counted(network: Network, questions: Any) -> Any:  # noqa: ANN401 - as the real one's
        if questions:
            asked.append(time.monotonic())
        return look_up(network, questions)

    client = offloading.client()
    client.allocate()
    assert relays(client)
    actor = offload_actor()
    actor.ask(Changes([], others=False), timeout=30)
    monkeypatch.setattr(Network, "look_up", counted)
    begun = time.monotonic()
    last = begun
    while last < begun + 4 * REST:
        last = time.monotonic()
        actor.ask(Changes([], others=True), timeout=30)
        # Changes are frequent, but other threads get the CPU.
        time.sleep(0.005)
    # The last change triggers a lookup, too.
    wait_until(lambda: asked[-1] > last)
    followed = len(asked)
    # Four, the first at once and one at the end. Fewer if this process was preempted.
    assert 1 <= followed <= 7
    assert all(later - earlier > 0.5 * REST for earlier, later in itertools.pairwise(asked))
    actor.ask(Tick(), timeout=30)
    assert len(asked) == followed


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_stopping_leaves_no_thread_actor_or_descriptor(here: Machine) -> None:
    del here
    before, opened = set(threads.names()), descriptors()

    def run() -> None:
        with offloading_relay() as started:
            client = started.client()
            client.allocate()
            assert relays(client)
            assert {"offload", "monitor"} <= set(threads.names().values())

    run()
    wait_until(lambda: not set(threads.names()) - before)
    assert not pykka.ActorRegistry.get_all()
    wait_until(lambda: descriptors() == opened)
