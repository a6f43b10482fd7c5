"""Sockets: read in order, woken at the end, never waiting to send."""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

from relay.core.addresses import Family
from relay.core.trains import Arrival
from relay.net.receiver import BATCH_DATAGRAMS, Receiver
from relay.net.udp import UdpCounters, UdpSocket, is_broken
from tests.conftest import needs_ipv6, wait_until

HOSTS = [
    (Family.IPV4, "127.0.0.1"),
    pytest.param(Family.IPV6, "::1", marks=needs_ipv6),
]


Opener: TypeAlias = Callable[[Family, str], UdpSocket]


@pytest.fixture
def open_socket() -> Iterator[Opener]:
    opened: list[UdpSocket] = []

    def open_(family: Family, host: str) -> UdpSocket:
        opened.append(UdpSocket(family, host, 0))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


@pytest.mark.parametrize(("family", "host"), HOSTS)
def test_datagrams_come_in_the_order_they_were_sent_empty_ones_too(open_socket: Opener, family: Family, host: str) -> None:
    receiving, sending = open_socket(family, host), open_socket(family, host)
    sent = [b"", *(b"%d" % number for number in range(200)), bytes(60_000), b""]
    for data in sent:
        assert sending.transmit(data, receiving.getsockname()) is None
    receiver = Receiver([receiving])
    received: list[Arrival] = []
    while len(received) < len(sent):
        received += receiver.receive()
    assert [data for data, *_ in received] == sent
    assert {tuple(rest) for _, *rest in received} == {(sending.getsockname(), 0, 0)}


@needs_ipv6
def test_one_receiver_reads_sockets_of_both_families(open_socket: Opener) -> None:
    sockets = [open_socket(Family.IPV4, "127.0.0.1"), open_socket(Family.IPV6, "::1")]
    receiver = Receiver(sockets)
    for family, host, receiving in ((Family.IPV4, "127.0.0.1", sockets[0]), (Family.IPV6, "::1", sockets[1])):
        sending = open_socket(family, host)
        sending.transmit(host.encode(), receiving.getsockname())
        assert receiver.receive() == [(host.encode(), sending.getsockname(), 0, 0)]


@needs_ipv6
def test_an_ipv4_and_an_ipv6_socket_share_a_port() -> None:
    with UdpSocket(Family.IPV6, "::", 0) as six, UdpSocket(Family.IPV4, "0.0.0.0", six.getsockname()[1]) as four:
        assert four.getsockname()[1] == six.getsockname()[1]


@pytest.mark.parametrize("count", [1, 2])
def test_stop_wakes_a_thread_that_is_blocked_in_receive(open_socket: Opener, count: int) -> None:
    receiver = Receiver([open_socket(Family.IPV4, "127.0.0.1") for _ in range(count)])
    result: list[list[Arrival]] = []
    thread = threading.Thread(target=lambda: result.append(receiver.receive()))
    thread.start()
    receiver.stop()
    thread.join(30)
    assert result == [[]]


WAITING = 300
STALE = 0.05
USED = 16
"""Reads until a socket is one that is used."""


def notes_arrivals(sock: UdpSocket) -> bool:
    """Whether the kernel notes when datagrams arrive, which it begins to in its own time."""
    sock.waited()
    sock.transmit(b"", sock.getsockname())
    # It has to wait, by the kernel's clock.
    time.sleep(STALE)
    sock.receive()
    return sock.waited() >= STALE


@pytest.mark.parametrize("count", [1, 2])
def test_what_nobody_read_for_too_long_is_thrown_away_but_for_less_than_a_batch(open_socket: Opener, count: int) -> None:
    sockets = [open_socket(Family.IPV4, "127.0.0.1") for _ in range(count)]
    sending = open_socket(Family.IPV4, "127.0.0.1")
    counters = UdpCounters()
    for each in sockets:
        each.counters = counters
    receiver = Receiver(sockets, stale_after=STALE)
    for _ in range(USED):
        sending.transmit(b"", sockets[-1].getsockname())
        receiver.receive()
    wait_until(lambda: notes_arrivals(sending))
    for number in range(WAITING):
        for each in sockets:
            sending.transmit(b"%d" % number, each.getsockname())
    # That it passes is what this is about.
    time.sleep(STALE * 2)
    received: list[bytes] = []

    def read() -> None:
        while batch := receiver.receive():
            received.extend(data for data, *_ in batch)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        wait_until(lambda: counters.dropped_stale + len(received) == WAITING * count)
        assert len(received) < BATCH_DATAGRAMS * count
        for each in sockets:
            sending.transmit(b"fresh", each.getsockname())
        wait_until(lambda: received[-count:] == [b"fresh"] * count)
    finally:
        receiver.stop()
        thread.join(5)


def test_a_burst_after_a_silence_is_no_older_than_it_is(open_socket: Opener) -> None:
    receiving, sending = open_socket(Family.IPV4, "127.0.0.1"), open_socket(Family.IPV4, "127.0.0.1")
    receiver = Receiver([receiving], stale_after=30)
    received: list[Arrival] = []
    for number in range(WAITING):
        sending.transmit(b"%d" % number, receiving.getsockname())
    while len(received) < WAITING:
        received += receiver.receive()
    assert [int(data) for data, *_ in received] == list(range(WAITING))
    assert receiving.counters.dropped_stale == 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_socket_that_someone_else_shut_down_is_an_error_not_a_busy_loop(open_socket: Opener, count: int) -> None:
    sockets = [open_socket(Family.IPV4, "127.0.0.1") for _ in range(count)]
    receiver = Receiver(sockets)
    with pytest.raises(OSError, match="not connected"):
        sockets[0].shutdown(socket.SHUT_RD)
    with pytest.raises(OSError, match="shut down"):
        receiver.receive()


def test_a_port_in_use_is_an_error_and_leaves_no_socket_open(open_socket: Opener) -> None:
    taken = open_socket(Family.IPV4, "127.0.0.1").getsockname()[1]
    # pytest turns the warning of a socket that is not closed into an error.
    with pytest.raises(OSError, match="in use") as caught:
        UdpSocket(Family.IPV4, "127.0.0.1", taken)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_datagram_that_can_not_be_sent_is_lost_and_the_socket_lives(open_socket: Opener) -> None:
    sending = open_socket(Family.IPV4, "127.0.0.1")
    error = sending.transmit(bytes(65_508), ("127.0.0.1", 9))
    assert error is not None
    assert error.errno == errno.EMSGSIZE
    assert not is_broken(error)
    assert sending.transmit(b"", sending.getsockname()) is None


def test_a_socket_that_can_not_send_any_more_is_broken(open_socket: Opener) -> None:
    sending = open_socket(Family.IPV4, "127.0.0.1")
    with pytest.raises(OSError, match="not connected"):
        sending.shutdown(socket.SHUT_RDWR)
    error = sending.transmit(b"x", sending.getsockname())
    assert error is not None
    assert is_broken(error)
