"""Injected failures of system calls, for errors impossible to cause in the kernel."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.failing import BIND, CHANNEL, PATIENCE, RECEIVE, SEND, Failing, name_of, running
from tests.support.system import allocate_refused
from tests.support.turn_client import udp_socket
from tests.support.waiting import wait_until

CALLS: Final = 5


@pytest.fixture(scope="module", autouse=True)
def broken(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Iterator[Failing]:
    """A relay with failing reads. The relay exits after 6 s, while the other tests run."""
    with running(tmp_path_factory.mktemp("broken"), library) as started, udp_socket("127.0.0.1") as anyone:
        started.fail(RECEIVE, errno.EIO, -1)
        anyone.sendto(bytes(20), (started.host, 3478))
        yield started


@pytest.mark.parametrize(
    "number", [errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.ECONNREFUSED, errno.ENETDOWN], ids=name_of
)
def test_a_failed_send_drops_one_packet_and_is_counted(failing: Failing, number: int) -> None:
    before = failing.counted("relay.send_failures")
    with failing.client() as client, udp_socket("127.0.0.1") as peer:
        client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        failing.fail(SEND, number, CALLS)
        for each in range(CALLS + 3):
            client.send(CHANNEL, b"%d" % each)
            # One at a time: queued packets are sent in one call.
            wait_until(lambda count=each + 1: failing.hits(SEND) == min(count, CALLS))  # type: ignore[misc]
        assert [peer.recv(100) for _ in range(3)] == [b"%d" % each for each in range(CALLS, CALLS + 3)]
        assert client.refresh(600) is None
    assert failing.counted("relay.send_failures") - before == {name_of(number): CALLS}
    failing.assert_serves()


def test_a_retransmission_gets_a_response_that_could_not_be_sent(failing: Failing) -> None:
    with failing.client() as client:
        client.allocate()
        failing.fail(SEND, errno.ENOBUFS, 1)
        client.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.refresh(600)
        client.socket.settimeout(PATIENCE)
        assert client.refresh(600) is None
    failing.assert_serves()


def test_an_interrupted_send_is_retried(failing: Failing) -> None:
    before = failing.counted("relay.send_failures")
    with failing.client() as client, udp_socket("127.0.0.1") as peer:
        client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        failing.fail(SEND, errno.EINTR, CALLS)
        client.send(CHANNEL, b"not lost")
        assert peer.recv(100) == b"not lost"
    assert failing.hits(SEND) == CALLS
    assert failing.counted("relay.send_failures") == before


@pytest.mark.parametrize(
    "number", [errno.ENOBUFS, errno.ENOMEM, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EINTR], ids=name_of
)
def test_a_failed_read_is_counted_and_reading_continues(failing: Failing, number: int) -> None:
    """An ICMP error causes ECONNREFUSED or EHOSTUNREACH in the next read of a connected socket."""
    before = failing.counted("relay.receive_failures")
    with failing.client() as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        failing.fail(RECEIVE, number, CALLS)
        for each in range(CALLS + 1):
            # A pending read returns this packet; the next read fails.
            client.send(CHANNEL, b"%d" % each)
            peer.sendto(b"%d" % each, relayed[:2])
        wait_until(lambda: failing.hits(RECEIVE) == CALLS)
        assert [peer.recv(100) for _ in range(CALLS + 1)] == [b"%d" % each for each in range(CALLS + 1)]
        assert [client.receive() for _ in range(CALLS + 1)] == [(CHANNEL, b"%d" % each) for each in range(CALLS + 1)]
    counted = failing.counted("relay.receive_failures") - before
    assert counted == ({} if number == errno.EINTR else {name_of(number): CALLS})
    failing.assert_serves()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.EACCES], ids=name_of)
def test_a_failed_bind_responds_508_to_one_client(failing: Failing, number: int) -> None:
    """The relay does not try another port, because the error applies to all ports."""
    before = failing.counted("relay.bind_failures")
    with failing.client() as served, failing.client() as refused:
        served.allocate()
        failing.fail(BIND, number, 1)
        assert allocate_refused(refused) == 508
        assert served.refresh(600) is None
        refused.allocate()
    assert failing.hits(BIND) == 1
    assert failing.counted("relay.bind_failures") - before == {name_of(number): 1}
    failing.assert_serves()


def test_temporary_read_failures_do_not_end_the_process(failing: Failing) -> None:
    """If the machine lacks memory for a moment, readers back off and retry."""
    failing.fail(RECEIVE, errno.ENOMEM, -1)
    with udp_socket("127.0.0.1") as anyone:
        anyone.sendto(b"to wake up who reads", (failing.host, 3478))
        wait_until(lambda: failing.hits(RECEIVE) > CALLS * 3, PATIENCE)
        failing.fail(RECEIVE, errno.ENOMEM, 0)
    failing.assert_serves()
    assert failing.process.poll() is None


def test_permanent_read_failures_end_the_process_with_an_error(broken: Failing) -> None:
    """A restart may fix the cause. A running relay that reads nothing would be worse."""
    assert broken.wait(30) == 1
    assert "an actor failed and the relay can't go on" in broken.log
