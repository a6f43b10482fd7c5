"""GSO batches through the program, between three machines: the same datagrams arrive as without batches.

The machines are network namespaces, with the client on one side of the relay and the peers on the other side. Their
links use GRO like network cards.
"""

import contextlib
import functools
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import pytest
from hypothesis import Phase, example, given
from hypothesis import strategies as st

from relay.core.addresses import Family, SocketAddress, socket_address
from relay.core.credentials import RelaySecret, mint
from relay.net.udp import RECEIVE_BUFFER
from tests.support.examples import examples
from tests.support.machine import Machine, put_first, wait_until_up
from tests.support.program import Program
from tests.support.requirements import HAS_IPV6, needs_ipv6
from tests.support.turn_client import TurnClient
from tests.support.udp import CLASS_OPTIONS, SO_RCVBUFFORCE, SOL_UDP, UDP_GRO, UDP_SEGMENT, receive_whole
from tests.support.waiting import wait_until

CLIENT = {Family.IPV4: "10.77.1.2", Family.IPV6: "fd77:1::2"}
RELAY = {Family.IPV4: "10.77.1.1", Family.IPV6: "fd77:1::1"}
PEER = {Family.IPV4: "10.77.2.2", Family.IPV6: "fd77:2::2"}
FAMILIES = [
    pytest.param((one, other), marks=needs_ipv6 if Family.IPV6 in (one, other) else (), id=f"{one.name}-{other.name}")
    for one in Family
    for other in Family
]
LARGEST = 1400
"""Maximum payload for the MTU of a link."""
SECRET = "secret of the trains"
END = b"the end of it"
LOOK_AFTER = 0.2
"""Seconds without data until the test checks whether the relay has dropped packets."""
LOST_AFTER = 10
"""Seconds until a packet counts as lost."""

T = TypeVar("T")

Pair: TypeAlias = tuple[Family, Family]


class Network(NamedTuple):
    """Three machines in a row."""

    client: Machine
    relay: Machine
    peer: Machine


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no trains are tested between machines: {' and '.join(missing)} not installed (iproute2, util-linux)")
    families = Family if HAS_IPV6 else (Family.IPV4,)
    with contextlib.ExitStack() as stack:
        try:
            made = []
            for _ in Network._fields:
                made.append(Machine())
                stack.callback(made[-1].close)
        except OSError as error:
            pytest.skip(f"no trains are tested between machines: namespaces take root ({error.strerror})")
        machines = Network(*made)
        for link, machine in (("toclient", machines.client), ("topeer", machines.peer)):
            machines.relay.run(
                *("ip", "link", "add", link, "type", "veth", "peer", "name", "torelay", "netns", machine.path)
            )
        far = {family: PEER[family][:-1] + "1" for family in families}
        machines.relay.configure(toclient={each: RELAY[each] for each in families}, topeer=far)
        machines.client.configure(torelay={each: CLIENT[each] for each in families})
        machines.peer.configure(torelay={each: PEER[each] for each in families})
        for family in families:
            machines.peer.run("ip", "route", "add", "default", "via", far[family])
        wait_until_up(*machines)
        yield machines


@pytest.fixture(scope="module")
def program(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A relay on the middle machine."""
    secret = tmp_path_factory.mktemp("relay") / "secret"
    secret.write_text(SECRET)
    hosts = tuple(RELAY.values()) if HAS_IPV6 else (RELAY[Family.IPV4],)
    with network.relay.entered():
        started = Program("--relay-secret-file", str(secret), hosts=hosts)
    try:
        started.wait_until_ready()
        put_first(started.process.pid)
        yield started
    finally:
        started.close()


class DisturbedError(Exception):
    """The relay has dropped packets, because this machine is busy."""


class Attempts:
    """Runs checks without tolerance for loss, and repeats a check if the relay has dropped packets.

    A preempted relay shrinks its receive buffers until one second passes without drops. The next attempt waits until the
    buffers are large again.
    """

    def __init__(self, relay: Machine, program: Program) -> None:
        self.ways: list[Way] = []
        """Flows for datagrams."""
        self._relay = relay
        self._program = program
        self._dropped = program.dropped()

    def __call__(self, attempt: Callable[[], None]) -> None:
        for _ in range(4):
            try:
                attempt()
            except (AssertionError, TimeoutError):
                if not self._has_dropped():
                    raise
            except DisturbedError:
                pass
            else:
                return
            wait_until(self._is_calm)
            self._has_dropped()
        attempt()

    def read(self, reader: Callable[[], T]) -> T:
        """Read expected data from a socket with a timeout of `LOOK_AFTER`.

        Raises:
            DisturbedError: no data arrives, and the relay has dropped packets.
            TimeoutError: no data arrives, without drops in the relay.
        """
        until = time.monotonic() + LOST_AFTER
        while True:
            try:
                return reader()
            except TimeoutError as error:
                if self._has_dropped():
                    raise DisturbedError from error
                if time.monotonic() > until:
                    raise

    def _is_calm(self) -> bool:
        """Send a little to each socket, so that the relay checks its buffers; return whether all buffers are large."""
        for way in self.ways:
            way.end_to_peers()
            way.end_to_client()
            way.forget()
        with self._relay.entered():
            shown = subprocess.run(("ss", "-Huanm"), capture_output=True, text=True, timeout=60, check=True).stdout
        sizes = {int(port): int(size) for port, size in re.findall(r":(\d+)\s+\S+:\*\s+skmem:\(r\d+,rb(\d+)", shown)}
        ports = {3478, *(way.relayed[1] for way in self.ways)}
        return min(sizes[port] for port in ports) >= RECEIVE_BUFFER

    def _has_dropped(self) -> bool:
        """Return whether the relay has dropped packets since the last call."""
        before, self._dropped = self._dropped, self._program.dropped()
        return self._dropped > before


@pytest.fixture
def undisturbed(network: Network, program: Program) -> Attempts:
    return Attempts(network.relay, program)


def send(sock: socket.socket, datagrams: Sequence[bytes], to: SocketAddress, *, train: bool) -> None:
    """Send datagrams as a GSO batch (the last may be shorter), or separately."""
    if not train or len(datagrams) == 1:
        for each in datagrams:
            sock.sendto(each, to[:2])
        return
    segment = struct.pack("=H", len(datagrams[0]))
    sock.sendmsg([b"".join(datagrams)], [(SOL_UDP, UDP_SEGMENT, segment)], 0, to[:2])


def frame(number: int, payload: bytes, padding: int = 0) -> bytes:
    return struct.pack("!HH", number, len(payload)) + payload + bytes(padding)


class Way:
    """An allocation: a client with a channel to each of some peers. Allocations may share peers."""

    def __init__(self, client: TurnClient, peers: Sequence[socket.socket], family: Family, server: SocketAddress) -> None:
        self.client = client
        self.server = server
        self.peers = peers
        (relayed,) = client.allocate(family=family)
        self.relayed: SocketAddress = relayed
        self.numbers = [0x4000 + 7 * index for index in range(len(peers))]
        for number, peer in zip(self.numbers, peers, strict=True):
            host, port, *_ = peer.getsockname()
            assert client.bind_channel(number, socket_address(host, port)) is None
        client.socket.settimeout(LOOK_AFTER)

    def end_to_peers(self) -> None:
        for number in self.numbers:
            self.client.send(number, END)

    def end_to_client(self) -> None:
        for peer in self.peers:
            peer.sendto(END, self.relayed[:2])

    def forget(self) -> None:
        """Discard received data."""
        for each in (self.client.socket, *self.peers):
            while select.select([each], [], [], 0)[0]:
                each.recv(65535)

    def at_peers(self, attempts: Attempts) -> list[list[bytes]]:
        """Return the data received by each peer, until the end marker."""
        found = []
        for peer in self.peers:
            found.append(list[bytes]())
            while True:
                try:
                    data, source = attempts.read(functools.partial(peer.recvfrom, 65535))
                except TimeoutError:
                    # The received data shows the missing data.
                    return found
                assert source[:2] == self.relayed[:2]
                if data == END:
                    break
                found[-1].append(data)
        return found

    def at_client(self, attempts: Attempts) -> list[list[bytes]]:
        """Return the data received by the client on each channel, until all end markers."""
        found: dict[int, list[bytes]] = {number: [] for number in self.numbers}
        ended = set[int]()
        while len(ended) < len(found):
            try:
                number, data = attempts.read(self.client.receive)
            except TimeoutError:
                break
            assert number not in ended, "something came after the end"
            if data == END:
                ended.add(number)
            else:
                found[number].append(data)
        return list(found.values())


WayMaker: TypeAlias = Callable[[Pair], tuple[Way, Way]]


@pytest.fixture
def two_ways(network: Network, program: Program, undisturbed: Attempts) -> Iterator[WayMaker]:
    """Make two allocations of one relay with channels to the same three peers."""
    assert program.process.poll() is None
    with contextlib.ExitStack() as stack:

        def make(families: Pair) -> tuple[Way, Way]:
            server = (RELAY[families[0]], 3478)
            with network.peer.entered():
                peers = [stack.enter_context(udp_socket(PEER[families[1]])) for _ in range(3)]
            clients = []
            with network.client.entered():
                for _ in range(2):
                    credential = mint(RelaySecret(SECRET), int(time.time()) + 600, os.urandom(8).hex())
                    clients.append(stack.enter_context(TurnClient(server, credential, CLIENT[families[0]])))
            for each in clients:
                each.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
            one, other = (Way(client, peers, families[1], socket_address(*server)) for client in clients)
            undisturbed.ways += (one, other)
            return one, other

        yield make


def udp_socket(host: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
    opened.bind((host, 0))
    opened.settimeout(LOOK_AFTER)
    return opened


class Burst(NamedTuple):
    """Datagrams sent together. Numbers make payloads distinct, if their lengths allow."""

    size: int
    """Payload bytes of each datagram except the last."""
    number: int
    channel: int
    last: int
    """Bytes by which the last datagram is shorter, if possible."""
    odd: dict[int, tuple[str, int]]
    """Datagrams that are not full-size ChannelData, by index from the start or the end."""


OTHER_CHANNEL, PADDED, UNBOUND, TOO_LONG, BINDING = "other channel", "padded", "unbound", "too long", "binding"

SIZES = st.sampled_from([0, 1, 3, 4, 16, 100, 1200, LARGEST]) | st.integers(0, LARGEST)
BURSTS = st.builds(
    Burst,
    size=SIZES,
    number=st.just(1) | st.integers(1, 45),
    channel=st.integers(0, 2),
    last=st.just(0) | st.integers(0, LARGEST),
    odd=st.dictionaries(
        st.integers(-3, 45),
        st.tuples(st.sampled_from([OTHER_CHANNEL, PADDED, UNBOUND, TOO_LONG, BINDING]), st.integers(0, LARGEST)),
        max_size=4,
    ),
)
SEQUENCES = st.lists(BURSTS, min_size=1, max_size=8)
# Failures are not shrunk, because each lost datagram costs a timeout.
checked = examples(10, phases=(Phase.explicit, Phase.generate))


MOST_DATAGRAMS, MOST_BYTES = 60, 90_000
"""Approximate size of a read of the relay. If preempted, the relay may drop packets of larger bursts."""


def rounds(bursts: list[Burst]) -> Iterator[list[Burst]]:
    """Divide bursts into groups that may be in flight together."""
    together: list[Burst] = []
    for burst in bursts:
        sent = [*together, burst]
        if sum(each.number for each in sent) > MOST_DATAGRAMS or sum(each.number * each.size for each in sent) > MOST_BYTES:
            yield together
            sent = [burst]
        together = sent
    yield together


class Stamps:
    """Return distinct payloads."""

    def __init__(self) -> None:
        self._count = 0

    def payload(self, length: int) -> bytes:
        self._count += 1
        return (b"%07d " % self._count * (length // 8 + 1))[:length]


def binding_request(length: int) -> bytes:
    """Return a Binding request of a length, padded with a comprehension-optional attribute."""
    attribute = struct.pack("!HH", 0xFF00, length - 24) + bytes(length - 24)
    return struct.pack("!HHI", 0x0001, length - 20, 0x2112A442) + os.urandom(12) + attribute


def from_client(burst: Burst, way: Way, stamps: Stamps, expected: list[list[bytes]]) -> tuple[list[bytes], int]:
    """Return a client's datagrams and its number of responses; add the data expected by peers."""
    datagrams = []
    answers = 0
    for place in range(burst.number):
        is_last = place == burst.number - 1
        room = burst.size - min(burst.size, burst.last) * is_last
        channel, padding = burst.channel, 0
        kind, parameter = burst.odd.get(place) or burst.odd.get(place - burst.number) or ("", 0)
        if kind == OTHER_CHANNEL:
            channel = (channel + 1 + parameter) % 3
        elif kind == PADDED:
            padding = min(parameter, room)
        elif kind == BINDING and place and room >= 20 and room % 4 == 0:
            datagrams.append(binding_request(4 + room))
            answers += 1
            continue
        payload = stamps.payload(room - padding)
        if kind == UNBOUND:
            datagrams.append(frame(0x4FF0, payload))
        elif kind == TOO_LONG:
            datagrams.append(struct.pack("!HH", way.numbers[channel], room + 1 + parameter % 2) + payload)
        else:
            datagrams.append(frame(way.numbers[channel], payload, padding))
            expected[channel].append(payload)
    return datagrams, answers


@pytest.mark.parametrize("families", FAMILIES)
def test_peers_get_the_same_datagrams_from_gso_batches(two_ways: WayMaker, families: Pair, undisturbed: Attempts) -> None:
    trains, singles = two_ways(families)

    def check_round(way: Way, bursts: list[Burst], *, train: bool) -> None:
        way.forget()
        stamps, expected, answers = Stamps(), list[list[bytes]]([[], [], []]), 0
        for burst in bursts:
            datagrams, more = from_client(burst, way, stamps, expected)
            answers += more
            send(way.client.socket, datagrams, way.server, train=train)
        way.end_to_peers()
        assert way.at_peers(undisturbed) == expected, "as a train" if train else "one by one"
        for _ in range(answers):
            assert undisturbed.read(lambda: way.client.socket.recv(65535))[:2] == b"\x01\x01"

    @checked
    @given(bursts=SEQUENCES)
    @example(bursts=[Burst(100, 20, 0, 50, {-1: (OTHER_CHANNEL, 0)})])
    @example(bursts=[Burst(100, 20, 0, 50, {-1: (PADDED, 1)})])
    @example(bursts=[Burst(100, 20, 0, 0, {3: (OTHER_CHANNEL, 0), 5: (BINDING, 0), 7: (UNBOUND, 0), 9: (TOO_LONG, 0)})])
    @example(bursts=[Burst(100, 20, 0, 100, {}), Burst(0, 40, 0, 0, {})])
    def check(bursts: list[Burst]) -> None:
        for together in rounds(bursts):
            undisturbed(functools.partial(check_round, trains, together, train=True))
            undisturbed(functools.partial(check_round, singles, together, train=False))

    check()


@pytest.mark.parametrize("families", FAMILIES)
def test_clients_get_the_same_datagrams_from_gso_batches(two_ways: WayMaker, families: Pair, undisturbed: Attempts) -> None:
    trains, singles = two_ways(families)

    def check_round(way: Way, bursts: list[Burst], *, train: bool) -> None:
        way.forget()
        stamps, expected = Stamps(), list[list[bytes]]([[], [], []])
        for burst in bursts:
            datagrams = [stamps.payload(burst.size) for _ in range(burst.number - 1)]
            datagrams.append(stamps.payload(burst.size - min(burst.size, burst.last)))
            expected[burst.channel] += datagrams
            # A GSO batch cannot contain empty datagrams.
            send(way.peers[burst.channel], datagrams, way.relayed, train=train and len(datagrams[-1]) > 0)
        way.end_to_client()
        assert way.at_client(undisturbed) == expected, "as a train" if train else "one by one"

    @checked
    @given(bursts=SEQUENCES)
    def check(bursts: list[Burst]) -> None:
        for together in rounds(bursts):
            undisturbed(functools.partial(check_round, trains, together, train=True))
            undisturbed(functools.partial(check_round, singles, together, train=False))

    check()


@pytest.mark.parametrize("middle", [1, 10, 21])
def test_a_batch_with_a_request_first_is_answered_and_relayed(
    two_ways: WayMaker, undisturbed: Attempts, middle: int
) -> None:
    """Data in the same batch as a request arrives at the reader of requests."""
    way, _ = two_ways((Family.IPV4, Family.IPV4))
    stamps = Stamps()
    sent = [stamps.payload(100) for _ in range(20)]
    datagrams = [frame(way.numbers[0], each) for each in sent]
    for place in (0, middle):
        datagrams.insert(place, binding_request(104))

    def check() -> None:
        way.forget()
        send(way.client.socket, datagrams, way.server, train=True)
        assert [undisturbed.read(lambda: way.peers[0].recv(65535)) for _ in sent] == sent
        for _ in range(2):
            assert undisturbed.read(lambda: way.client.socket.recv(65535))[:2] == b"\x01\x01"

    undisturbed(check)


def test_single_empty_datagrams_are_relayed(two_ways: WayMaker, undisturbed: Attempts) -> None:
    way, _ = two_ways((Family.IPV4, Family.IPV4))

    def check() -> None:
        way.forget()
        for _ in range(MOST_DATAGRAMS):
            way.client.send(way.numbers[0], b"")
        way.end_to_peers()
        assert way.at_peers(undisturbed) == [[b""] * MOST_DATAGRAMS, [], []]

    undisturbed(check)


@pytest.mark.parametrize("families", FAMILIES)
def test_a_batch_leaves_the_relay_as_a_batch(two_ways: WayMaker, families: Pair, undisturbed: Attempts) -> None:
    """A batch costs as much as one datagram, on the next machines too."""
    way, _ = two_ways(families)
    peer, client = way.peers[0], way.client.socket
    peer.setsockopt(SOL_UDP, UDP_GRO, 1)
    client.setsockopt(SOL_UDP, UDP_GRO, 1)
    stamps = Stamps()
    datagrams = [stamps.payload(1200) for _ in range(40)]

    def check() -> None:
        way.forget()
        for padding in (0, 3):
            send(client, [frame(way.numbers[0], each, padding) for each in datagrams], way.server, train=True)
            assert undisturbed.read(lambda: receive_whole(peer)) == (b"".join(datagrams), 1200)
        send(peer, datagrams, way.relayed, train=True)
        assert undisturbed.read(lambda: receive_whole(client)) == (
            b"".join(frame(way.numbers[0], each) for each in datagrams),
            1204,
        )

    undisturbed(check)


# Expedited forwarding; ECT(0), ECT(1) and CE; all bits; no bits.
CLASSES = [0xB8, 0x01, 0x02, 0x03, 0xFF, 0]


def receive_with_class(sock: socket.socket) -> tuple[bytes, int]:
    data, control, *_ = sock.recvmsg(65535, 256)
    # One byte for IPv4, an int for IPv6.
    return data, next(
        int.from_bytes(value, "little") for _, kind, value in control if kind in (socket.IP_TOS, socket.IPV6_TCLASS)
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("families", FAMILIES)
def test_dscp_and_ecn_are_preserved_for_each_datagram(
    two_ways: WayMaker,
    families: Pair,
    undisturbed: Attempts,
    train: bool,  # noqa: FBT001
) -> None:
    """Check both directions, with different values in flight together."""
    way, _ = two_ways(families)
    peer, client = way.peers[0], way.client.socket
    for sock, family in ((client, families[0]), (peer, families[1])):
        level, _, tell = CLASS_OPTIONS[family]
        sock.setsockopt(level, tell, 1)

    def check() -> None:
        way.forget()
        stamps = Stamps()
        to_peer, to_client = [], []
        for traffic_class in CLASSES * 3:
            for sock, family in ((client, families[0]), (peer, families[1])):
                level, option, _ = CLASS_OPTIONS[family]
                sock.setsockopt(level, option, traffic_class)
            there = [stamps.payload(500) for _ in range(3)]
            send(client, [frame(way.numbers[0], each) for each in there], way.server, train=train)
            to_peer += [(each, traffic_class) for each in there]
            back = [stamps.payload(500) for _ in range(3)]
            send(peer, back, way.relayed, train=train)
            to_client += [(frame(way.numbers[0], each), traffic_class) for each in back]
        assert [undisturbed.read(lambda: receive_with_class(peer)) for _ in to_peer] == to_peer
        assert [undisturbed.read(lambda: receive_with_class(client)) for _ in to_client] == to_client

    undisturbed(check)


@contextlib.contextmanager
def narrow(relay: Machine, link: str, far: Machine) -> Iterator[None]:
    """Set the MTU of a link to 1280 bytes, like a tunnel."""
    for machine, name in ((relay, link), (far, "torelay")):
        machine.set_mtu(name, 1280)
    try:
        yield
    finally:
        for machine, name in ((relay, link), (far, "torelay")):
            machine.set_mtu(name, 1500)


@pytest.mark.parametrize("families", FAMILIES)
def test_batches_above_the_mtu_of_the_next_link_arrive(
    network: Network, two_ways: WayMaker, families: Pair, undisturbed: Attempts
) -> None:
    """The kernel rejects a batch above the MTU, but fragments single datagrams."""
    way, _ = two_ways(families)
    stamps = Stamps()
    bursts = [[stamps.payload(size) for _ in range(15)] for size in (LARGEST, 1000, LARGEST, 1250)]
    expected = [[each for burst in bursts for each in burst], list[bytes](), list[bytes]()]

    def check_to_peers() -> None:
        way.forget()
        for burst in bursts:
            send(way.client.socket, [frame(way.numbers[0], each) for each in burst], way.server, train=True)
        way.end_to_peers()
        assert way.at_peers(undisturbed) == expected

    def check_to_client() -> None:
        way.forget()
        for burst in bursts:
            send(way.peers[0], burst, way.relayed, train=True)
        way.end_to_client()
        assert way.at_client(undisturbed) == expected

    with narrow(network.relay, "topeer", network.peer):
        undisturbed(check_to_peers)
    with narrow(network.relay, "toclient", network.client):
        undisturbed(check_to_client)
