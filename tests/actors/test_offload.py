"""A relay whose kernel relays, too: what switches that on and off, and what its failure does not end.

Its network is its own, and a test is in it while it runs. What the program makes of packets is tested elsewhere.
"""

import contextlib
import errno
import gc
import http.client
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
import structlog

from relay.actors.messages import Tick
from relay.actors.offload import ROUTES_REST, KernelNews, OffloadActor
from relay.actors.system import System
from relay.config import OffloadConfig
from relay.offload import capabilities
from relay.offload.datapath import open_datapath
from relay.offload.netlink import Monitor, Network
from relay.offload.network import RoutesChanged
from relay.ops import threads
from tests.actors.conftest import CONFIG, JumpingClock, Relay
from tests.conftest import wait_until
from tests.machine import Machine
from tests.offload.conftest import machine, needs_bpf, object_file
from tests.turn_client import TurnClient, udp_socket

__all__ = ("machine", "object_file")

pytestmark = [needs_bpf, pytest.mark.usefixtures("object_file", "machine")]

OFFLOAD = OffloadConfig(("near",))
IPV4_ONLY = replace(CONFIG, public_ip6=None, offload=OFFLOAD)
PEER = "127.0.0.1"
FAILED = "offload failed: the sockets relay everything"


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A network with an interface for the program."""
    machine.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    for name in ("near", "far", "lo"):
        # The kernel is to have no news of its own.
        machine.run("ip", "link", "set", name, "addrgenmode", "none", "up")
    # These threads are also those of the tests to come.
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
    """A relay that is attached."""
    del here
    with offloading_relay() as started:
        assert state(started)["xdp_attached"] == {"near": "generic"}
        yield started


def state(relay: Relay) -> dict[str, Any]:
    """What `GET /offload` tells."""
    return page(relay, "GET", "/offload")[1]


def page(relay: Relay, method: str, path: str) -> tuple[int, dict[str, Any]]:
    status, text = ask(relay, method, path)
    return status, json.loads(text)


def ask(relay: Relay, method: str, path: str) -> tuple[int, str]:
    at = relay.system._http["control"]
    connection = http.client.HTTPConnection(at.host, at.port, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def offload_actor() -> pykka.ActorRef[OffloadActor]:
    (found,) = pykka.ActorRegistry.get_by_class(OffloadActor)
    return found


def relays(client: TurnClient, number: int = 0x4000) -> bool:
    """Tell whether a new channel relays, by whatever way."""
    with udp_socket(PEER) as peer:
        assert client.bind_channel(number, peer.getsockname()) is None
        client.send(number, b"there")
        data, relayed = peer.recvfrom(100)
        peer.sendto(b"back", relayed)
        return data == b"there" and client.receive() == (number, b"back")


def test_channels_are_in_the_kernel_as_soon_as_their_client_is_told_and_gone_with_them(offloading: Relay) -> None:
    client = offloading.client()
    client.allocate()
    assert relays(client, 0x4000)
    assert relays(client, 0x4001)
    assert state(offloading)["xdp_channels"] == 2
    assert offloading.system.summary()["xdp_channels"] == 2
    (channels,) = page(offloading, "GET", "/offload/channels")[1]["clients"].values()
    unused = {"packets": 0, "bytes": 0, "idle_seconds": None}
    assert channels == {number: {"to_peer": unused, "to_client": unused} for number in ("0x4000", "0x4001")}
    assert client.refresh(0) is None
    assert state(offloading)["xdp_channels"] == 0
    assert page(offloading, "GET", "/offload/channels")[1] == {"clients": {}}


def test_a_scrape_tells_what_is_in_the_kernel(offloading: Relay) -> None:
    client = offloading.client()
    client.allocate()
    assert relays(client)
    told = ask(offloading, "GET", "/metrics")[1].splitlines()
    assert "relay_xdp_channels 1.0" in told
    assert 'relay_xdp_interfaces{state="attached"} 1.0' in told
    # Packets of this machine to itself pass no interface.
    assert 'relay_relayed_packets_total{relay_datapath="xdp",relay_direction="to_peer"} 0.0' in told


def test_it_is_detached_and_attached_again_while_channels_go_on(offloading: Relay) -> None:
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


def test_an_interface_that_goes_is_let_go_and_attached_when_it_is_back(here: Machine, offloading: Relay) -> None:
    here.run("ip", "link", "del", "near")
    wait_until(lambda: state(offloading)["xdp_attached"] == {"near": None})
    here.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    wait_until(lambda: state(offloading)["xdp_attached"] == {"near": "generic"})


def test_what_is_detached_stays_so_whatever_happens_to_interfaces(here: Machine, offloading: Relay) -> None:
    page(offloading, "POST", "/offload/detach")
    here.run("ip", "link", "set", "near", "mtu", "1400")
    here.run("ip", "addr", "add", "192.0.2.1/24", "dev", "near")
    offload_actor().ask(KernelNews([]), timeout=30)
    assert state(offloading)["xdp_attached"] == {"near": None}


def check_it_goes_on_without(relay: Relay, log: list[Any]) -> None:
    """The failure is said once, and nothing else has come of it."""
    wait_until(lambda: state(relay)["xdp_attached"] == {"near": None})
    client = relay.client()
    client.allocate()
    assert relays(client)
    status, told = page(relay, "POST", "/offload/attach")
    assert (status, told["xdp_attached"]) == (503, {"near": None})
    assert page(relay, "POST", "/offload/detach")[0] == 503
    assert relay.system.news.empty()
    assert relay.system.is_ready
    wait_until(lambda: any(entry["event"] == FAILED for entry in log))
    assert [entry["event"] for entry in log if entry["log_level"] in {"error", "critical"}] == [FAILED]


def test_without_the_kernels_news_the_sockets_relay_everything(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not hear what changes must not send where nobody may be any more."""
    breaks = threading.Event()
    receive = Monitor.receive

    def receive_until_it_breaks(monitor: Monitor) -> Any:  # noqa: ANN401 - as the real one's
        news = receive(monitor)
        if breaks.is_set() and news is not None:
            raise OSError(errno.EBADF, "broken")
        return news

    monkeypatch.setattr(Monitor, "receive", receive_until_it_breaks)
    with offloading_relay() as started, structlog.testing.capture_logs() as log:
        breaks.set()
        here.run("ip", "link", "set", "far", "down")
        check_it_goes_on_without(started, log)


def test_an_actor_that_fails_leaves_everything_to_the_sockets(offloading: Relay) -> None:
    with structlog.testing.capture_logs() as log:
        offload_actor().tell("what is this?")
        check_it_goes_on_without(offloading, log)


def test_an_actor_that_can_not_ask_the_kernel_any_more_leaves_everything_to_the_sockets(
    offloading: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Network) -> Any:  # noqa: ANN401 - never gives anything
        raise OSError(errno.EIO, "the kernel doesn't say")

    monkeypatch.setattr(Network, "links", broken)
    with structlog.testing.capture_logs() as log:
        assert page(offloading, "POST", "/offload/attach")[0] == 503
        check_it_goes_on_without(offloading, log)


def test_all_routes_are_asked_for_at_once_and_then_only_so_often(offloading: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
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
    actor.ask(KernelNews([]), timeout=30)
    monkeypatch.setattr(Network, "look_up", counted)
    begun = time.monotonic()
    last = begun
    while last < begun + 4 * ROUTES_REST:
        last = time.monotonic()
        actor.ask(KernelNews([RoutesChanged()]), timeout=30)
    # The last change of all is followed, too, and then there is rest.
    wait_until(lambda: asked[-1] > last)
    followed = len(asked)
    # Four, one at once, and one at the end; fewer if this process was held up.
    assert 1 <= followed <= 7
    assert all(later - earlier > 0.5 * ROUTES_REST for earlier, later in itertools.pairwise(asked))
    actor.ask(Tick(), timeout=30)
    assert len(asked) == followed


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_stopping_leaves_no_thread_no_actor_and_no_descriptor(here: Machine) -> None:
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
