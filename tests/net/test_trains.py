"""Trains over real sockets: cut and put together by the kernel, or by hand where it does not."""

import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import pytest

from relay.core.addresses import Family
from relay.core.trains import Arrival, cut
from relay.net.receiver import BATCH_BYTES, BATCH_DATAGRAMS, Receiver
from relay.net.udp import LARGEST_DATAGRAM, UdpCounters, UdpSocket, discard_waiting
from tests.conftest import needs_ipv6
from tests.turn_client import TIMEOUT, udp_socket

if TYPE_CHECKING:
    from _socket import _Address

    from _typeshed import ReadableBuffer

FAMILIES = pytest.mark.parametrize(
    ("family", "host"), [(Family.IPV4, "127.0.0.1"), pytest.param(Family.IPV6, "::1", marks=needs_ipv6)]
)
EXPEDITED = 0xB8 | 1
"""DSCP EF, ECN ECT(1)."""

SOL_UDP = 17
UDP_SEGMENT = 103
SO_NO_CHECK = 11
UDP_NO_CHECK6_TX = 101
UDP_NO_CHECK6_RX = 102
IPV6_MTU = 24

SINGLE_READS = 15
"""Reads of one datagram each before a `Receiver` looks whether there is more."""

Opener: TypeAlias = Callable[..., UdpSocket]


@pytest.fixture
def open_socket() -> Iterator[Opener]:
    opened: list[UdpSocket] = []

    def open_(family: Family, host: str, kind: type[UdpSocket] = UdpSocket) -> UdpSocket:
        opened.append(kind(family, host, 0))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


@pytest.fixture
def plain(host: str) -> Iterator[socket.socket]:
    """A receiver that knows nothing of trains: the kernel cuts them for it."""
    with udp_socket(host) as opened:
        yield opened


def numbered(count: int, size: int) -> list[bytes]:
    """Datagrams that are told from one another."""
    return [number.to_bytes(2, "big").ljust(size, b"x")[-size:] for number in range(count)]


def arrivals_at(receiving: UdpSocket, count: int) -> list[Arrival]:
    """The next ones, and there are no more."""
    arrivals = [arrival for _ in range(count) if (arrival := receiving.receive()) is not None]
    with pytest.raises(BlockingIOError):
        receiving.receive(socket.MSG_DONTWAIT)
    return arrivals


def datagrams_at(receiving: socket.socket, count: int) -> list[bytes]:
    """The next ones, and there are no more."""
    datagrams = [receiving.recv(65535) for _ in range(count)]
    receiving.settimeout(0)
    with pytest.raises(BlockingIOError):
        receiving.recv(65535)
    receiving.settimeout(TIMEOUT)
    return datagrams


class NoTrains(UdpSocket):
    """A socket on a path that takes no trains, as some network cards and sandboxes have it."""

    error = errno.EIO

    def __init__(self, family: Family, host: str, port: int) -> None:
        super().__init__(family, host, port)
        self.attempts = 0

    def sendmsg(
        self,
        buffers: "Iterable[ReadableBuffer]",
        ancdata: "Iterable[tuple[int, int, ReadableBuffer]]" = (),
        flags: int = 0,
        address: "_Address | None" = None,
    ) -> int:
        control = list(ancdata)
        if any(kind == UDP_SEGMENT for _, kind, _ in control):
            self.attempts += 1
            raise OSError(self.error, os.strerror(self.error))
        return super().sendmsg(buffers, control, flags, address)


@FAMILIES
@pytest.mark.parametrize("sizes", [(100, 100, 100), (100, 100, 1), (1, 1, 1), (30_000, 30_000, 5000)])
def test_a_train_arrives_as_its_datagrams_in_order(
    open_socket: Opener, plain: socket.socket, family: Family, host: str, sizes: tuple[int, ...]
) -> None:
    sending = open_socket(family, host)
    datagrams = [bytes((number,)) * size for number, size in enumerate(sizes)]
    assert sending.transmit(b"".join(datagrams), plain.getsockname(), sizes[0]) is None
    assert datagrams_at(plain, len(sizes)) == datagrams
    assert sending.counters == UdpCounters(trains_sent=1)


@FAMILIES
@pytest.mark.parametrize("last", [100, 1])
def test_a_train_is_received_whole_with_the_length_of_its_datagrams(
    open_socket: Opener, family: Family, host: str, last: int
) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    train = b"".join(numbered(9, 100)) + bytes(last)
    sending.transmit(train, receiving.getsockname(), 100)
    assert arrivals_at(receiving, 1) == [(train, sending.getsockname(), 100, 0)]


@FAMILIES
@pytest.mark.parametrize(
    ("sizes", "trains"),
    [
        # Linux before 6.9 takes no more than 64.
        ([10] * 64, 1),
        ([10] * 65, 1),
        ([10] * 130, 3),
        ([10] * 65 + [1], 2),
        # 46 of these fit 65,507 bytes.
        ([1400] * 92, 2),
        ([1400] * 94, 3),
        ([LARGEST_DATAGRAM // 2] * 2, 1),
        ([LARGEST_DATAGRAM // 2] * 3, 1),
        ([LARGEST_DATAGRAM // 2] * 3 + [1], 2),
        ([LARGEST_DATAGRAM // 2 + 1] * 3, 0),
        ([LARGEST_DATAGRAM] * 2, 0),
    ],
    ids=lambda value: f"{len(value)}x{value[0]}" if isinstance(value, list) else value,
)
def test_a_train_that_is_too_large_for_the_kernel_is_sent_as_several(
    open_socket: Opener, family: Family, host: str, sizes: list[int], trains: int
) -> None:
    """What is left over may be a datagram alone, which is no train."""
    sending, receiving = open_socket(family, host), open_socket(family, host)
    sent = [numbered(number + 1, size)[-1] for number, size in enumerate(sizes)]
    assert sending.transmit(b"".join(sent), receiving.getsockname(), sizes[0]) is None
    received: list[bytes] = []
    while len(received) < len(sent):
        arrival = receiving.receive()
        assert arrival is not None
        received += cut(arrival[0], arrival[2])
    assert received == sent
    assert sending.counters == UdpCounters(trains_sent=trains)


@FAMILIES
def test_a_train_of_datagrams_longer_than_any_train_is_sent_one_by_one(
    open_socket: Opener, family: Family, host: str
) -> None:
    """Two of the longest datagrams of a peer, with a header each."""
    sending, receiving = open_socket(family, host), open_socket(family, host)
    size = LARGEST_DATAGRAM + 4
    error = sending.transmit(bytes(2 * size), receiving.getsockname(), size)
    if family is Family.IPV6:
        # There, they fit.
        assert error is None
        assert [len(data) for data, *_ in arrivals_at(receiving, 2)] == [size, size]
    else:
        assert error is not None
        assert sending.counters.send_errors == {"EMSGSIZE": 2}


@FAMILIES
def test_a_datagram_no_longer_than_its_segment_is_a_single_one(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    for segment in (4, 5, 1000):
        sending.transmit(b"data", receiving.getsockname(), segment)
    assert arrivals_at(receiving, 3) == [(b"data", sending.getsockname(), 0, 0)] * 3
    assert sending.counters == UdpCounters()


@FAMILIES
def test_the_traffic_class_of_datagrams_and_trains_is_carried_and_told(
    open_socket: Opener, family: Family, host: str
) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    sent = [(b"marked", 0, EXPEDITED), (b"none", 0, 0), (bytes(50), 20, EXPEDITED), (bytes(50), 20, 0), (b"", 0, 0xFC)]
    for data, segment, traffic_class in sent:
        assert sending.transmit(data, receiving.getsockname(), segment, traffic_class) is None
    assert [(data, segment, told) for data, _, segment, told in arrivals_at(receiving, len(sent))] == sent


@FAMILIES
def test_each_part_of_a_large_train_bears_its_traffic_class(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    sending.transmit(bytes(1290), receiving.getsockname(), 10, EXPEDITED)
    assert [(len(data), told) for data, _, _, told in arrivals_at(receiving, 3)] == [
        (640, EXPEDITED),
        (640, EXPEDITED),
        (10, EXPEDITED),
    ]


@FAMILIES
def test_each_datagram_of_a_train_bears_its_traffic_class(
    open_socket: Opener, plain: socket.socket, family: Family, host: str
) -> None:
    if family is Family.IPV4:
        plain.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
    else:
        plain.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
    sending, regular = open_socket(family, host), open_socket(family, host, NoTrains)
    sending.transmit(bytes(30), plain.getsockname(), 10, EXPEDITED)
    regular.transmit(b"marked" * 3, plain.getsockname(), 6, EXPEDITED)
    for size in (10,) * 3 + (6,) * 3:
        data, ((_, _, told),), *_ = plain.recvmsg(100, 64)
        assert (len(data), told[0]) == (size, EXPEDITED)


@FAMILIES
def test_a_train_that_the_kernel_takes_not_is_sent_one_by_one(
    open_socket: Opener, plain: socket.socket, family: Family, host: str
) -> None:
    sending = open_socket(family, host)
    # It cuts nothing for a socket that writes no checksums.
    if family is Family.IPV4:
        sending.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
    else:
        plain.setsockopt(SOL_UDP, UDP_NO_CHECK6_RX, 1)
        sending.setsockopt(SOL_UDP, UDP_NO_CHECK6_TX, 1)
    datagrams = [*numbered(3, 100), b"last"]
    assert sending.transmit(b"".join(datagrams), plain.getsockname(), 100) is None
    assert datagrams_at(plain, 4) == datagrams
    assert sending.counters == UdpCounters(trains_cut=Counter(EINVAL=1))


@needs_ipv6
@pytest.mark.parametrize("host", ["::1"])
def test_a_train_whose_datagrams_are_longer_than_the_mtu_is_cut_and_shorter_ones_are_not(
    open_socket: Opener, plain: socket.socket, host: str
) -> None:
    sending = open_socket(Family.IPV6, host)
    sending.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU, 1280)
    long, short = numbered(3, 1400), numbered(3, 1200)
    assert sending.transmit(b"".join(long), plain.getsockname(), 1400) is None
    assert datagrams_at(plain, 3) == long
    assert sending.counters.trains_cut.total() == 1
    assert sending.transmit(b"".join(short), plain.getsockname(), 1200) is None
    assert datagrams_at(plain, 3) == short
    assert sending.counters.trains_cut.total() == 1
    assert sending.counters.trains_sent == 1


@FAMILIES
@pytest.mark.parametrize("error", [errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT], ids=errno.errorcode.get)
def test_a_path_that_takes_no_trains_is_never_asked_again(
    open_socket: Opener, plain: socket.socket, family: Family, host: str, error: int
) -> None:
    sending = open_socket(family, host, NoTrains)
    assert isinstance(sending, NoTrains)
    sending.error = error
    datagrams = numbered(3, 100)
    for _ in range(3):
        assert sending.transmit(b"".join(datagrams), plain.getsockname(), 100) is None
        assert datagrams_at(plain, 3) == datagrams
    assert sending.attempts == 1
    assert sending.counters == UdpCounters(trains_cut=Counter({errno.errorcode[error]: 1}))


@FAMILIES
def test_each_datagram_that_could_not_be_sent_is_counted(open_socket: Opener, family: Family, host: str) -> None:
    sending = open_socket(family, host)
    to = sending.getsockname()
    with pytest.raises(OSError, match="not connected"):
        sending.shutdown(socket.SHUT_WR)
    for data, segment, traffic_class in (
        (bytes(10), 0, 0),
        (bytes(10), 0, EXPEDITED),
        (bytes(41), 10, 0),
        (bytes(20), 10, 7),
    ):
        error = sending.transmit(data, to, segment, traffic_class)
        assert error is not None
        assert error.errno == errno.EPIPE
    assert sending.counters == UdpCounters(send_errors=Counter(EPIPE=1 + 1 + 5 + 2))


@needs_ipv6
@pytest.mark.parametrize("host", ["::1"])
def test_a_loss_is_told_though_what_followed_it_was_sent(open_socket: Opener, plain: socket.socket, host: str) -> None:
    sending = open_socket(Family.IPV6, host)
    sending.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU, 1280)
    sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)
    error = sending.transmit(bytes(2 * 1400) + b"short", plain.getsockname(), 1400)
    assert error is not None
    assert error.errno == errno.EMSGSIZE
    assert sending.counters.send_errors == {"EMSGSIZE": 2}
    assert datagrams_at(plain, 1) == [b"short"]


@FAMILIES
def test_each_part_of_a_large_train_that_could_not_be_sent_is_counted(
    open_socket: Opener, family: Family, host: str
) -> None:
    sending = open_socket(family, host)
    # To port 0: EINVAL may be about the train, so each is tried.
    address = (*sending.getsockname()[:1], 0, *sending.getsockname()[2:])
    error = sending.transmit(bytes(65 * 10), address, 10)
    assert error is not None
    assert sending.counters == UdpCounters(trains_cut=Counter(EINVAL=1), send_errors=Counter(EINVAL=65))


@FAMILIES
def test_what_found_the_buffer_full_is_counted_also_after_the_end(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    assert receiving.drops() == 0
    receiving.set_receive_buffer(1)
    for datagram in numbered(50, 100):
        sending.transmit(datagram, receiving.getsockname())
    # Once this has come, so have those before it.
    sending.transmit(b"", sending.getsockname())
    sending.receive()
    taken = discard_waiting([receiving])
    assert receiving.drops() == 50 - taken
    assert 0 < taken < 50
    assert receiving.counters.kernel_drops == 0
    receiving.close()
    receiving.close()
    assert receiving.counters.kernel_drops == 50 - taken
    assert sending.drops() == 0


@FAMILIES
def test_what_waits_can_be_thrown_away(open_socket: Opener, family: Family, host: str) -> None:
    sending, *sockets = (open_socket(family, host) for _ in range(3))
    for receiving in sockets:
        sending.transmit(b"", receiving.getsockname())
        sending.transmit(bytes(60_000), receiving.getsockname())
        sending.transmit(bytes(50), receiving.getsockname(), 20)
    assert discard_waiting(sockets) == 6
    assert discard_waiting(sockets) == 0


def test_in_a_socket_that_is_shut_down_nothing_waits(open_socket: Opener) -> None:
    receiving = open_socket(Family.IPV4, "127.0.0.1")
    receiving.transmit(b"the last", receiving.getsockname())
    with pytest.raises(OSError, match="not connected"):
        receiving.shutdown(socket.SHUT_RD)
    assert discard_waiting([receiving]) <= 1


def made_busy(receiver: Receiver, sending: UdpSocket, receiving: UdpSocket) -> None:
    """Bring a receiver to the read at which it looks for more."""
    for _ in range(SINGLE_READS):
        sending.transmit(b"", receiving.getsockname())
        assert len(receiver.receive()) == 1


@FAMILIES
@pytest.mark.parametrize("size", [0, 10, 1600, 30_000])
def test_a_batch_is_bounded_and_says_whether_more_may_wait(
    open_socket: Opener, family: Family, host: str, size: int
) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    receiver = Receiver([receiving])
    made_busy(receiver, sending, receiving)
    assert not receiver.is_behind
    bound = BATCH_DATAGRAMS if size * BATCH_DATAGRAMS <= BATCH_BYTES else -(-BATCH_BYTES // size)
    for _ in range(bound + 2):
        sending.transmit(bytes(size), receiving.getsockname())
    assert (len(receiver.receive()), receiver.is_behind) == (bound, True)
    assert (len(receiver.receive()), receiver.is_behind) == (2, False)


@FAMILIES
def test_trains_in_a_batch_count_with_all_their_bytes(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    receiver = Receiver([receiving])
    made_busy(receiver, sending, receiving)
    train = b"".join(numbered(40, 1000))
    fit = -(-BATCH_BYTES // len(train))
    for _ in range(fit + 1):
        sending.transmit(train, receiving.getsockname(), 1000)
    assert receiver.receive() == [(train, sending.getsockname(), 1000, 0)] * fit
    assert receiver.is_behind
    assert receiver.receive() == [(train, sending.getsockname(), 1000, 0)]


@FAMILIES
def test_a_receiver_does_not_look_for_more_where_little_arrives(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    receiver = Receiver([receiving])
    for _ in range(SINGLE_READS):
        sending.transmit(b"", receiving.getsockname())
        sending.transmit(b"", receiving.getsockname())
    sizes = [len(receiver.receive()) for _ in range(SINGLE_READS + 1)]
    assert sizes == [1] * SINGLE_READS + [SINGLE_READS]


@FAMILIES
def test_two_sockets_are_served_by_turns(open_socket: Opener, family: Family, host: str) -> None:
    sending, *sockets = (open_socket(family, host) for _ in range(3))
    receiver = Receiver(sockets)
    for number in b"1234567":
        for name, receiving in zip((b"a", b"b"), sockets, strict=True):
            sending.transmit(name + bytes((number,)), receiving.getsockname())
    served = [data for _ in range(14) for data, *_ in receiver.receive()]
    assert {data[:1] for data in served[::2]} != {data[:1] for data in served[1::2]}
    assert len({data[:1] for data in served[::2]}) == 1
    for name in (b"a", b"b"):
        assert [data for data in served if data[:1] == name] == [name + bytes((number,)) for number in b"1234567"]


@FAMILIES
def test_a_socket_that_is_full_does_not_keep_the_other_one_waiting(open_socket: Opener, family: Family, host: str) -> None:
    sending, *sockets = (open_socket(family, host) for _ in range(3))
    for full, other in (sockets, sockets[::-1]):
        receiver = Receiver(sockets)
        for _ in range(300):
            sending.transmit(b"much", full.getsockname())
        made = [receiver.receive() for _ in range(SINGLE_READS + 2)]
        assert len(made[-1]) == BATCH_DATAGRAMS
        assert receiver.is_behind
        sending.transmit(b"little", other.getsockname())
        assert b"little" in [data for _ in range(2) for data, *_ in receiver.receive()]
        discard_waiting(sockets)
