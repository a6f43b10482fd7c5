"""The kernel relays for a channel exactly as long as it lives."""

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
from relay.actors.system import System
from relay.config import AttachMode, OffloadConfig
from relay.core.addresses import Family
from relay.core.attributes import LIFETIME, REQUESTED_ADDRESS_FAMILY
from relay.core.credentials import RelaySecret
from relay.core.stun import Method
from relay.offload import capabilities
from relay.offload.datapath import open_datapath
from tests.actors.conftest import CONFIG, JumpingClock
from tests.conftest import needs_ipv6, wait_until
from tests.offload.conftest import needs_bpf
from tests.offload.relays import SECRET, Counts, Lab, Offloading, Talk, talk
from tests.offload.topology import PEER, RELAY, Row, row
from tests.turn_client import TIMEOUT, code_of

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

AFTER: Final = 500
"""Packets that are sent in vain."""

TRIES: Final = 10


class Flood:
    """As many packets as a thread can send, both ways."""

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
        """Wait until so many more were sent."""
        wanted = self.sent + count
        wait_until(lambda: self.sent >= wanted)

    def _send(self) -> None:
        while not self._ended.is_set():
            for _ in range(10):
                self._way.client.send(self._way.number, bytes(100))
                self._way.peer.sendto(bytes(100), self._way.relayed[:2])
                self.sent += 1
            # The pace is the flood's: 20,000 a second each way, which the sockets can take, too.
            time.sleep(0.0005)


def drain(way: Talk) -> int:
    """Throw away all that has arrived, and give how much that was."""
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
    """See that nothing is relayed from now on, and give what the kernel did instead."""
    before = relay.counts()
    # What was on its way arrives, on a machine that is busy a little later.
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
def test_nothing_of_a_freed_allocation_is_relayed_once_that_was_answered(lab: Lab, families: tuple[Family, Family]) -> None:
    before = lab.relay.state()["xdp_channels"]
    for _ in range(5):
        with talk(lab.relay, lab.network, families) as way, Flood(way) as flood:
            flood.wait_for(AFTER)
            assert min(way.by_kernel()) > AFTER / 2
            assert way.client.refresh(0) is None
            counts = nothing_more_arrives(lab.relay, way, flood)
            assert counts.passed["unbound"] > AFTER
    assert lab.relay.state()["xdp_channels"] == before


def test_nothing_of_a_deleted_family_is_relayed_once_that_was_answered(lab: Lab) -> None:
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
    """Tell whether the sockets on the relay's machine have nothing that waits to be read."""
    with network.relay.entered():
        lines = [
            line for name in ("udp", "udp6") for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]
        ]
    return all(line.split()[4].endswith(":00000000") for line in lines)


class Here(Offloading):
    """A relay in this process, whose clock can be put forward."""

    def __init__(self, network: Row, system: System, clock: JumpingClock) -> None:
        at = system._http["control"]
        super().__init__(network.relay, (at.host, at.port))
        self.clock = clock
        self.network = network

    def jump(self, seconds: float) -> None:
        """Let time pass for all of it but the kernel."""
        self.clock.jump(seconds)
        (server,) = pykka.ActorRegistry.get_by_class(ServerActor)
        server.ask(Tick(), timeout=TIMEOUT)

    def settle(self) -> None:
        """Let it work off what the kernel left to its sockets: requests may be taken before that."""
        wait_until(lambda: sockets_are_empty(self.network))
        for _ in range(3):
            self.jump(0)


HERE: Final = replace(
    CONFIG,
    public_ip4=IPv4Address(RELAY[Family.IPV4]),
    public_ip6=IPv6Address(RELAY[Family.IPV6]),
    secret=RelaySecret(SECRET),
    service_port=3478,
    offload=OffloadConfig(("r0", "r1"), AttachMode.GENERIC),
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    # This thread is also that of the tests to come.
    monkeypatch.setattr(capabilities, "drop", lambda: None)
    clock = JumpingClock()
    with row() as network, contextlib.ExitStack() as stack:
        network.know_all()
        # Its threads are where the one was that started them.
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


def test_a_channel_that_has_expired_is_back_when_it_is_refreshed_in_its_cool_down(here: Here) -> None:
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
            assert way.client.bind_channel(way.number, (host, port)) is None
            assert here.state()["xdp_channels"] == 1
            assert way.client.refresh(600) is None
            way.wait_for_kernel()


def test_a_channel_that_is_refreshed_in_time_goes_on(here: Here) -> None:
    with talk_here(here) as way:
        host, port, *_ = way.peer.getsockname()
        for _ in range(5):
            here.jump(590)
            assert way.client.refresh(600) is None
            assert way.client.bind_channel(way.number, (host, port)) is None
            before = way.by_kernel()
            way.both()
            assert way.by_kernel() == (before[0] + 1, before[1] + 1), "it is the same channel still"


def test_an_allocation_that_has_expired_is_the_kernels_no_more(here: Here) -> None:
    with talk_here(here) as way, Flood(way) as flood:
        here.jump(601)
        assert here.state()["xdp_channels"] == 0
        nothing_more_arrives(here, way, flood)


@pytest.mark.parametrize("which", ["channel", "allocation"])
def test_the_kernel_needs_nobody_to_tell_it_that_the_time_is_over(here: Here, which: str) -> None:
    """For the relay, less time has passed than for the kernel: the sockets go on where the kernel has stopped."""
    here.jump(-598.5)
    with here.client(here.network.client) as client, here.network.peer.udp(PEER[Family.IPV4]) as peer:
        (relayed,) = client.allocate()
        ends = time.monotonic() + 1.5
        if which == "allocation":
            here.jump(300)
        way = Talk(here, client, peer, relayed)
        if which == "channel":
            assert client.refresh(3600) is None
        way.wait_for_kernel()

        def has_stopped() -> bool:
            before = here.counts()
            way.both()
            return here.counts().since(before) == (0, 0, {"expired": 2})

        wait_until(has_stopped)
        assert time.monotonic() > ends - 0.5
        here.jump(200)
        assert client.refresh(600) is None
        assert client.bind_channel(way.number, (PEER[Family.IPV4], peer.getsockname()[1])) is None
        way.wait_for_kernel()
