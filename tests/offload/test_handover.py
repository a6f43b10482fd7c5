"""A successor takes over a relay whose channels the kernel relays."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.handover import HalfSuccessor
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, SECRET, Running, talk
from tests.support.offload.stream import Stream
from tests.support.offload.topology import RELAY, Row, row
from tests.support.program import Program
from tests.support.waiting import wait_until

pytestmark = [needs_bpf, pytest.mark.usefixtures("object_file")]

INTERFACES = ("r0", "r1")
PUBLIC = tuple(RELAY.values())
HEALTH = "127.0.0.1:0"


@pytest.fixture
def network() -> Iterator[Row]:
    with row() as made:
        yield made
        assert "xdp" not in made.relay.links(), "the program stays behind"


def counted(running: Running) -> int:
    """Return the packets to the peer of the only allocation."""
    packets: int = running.ask("/status")["allocations"][0]["to_peer"]["packets"]
    return packets


def offloading(mode: str) -> tuple[str, ...]:
    return ("--ebpf-offloading", ",".join(INTERFACES), "--ebpf-attach-mode", mode)


class Relay:
    """The processes of one relay, each of which takes the former over."""

    def __init__(self, network: Row, folder: Path, stack: ExitStack) -> None:
        self._network = network
        self._secret, self.path = folder / "secret", folder / "handover.sock"
        self._secret.write_text(SECRET)
        self._secret.chmod(0o600)
        self._stack = stack
        self.programs: list[Program] = []

    def start(self, *options: str) -> Running:
        """Start a process, and wait until it relays and the former process has ended."""
        former = self.programs[-1] if self.programs else None
        if former is not None:
            wait_until(self.path.exists)
        with self._network.relay.entered():
            program = Program(
                *("--relay-secret-file", str(self._secret), "--handover-socket", str(self.path)),
                *("--health-check-addr", HEALTH, *options, *(() if former is None else ("--take-over",))),
                hosts=PUBLIC,
            )
        self._stack.callback(program.close)
        self.programs.append(program)
        if former is None:
            program.wait_until_ready()
        else:
            assert former.wait() == 0, former.log + program.log
            program.wait_for_log("taken over")
            # Then the program listens for its own successor.
            program.wait_for_log(" ready ")
        return Running(self._network.relay, program)

    def half_successor(self, step: str) -> HalfSuccessor:
        """Return a successor that goes no further than to some step."""
        wait_until(self.path.exists)
        with self._network.relay.entered():
            half = HalfSuccessor(self.path, PUBLIC, HEALTH)
            self._stack.callback(half.close)
            half.go(step)
        return half


@pytest.fixture
def relay(network: Row, tmp_path: Path) -> Iterator[Relay]:
    with ExitStack() as stack:
        made = Relay(network, tmp_path, stack)
        yield made
        assert made.programs[-1].stop() == 0, made.programs[-1].log


@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_relays_every_packet_while_successors_take_over(network: Row, relay: Relay, mode: str) -> None:
    running = relay.start(*offloading(mode))
    with talk(running, network) as way:
        before = counted(running)
        with Stream(way) as stream:
            for _ in range(3):
                stream.wait_for(200)
                running = relay.start(*offloading(mode))
                assert running.state()["xdp_attached"] == dict.fromkeys(INTERFACES, mode)
            stream.wait_for(200)
        assert (stream.lost(), stream.doubled()) == (0, 0)
        assert counted(running) - before == stream.sent, "the packets relayed by the kernel for predecessors are counted"
        totals = running.ask("/status")["totals"]["to_peer"]
        assert totals["packets"] == totals["xdp_packets"] > 0, "the sockets relay nothing"


def test_no_packet_is_lost_when_a_successor_has_no_offload_or_begins_to_offload(network: Row, relay: Relay) -> None:
    running = relay.start(*offloading("generic"))
    with talk(running, network) as way:
        with Stream(way) as stream:
            stream.wait_for(200)
            running = relay.start()
            assert "xdp" not in network.relay.links()
            stream.wait_for(200)
            way.relay = running = relay.start(*offloading("generic"))
            stream.wait_for(200)
        assert (stream.lost(), stream.doubled()) == (0, 0)
        way.wait_for_kernel()


def test_a_successor_with_another_mode_attaches_its_program_once_the_former_is_detached(network: Row, relay: Relay) -> None:
    running = relay.start(*offloading("generic"))
    with talk(running, network) as way:
        way.relay = running = relay.start(*offloading("driver"))
        wait_until(lambda: running.state()["xdp_attached"] == dict.fromkeys(INTERFACES, "driver"))
        way.wait_for_kernel()


def test_the_program_stays_detached_if_an_operator_has_detached_it(network: Row, relay: Relay) -> None:
    running = relay.start(*offloading("generic"))
    with talk(running, network) as way:
        running.detach()
        way.relay = running = relay.start(*offloading("generic"))
        assert running.state()["xdp_attached"] == dict.fromkeys(INTERFACES)
        way.both()
        running.attach()
        way.wait_for_kernel()


@pytest.mark.parametrize("step", ["links", "rest"])
def test_the_kernel_relays_on_if_a_successor_ends_early(network: Row, relay: Relay, step: str) -> None:
    running = relay.start(*offloading("generic"))
    with talk(running, network) as way:
        half = relay.half_successor(step)
        half.close()
        half.messages.clear()
        running.program.wait_for_log("not handed over: this relay goes on")
        assert running.state()["xdp_attached"] == dict.fromkeys(INTERFACES, "generic")
        assert way.client.refresh(600) is None
        way.wait_for_kernel()


def test_a_relay_whose_interfaces_change_meanwhile_is_not_handed_over(network: Row, relay: Relay) -> None:
    running = relay.start(*offloading("generic"))
    with talk(running, network) as way:
        half = relay.half_successor("ready?")
        running.detach()
        half.link.send("ready")
        running.program.wait_for_log("an interface with the XDP program has changed: try again")
        way.both()
