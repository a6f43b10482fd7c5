"""The receive buffer under overload: small while the kernel drops datagrams, large for bursts."""

import socket
from collections.abc import Iterator

import pytest

from relay.core.addresses import Family
from relay.core.overload import BUFFER_CALM, BUFFER_DELAY, BUFFER_REVIEW, BURST, LEAST_WAITING
from relay.net.backlog import Backlog, counted_size
from relay.net.receiver import Receiver
from relay.net.udp import UdpSocket

START = 1000.0
MILLISECOND = 0.001
SIZE = 100
"""Bytes of a datagram. 16 datagrams per millisecond need more than the minimum buffer, and less than `rmem_max`."""


class Overloaded:
    """A real socket, and a `Backlog` with timestamps from the test."""

    def __init__(self) -> None:
        self.socket = UdpSocket(Family.IPV4, "127.0.0.1", 0)
        self.sender = UdpSocket(Family.IPV4, "127.0.0.1", 0)
        self.backlog = Backlog(self.socket)
        self.large = self.buffer
        self.now = START

    @property
    def buffer(self) -> int:
        return self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    @property
    def cuts(self) -> int:
        return self.socket.counters.buffers_cut

    def read(self, seconds: float, per_millisecond: int = 16, *, is_behind: bool = True) -> None:
        """Note a batch every millisecond, including the last millisecond."""
        for _ in range(round(seconds / MILLISECOND)):
            self.now += MILLISECOND
            self.backlog.note(per_millisecond * SIZE, per_millisecond, is_behind=is_behind, now=self.now)

    def begin(self) -> None:
        """Start an overload."""
        self.backlog.note(16 * SIZE, 16, is_behind=True, now=self.now)

    def become_small(self, per_millisecond: int = 16) -> None:
        self.begin()
        self.read(BURST + MILLISECOND, per_millisecond)
        assert self.backlog.is_small

    def drop_one(self) -> None:
        """Send datagrams until the kernel drops a datagram."""
        before = self.socket.drops()
        while self.socket.drops() == before:
            self.sender.transmit(bytes(SIZE), self.socket.getsockname())

    def close(self) -> None:
        self.socket.close()
        self.sender.close()


@pytest.fixture
def overloaded() -> Iterator[Overloaded]:
    made = Overloaded()
    yield made
    made.close()


def test_a_burst_keeps_the_buffer_size(overloaded: Overloaded) -> None:
    overloaded.begin()
    overloaded.read(BURST - MILLISECOND)
    assert (overloaded.buffer, overloaded.backlog.is_small, overloaded.cuts) == (overloaded.large, False, 0)


def test_bursts_with_pauses_are_no_overload(overloaded: Overloaded) -> None:
    for _ in range(10):
        overloaded.begin()
        overloaded.read(BURST - MILLISECOND)
        overloaded.read(MILLISECOND, is_behind=False)
    assert (overloaded.buffer, overloaded.backlog.is_small, overloaded.cuts) == (overloaded.large, False, 0)


def test_an_overload_shrinks_the_buffer(overloaded: Overloaded) -> None:
    overloaded.begin()
    overloaded.read(BURST + MILLISECOND)
    assert overloaded.buffer < overloaded.large
    assert (overloaded.backlog.is_small, overloaded.cuts) == (True, 1)


@pytest.mark.parametrize("size", [20, 100, 400, 1200])
def test_a_small_buffer_holds_the_packets_of_one_delay(overloaded: Overloaded, size: int) -> None:
    """The test fills the buffer, because the kernel also counts the overhead of each datagram."""
    per_millisecond = 12
    for _ in range(round(BURST / MILLISECOND) + 2):
        overloaded.backlog.note(per_millisecond * size, per_millisecond, is_behind=True, now=overloaded.now)
        overloaded.now += MILLISECOND
    assert overloaded.backlog.is_small
    for _ in range(2000):
        overloaded.sender.transmit(bytes(size), overloaded.socket.getsockname())
    # Loopback keeps the order: all earlier datagrams have arrived by now.
    overloaded.sender.transmit(b"", overloaded.sender.getsockname())
    overloaded.sender.receive()
    held = 2000 - overloaded.socket.drops()
    assert held == pytest.approx(per_millisecond * BUFFER_DELAY / MILLISECOND, rel=0.4)


def test_the_buffer_never_shrinks_below_the_minimum(overloaded: Overloaded) -> None:
    overloaded.become_small(per_millisecond=1)
    assert overloaded.buffer == pytest.approx(counted_size(LEAST_WAITING * SIZE, LEAST_WAITING), rel=0.05)


@pytest.mark.parametrize("size", [20, 1200])
def test_the_caller_sets_the_minimum_in_datagrams(overloaded: Overloaded, size: int) -> None:
    overloaded.backlog = Backlog(overloaded.socket, 100)
    for _ in range(round(BURST / MILLISECOND) + 2):
        overloaded.backlog.note(size, 1, is_behind=True, now=overloaded.now)
        overloaded.now += MILLISECOND
    assert overloaded.buffer == pytest.approx(counted_size(100 * size, 100), rel=0.05)


def test_a_fast_reader_keeps_its_buffer(overloaded: Overloaded) -> None:
    overloaded.become_small(per_millisecond=100_000)
    assert overloaded.buffer == overloaded.large


def test_during_drops_the_buffer_stays_small_and_follows_the_rate(overloaded: Overloaded) -> None:
    overloaded.become_small(16)
    first = overloaded.buffer
    for pace in (24, 12, 16):
        # The next review may cover both rates. The review after the next covers the new rate alone.
        for _ in range(2):
            overloaded.drop_one()
            overloaded.read(BUFFER_REVIEW + MILLISECOND, pace)
        assert overloaded.buffer == pytest.approx(first * pace / 16, rel=0.05)
    for _ in range(round(3 * BUFFER_CALM / BUFFER_REVIEW)):
        overloaded.drop_one()
        overloaded.read(BUFFER_REVIEW + MILLISECOND)
        assert overloaded.backlog.is_small
    assert overloaded.buffer == pytest.approx(first, rel=0.05)
    assert overloaded.cuts == 1


def test_during_drops_an_empty_socket_keeps_its_small_buffer(overloaded: Overloaded) -> None:
    overloaded.become_small()
    for _ in range(round(2 * BUFFER_CALM / BUFFER_REVIEW)):
        overloaded.drop_one()
        overloaded.read(BUFFER_REVIEW + MILLISECOND, is_behind=False)
    assert overloaded.backlog.is_small


def test_between_reviews_the_buffer_is_unchanged(overloaded: Overloaded) -> None:
    overloaded.become_small(16)
    small = overloaded.buffer
    overloaded.read(BUFFER_REVIEW - 2 * MILLISECOND, 64)
    assert overloaded.buffer == small


def test_a_period_without_drops_restores_the_buffer(overloaded: Overloaded) -> None:
    overloaded.drop_one()
    overloaded.become_small()
    overloaded.read(BUFFER_CALM - BUFFER_REVIEW, is_behind=False)
    assert overloaded.buffer < overloaded.large
    overloaded.read(1.5 * BUFFER_REVIEW, is_behind=False)
    assert overloaded.buffer == overloaded.large


def test_each_drop_restarts_the_period(overloaded: Overloaded) -> None:
    overloaded.become_small()
    overloaded.read(BUFFER_CALM - 3 * BUFFER_REVIEW, is_behind=False)
    overloaded.drop_one()
    overloaded.read(BUFFER_CALM - BUFFER_REVIEW, is_behind=False)
    assert overloaded.buffer < overloaded.large
    overloaded.read(4 * BUFFER_REVIEW, is_behind=False)
    assert overloaded.buffer == overloaded.large


def test_each_overload_is_counted_and_measured_separately(overloaded: Overloaded) -> None:
    smalls: list[int] = []
    for count in (1, 2, 3):
        overloaded.become_small()
        smalls.append(overloaded.buffer)
        assert overloaded.cuts == count
        assert overloaded.buffer == pytest.approx(smalls[0], rel=0.05)
        overloaded.read(BUFFER_CALM + 2 * BUFFER_REVIEW, is_behind=False)
        assert overloaded.buffer == overloaded.large


def test_a_slow_receiver_shrinks_the_buffer(overloaded: Overloaded) -> None:
    receiver = Receiver([overloaded.socket])
    while not overloaded.cuts:
        for _ in range(80):
            overloaded.sender.transmit(b"", overloaded.socket.getsockname())
        receiver.receive()
    assert overloaded.buffer <= overloaded.large
    assert receiver.is_behind
