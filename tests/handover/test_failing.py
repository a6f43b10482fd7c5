"""A handover that fails at any step leaves one relay, which serves all clients."""

import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Final

import pytest

from relay.core.handover import FORMAT
from relay.net.handover import HandoverError, HandoverLink
from tests.support.handover import SECRET, Allocator, HalfSuccessor, Starter
from tests.support.program import Program
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until

CHANNEL = 0x4000

STEPS: Final = ("connected", "offered", "group", "some", "ready?", "rest", "decided", "stopped")


@pytest.fixture
def half(path: Path) -> Iterator[Callable[[], HalfSuccessor]]:
    with ExitStack() as stack:

        def started() -> HalfSuccessor:
            wait_until(path.exists)
            successor = HalfSuccessor(path)
            stack.callback(successor.close)
            return successor

        yield started


def serves(client: TurnClient, peer: socket.socket) -> bool:
    """Check that a relay answers the client and relays both ways, each packet once."""
    assert client.refresh(600) is None
    client.send(CHANNEL, b"to the peer")
    assert peer.recvfrom(100)[0] == b"to the peer"
    peer.sendto(b"to the client", client.relayed)
    assert client.receive() == (CHANNEL, b"to the client")
    peer.settimeout(0)
    with pytest.raises(BlockingIOError):
        peer.recv(100)
    peer.settimeout(30)
    return True


@pytest.fixture
def client(allocated: Allocator, relay: Program, peer: socket.socket) -> TurnClient:
    """A client with a channel."""
    relay.wait_until_ready()
    client = allocated()
    assert client.bind_channel(CHANNEL, peer.getsockname()) is None
    return client


@pytest.fixture
def relay(start: Starter) -> Program:
    return start()


@pytest.mark.parametrize("step", STEPS[:-1])
def test_the_relay_goes_on_if_its_successor_ends(
    relay: Program, client: TurnClient, peer: socket.socket, half: Callable[[], HalfSuccessor], step: str
) -> None:
    successor = half()
    successor.go(step)
    # As by SIGKILL: the kernel closes everything.
    successor.close()
    successor.messages.clear()
    relay.wait_for_log("not handed over: this relay goes on")
    assert serves(client, peer)


def test_a_relay_that_begins_to_drain_meanwhile_is_not_handed_over(
    relay: Program, client: TurnClient, peer: socket.socket, half: Callable[[], HalfSuccessor]
) -> None:
    successor = half()
    successor.go("ready?")
    host, _, port = relay.control.rpartition(":")
    connection = HTTPConnection(host, int(port))
    connection.request("POST", "/drain?timeout=10m")
    assert connection.getresponse().status == 200
    connection.close()
    successor.link.send("ready")
    relay.wait_for_log("not handed over: this relay goes on")
    assert "the relay is shutting down" in relay.log
    assert serves(client, peer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_does_not_disturb_the_sockets_of_a_successor(
    relay: Program, client: TurnClient, half: Callable[[], HalfSuccessor], number: signal.Signals
) -> None:
    successor = half()
    successor.go("rest")
    relay.process.send_signal(number)
    # The relay is frozen. Established channels go on until the decision.
    assert os.eventfd_read(successor.messages[0].descriptors[0]) == 1
    successor.link.send("relaying")
    successor.receive("retired")
    successor.receive("go")
    assert relay.wait() == 0
    client.start_binding(CHANNEL + 1, ("127.0.0.1", 5000))
    (group,) = (each.descriptors for each in successor.messages if each.kind == "group")
    arrived, _, _ = select.select(group, [], [], 30)
    with socket.socket(fileno=os.dup(arrived[0])) as opened:
        assert opened.recv(2000), "the socket is shut down"


def test_the_relay_goes_on_if_its_successor_hangs_before_the_decision(
    relay: Program, client: TurnClient, peer: socket.socket, half: Callable[[], HalfSuccessor]
) -> None:
    successor = half()
    successor.go("rest")
    # The response comes as soon as the relay waits no longer.
    assert serves(client, peer)
    relay.wait_for_log("not handed over: this relay goes on")
    # Too late: this one must not relay.
    with pytest.raises(BlockingIOError):
        os.eventfd_read(successor.messages[0].descriptors[0])


@pytest.mark.parametrize("hello", [None, {}, [], {"settings": 5}, {"settings": {}, "ports": "x"}])
def test_unreadable_settings_are_refused_and_the_next_successor_is_not(
    start: Starter, relay: Program, client: TurnClient, peer: socket.socket, half: Callable[[], HalfSuccessor], hello: object
) -> None:
    successor = half()
    successor.go("offered")
    successor.link.send("hello", hello)
    with pytest.raises(HandoverError, match=r"its settings can't be read|may not change"):
        successor.receive("group")
    start("--take-over")
    assert relay.wait() == 0
    assert serves(client, peer)


@pytest.mark.usefixtures("relay")
def test_data_is_relayed_and_requests_are_answered_once_after_a_decision_that_takes_long(
    client: TurnClient, peer: socket.socket, half: Callable[[], HalfSuccessor]
) -> None:
    successor = half()
    successor.go("rest")
    # The relay is frozen now. Established channels are not.
    transaction = client.start_binding(CHANNEL + 1, ("127.0.0.1", 5000))
    for number in range(10):
        client.send(CHANNEL, bytes((number,)))
        assert peer.recv(10) == bytes((number,))
        peer.sendto(bytes((number,)), client.relayed)
        assert client.socket.recv(100)[4:] == bytes((number,))
    successor.close()
    successor.messages.clear()
    client.wait_for(transaction)
    assert serves(client, peer)


class HalfPredecessor:
    """A relay that hands over no more than to some step, at the path of the real one."""

    def __init__(self, path: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen(1)

    def offer(self, **changes: object) -> HandoverLink:
        """Accept a successor, and send it an offer."""
        self._listening.settimeout(60)
        link = HandoverLink(self._listening.accept()[0])
        offer = {"format": FORMAT, "version": "0", "secret": SECRET, "token": None, "systemd": {}, "handovers": 0} | changes
        token = os.eventfd(1)
        link.send("offer", offer, [token])
        os.close(token)
        return link

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def predecessor(path: Path) -> Iterator[HalfPredecessor]:
    half = HalfPredecessor(path)
    yield half
    half.close()


def line_of(successor: Program) -> str:
    """Return the only line of a successor that has given up."""
    assert successor.wait() == 2
    (line,) = successor.log.splitlines()
    assert line.startswith("firezone-relay: can't take over the running relay: ")
    return line


def test_a_successor_gives_up_if_the_relay_ends_before_it_has_sent_everything(
    start: Starter, predecessor: HalfPredecessor
) -> None:
    successor = start("--take-over")
    link = predecessor.offer()
    link.receive("hello", timeout=60)
    link.close()
    assert "the connection was closed" in line_of(successor)


def test_a_successor_gives_up_if_it_does_not_know_the_format_of_the_state(
    start: Starter, predecessor: HalfPredecessor
) -> None:
    successor = start("--take-over")
    predecessor.offer(format=FORMAT + 1, version="9.9").close()
    assert line_of(successor).endswith("version 9.9 has another format of the state")


@pytest.mark.parametrize(
    ("kind", "content"),
    [("rest", {}), ("some", {"rows": [[1, 2]], "sockets": []}), ("group", [9, True]), ("strange", None), ("rest", [])],
)
def test_a_successor_gives_up_on_an_unexpected_message(
    start: Starter, predecessor: HalfPredecessor, kind: str, content: object
) -> None:
    successor = start("--take-over")
    link = predecessor.offer()
    link.receive("hello", timeout=60)
    link.send(kind, content)
    line_of(successor)
    link.close()


@pytest.mark.parametrize("victim", ["relay", "successor"])
@pytest.mark.parametrize("seed", range(4))
def test_after_a_kill_at_any_moment_at_most_one_relay_is_left_and_it_serves(
    start: Starter, relay: Program, client: TurnClient, peer: socket.socket, victim: str, seed: int
) -> None:
    successor = start("--take-over")
    # Any moment of the handover is right: the start takes about 0.3 s, all steps some 20 ms.
    time.sleep(random.Random(seed).uniform(0, 0.4))
    killed, other = (relay, successor) if victim == "relay" else (successor, relay)
    killed.process.kill()
    killed.wait()
    wait_until(lambda: other.process.poll() is not None or is_answering(client))
    if other.process.poll() is not None:
        # The relay had handed over, or the successor had not begun to relay.
        assert other.wait() == (0 if other is relay else 2)
        return
    code = client.refresh(600)
    if code is None:
        assert serves(client, peer)
    else:
        # The relay had ended before its successor found it.
        assert other is successor
        assert code in {437, 438}


def is_answering(client: TurnClient) -> bool:
    client.socket.settimeout(0.2)
    try:
        client.refresh(600)
    except TimeoutError:
        return False
    else:
        return True
    finally:
        client.socket.settimeout(30)
