"""Several sockets on one port: what each of them gets, and that no other one shares the port."""

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
from relay.net.steering import Steered, open_steered
from relay.net.udp import UdpCounters, UdpSocket
from tests.conftest import needs_ipv6
from tests.turn_client import TIMEOUT, udp_socket

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
def steered(family: Family, host: str) -> Iterator[Steered]:
    with opened(family, host) as sockets:
        yield sockets


@contextlib.contextmanager
def opened(
    family: Family, host: str, port: int = 0, threshold: int = THRESHOLD, counters: UdpCounters | None = None
) -> Iterator[Steered]:
    steered = open_steered(family, host, port, threshold, counters or UdpCounters())
    with contextlib.ExitStack() as stack:
        for each in all_of(steered):
            stack.enter_context(each)
        yield steered


def all_of(steered: Steered) -> list[UdpSocket]:
    return [*steered.data, *(() if steered.rest is None else (steered.rest,))]


def rest_of(steered: Steered) -> UdpSocket:
    assert steered.rest is not None
    return steered.rest


def waiting_in(receiving: UdpSocket, count: int) -> list[bytes]:
    """The next ones, and there are no more."""
    data = [receiving.recv(65535) for _ in range(count)]
    assert is_empty(receiving)
    return data


def is_empty(receiving: UdpSocket) -> bool:
    try:
        receiving.recv(65535, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    return False


def busy_one(steered: Steered) -> UdpSocket:
    """The one of the sockets for data at which something waits; there is one."""
    readable, _, _ = select.select(steered.data, (), (), TIMEOUT)
    (busy,) = readable
    return busy


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def assert_refused(family: Family, host: str, port: int, error: int) -> None:
    """A pair can't be opened, and nothing of it is left."""
    before = open_descriptors()
    with pytest.raises(OSError, match=os.strerror(error)) as caught:
        open_steered(family, host, port, THRESHOLD, UdpCounters())
    assert caught.value.errno == error
    assert open_descriptors() == before


@FAMILIES
def test_what_begins_with_the_threshold_or_more_is_data_and_all_else_is_the_rest(
    steered: Steered, client: socket.socket
) -> None:
    for datagram in sorted([*DATA, *REST], key=len):
        client.sendto(datagram, steered.data[0].getsockname())
    # Of one sender, so they are all in one, in their order.
    assert waiting_in(busy_one(steered), len(DATA)) == DATA
    assert waiting_in(rest_of(steered), len(REST)) == REST
    assert all(is_empty(each) for each in steered.data)


@FAMILIES
@pytest.mark.parametrize("threshold", [1, 0x80, 0xFF])
def test_the_threshold_is_the_callers(client: socket.socket, family: Family, host: str, threshold: int) -> None:
    with opened(family, host, threshold=threshold) as steered:
        for byte in (threshold, threshold - 1):
            client.sendto(bytes((byte,)), steered.data[0].getsockname())
        assert waiting_in(busy_one(steered), 1) == [bytes((threshold,))]
        assert waiting_in(rest_of(steered), 1) == [bytes((threshold - 1,))]


def where_they_come(steered: Steered, clients: Sequence[UdpSocket]) -> list[int]:
    """Have each send several times, some of it no data, and give which socket it is that gets all the data of each."""
    data = (b"\x401", b"\x402", b"\x7f3")
    for each in data:
        for client in clients:
            client.transmit(each, steered.data[0].getsockname())
            client.transmit(b"\0", steered.data[0].getsockname())
    assert waiting_in(rest_of(steered), len(data) * len(clients)) == [b"\0"] * len(data) * len(clients)
    came: dict[Hashable, list[tuple[int, bytes]]] = {client.getsockname(): [] for client in clients}
    for _ in range(len(data) * len(clients)):
        readable, _, _ = select.select(steered.data, (), (), TIMEOUT)
        received, source = readable[0].recvfrom(100)
        came[source].append((steered.data.index(readable[0]), received))
    own = [where for (where, _), *_ in came.values()]
    assert list(came.values()) == [[(where, each) for each in data] for where in own]
    return own


@FAMILIES
def test_senders_are_spread_by_port_and_each_stays_with_its_socket(steered: Steered, family: Family, host: str) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(UdpSocket(family, host, 0)) for _ in range(100)]
        assert len(set(where_they_come(steered, clients))) > 1


@pytest.mark.parametrize(("family", "host"), [(Family.IPV4, "127.0.0.1")])
def test_senders_are_spread_by_host_over_all_sockets(steered: Steered) -> None:
    # One of four sockets gets nobody of so many once in a million runs.
    hosts = sorted({str(ipaddress.IPv4Address(random.randrange(0x7F000002, 0x7FFFFFF0))) for _ in range(100)})
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(UdpSocket(Family.IPV4, hosts[0], 0)).getsockname()[1]
        clients = [stack.enter_context(UdpSocket(Family.IPV4, each, port)) for each in hosts[1:]]
        assert set(where_they_come(steered, clients)) == set(range(len(steered.data)))


@FAMILIES
def test_a_train_goes_where_its_datagrams_would(steered: Steered, family: Family, host: str) -> None:
    with UdpSocket(family, host, 0) as client:
        client.transmit(b"\x40data" * 3, steered.data[0].getsockname(), 5)
        client.transmit(b"\0\1..." * 3, steered.data[0].getsockname(), 5)
        assert busy_one(steered).receive() == (b"\x40data" * 3, client.getsockname(), 5, 0)
        assert rest_of(steered).receive() == (b"\0\1..." * 3, client.getsockname(), 5, 0)


@FAMILIES
def test_what_they_send_comes_from_one_address(steered: Steered, client: socket.socket, host: str) -> None:
    sockets = all_of(steered)
    address = sockets[0].getsockname()
    assert address[0] == host
    for each in sockets:
        assert each.transmit(b"x", client.getsockname()) is None
    assert [client.recvfrom(10)[1] for _ in sockets] == [address] * len(sockets)
    assert {each.getsockname() for each in sockets} == {address}


@FAMILIES
def test_a_port_that_is_asked_for_is_had(family: Family, host: str) -> None:
    with UdpSocket(family, host, 0) as free:
        port = free.getsockname()[1]
    with opened(family, host, port) as steered:
        assert {each.getsockname()[1] for each in all_of(steered)} == {port}


@FAMILIES
@pytest.mark.parametrize("shares", [False, True])
def test_a_port_that_any_other_socket_has_is_in_use(family: Family, host: str, *, shares: bool) -> None:
    with UdpSocket(family, host, 0, shares_port=shares) as other:
        port = other.getsockname()[1]
        assert_refused(family, host, port, errno.EADDRINUSE)
    with opened(family, host, port) as steered:
        assert steered.rest is not None


@FAMILIES
def test_a_port_that_others_have_by_the_same_means_is_in_use(steered: Steered, family: Family, host: str) -> None:
    assert_refused(family, host, steered.data[0].getsockname()[1], errno.EADDRINUSE)


def test_an_address_that_is_not_of_this_machine_is_an_error_and_leaves_nothing_open() -> None:
    assert_refused(Family.IPV4, "198.51.100.77", 0, errno.EADDRNOTAVAIL)


@FAMILIES
def test_data_takes_no_room_from_the_rest(steered: Steered, client: socket.socket) -> None:
    to = steered.data[0].getsockname()
    for each in steered.data:
        each.set_receive_buffer(1)
    while not any(each.drops() for each in steered.data):
        client.sendto(b"\x40data", to)
    for request in REST:
        client.sendto(request, to)
    assert waiting_in(rest_of(steered), len(REST)) == REST
    assert rest_of(steered).drops() == 0


@FAMILIES
def test_a_sender_that_floods_takes_no_room_from_those_at_other_sockets(steered: Steered, family: Family, host: str) -> None:
    to = steered.data[0].getsockname()
    with contextlib.ExitStack() as stack:
        flooding, *others = (stack.enter_context(UdpSocket(family, host, 0)) for _ in range(50))
        flooding.transmit(b"\x40data", to)
        flooded = busy_one(steered)
        flooded.set_receive_buffer(1)
        while not flooded.drops():
            flooding.transmit(b"\x40data", to)
        for other in others:
            other.transmit(b"\x40more", to)
    free = [each for each in steered.data if each is not flooded]
    assert [each.drops() for each in free] == [0] * len(free)
    assert not all(is_empty(each) for each in free)


@FAMILIES
def test_all_of_them_count_together(family: Family, host: str, client: socket.socket) -> None:
    counters = UdpCounters()
    with opened(family, host, counters=counters) as steered:
        for each in all_of(steered):
            each.set_receive_buffer(1)
        while not (rest_of(steered).drops() and any(each.drops() for each in steered.data)):
            client.sendto(b"\x40", steered.data[0].getsockname())
            client.sendto(b"\0", steered.data[0].getsockname())
        dropped = sum(each.drops() for each in all_of(steered))
    assert counters.kernel_drops == dropped


@FAMILIES
def test_where_the_kernel_can_not_steer_one_socket_gets_all(
    monkeypatch: pytest.MonkeyPatch, client: socket.socket, family: Family, host: str
) -> None:
    def set_option(self: socket.socket, level: int, option: int, value: int | bytes) -> None:
        if option == SO_ATTACH_REUSEPORT_CBPF:
            raise OSError(errno.ENOPROTOOPT, "as Linux before 4.5 has it")
        socket.socket.setsockopt(self, level, option, value)

    monkeypatch.setattr(UdpSocket, "setsockopt", set_option, raising=False)
    before = open_descriptors()
    with opened(family, host) as steered:
        assert open_descriptors() == before + 1
        assert steered.rest is None
        (only,) = steered.data
        # From many, or the kernel might happen to choose the one that is left of several.
        for _ in range(20):
            with udp_socket(host) as other:
                other.sendto(b"\x40", only.getsockname())
                other.sendto(b"\0", only.getsockname())
        client.sendto(b"", only.getsockname())
        assert waiting_in(only, 41) == [b"\x40", b"\0"] * 20 + [b""]
        only.transmit(b"answer", client.getsockname())
        assert client.recvfrom(10) == (b"answer", only.getsockname())
