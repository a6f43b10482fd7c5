"""Steps of the wall clock, and a temporarily stopped process."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Final

import pytest

from relay.core.overload import BATCH_DATAGRAMS, STALE_AFTER
from relay.core.stun import MessageClass, Method, encode
from tests.support.failing import CHANNEL, PATIENCE, Failing
from tests.support.turn_client import udp_socket
from tests.support.waiting import wait_until

HOUR: Final = 3600
DAY: Final = 86400
STOPPED: Final = 200
ASKED: Final = 100
USED: Final = 20
"""Packets after which the relay treats a socket as active."""
QUIET: Final = 0.5
"""Seconds without a response from a stopped process."""


@pytest.mark.parametrize("step", [-DAY, DAY])
def test_a_wall_clock_step_by_a_day_ends_no_allocation(failing: Failing, step: int) -> None:
    """Lifetimes use the monotonic clock. Credentials use the wall clock, because other machines issue them."""
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
            # After a step forward, this credential is expired. Its allocation lives on, but can't be refreshed.
            assert brief.refresh(600) == (401 if step > 0 else None)
            failing.assert_serves()
            assert abs(float(failing.dump()["relay.wall_clock.moved"]) - step) < HOUR
        finally:
            failing.step_wall_clock(0)
        assert brief.refresh(600) is None
    failing.assert_serves()


def numbers(sock: socket.socket) -> list[int]:
    """Return the numbers of all received packets, without responses."""
    found = []
    sock.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while data := sock.recv(2000):
            # A response begins with 0x01.
            found += [int(data[-4:])] if data[0] != 1 else []
    sock.settimeout(PATIENCE)
    return found


@contextlib.contextmanager
def stopped(failing: Failing) -> Iterator[None]:
    """Stop the process in the meantime."""
    failing.process.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(failing.process.pid, os.WUNTRACED)[1])
    try:
        yield
    finally:
        failing.process.send_signal(signal.SIGCONT)


def test_a_stopped_process_continues_and_counts_late_packets(failing: Failing) -> None:
    """Like a virtual machine during a migration or without CPU time."""
    before = failing.dropped()
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
            return len(at_peer) + len(at_client) + failing.dropped() - before == 2 * STOPPED

        wait_until(is_all_accounted_for)
        assert (at_peer, at_client) == (sorted(set(at_peer)), sorted(set(at_client))), "in order, and none twice"
        assert client.refresh(600) is None
    failing.assert_serves()


def test_packets_queued_during_a_stop_are_dropped_and_requests_are_kept(failing: Failing) -> None:
    """Megabytes of stale packets would delay new packets."""
    # The kernel drops some of them, if the socket's buffer is still small after an earlier overload.
    stale, lost = failing.counted("relay.drops")["late"], failing.dropped()
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
            # The kernel measures the age of packets with its own clock.
            time.sleep(STALE_AFTER * 1.1)
        assert [int(other.socket.recv(100)[8:20]) for _ in range(ASKED)] == list(range(ASKED)), (
            "all requests, despite their age"
        )
        # The relay reads the first packets one by one before it detects the backlog.
        wait_until(lambda: failing.dropped() - lost > 2 * (STOPPED - BATCH_DATAGRAMS), PATIENCE)
        assert failing.counted("relay.drops")["late"] > stale
        client.send(CHANNEL, b"9999")
        peer.sendto(b"9999", relayed[:2])
        at_peer, at_client = list[int](), list[int]()

        def has_all_come() -> bool:
            at_peer.extend(numbers(peer))
            at_client.extend(numbers(client.socket))
            return at_peer[-1:] == at_client[-1:] == [9999]

        wait_until(has_all_come)
        assert len(at_peer) + len(at_client) + failing.dropped() - lost == 2 * STOPPED + 2
        assert client.refresh(600) is None
    failing.assert_serves()
