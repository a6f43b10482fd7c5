"""What waits in a socket under overload: the buffer is small while it drops, and large for bursts."""

import socket
from collections.abc import Iterator

import pytest

from relay.core.addresses import Family
from relay.net.backlog import CALM, DELAY, LEAST, PATIENCE, REVIEW, Backlog, counted_size
from relay.net.receiver import Receiver
from relay.net.udp import UdpSocket

START = 1000.0
MILLISECOND = 0.001
SIZE = 100
"""Of each datagram; with 16 of them a millisecond, what the buffer is to hold is more than the least and is granted to
anyone."""


class Overloaded:
    """A real socket, and the reader's notes of it at times that a test makes up."""

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
        """Read a batch every millisecond, the last one at the end of that time."""
        for _ in range(round(seconds / MILLISECOND)):
            self.now += MILLISECOND
            self.backlog.note(per_millisecond * SIZE, per_millisecond, is_behind=is_behind, now=self.now)

    def begin(self) -> None:
        """Be behind for the first time."""
        self.backlog.note(16 * SIZE, 16, is_behind=True, now=self.now)

    def become_small(self, per_millisecond: int = 16) -> None:
        self.begin()
        self.read(PATIENCE + MILLISECOND, per_millisecond)
        assert self.backlog.is_small

    def drop_one(self) -> None:
        """Have the kernel drop a datagram, of as many as it takes."""
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


def test_a_burst_leaves_the_buffer_as_it_is(overloaded: Overloaded) -> None:
    overloaded.begin()
    overloaded.read(PATIENCE - MILLISECOND)
    assert (overloaded.buffer, overloaded.backlog.is_small, overloaded.cuts) == (overloaded.large, False, 0)


def test_bursts_with_a_moment_between_them_are_no_overload(overloaded: Overloaded) -> None:
    for _ in range(10):
        overloaded.begin()
        overloaded.read(PATIENCE - MILLISECOND)
        overloaded.read(MILLISECOND, is_behind=False)
    assert (overloaded.buffer, overloaded.backlog.is_small, overloaded.cuts) == (overloaded.large, False, 0)


def test_an_overload_makes_the_buffer_small(overloaded: Overloaded) -> None:
    overloaded.begin()
    overloaded.read(PATIENCE + MILLISECOND)
    assert overloaded.buffer < overloaded.large
    assert (overloaded.backlog.is_small, overloaded.cuts) == (True, 1)


@pytest.mark.parametrize("size", [20, 100, 400, 1200])
def test_a_small_buffer_holds_what_is_read_in_a_moment(overloaded: Overloaded, size: int) -> None:
    """Counted by filling it: the kernel counts more than the bytes of a datagram, and does so in its own way."""
    per_millisecond = 12
    for _ in range(round(PATIENCE / MILLISECOND) + 2):
        overloaded.backlog.note(per_millisecond * size, per_millisecond, is_behind=True, now=overloaded.now)
        overloaded.now += MILLISECOND
    assert overloaded.backlog.is_small
    for _ in range(2000):
        overloaded.sender.transmit(bytes(size), overloaded.socket.getsockname())
    # Once this has come, so have those before it.
    overloaded.sender.transmit(b"", overloaded.sender.getsockname())
    overloaded.sender.receive()
    held = 2000 - overloaded.socket.drops()
    assert held == pytest.approx(per_millisecond * DELAY / MILLISECOND, rel=0.4)


def test_a_buffer_never_becomes_smaller_than_a_late_thread_needs(overloaded: Overloaded) -> None:
    overloaded.become_small(per_millisecond=1)
    assert overloaded.buffer == pytest.approx(counted_size(LEAST * SIZE, LEAST), rel=0.05)


@pytest.mark.parametrize("size", [20, 1200])
def test_what_may_wait_at_the_least_is_the_callers_and_is_counted_in_datagrams(overloaded: Overloaded, size: int) -> None:
    overloaded.backlog = Backlog(overloaded.socket, 100)
    for _ in range(round(PATIENCE / MILLISECOND) + 2):
        overloaded.backlog.note(size, 1, is_behind=True, now=overloaded.now)
        overloaded.now += MILLISECOND
    assert overloaded.buffer == pytest.approx(counted_size(100 * size, 100), rel=0.05)


def test_a_fast_reader_keeps_its_buffer(overloaded: Overloaded) -> None:
    overloaded.become_small(per_millisecond=100_000)
    assert overloaded.buffer == overloaded.large


def test_while_it_drops_the_buffer_stays_small_and_follows_the_pace(overloaded: Overloaded) -> None:
    overloaded.become_small(16)
    first = overloaded.buffer
    for pace in (24, 12, 16):
        # The next look may come before a whole period at the new pace has passed: the one after that has it.
        for _ in range(2):
            overloaded.drop_one()
            overloaded.read(REVIEW + MILLISECOND, pace)
        assert overloaded.buffer == pytest.approx(first * pace / 16, rel=0.05)
    for _ in range(round(3 * CALM / REVIEW)):
        overloaded.drop_one()
        overloaded.read(REVIEW + MILLISECOND)
        assert overloaded.backlog.is_small
    assert overloaded.buffer == pytest.approx(first, rel=0.05)
    assert overloaded.cuts == 1


def test_it_stays_small_also_if_the_socket_is_seen_empty_while_it_drops(overloaded: Overloaded) -> None:
    overloaded.become_small()
    for _ in range(round(2 * CALM / REVIEW)):
        overloaded.drop_one()
        overloaded.read(REVIEW + MILLISECOND, is_behind=False)
    assert overloaded.backlog.is_small


def test_between_two_looks_the_buffer_is_left_alone(overloaded: Overloaded) -> None:
    overloaded.become_small(16)
    small = overloaded.buffer
    overloaded.read(REVIEW - 2 * MILLISECOND, 64)
    assert overloaded.buffer == small


def test_after_a_calm_the_buffer_is_large_again(overloaded: Overloaded) -> None:
    overloaded.drop_one()
    overloaded.become_small()
    overloaded.read(CALM - REVIEW, is_behind=False)
    assert overloaded.buffer < overloaded.large
    overloaded.read(1.5 * REVIEW, is_behind=False)
    assert overloaded.buffer == overloaded.large


def test_the_calm_begins_with_the_last_drop(overloaded: Overloaded) -> None:
    overloaded.become_small()
    overloaded.read(CALM - 3 * REVIEW, is_behind=False)
    overloaded.drop_one()
    overloaded.read(CALM - REVIEW, is_behind=False)
    assert overloaded.buffer < overloaded.large
    overloaded.read(4 * REVIEW, is_behind=False)
    assert overloaded.buffer == overloaded.large


def test_each_overload_is_counted_and_has_a_pace_of_its_own(overloaded: Overloaded) -> None:
    smalls: list[int] = []
    for count in (1, 2, 3):
        overloaded.become_small()
        smalls.append(overloaded.buffer)
        assert overloaded.cuts == count
        assert overloaded.buffer == pytest.approx(smalls[0], rel=0.05)
        overloaded.read(CALM + 2 * REVIEW, is_behind=False)
        assert overloaded.buffer == overloaded.large


def test_a_receiver_that_can_not_keep_up_makes_the_buffer_small(overloaded: Overloaded) -> None:
    receiver = Receiver([overloaded.socket])
    while not overloaded.cuts:
        for _ in range(80):
            overloaded.sender.transmit(b"", overloaded.socket.getsockname())
        receiver.receive()
    assert overloaded.buffer <= overloaded.large
    assert receiver.is_behind
