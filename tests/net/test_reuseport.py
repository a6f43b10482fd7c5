"""Several sockets on a port: the distribution of datagrams, and exclusive use of the port."""

import contextlib
import errno
import ipaddress
import os
import random
import select
import socket
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import pytest

from relay.core.addresses import Family
from relay.net.reuseport import ReuseportGroup, open_group
from relay.net.udp import UdpCounters, UdpSocket
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TIMEOUT, udp_socket

FAMILIES = pytest.mark.parametrize(
    ("family", "host"), [(Family.IPV4, "127.0.0.1"), pytest.param(Family.IPV6, "::1", marks=needs_ipv6)]
)
THRESHOLD = 64
SO_ATTACH_REUSEPORT_CBPF = 51
DATA = [bytes((first,)) + rest for rest in (b"", b"\0" * 100) for first in (64, 65, 127, 128, 255)]
REST = [b"", *(bytes((first,)) + rest for rest in (b"", b"\xff" * 100) for first in (0, 1, 3, 63))]


@pytest.fixture
def client(host: str) -> Iterator[socket.socket]:
    with udp_socket(host) as opened:
        yield opened


@pytest.fixture
def group(family: Family, host: str) -> Iterator[ReuseportGroup]:
    with opened(family, host) as sockets:
        yield sockets


@contextlib.contextmanager
def opened(
    family: Family, host: str, port: int = 0, threshold: int = THRESHOLD, counters: UdpCounters | None = None
) -> Iterator[ReuseportGroup]:
    group = open_group(family, host, port, threshold, counters or UdpCounters())
    with contextlib.ExitStack() as stack:
        for each in all_of(group):
            stack.enter_context(each)
        yield group


def all_of(group: ReuseportGroup) -> list[UdpSocket]:
    return [*group.data, *(() if group.rest is None else (group.rest,))]


def rest_of(group: ReuseportGroup) -> UdpSocket:
    assert group.rest is not None
    return group.rest


def waiting_in(receiving: UdpSocket, count: int) -> list[bytes]:
    """Return the next datagrams, and check for the absence of more datagrams."""
    data = [receiving.recv(65535) for _ in range(count)]
    assert is_empty(receiving)
    return data


def is_empty(receiving: UdpSocket) -> bool:
    try:
        receiving.recv(65535, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    return False


def busy_one(group: ReuseportGroup) -> UdpSocket:
    """Return the only data socket with a received datagram."""
    readable, _, _ = select.select(group.data, (), (), TIMEOUT)
    (busy,) = readable
    return busy


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def assert_refused(family: Family, host: str, port: int, error: int) -> None:
    """Check that opening fails and leaves no socket open."""
    before = open_descriptors()
    with pytest.raises(OSError, match=os.strerror(error)) as caught:
        open_group(family, host, port, THRESHOLD, UdpCounters())
    assert caught.value.errno == error
    assert open_descriptors() == before


@FAMILIES
def test_datagrams_are_data_if_their_first_byte_reaches_the_threshold(group: ReuseportGroup, client: socket.socket) -> None:
    for datagram in sorted([*DATA, *REST], key=len):
        client.sendto(datagram, group.data[0].getsockname())
    # A socket gets all datagrams of a sender in order.
    assert waiting_in(busy_one(group), len(DATA)) == DATA
    assert waiting_in(rest_of(group), len(REST)) == REST
    assert all(is_empty(each) for each in group.data)


@FAMILIES
@pytest.mark.parametrize("threshold", [1, 0x80, 0xFF])
def test_the_caller_sets_the_threshold(client: socket.socket, family: Family, host: str, threshold: int) -> None:
    with opened(family, host, threshold=threshold) as group:
        for byte in (threshold, threshold - 1):
            client.sendto(bytes((byte,)), group.data[0].getsockname())
        assert waiting_in(busy_one(group), 1) == [bytes((threshold,))]
        assert waiting_in(rest_of(group), 1) == [bytes((threshold - 1,))]


def where_they_come(group: ReuseportGroup, clients: Sequence[UdpSocket]) -> list[int]:
    """Let each sender send data and other datagrams, and return the socket that gets the data of each sender."""
    data = (b"\x401", b"\x402", b"\x7f3")
    for each in data:
        for client in clients:
            client.transmit(each, group.data[0].getsockname())
            client.transmit(b"\0", group.data[0].getsockname())
    assert waiting_in(rest_of(group), len(data) * len(clients)) == [b"\0"] * len(data) * len(clients)
    came: dict[Hashable, list[tuple[int, bytes]]] = {client.getsockname(): [] for client in clients}
    for _ in range(len(data) * len(clients)):
        readable, _, _ = select.select(group.data, (), (), TIMEOUT)
        received, source = readable[0].recvfrom(100)
        came[source].append((group.data.index(readable[0]), received))
    own = [where for (where, _), *_ in came.values()]
    assert list(came.values()) == [[(where, each) for each in data] for where in own]
    return own


@FAMILIES
def test_senders_are_spread_by_port_and_keep_their_socket(group: ReuseportGroup, family: Family, host: str) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(UdpSocket(family, host, 0)) for _ in range(100)]
        assert len(set(where_they_come(group, clients))) > 1


@pytest.mark.parametrize(("family", "host"), [(Family.IPV4, "127.0.0.1")])
def test_senders_are_spread_by_host_over_all_sockets(group: ReuseportGroup) -> None:
    # With this number of senders, a socket gets no sender once in a million runs.
    hosts = sorted({str(ipaddress.IPv4Address(random.randrange(0x7F000002, 0x7FFFFFF0))) for _ in range(100)})
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(UdpSocket(Family.IPV4, hosts[0], 0)).getsockname()[1]
        clients = [stack.enter_context(UdpSocket(Family.IPV4, each, port)) for each in hosts[1:]]
        assert set(where_they_come(group, clients)) == set(range(len(group.data)))


@FAMILIES
def test_a_gso_batch_is_distributed_like_its_datagrams(group: ReuseportGroup, family: Family, host: str) -> None:
    with UdpSocket(family, host, 0) as client:
        client.transmit(b"\x40data" * 3, group.data[0].getsockname(), 5)
        client.transmit(b"\0\1..." * 3, group.data[0].getsockname(), 5)
        assert busy_one(group).receive() == (b"\x40data" * 3, client.getsockname(), 5, 0)
        assert rest_of(group).receive() == (b"\0\1..." * 3, client.getsockname(), 5, 0)


@FAMILIES
def test_all_sockets_send_from_the_same_address(group: ReuseportGroup, client: socket.socket, host: str) -> None:
    sockets = all_of(group)
    address = sockets[0].getsockname()
    assert address[0] == host
    for each in sockets:
        assert each.transmit(b"x", client.getsockname()) is None
    assert [client.recvfrom(10)[1] for _ in sockets] == [address] * len(sockets)
    assert {each.getsockname() for each in sockets} == {address}


@FAMILIES
def test_a_requested_port_is_bound(family: Family, host: str) -> None:
    with UdpSocket(family, host, 0) as free:
        port = free.getsockname()[1]
    with opened(family, host, port) as group:
        assert {each.getsockname()[1] for each in all_of(group)} == {port}


@FAMILIES
@pytest.mark.parametrize("shares", [False, True])
def test_a_port_of_another_socket_is_in_use(family: Family, host: str, *, shares: bool) -> None:
    with UdpSocket(family, host, 0, shares_port=shares) as other:
        port = other.getsockname()[1]
        assert_refused(family, host, port, errno.EADDRINUSE)
    with opened(family, host, port) as group:
        assert group.rest is not None


@FAMILIES
def test_a_port_of_another_reuseport_group_is_in_use(group: ReuseportGroup, family: Family, host: str) -> None:
    assert_refused(family, host, group.data[0].getsockname()[1], errno.EADDRINUSE)


def test_a_foreign_address_is_an_error_and_leaves_no_socket_open() -> None:
    assert_refused(Family.IPV4, "198.51.100.77", 0, errno.EADDRNOTAVAIL)


@FAMILIES
def test_data_does_not_fill_the_buffer_of_other_datagrams(group: ReuseportGroup, client: socket.socket) -> None:
    to = group.data[0].getsockname()
    for each in group.data:
        each.set_receive_buffer(1)
    while not any(each.drops() for each in group.data):
        client.sendto(b"\x40data", to)
    for request in REST:
        client.sendto(request, to)
    assert waiting_in(rest_of(group), len(REST)) == REST
    assert rest_of(group).drops() == 0


@FAMILIES
def test_a_flood_does_not_fill_the_buffers_of_other_sockets(group: ReuseportGroup, family: Family, host: str) -> None:
    to = group.data[0].getsockname()
    with contextlib.ExitStack() as stack:
        flooding, *others = (stack.enter_context(UdpSocket(family, host, 0)) for _ in range(50))
        flooding.transmit(b"\x40data", to)
        flooded = busy_one(group)
        flooded.set_receive_buffer(1)
        while not flooded.drops():
            flooding.transmit(b"\x40data", to)
        for other in others:
            other.transmit(b"\x40more", to)
    free = [each for each in group.data if each is not flooded]
    assert [each.drops() for each in free] == [0] * len(free)
    assert not all(is_empty(each) for each in free)


@FAMILIES
def test_drops_are_summed_over_all_sockets(family: Family, host: str, client: socket.socket) -> None:
    counters = UdpCounters()
    with opened(family, host, counters=counters) as group:
        for each in all_of(group):
            each.set_receive_buffer(1)
        while not (rest_of(group).drops() and any(each.drops() for each in group.data)):
            client.sendto(b"\x40", group.data[0].getsockname())
            client.sendto(b"\0", group.data[0].getsockname())
        dropped = sum(each.drops() for each in all_of(group))
    assert counters.kernel_drops == dropped


@FAMILIES
def test_without_kernel_support_a_single_socket_gets_all_datagrams(
    monkeypatch: pytest.MonkeyPatch, client: socket.socket, family: Family, host: str
) -> None:
    def set_option(self: socket.socket, level: int, option: int, value: int | bytes) -> None:
        if option == SO_ATTACH_REUSEPORT_CBPF:
            raise OSError(errno.ENOPROTOOPT, "as Linux before 4.5 has it")
        socket.socket.setsockopt(self, level, option, value)

    monkeypatch.setattr(UdpSocket, "setsockopt", set_option, raising=False)
    before = open_descriptors()
    with opened(family, host) as group:
        assert open_descriptors() == before + 1
        assert group.rest is None
        (only,) = group.data
        # Many senders, because with several sockets the kernel could select the expected socket by chance.
        for _ in range(20):
            with udp_socket(host) as other:
                other.sendto(b"\x40", only.getsockname())
                other.sendto(b"\0", only.getsockname())
        client.sendto(b"", only.getsockname())
        assert waiting_in(only, 41) == [b"\x40", b"\0"] * 20 + [b""]
        only.transmit(b"answer", client.getsockname())
        assert client.recvfrom(10) == (b"answer", only.getsockname())
