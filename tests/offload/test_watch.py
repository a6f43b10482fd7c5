"""The relay detects that the program does not run on an interface, and never suspects a working program."""

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from relay.core.addresses import Family
from relay.offload.program import Device
from relay.offload.watch import INTERVAL, PACKETS, Figures, ProgramWatch, received_packets
from tests.support.offload import watched
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import WITHIN, Talk, running
from tests.support.offload.stream import Stream
from tests.support.offload.topology import PEER, connect, row
from tests.support.waiting import wait_until

REACHED: Final = (sys.executable, str(Path(watched.__file__)), watched.REACHED)
UNREACHED: Final = (*REACHED[:-1], "unreached")
SECONDS: Final = 2.0
"""Some six looks, of which two are enough."""

BOND: Final = [
    Device(3, b"", send_back=False, strict=False, upper=3, name="bond0"),
    Device(4, b"", send_back=False, strict=False, upper=5, name="bond0"),
]
BOTH: Final = [*BOND, Device(5, b"", send_back=False, strict=False, upper=3, name="eth2")]


class Looks:
    """Consecutive looks, with the packets counted since the previous look."""

    def __init__(self) -> None:
        self.watch = ProgramWatch()
        self.now = 0.0
        self.frames = [0] * len(BOTH)
        self.received = {"bond0": 10**9, "eth2": 0}
        self.by_sockets = 10**6

    def look(
        self,
        frames: Sequence[int] = (0, 0, 0),
        received: int = PACKETS,
        by_sockets: int = PACKETS,
        devices: list[Device] = BOTH,
        after: float = INTERVAL,
    ) -> list[str]:
        self.now += after
        self.frames = [sum(each) for each in zip(self.frames, frames, strict=True)]
        self.received = {"bond0": self.received["bond0"] + received, "eth2": self.received["eth2"]}
        self.by_sockets += by_sockets
        return self.watch.look(self.now, devices, lambda: Figures(self.frames, self.received, self.by_sockets))


def test_a_program_without_frames_is_reported_once_after_two_intervals() -> None:
    looks = Looks()
    assert [looks.look() for _ in range(5)] == [[], [], ["bond0"], [], []]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"frames": (1, 0, 0)}, id="a frame by the interface"),
        pytest.param({"frames": (0, 1, 0)}, id="a frame by a port"),
        pytest.param({"received": PACKETS - 1}, id="an idle interface"),
        pytest.param({"by_sockets": PACKETS - 1}, id="idle sockets"),
        pytest.param({"devices": BOND[:1]}, id="another interface"),
    ],
)
def test_one_interval_with_an_explanation_begins_the_count_again(other: dict[str, object]) -> None:
    looks = Looks()
    looks.look()
    for _ in range(3):
        assert looks.look() == []
        assert looks.look(**other) == []  # type: ignore[arg-type]


def test_frames_of_one_interface_prove_nothing_about_another_interface() -> None:
    looks = Looks()
    assert [looks.look((0, 0, 7)) for _ in range(3)] == [[], [], ["bond0"]]


def test_looks_within_an_interval_do_not_count() -> None:
    looks = Looks()
    assert [looks.look(after=INTERVAL / 10) for _ in range(15)] == [[]] * 15


def test_received_packets_are_read_by_interface(tmp_path: Path) -> None:
    path = tmp_path / "dev"
    path.write_text(
        "Inter-|   Receive                            |  Transmit\n face |bytes    packets errs drop|bytes    packets\n"
        "    lo:    9000      90    0    0     9000      90\nr0.10: 1 2 0 0 3 4\n"
    )
    assert received_packets(path) == {"lo": 90, "r0.10": 2}


@needs_bpf
@pytest.mark.usefixtures("object_file")
def test_in_automatic_mode_the_relay_steps_down_until_the_sockets_relay(tmp_path: Path) -> None:
    with (
        row() as network,
        running(network.relay, tmp_path, "auto", by=UNREACHED) as relay,
        relay.client(network.client) as client,
        network.peer.udp(PEER[Family.IPV4]) as peer,
    ):
        way = Talk(relay, client, peer)
        with Stream(way, loses=True) as stream:
            wait_until(lambda: relay.state()["xdp_failures"].keys() == {"r0", "r1"}, WITHIN)
            assert relay.state()["xdp_attached"] == {"r0": None, "r1": None}
            stream.wait_for(100)
        state = relay.state()
        assert state["xdp_stalls"] >= 2
        for link in ("r0", "r1"):
            assert state["xdp_failures"][link] == f"no packet of {link} reaches the XDP program (generic mode, driver veth)"
        assert "the XDP program stands still" in relay.log
        assert "reaches the XDP program (driver mode, driver veth)" in relay.log
        # The operator may have fixed the cause.
        relay.detach()
        assert relay.attach()["xdp_attached"] == {"r0": "driver", "r1": "driver"}


@needs_bpf
@pytest.mark.usefixtures("object_file")
def test_in_a_mode_chosen_by_the_operator_the_relay_only_warns(tmp_path: Path) -> None:
    with (
        row() as network,
        running(network.relay, tmp_path, "driver", by=UNREACHED) as relay,
        relay.client(network.client) as client,
        network.peer.udp(PEER[Family.IPV4]) as peer,
        Stream(Talk(relay, client, peer), loses=True),
    ):
        wait_until(lambda: relay.state()["xdp_stalls"] == 2, WITHIN)
        assert relay.state()["xdp_attached"] == {"r0": "driver", "r1": "driver"}
        assert "give --ebpf-attach-mode auto" in relay.state()["xdp_failures"]["r0"]


def fragments(way: Talk) -> None:
    way.both(bytes(3000))


def options(way: Talk) -> None:
    for sender in (way.client.socket, way.peer):
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1\1\1\0")
    way.both()


def short_frames(way: Talk) -> None:
    way.both(b"1")


@needs_bpf
@pytest.mark.usefixtures("object_file")
@pytest.mark.parametrize("exchange", [fragments, options, short_frames])
def test_packets_that_the_program_leaves_to_the_sockets_are_no_reason_to_step_down(
    tmp_path: Path, exchange: Callable[[Talk], None]
) -> None:
    with (
        row() as network,
        running(network.relay, tmp_path, "auto", by=REACHED) as relay,
        relay.client(network.client) as client,
        network.peer.udp(PEER[Family.IPV4]) as peer,
    ):
        way = Talk(relay, client, peer)
        goes_on(way, exchange)
        assert sum(relay.counts()[:2]) < PACKETS, "the sockets relay"


@needs_bpf
@pytest.mark.usefixtures("object_file")
def test_packets_of_an_interface_without_the_program_are_no_reason_to_step_down(tmp_path: Path) -> None:
    with row() as network:
        there = network.relay
        connect(there, "r2", network.client, "c2")
        there.ip("link set r2 up")
        with (
            running(there, tmp_path, "auto", links="r2", by=REACHED) as relay,
            relay.client(network.client) as client,
            network.peer.udp(PEER[Family.IPV4]) as peer,
        ):
            goes_on(Talk(relay, client, peer), lambda way: way.both())


def goes_on(way: Talk, exchange: Callable[[Talk], None]) -> None:
    """Exchange packets during several looks, and check that the program stays attached."""
    attached = way.relay.state()["xdp_attached"]
    for sock in (way.client.socket, way.peer):
        sock.settimeout(1)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        # On a busy machine, a packet may be lost.
        with contextlib.suppress(TimeoutError):
            exchange(way)
    state = way.relay.state()
    assert (state["xdp_attached"], state["xdp_stalls"], state["xdp_failures"]) == (attached, 0, {})
    assert "stands still" not in way.relay.log
