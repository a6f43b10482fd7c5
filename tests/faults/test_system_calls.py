"""System calls that fail, of a kind that no test can have the kernel fail in."""

import errno
from pathlib import Path
from typing import Final

import pytest

from tests.actors.test_lifetime import allocate_refused
from tests.conftest import wait_until
from tests.faults.conftest import BIND, CHANNEL, PATIENCE, RECEIVE, SEND, Failing, name_of, running
from tests.turn_client import udp_socket

CALLS: Final = 5


@pytest.mark.parametrize(
    "number", [errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.ECONNREFUSED, errno.ENETDOWN], ids=name_of
)
def test_a_send_that_fails_loses_its_packet_is_counted_and_nothing_else(failing: Failing, number: int) -> None:
    before = failing.counted("send_errors")
    with failing.client() as client, udp_socket("127.0.0.1") as peer:
        client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        failing.fail(SEND, number, CALLS)
        for each in range(CALLS + 3):
            client.send(CHANNEL, b"%d" % each)
            # One by one: packets that wait together leave in one call.
            wait_until(lambda count=each + 1: failing.hits(SEND) == min(count, CALLS))  # type: ignore[misc]
        assert [peer.recv(100) for _ in range(3)] == [b"%d" % each for each in range(CALLS, CALLS + 3)]
        assert client.refresh(600) is None
    assert failing.counted("send_errors") - before == {name_of(number): CALLS}
    failing.assert_serves()


def test_an_answer_that_can_not_be_sent_is_lost_and_given_to_who_asks_again(failing: Failing) -> None:
    with failing.client() as client:
        client.allocate()
        failing.fail(SEND, errno.ENOBUFS, 1)
        client.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.refresh(600)
        client.socket.settimeout(PATIENCE)
        assert client.refresh(600) is None
    failing.assert_serves()


def test_a_send_that_is_interrupted_is_tried_again(failing: Failing) -> None:
    before = failing.counted("send_errors")
    with failing.client() as client, udp_socket("127.0.0.1") as peer:
        client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        failing.fail(SEND, errno.EINTR, CALLS)
        client.send(CHANNEL, b"not lost")
        assert peer.recv(100) == b"not lost"
    assert failing.hits(SEND) == CALLS
    assert failing.counted("send_errors") == before


@pytest.mark.parametrize(
    "number", [errno.ENOBUFS, errno.ENOMEM, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EINTR], ids=name_of
)
def test_a_read_that_fails_is_counted_and_the_socket_is_read_on(failing: Failing, number: int) -> None:
    """ECONNREFUSED and EHOSTUNREACH are what an ICMP message makes of the next read of a connected socket."""
    before = failing.counted("receive_errors")
    with failing.client() as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        failing.fail(RECEIVE, number, CALLS)
        for each in range(CALLS + 1):
            # Whoever waits in a read gets this first; the next read fails.
            client.send(CHANNEL, b"%d" % each)
            peer.sendto(b"%d" % each, relayed[:2])
        wait_until(lambda: failing.hits(RECEIVE) == CALLS)
        assert [peer.recv(100) for _ in range(CALLS + 1)] == [b"%d" % each for each in range(CALLS + 1)]
        assert [client.receive() for _ in range(CALLS + 1)] == [(CHANNEL, b"%d" % each) for each in range(CALLS + 1)]
    counted = failing.counted("receive_errors") - before
    assert counted == ({} if number == errno.EINTR else {name_of(number): CALLS})
    failing.assert_serves()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.EACCES], ids=name_of)
def test_a_bind_that_fails_costs_the_client_that_asked_for_it_508_and_nobody_else(failing: Failing, number: int) -> None:
    """No other port is tried: what forbids one forbids them all."""
    before = failing.counted("bind_errors")
    with failing.client() as served, failing.client() as refused:
        served.allocate()
        failing.fail(BIND, number, 1)
        assert allocate_refused(refused) == 508
        assert served.refresh(600) is None
        refused.allocate()
    assert failing.hits(BIND) == 1
    assert failing.counted("bind_errors") - before == {name_of(number): 1}
    failing.assert_serves()


def test_reads_that_all_fail_for_a_while_end_nothing(failing: Failing) -> None:
    """A machine without memory for a moment: who reads waits a little longer each time, and does not give up at once."""
    failing.fail(RECEIVE, errno.ENOMEM, -1)
    with udp_socket("127.0.0.1") as anyone:
        anyone.sendto(b"to wake up who reads", (failing.host, 3478))
        wait_until(lambda: failing.hits(RECEIVE) > CALLS * 3, PATIENCE)
        failing.fail(RECEIVE, errno.ENOMEM, 0)
    failing.assert_serves()
    assert failing.process.poll() is None


def test_reads_that_fail_for_good_end_the_process_which_says_so(tmp_path: Path, library: Path) -> None:
    """What starts it again may put it right; a relay that lives and hears nobody would be worse."""
    with running(tmp_path, library) as failing, udp_socket("127.0.0.1") as anyone:
        failing.fail(RECEIVE, errno.EIO, -1)
        anyone.sendto(bytes(20), (failing.host, 3478))
        assert failing.wait(30) == 1
        assert "an actor failed and the relay can't go on" in failing.log
