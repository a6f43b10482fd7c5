"""Clocks that jump, and a process that is stopped for a while."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Final

import pytest

from relay.actors.receiving import STALE_AFTER
from relay.core.stun import MessageClass, Method, encode
from relay.net.receiver import BATCH_DATAGRAMS
from tests.conftest import wait_until
from tests.faults.conftest import CHANNEL, PATIENCE, Failing
from tests.turn_client import udp_socket

HOUR: Final = 3600
DAY: Final = 86400
STOPPED: Final = 200
ASKED: Final = 100
USED: Final = 20
"""Packets after which a socket is taken for one that is used."""
QUIET: Final = 0.5
"""Seconds without an answer from a process that is stopped."""


@pytest.mark.parametrize("step", [-DAY, DAY])
def test_a_wall_clock_that_steps_by_a_day_ends_nothing_and_is_right_again_afterwards(failing: Failing, step: int) -> None:
    """Lifetimes run by a clock that nobody sets; credentials by the wall clock, since others make them."""
    with failing.client(ttl=DAY * 10) as client, failing.client(ttl=HOUR) as brief, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        brief.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        try:
            failing.step_wall_clock(step)
            assert client.refresh(600) is None
            client.send(CHANNEL, b"there")
            assert peer.recv(100) == b"there"
            peer.sendto(b"back", relayed[:2])
            assert client.receive() == (CHANNEL, b"back")
            # An hour is over a day later. It lives on until its lifetime is over, but can't be refreshed.
            assert brief.refresh(600) == (401 if step > 0 else None)
            failing.assert_serves()
            assert abs(float(failing.shown("wall_clock_moved_seconds")) - step) < HOUR
        finally:
            failing.step_wall_clock(0)
        assert brief.refresh(600) is None
    failing.assert_serves()


def numbers(sock: socket.socket) -> list[int]:
    """Read the numbers of all packets that have come, and nothing that is no packet."""
    found = []
    sock.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while data := sock.recv(2000):
            # A response begins with 0x01.
            found += [int(data[-4:])] if data[0] != 1 else []
    sock.settimeout(PATIENCE)
    return found


def late(failing: Failing) -> int:
    """How many packets it was too late for."""
    return sum(failing.counted(why)[""] for why in ("dropped_late", "dropped_stale", "kernel_drops"))


@contextlib.contextmanager
def stopped(failing: Failing) -> Iterator[None]:
    """The process does nothing meanwhile."""
    failing.process.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(failing.process.pid, os.WUNTRACED)[1])
    try:
        yield
    finally:
        failing.process.send_signal(signal.SIGCONT)


def test_a_process_that_was_stopped_goes_on_and_what_it_was_too_late_for_is_counted(failing: Failing) -> None:
    """As a machine is that was moved to another host, or had no CPU to give."""
    before = late(failing)
    with failing.client() as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        with stopped(failing):
            for each in range(STOPPED):
                client.send(CHANNEL, b"%04d" % each)
                peer.sendto(b"%04d" % each, relayed[:2])
            client.socket.settimeout(QUIET)
            with pytest.raises(TimeoutError):
                client.refresh(600)
        at_peer, at_client = list[int](), list[int]()

        def is_all_accounted_for() -> bool:
            at_peer.extend(numbers(peer))
            at_client.extend(numbers(client.socket))
            return len(at_peer) + len(at_client) + late(failing) - before == 2 * STOPPED

        wait_until(is_all_accounted_for)
        assert (at_peer, at_client) == (sorted(set(at_peer)), sorted(set(at_client))), "in order, and none twice"
        assert client.refresh(600) is None
    failing.assert_serves()


def test_what_waited_for_as_long_as_a_process_was_stopped_is_dropped_but_for_requests(failing: Failing) -> None:
    """Megabytes of what nobody waits for any more would be in the way of everything new."""
    lost = failing.counted("dropped_stale")[""]
    with failing.client() as client, failing.client() as other, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        other.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        for each in range(USED):
            client.send(CHANNEL, b"%04d" % each)
            assert int(peer.recv(100)) == each
            peer.sendto(b"%04d" % each, relayed[:2])
            assert client.receive() == (CHANNEL, b"%04d" % each)
        with stopped(failing):
            for each in range(STOPPED):
                client.send(CHANNEL, b"%04d" % each)
                peer.sendto(b"%04d" % each, relayed[:2])
            for each in range(ASKED):
                request = encode(MessageClass.REQUEST, Method.BINDING, b"%012d" % each, [])
                other.socket.sendto(request, (failing.host, 3478))
            # The kernel counts for how long packets wait, and nobody can tell it the time.
            time.sleep(STALE_AFTER * 2)
        assert [int(other.socket.recv(100)[8:20]) for _ in range(ASKED)] == list(range(ASKED)), "all, however late"
        # Those that it reads one by one, until it finds that there are many.
        wait_until(lambda: failing.counted("dropped_stale")[""] - lost > 2 * (STOPPED - BATCH_DATAGRAMS), PATIENCE)
        client.send(CHANNEL, b"9999")
        peer.sendto(b"9999", relayed[:2])
        at_peer, at_client = list[int](), list[int]()

        def has_all_come() -> bool:
            at_peer.extend(numbers(peer))
            at_client.extend(numbers(client.socket))
            return at_peer[-1:] == at_client[-1:] == [9999]

        wait_until(has_all_come)
        lost = failing.counted("dropped_stale")[""] - lost
        assert len(at_peer) + len(at_client) + lost == 2 * STOPPED + 2
        assert client.refresh(600) is None
    failing.assert_serves()
