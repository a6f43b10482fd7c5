"""GSO and GRO batches over real sockets: segmented and coalesced by the kernel, or in software without kernel support."""

import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import pytest

from relay.core.addresses import Family
from relay.core.commands import cut
from relay.core.data import Datagram
from relay.core.overload import BATCH_BYTES, BATCH_DATAGRAMS, DATAGRAM_BYTES
from relay.net.receiver import Receiver
from relay.net.udp import LARGEST_DATAGRAM, UdpCounters, UdpSocket, discard_waiting
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TIMEOUT, udp_socket

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
"""Reads of a single datagram before a `Receiver` checks for more datagrams."""

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
    """A receiver without UDP_GRO, for which the kernel segments GSO batches."""
    with udp_socket(host) as opened:
        yield opened


def numbered(count: int, size: int) -> list[bytes]:
    """Return distinct datagrams."""
    return [number.to_bytes(2, "big").ljust(size, b"x")[-size:] for number in range(count)]


def arrivals_at(receiving: UdpSocket, count: int) -> list[Datagram]:
    """Return the next datagrams, and check for the absence of more datagrams."""
    arrivals = [arrival for _ in range(count) if (arrival := receiving.receive()) is not None]
    with pytest.raises(BlockingIOError):
        receiving.receive(socket.MSG_DONTWAIT)
    return arrivals


def datagrams_at(receiving: socket.socket, count: int) -> list[bytes]:
    """Return the next datagrams, and check for the absence of more datagrams."""
    datagrams = [receiving.recv(65535) for _ in range(count)]
    receiving.settimeout(0)
    with pytest.raises(BlockingIOError):
        receiving.recv(65535)
    receiving.settimeout(TIMEOUT)
    return datagrams


class NoTrains(UdpSocket):
    """A socket without GSO, as with some network cards and sandboxes."""

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
def test_a_gso_batch_arrives_as_ordered_datagrams(
    open_socket: Opener, plain: socket.socket, family: Family, host: str, sizes: tuple[int, ...]
) -> None:
    sending = open_socket(family, host)
    datagrams = [bytes((number,)) * size for number, size in enumerate(sizes)]
    assert sending.transmit(b"".join(datagrams), plain.getsockname(), sizes[0]) is None
    assert datagrams_at(plain, len(sizes)) == datagrams
    assert sending.counters == UdpCounters(trains_sent=1)


@FAMILIES
@pytest.mark.parametrize("last", [100, 1])
def test_a_gro_batch_is_received_with_its_segment_size(open_socket: Opener, family: Family, host: str, last: int) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    train = b"".join(numbered(9, 100)) + bytes(last)
    sending.transmit(train, receiving.getsockname(), 100)
    assert arrivals_at(receiving, 1) == [(train, sending.getsockname(), 100, 0)]


@FAMILIES
@pytest.mark.parametrize(
    ("sizes", "trains"),
    [
        # Linux before 6.9 accepts at most 64 segments.
        ([10] * 64, 1),
        ([10] * 65, 1),
        ([10] * 130, 3),
        ([10] * 65 + [1], 2),
        # 46 of these segments fit into 65,507 bytes.
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
def test_a_batch_beyond_the_gso_limits_is_split(
    open_socket: Opener, family: Family, host: str, sizes: list[int], trains: int
) -> None:
    """The remainder may be a single datagram."""
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
def test_datagrams_too_long_for_gso_are_sent_separately(open_socket: Opener, family: Family, host: str) -> None:
    """Two maximum-size datagrams of a peer, with a ChannelData header each."""
    sending, receiving = open_socket(family, host), open_socket(family, host)
    size = LARGEST_DATAGRAM + 4
    error = sending.transmit(bytes(2 * size), receiving.getsockname(), size)
    if family is Family.IPV6:
        # They fit into IPv6 datagrams.
        assert error is None
        assert [len(data) for data, *_ in arrivals_at(receiving, 2)] == [size, size]
    else:
        assert error is not None
        assert sending.counters.send_errors == {"EMSGSIZE": 2}


@FAMILIES
def test_a_datagram_up_to_the_segment_size_is_sent_alone(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    for segment in (4, 5, 1000):
        sending.transmit(b"data", receiving.getsockname(), segment)
    assert arrivals_at(receiving, 3) == [(b"data", sending.getsockname(), 0, 0)] * 3
    assert sending.counters == UdpCounters()


@FAMILIES
def test_datagrams_and_batches_keep_their_traffic_class(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    sent = [(b"marked", 0, EXPEDITED), (b"none", 0, 0), (bytes(50), 20, EXPEDITED), (bytes(50), 20, 0), (b"", 0, 0xFC)]
    for data, segment, traffic_class in sent:
        assert sending.transmit(data, receiving.getsockname(), segment, traffic_class) is None
    assert [(data, segment, told) for data, _, segment, told in arrivals_at(receiving, len(sent))] == sent


@FAMILIES
def test_each_part_of_a_split_batch_has_its_traffic_class(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    sending.transmit(bytes(1290), receiving.getsockname(), 10, EXPEDITED)
    assert [(len(data), told) for data, _, _, told in arrivals_at(receiving, 3)] == [
        (640, EXPEDITED),
        (640, EXPEDITED),
        (10, EXPEDITED),
    ]


@FAMILIES
def test_each_datagram_of_a_batch_has_its_traffic_class(
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
def test_a_batch_without_gso_support_is_sent_separately(
    open_socket: Opener, plain: socket.socket, family: Family, host: str
) -> None:
    sending = open_socket(family, host)
    # The kernel supports no GSO on sockets without UDP checksums.
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
def test_only_datagrams_longer_than_the_mtu_are_sent_without_gso(
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
def test_gso_is_not_retried_after_an_error(
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
def test_each_failed_datagram_is_counted(open_socket: Opener, family: Family, host: str) -> None:
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
def test_an_error_is_returned_despite_later_success(open_socket: Opener, plain: socket.socket, host: str) -> None:
    sending = open_socket(Family.IPV6, host)
    sending.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU, 1280)
    sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)
    error = sending.transmit(bytes(2 * 1400) + b"short", plain.getsockname(), 1400)
    assert error is not None
    assert error.errno == errno.EMSGSIZE
    assert sending.counters.send_errors == {"EMSGSIZE": 2}
    assert datagrams_at(plain, 1) == [b"short"]


@FAMILIES
def test_each_failed_datagram_of_a_large_batch_is_counted(open_socket: Opener, family: Family, host: str) -> None:
    sending = open_socket(family, host)
    # Port 0 causes EINVAL, which GSO can cause too. Each datagram is therefore sent separately.
    address = (*sending.getsockname()[:1], 0, *sending.getsockname()[2:])
    error = sending.transmit(bytes(65 * 10), address, 10)
    assert error is not None
    assert sending.counters == UdpCounters(trains_cut=Counter(EINVAL=1), send_errors=Counter(EINVAL=65))


@FAMILIES
def test_drops_are_counted_also_after_close(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    assert receiving.drops() == 0
    receiving.set_receive_buffer(1)
    for datagram in numbered(50, 100):
        sending.transmit(datagram, receiving.getsockname())
    # Loopback keeps the order: all earlier datagrams have arrived by now.
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
def test_waiting_datagrams_are_discarded(open_socket: Opener, family: Family, host: str) -> None:
    sending, *sockets = (open_socket(family, host) for _ in range(3))
    for receiving in sockets:
        sending.transmit(b"", receiving.getsockname())
        sending.transmit(bytes(60_000), receiving.getsockname())
        sending.transmit(bytes(50), receiving.getsockname(), 20)
    assert discard_waiting(sockets) == 6
    assert discard_waiting(sockets) == 0


def test_discarding_ends_on_a_shut_down_socket(open_socket: Opener) -> None:
    receiving = open_socket(Family.IPV4, "127.0.0.1")
    receiving.transmit(b"the last", receiving.getsockname())
    with pytest.raises(OSError, match="not connected"):
        receiving.shutdown(socket.SHUT_RD)
    assert discard_waiting([receiving]) <= 1


def made_busy(receiver: Receiver, sending: UdpSocket, receiving: UdpSocket) -> None:
    """Make the next read of the receiver check for more datagrams."""
    for _ in range(SINGLE_READS):
        sending.transmit(b"", receiving.getsockname())
        assert len(receiver.receive()) == 1


@FAMILIES
@pytest.mark.parametrize("size", [0, 10, 1600, 30_000])
def test_a_batch_is_limited_and_reports_a_backlog(open_socket: Opener, family: Family, host: str, size: int) -> None:
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
@pytest.mark.parametrize("size", [4, 1000])
def test_gro_batches_count_with_all_their_bytes_and_datagrams(
    open_socket: Opener, family: Family, host: str, size: int
) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    receiver = Receiver([receiving])
    made_busy(receiver, sending, receiving)
    train = b"".join(numbered(40, size))
    # The first does not count its datagrams.
    fit = -(-(BATCH_BYTES + 40 * DATAGRAM_BYTES) // (len(train) + 40 * DATAGRAM_BYTES))
    for _ in range(fit + 1):
        sending.transmit(train, receiving.getsockname(), size)
    assert receiver.receive() == [(train, sending.getsockname(), size, 0)] * fit
    assert receiver.is_behind
    assert receiver.receive() == [(train, sending.getsockname(), size, 0)]


@FAMILIES
def test_an_idle_receiver_reads_single_datagrams(open_socket: Opener, family: Family, host: str) -> None:
    sending, receiving = open_socket(family, host), open_socket(family, host)
    receiver = Receiver([receiving])
    for _ in range(SINGLE_READS):
        sending.transmit(b"", receiving.getsockname())
        sending.transmit(b"", receiving.getsockname())
    sizes = [len(receiver.receive()) for _ in range(SINGLE_READS + 1)]
    assert sizes == [1] * SINGLE_READS + [SINGLE_READS]


@FAMILIES
def test_two_sockets_are_read_in_turn(open_socket: Opener, family: Family, host: str) -> None:
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
def test_a_full_socket_does_not_starve_another_socket(open_socket: Opener, family: Family, host: str) -> None:
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
