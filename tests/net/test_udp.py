"""UDP sockets: order of reads, wake-up at stop, nonblocking sends, and errors."""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import pytest

from relay.core.addresses import Family
from relay.core.data import Datagram
from relay.core.overload import BATCH_DATAGRAMS
from relay.net.asked import AskedAddresses
from relay.net.receiver import Receiver
from relay.net.udp import UdpCounters, UdpSocket, is_broken
from tests.support.requirements import needs_ipv6
from tests.support.waiting import wait_until

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
def test_datagrams_and_empty_datagrams_arrive_in_order(open_socket: Opener, family: Family, host: str) -> None:
    receiving, sending = open_socket(family, host), open_socket(family, host)
    sent = [b"", *(b"%d" % number for number in range(200)), bytes(60_000), b""]
    for data in sent:
        assert sending.transmit(data, receiving.getsockname()) is None
    receiver = Receiver([receiving])
    received: list[Datagram] = []
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
def test_stop_wakes_a_thread_blocked_in_receive(open_socket: Opener, count: int) -> None:
    receiver = Receiver([open_socket(Family.IPV4, "127.0.0.1") for _ in range(count)])
    result: list[list[Datagram]] = []
    thread = threading.Thread(target=lambda: result.append(receiver.receive()))
    thread.start()
    receiver.stop()
    thread.join(30)
    assert result == [[]]


WAITING = 300
STALE = 0.05


def notes_arrivals(sock: UdpSocket) -> bool:
    """Check whether the kernel timestamps arrivals yet. It starts asynchronously."""
    sock.waited()
    sock.transmit(b"", sock.getsockname())
    # The kernel measures the waiting time with its own clock.
    time.sleep(STALE)
    sock.receive()
    return sock.waited() >= STALE


@pytest.mark.parametrize("count", [1, 2])
def test_stale_datagrams_are_dropped_except_for_less_than_a_batch(open_socket: Opener, count: int) -> None:
    sockets = [open_socket(Family.IPV4, "127.0.0.1") for _ in range(count)]
    sending = open_socket(Family.IPV4, "127.0.0.1")
    counters = UdpCounters()
    for each in sockets:
        each.counters = counters
    receiver = Receiver(sockets, stale_after=STALE)
    wait_until(lambda: notes_arrivals(sending))
    for number in range(WAITING):
        for each in sockets:
            sending.transmit(b"%d" % number, each.getsockname())
    # The datagrams have to become stale.
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


def test_a_burst_after_silence_is_not_stale(open_socket: Opener) -> None:
    receiving, sending = open_socket(Family.IPV4, "127.0.0.1"), open_socket(Family.IPV4, "127.0.0.1")
    receiver = Receiver([receiving], stale_after=30)
    received: list[Datagram] = []
    for number in range(WAITING):
        sending.transmit(b"%d" % number, receiving.getsockname())
    while len(received) < WAITING:
        received += receiver.receive()
    assert [int(data) for data, *_ in received] == list(range(WAITING))
    assert receiving.counters.dropped_stale == 0


@pytest.mark.parametrize("count", [1, 2])
def test_an_external_shutdown_of_a_socket_raises_an_error(open_socket: Opener, count: int) -> None:
    sockets = [open_socket(Family.IPV4, "127.0.0.1") for _ in range(count)]
    receiver = Receiver(sockets)
    with pytest.raises(OSError, match="not connected"):
        sockets[0].shutdown(socket.SHUT_RD)
    with pytest.raises(OSError, match="shut down"):
        receiver.receive()


def test_a_port_in_use_is_an_error_and_leaves_no_socket_open(open_socket: Opener) -> None:
    taken = open_socket(Family.IPV4, "127.0.0.1").getsockname()[1]
    # pytest turns a ResourceWarning about an open socket into an error.
    with pytest.raises(OSError, match="in use") as caught:
        UdpSocket(Family.IPV4, "127.0.0.1", taken)
    assert caught.value.errno == errno.EADDRINUSE


def test_an_oversized_datagram_is_dropped_and_keeps_the_socket_usable(open_socket: Opener) -> None:
    sending = open_socket(Family.IPV4, "127.0.0.1")
    error = sending.transmit(bytes(65_508), ("127.0.0.1", 9))
    assert error is not None
    assert error.errno == errno.EMSGSIZE
    assert not is_broken(error)
    assert sending.transmit(b"", sending.getsockname()) is None


def test_a_socket_shut_down_for_sending_is_broken(open_socket: Opener) -> None:
    sending = open_socket(Family.IPV4, "127.0.0.1")
    with pytest.raises(OSError, match="not connected"):
        sending.shutdown(socket.SHUT_RDWR)
    error = sending.transmit(b"x", sending.getsockname())
    assert error is not None
    assert is_broken(error)


LOOPBACK: Final = {Family.IPV4: ("127.0.0.2", "127.0.0.3"), Family.IPV6: ("::1", "::1")}


@pytest.mark.parametrize(("family", "host"), [(Family.IPV4, "0.0.0.0"), pytest.param(Family.IPV6, "::", marks=needs_ipv6)])
def test_datagrams_leave_from_the_address_that_a_client_asked(open_socket: Opener, family: Family, host: str) -> None:
    bound, client = open_socket(family, host), open_socket(family, LOOPBACK[family][0])
    bound.asked = AskedAddresses(is_needed=True)
    bound.note_asked()
    asked = LOOPBACK[family][1]
    client.transmit(b"request", (asked, *bound.getsockname()[1:]))
    bound.receive()
    assert bound.asked.host(client.getsockname()) == asked
    for data, size, traffic_class in ((b"alone", 0, 0), (b"marked", 0, 0xB8), (b"1st 2nd ", 4, 0), (b"1st 2nd ", 4, 0xB8)):
        assert bound.transmit(data, client.getsockname(), size, traffic_class) is None
        while data:
            received = client.receive()
            assert received is not None
            assert (data.startswith(received[0]), received[1][0], received[3]) == (True, asked, traffic_class)
            data = data[len(received[0]) :]  # noqa: PLW2901


INFO: Final = bytes(4) + bytes((192, 0, 2, 1)) + bytes((192, 0, 2, 1))


def test_without_several_addresses_nothing_is_noted() -> None:
    asked = AskedAddresses()
    asked.note(("198.51.100.7", 40001), 8, INFO)
    assert not asked
    asked.is_needed = True
    asked.note(("198.51.100.7", 40001), 8, INFO)
    assert asked.host(("198.51.100.7", 40001)) == "192.0.2.1"


def test_forged_requests_neither_move_nor_displace_clients_with_an_allocation() -> None:
    client = ("198.51.100.7", 40001)
    allocated = set[tuple[str, int]]()
    asked = AskedAddresses(allocated, is_needed=True)
    asked.note(client, 8, INFO)
    allocated.add(client)
    asked.note(client, 8, bytes(12))
    for number in range(20_000):
        asked.note((f"10.0.{number >> 8}.{number & 255}", 9), 8, INFO)
    assert asked.host(client) == "192.0.2.1"
    assert len(asked) < 5_000
