"""The kernel relays for a channel exactly during its lifetime."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final, Self

import pykka
import pytest

from relay.actors.messages import Tick
from relay.actors.server import ServerActor
from relay.config import AttachMode, OffloadConfig
from relay.core.addresses import Family
from relay.core.attributes import LIFETIME, REQUESTED_ADDRESS_FAMILY
from relay.core.credentials import RelaySecret
from relay.core.stun import Method
from relay.offload import capabilities
from relay.offload.datapath import open_datapath
from relay.system.system import System
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import SECRET, Counts, Lab, Offloading, Talk, talk
from tests.support.offload.topology import PEER, RELAY, Row, row
from tests.support.requirements import needs_ipv6
from tests.support.system import CONFIG, JumpingClock
from tests.support.turn_client import TIMEOUT, code_of
from tests.support.waiting import wait_until

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

AFTER: Final = 500
"""Number of packets sent after the end of a channel."""

TRIES: Final = 10

SOON: Final = 0.5
"""Seconds until something expires for the kernel."""


class Flood:
    """A flood of packets in both directions, sent by a thread."""

    def __init__(self, way: Talk) -> None:
        self._way = way
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self.sent = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def wait_for(self, count: int) -> None:
        """Wait until this number of further packets was sent."""
        wanted = self.sent + count
        wait_until(lambda: self.sent >= wanted)

    def _send(self) -> None:
        while not self._ended.is_set():
            for _ in range(10):
                self._way.client.send(self._way.number, bytes(100))
                self._way.peer.sendto(bytes(100), self._way.relayed[:2])
                self.sent += 1
            # The rate is 20,000 packets per second in each direction, within the capacity of the sockets.
            time.sleep(0.0005)


def drain(way: Talk) -> int:
    """Discard all arrived packets, and return their number."""
    count = 0
    for sock in (way.peer, way.client.socket):
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.recv(65535)
                count += 1
        sock.settimeout(TIMEOUT)
    return count


def nothing_more_arrives(relay: Offloading, way: Talk, flood: Flood) -> Counts:
    """Check that nothing is relayed from now on, and return the kernel's counters."""
    before = relay.counts()
    # Packets in flight arrive, a little later on a busy machine.
    for _ in range(TRIES):
        flood.wait_for(AFTER)
        if not drain(way):
            break
    flood.wait_for(AFTER)
    counts = relay.counts().since(before)
    assert counts[:2] == (0, 0)
    assert drain(way) == 0
    return counts


@pytest.mark.parametrize("families", [(Family.IPV4, Family.IPV4), (Family.IPV6, Family.IPV6)], ids=["IPv4", "IPv6"])
def test_no_packet_is_relayed_after_the_response_to_a_delete(lab: Lab, families: tuple[Family, Family]) -> None:
    before = lab.relay.state()["xdp_channels"]
    for _ in range(2):
        with talk(lab.relay, lab.network, families) as way, Flood(way) as flood:
            wait_until(lambda way=way: min(way.by_kernel()) > AFTER)  # type: ignore[misc]
            assert way.client.refresh(0) is None
            counts = nothing_more_arrives(lab.relay, way, flood)
            assert counts.passed["unbound"] > AFTER
    assert lab.relay.state()["xdp_channels"] == before


def test_no_packet_of_a_deleted_family_is_relayed_after_the_response(lab: Lab) -> None:
    with (
        lab.relay.client(lab.network.client) as client,
        lab.network.peer.udp(PEER[Family.IPV4]) as peer4,
        lab.network.peer.udp(PEER[Family.IPV6]) as peer6,
    ):
        relayed4, relayed6 = client.allocate(dual=True)
        stays = Talk(lab.relay, client, peer4, relayed4, 0x4004)
        goes = Talk(lab.relay, client, peer6, relayed6, 0x4006)
        stays.wait_for_kernel()
        goes.wait_for_kernel()
        with Flood(goes) as flood:
            flood.wait_for(AFTER)
            answer = client.request(Method.REFRESH, (REQUESTED_ADDRESS_FAMILY, Family.IPV6), (LIFETIME, 0))
            assert code_of(answer) is None
            assert nothing_more_arrives(lab.relay, goes, flood).passed["unbound"] > AFTER
            stays.wait_for_kernel()


def sockets_are_empty(network: Row) -> bool:
    """Return whether the sockets on the relay's machine have no unread data."""
    with network.relay.entered():
        lines = [
            line for name in ("udp", "udp6") for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]
        ]
    return all(line.split()[4].endswith(":00000000") for line in lines)


class Here(Offloading):
    """A relay in this process, with an adjustable clock."""

    def __init__(self, network: Row, system: System, clock: JumpingClock) -> None:
        at = system.http["control"]
        super().__init__(network.relay, (at.host, at.port))
        self.clock = clock
        self.network = network

    def jump(self, seconds: float) -> None:
        """Advance the time of the relay, but not of the kernel."""
        self.clock.jump(seconds)
        (server,) = pykka.ActorRegistry.get_by_class(ServerActor)
        server.ask(Tick(), timeout=TIMEOUT)

    def settle(self) -> None:
        """Wait until the relay has processed the packets left to its sockets, which requests may overtake."""
        wait_until(lambda: sockets_are_empty(self.network))
        for _ in range(3):
            self.jump(0)


HERE: Final = replace(
    CONFIG,
    public_ip4=IPv4Address(RELAY[Family.IPV4]),
    public_ip6=IPv6Address(RELAY[Family.IPV6]),
    secret=RelaySecret(SECRET),
    service_port=3478,
    unauthenticated_rate=0,  # A limit requires a clock that never goes back.
    offload=OffloadConfig(("r0", "r1"), AttachMode.GENERIC),
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    # Later tests use the same thread.
    monkeypatch.setattr(capabilities, "drop", lambda: None)
    clock = JumpingClock()
    with row() as network, contextlib.ExitStack() as stack:
        network.know_all()
        # Its threads inherit the network of this thread.
        with network.relay.entered():
            assert HERE.offload
            datapath = open_datapath(HERE, HERE.offload)
            system = stack.enter_context(System(HERE, clock, datapath=datapath))
        yield Here(network, system, clock)


@contextlib.contextmanager
def talk_here(here: Here) -> Iterator[Talk]:
    with here.client(here.network.client) as client, here.network.peer.udp(PEER[Family.IPV4]) as peer:
        way = Talk(here, client, peer)
        way.wait_for_kernel()
        yield way


def test_an_expired_channel_relays_again_after_a_refresh(here: Here) -> None:
    with talk_here(here) as way:
        host, port, *_ = way.peer.getsockname()
        for _ in range(3):
            here.jump(300)
            assert way.client.refresh(600) is None
            way.both()
            here.jump(301)
            assert here.state()["xdp_channels"] == 0
            with Flood(way) as flood:
                assert nothing_more_arrives(here, way, flood).passed["unbound"] > AFTER
            here.settle()
            # Packets of the last second would be relayed with the ChannelBind.
            here.jump(1)
            assert way.client.bind_channel(way.number, (host, port)) is None
            assert here.state()["xdp_channels"] == 1
            assert way.client.refresh(600) is None
            way.wait_for_kernel()


def test_a_channel_refreshed_in_time_relays_without_interruption(here: Here) -> None:
    with talk_here(here) as way:
        host, port, *_ = way.peer.getsockname()
        for _ in range(5):
            here.jump(590)
            assert way.client.refresh(600) is None
            assert way.client.bind_channel(way.number, (host, port)) is None
            before = way.by_kernel()
            way.both()
            assert way.by_kernel() == (before[0] + 1, before[1] + 1), "it is the same channel still"


def test_channels_of_an_expired_allocation_are_removed_from_the_kernel(here: Here) -> None:
    with talk_here(here) as way, Flood(way) as flood:
        here.jump(601)
        assert here.state()["xdp_channels"] == 0
        nothing_more_arrives(here, way, flood)


@pytest.mark.parametrize("which", ["channel", "allocation"])
def test_the_kernel_checks_deadlines_without_the_relay(here: Here, which: str) -> None:
    """The relay's clock is behind the kernel's clock: the sockets relay after the kernel has stopped."""
    with talk_here(here) as way:
        client, channel = way.client, (way.number, (PEER[Family.IPV4], way.peer.getsockname()[1]))
        here.jump(SOON - 600)
        ends = time.monotonic() + SOON
        if which == "allocation":
            assert client.refresh(600) is None
            here.jump(300)
        else:
            assert client.refresh(3600) is None
        assert client.bind_channel(*channel) is None

        def has_stopped() -> bool:
            before = here.counts()
            way.both()
            return here.counts().since(before) == (0, 0, {"expired": 2})

        wait_until(has_stopped)
        assert time.monotonic() > ends - 0.05
        here.jump(200)
        assert client.refresh(600) is None
        assert client.bind_channel(*channel) is None
        way.wait_for_kernel()
