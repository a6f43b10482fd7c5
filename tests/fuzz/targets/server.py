"""The server: what clients, peers, sockets and time do to it, in any order; whatever comes, its tables fit together."""

from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

from relay.core.addresses import AllocationId, ClientAddress, RelayedPort
from relay.core.commands import BindPort, Command, Drained, FreeAllocation, SendToClient, SendToPeer
from relay.core.events import CORE_EVENTS
from relay.core.instant import Instant
from relay.core.lifecycle import BindRefusal
from relay.core.server import Server
from relay.core.trains import Arrival, cut
from tests.fuzz.reader import Reader
from tests.fuzz.relays import CHANNEL, CONFIG, HOSTS, PORTS, SECRET, START, proof, username
from tests.simulation import wire
from tests.simulation.kernel import Kernel
from tests.simulation.wire import Address

MODULES = (
    "relay.core.server",
    "relay.core.requests",
    "relay.core.lifecycle",
    "relay.core.allocations",
    "relay.core.relaying",
    "relay.core.authentication",
    "relay.core.answers",
    "relay.core.nonces",
    "relay.core.deadlines",
    "relay.core.ports",
    "relay.core.peers",
    "relay.core.limiter",
    "relay.core.credentials",
)

CLIENTS: tuple[Address, ...] = (
    ("203.0.113.1", 1000),
    ("203.0.113.1", 1001),
    ("203.0.113.2", 1000),
    ("2001:db8:5::5", 1000, 0, 0),
    ("203.0.113.9", 0),
    ("203.0.113.1", 1002),
    ("2001:db8:5::6", 5000, 0, 0),
)
USERNAMES = (username("a"), username("b"), username("short", 700), username("late", -1), "no username", username("c"))
PEERS: tuple[Address, ...] = (
    ("198.51.100.1", 5000),
    ("198.51.100.2", 5000),
    ("2001:db8:9::9", 5000, 0, 0),
    (HOSTS[next(iter(HOSTS))], 50001),
    ("127.0.0.1", 5000),
    ("::ffff:127.0.0.1", 5000, 0, 0),
    ("192.0.2.1", 3478),
    ("64:ff9b::7f00:1", 5000, 0, 0),
    ("2002:7f00:1::1", 5000, 0, 0),
    ("2001:0:7f00:1::", 5000, 0, 0),
)
TCP = (wire.TRANSPORT, b"\x06\0\0\0")
EVEN_AND_NEXT = (wire.EVEN_PORT, b"\x80")
NUMBERS = (CHANNEL, CHANNEL + 1, 0x7FFF, 0x3FFF, 0x8000)
LIFETIMES = (0, 1, 600, 601, 3600, 3601, 0xFFFFFFFF)
MOMENTS = (0.0, 0.001, 1.0, 4.999, 5.0, 299.0, 300.0, 599.999, 600.0, 601.0, 900.0, 3600.0)
FAMILIES = (b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0", b"\1")
METHODS = (wire.ALLOCATE, wire.REFRESH, wire.CHANNEL_BIND, wire.CREATE_PERMISSION, wire.BINDING, 0x006, 0xFFF)
_PUBLIC = frozenset(HOSTS.values())

_ALLOCATE = bytes((1, 0, 0, 0, 0, 6))
_ALLOCATE_BOTH = bytes((1, 1, 1, 0, 0, 4))
_BOUND = bytes((7, 0))
_BIND_CHANNEL = bytes((1, 0, 0, 2, 0, 0, 0, 0))
_BIND_CHANNEL_IPV6 = bytes((1, 1, 1, 2, 0, 0, 0, 2))
_SEND = bytes((4, 0, 0, 3, 65, 66, 67, 0, 0))
_SEND_TRAIN = bytes((4, 0, 0, 3, 65, 66, 67, 0xC3, 0))
_RECEIVE = bytes((5, 1, 0, 3, 65, 66, 67, 0))
_RECEIVE_MANY = bytes((5, 1, 0, 3, 65, 66, 67, 0x63))
_REFRESH = bytes((1, 0, 0, 1, 0, 8, 4))
_DELETE = bytes((1, 0, 0, 1, 0, 8, 0))
_ASK_BARE = bytes((1, 2, 0, 4, 0x0C, 0))
_FLOOD = bytes((11, 0x9F, 0, 3, 0, 0, 0x0C, 0)) + b"\3" * 30
_FORWARD = bytes((11, 5, 1, 0, 0, 3, 65, 66, 67, 0, 3, 3, 3, 3))
_LATER, _MUCH_LATER = bytes((6, 7, 1)), bytes((6, 11, 1))
_OPEN = _ALLOCATE * 2 + _BOUND + _BIND_CHANNEL

SEEDS = (
    _OPEN + _SEND + _RECEIVE + _SEND_TRAIN + _DELETE + _SEND,
    _OPEN + _LATER + _REFRESH + _BIND_CHANNEL + _LATER + _SEND + _LATER + _BIND_CHANNEL + _MUCH_LATER + _ALLOCATE,
    _ALLOCATE_BOTH * 2 + _BOUND + _BIND_CHANNEL_IPV6 + _LATER + bytes((1, 1, 1, 1, 0, 0x18, 0, 1)) + _MUCH_LATER,
    _ALLOCATE * 2
    + bytes((9, 0, 0))
    + _BOUND
    + bytes((1, 2, 0, 0, 0, 6)) * 2
    + _BOUND
    + bytes((12, 0xD7))
    + bytes((10, 1, 10, 2)),
    _OPEN + bytes((11, 7, 1, 0, 0, 2, 65, 66, 0, 3, 3, 0, 0, 0, 0, 0, 8, 2, 3, 2, 0, 0, 2, 67, 68, 0)),
    _ASK_BARE * 30,
    _OPEN + _RECEIVE_MANY + _LATER + _RECEIVE_MANY,
    b"".join(bytes((1, 0, 0, 0, 0, which)) for which in (6, 7, 0x86, 0x82)),
    _ALLOCATE_BOTH * 2 + _BOUND + b"".join(bytes((1, 1, 1, method, 0, 0, peer)) for method in (3,) for peer in range(10)),
    _ALLOCATE * 2 + _BOUND + bytes((0, 0, 0xFC, 0, 1, 5, 0xE0, 0x21, 0x12, 0xA4, 0x42)) + bytes(1525),
    _OPEN + _FLOOD + _FORWARD + bytes((5, 1, 0, 3, 65, 66, 67, 0x23)),
    b"".join(bytes((1, client, name, 0, 0, 6)) * 2 + _BOUND for client, name in ((0, 0), (1, 1), (5, 2), (2, 2), (3, 5))),
    _ALLOCATE * 2 + _BOUND + bytes((1, 2, 1, 0, 0, 6)) * 2 + bytes((12, 0xD7)) + bytes((1, 3, 5, 0, 0, 6)) * 2,
    _OPEN + bytes((1, 0, 0, 2, 0, 0, 1, 1)) + bytes((1, 0, 0, 2, 0, 0, 2, 3)),
    bytes(range(256)),
)


def run(data: bytes) -> None:
    _Sequence(data).run()


def _network(client: Address) -> str:
    """Give the address, or the first 64 bits of it; all of IPv6 are written with two colons there."""
    return client[0].partition("::")[0] + (":0" if len(client) > 2 else "")


class _Sequence:
    """One relay, and what is done to it."""

    def __init__(self, data: bytes) -> None:
        self.reader = Reader(data)
        self.server = Server(CONFIG, Random(1))
        self.server.watch(frozenset(CORE_EVENTS))
        self.kernel = Kernel()
        self.now = START
        self.nonces: dict[Address, bytes] = {}
        self.last = b""
        self.answered: Counter[str] = Counter()
        """Answers to who has proven nothing, by the network that they went to."""
        self.waiting: list[BindPort] = []
        self.ids: list[AllocationId] = [AllocationId(0)]
        self.ports: dict[AllocationId, RelayedPort] = {}
        self.has_drained = False
        self.is_same = True
        """Nothing has happened by which tables change."""
        self._deeds: tuple[Callable[[], None], ...] = (
            self._send_raw, self._ask, self._ask, self._repeat, self._send_on_channel, self._send_from_peer, self._pass_time,
            self._report_bound, self._report_bound, self._report_refused, self._report_failed, self._send_batch, self._drain,
        )  # fmt: skip

    def run(self) -> None:
        deeds = 0
        while self.reader and deeds < 200:
            deeds += 1
            self.reader.choose(self._deeds)()
            self._settle()
        self._pass(8000.0)
        self.server.handle_timeout(self.now)
        self._settle()
        tables = self.server.allocations
        held = (tables.by_id, tables.by_client, tables.by_username, tables.live_channels, tables.live_peers)
        left = [each for each in (*held, tables.deadlines, self.ports, self.kernel.by_channel) if len(each)]
        assert left == []
        assert self.server.poll_timeout() is None

    # Deeds.

    def _send_raw(self) -> None:
        self._send(self.reader.choose(CLIENTS), self.reader.blob())

    def _ask(self) -> None:
        self._send(*self._request())

    def _repeat(self) -> None:
        """Send the last request again, from anywhere, in part or with a byte changed."""
        data = bytearray(self.last)
        kind = self.reader.byte() % 4
        if kind == 1 and data:
            data[self.reader.short() % len(data)] ^= self.reader.byte()
        elif kind == 2:
            del data[self.reader.short() :]
        self._send(self.reader.choose(CLIENTS), bytes(data))

    def _request(self) -> tuple[Address, bytes]:
        reader = self.reader
        client, name, method = reader.choose(CLIENTS), reader.choose(USERNAMES), reader.choose(METHODS)
        how = reader.byte()
        transaction = bytes((how & 3,)) * 12
        attributes = list(self._attributes(method, transaction))
        if how & 0x0C != 0x0C:
            nonce = self.nonces.get(client, b"") if how & 0x30 != 0x30 else reader.take(16)
            attributes += proof(name, nonce)
            if how & 0x40:
                del attributes[reader.byte() % len(attributes)]
        key = wire.long_term_key(name, SECRET) if ":" in name else b"key"
        if how & 0x0C == 0x08:
            key = b"wrong"
        self.last = wire.write(wire.REQUEST, method, transaction, attributes, key, fingerprint=bool(how & 0x80))
        return client, self.last

    def _attributes(self, method: int, transaction: bytes) -> Iterable[tuple[int, bytes]]:
        reader = self.reader
        which = reader.byte()
        if method == wire.ALLOCATE:
            yield TCP if which & 0x01 else wire.UDP
            yield from () if which & 0x02 else (wire.DUAL,)
            yield from () if which & 0x04 else (wire.EVEN,)
            yield from (EVEN_AND_NEXT,) if which & 0x80 else ()
        if method == wire.CHANNEL_BIND:
            yield wire.CHANNEL_NUMBER, reader.choose(NUMBERS).to_bytes(2, "big") + b"\0\0"
        if method in (wire.CHANNEL_BIND, wire.CREATE_PERMISSION):
            yield wire.PEER_ADDRESS, wire.address(reader.choose(PEERS), transaction)
        if which & 0x08:
            yield wire.LIFETIME, reader.choose(LIFETIMES).to_bytes(4, "big")
        if which & 0x10:
            yield wire.REQUESTED_FAMILY, reader.choose(FAMILIES)
        if which & 0x20:
            yield wire.ADDITIONAL_FAMILY, reader.choose(FAMILIES)
        if which & 0x40:
            yield reader.short(), reader.blob()

    def _channel_data(self) -> tuple[bytes, int]:
        """Make ChannelData, or a train of it."""
        reader = self.reader
        number, payload, more = reader.choose(NUMBERS), reader.blob(), reader.byte()
        frame = wire.channel_data(number, payload)
        if more < 0xC0:
            return frame, 0
        count = more & 7
        return frame * (count + 1) + frame[: more >> 3 & 7], len(frame)

    def _send_on_channel(self) -> None:
        client = self.reader.choose(CLIENTS)
        data, segment = self._channel_data()
        self._take([(data, client, segment, self.reader.byte())])

    def _send_from_peer(self) -> None:
        reader = self.reader
        allocation, peer, data, more = reader.choose(self.ids), reader.choose(PEERS), reader.blob(), reader.byte()
        segment = more & 0x1F if more >= 0xC0 and data else 0
        arrival = (data, peer, segment, more & 0xFF)
        arrivals = [arrival] * (1 + (more & 3) if more & 0x20 else 1)
        if more & 0x40 or self.server.forward_to_client(arrivals, self.now.monotonic, allocation) is None:
            if len(arrivals) > 1:
                self.server.handle_peer_arrivals(allocation, iter(arrivals), self.now)
            else:
                self.server.handle_peer_arrival(allocation, arrival, self.now)

    def _send_batch(self) -> None:
        reader = self.reader
        arrivals: list[Arrival] = []
        how = reader.byte()
        for _ in range(how & 0x1F):
            kind = reader.byte() & 3
            if kind == 0:
                client, data = self._request()
                arrivals.append((data, client, 0, 0))
            elif kind == 3 and arrivals:
                arrivals.append(arrivals[-1])
            else:
                client = reader.choose(CLIENTS)
                data, segment = self._channel_data()
                arrivals.append((data, client, segment, kind))
        self._take(arrivals, is_flood=how >= 0x80)

    def _pass_time(self) -> None:
        self._pass(self.reader.choose(MOMENTS))
        if self.reader.flag():
            self.server.handle_timeout(self.now)
            at = self.server.poll_timeout()
            assert at is None or at > self.now.monotonic

    def _report_bound(self) -> None:
        which = self.reader.byte()
        if self.waiting:
            bind = self.waiting.pop(which % len(self.waiting))
            self.server.handle_bound(bind.allocation, self.now)

    def _report_refused(self) -> None:
        kind, which = self.reader.choose((BindRefusal.PORT, BindRefusal.MACHINE)), self.reader.byte()
        if self.waiting:
            bind = self.waiting.pop(which % len(self.waiting))
            self.server.handle_bind_refused(bind.allocation, kind, self.now)

    def _report_failed(self) -> None:
        self.server.handle_allocation_failed(self.reader.choose(self.ids), self.now)

    def _drain(self) -> None:
        # Seldom: nothing much happens afterwards.
        if self.reader.byte() == 0xD7:
            self.server.handle_drain(self.now)

    def _send(self, client: Address, data: bytes) -> None:
        self._take([(data, client, 0, 0)])

    def _take(self, arrivals: list[Arrival], *, is_flood: bool = False) -> None:
        mark = len(self.server.allocations.by_id)
        if arrivals and self.server.forward_to_peer(arrivals, self.now.monotonic) is not None:
            return
        if len(arrivals) == 1:
            data, client, *_ = arrivals[0]
            self.server.handle_client_arrival(arrivals[0], self.now)
            self._settle(about=(data, client) if mark == len(self.server.allocations.by_id) else None)
        else:
            self.server.handle_client_arrivals(iter(arrivals), self.now, is_flood=is_flood)

    def _pass(self, seconds: float) -> None:
        self.now = Instant(self.now.monotonic + seconds, self.now.unix + seconds)
        self.is_same = False

    # What must hold.

    def _settle(self, about: tuple[bytes, Address] | None = None) -> None:
        while commands := self.server.drain():
            self.kernel.take(commands)
            for command in commands:
                self._check(command, about)
                self.is_same = self.is_same and isinstance(command, SendToPeer)
        if not self.is_same:
            self.is_same = True
            self._check_tables()

    def _check(self, command: Command, about: tuple[bytes, Address] | None) -> None:
        match command:
            case SendToClient(data, client, segment):
                assert client[1] != 0
                assert all(len(each) <= 65507 for each in cut(data, segment))
                if data[0] < 64:
                    self._check_answer(data, client, about)
            case SendToPeer(allocation, _, peer):
                assert allocation in self.ports
                assert CONFIG.peers.rule_against(peer) is None
            case BindPort(allocation, port):
                assert port in PORTS
                assert port not in self.ports.values() or self.ports.get(allocation) == port
                self.ports[allocation] = port
                self.waiting.append(command)
                self.ids.append(allocation)
            case FreeAllocation(allocation):
                del self.ports[allocation]
                self.waiting = [each for each in self.waiting if each.allocation != allocation]
            case Drained():
                assert not self.has_drained
                assert not self.server.allocations.by_id
                self.has_drained = True
            case _:
                pass

    def _check_answer(self, data: bytes, client: ClientAddress, about: tuple[bytes, Address] | None) -> None:
        answer = wire.read(data)
        assert answer is not None
        nonce = answer.get(wire.NONCE)
        if nonce is not None:
            self.nonces[client] = nonce
        if answer.method == wire.BINDING or answer.code in (401, 420, 438):
            network = _network(client)
            self.answered[network] += 1
            earned = CONFIG.unauthenticated_rate * (self.now.monotonic - START.monotonic)
            # Half a token is for rounding.
            assert self.answered[network] <= CONFIG.unauthenticated_burst + earned + 0.5
        if about is None:
            return
        request, source = about
        if source != client:
            # Time has passed, and with it the patience for somebody else's sockets.
            assert (answer.method, answer.code) == (wire.ALLOCATE, 508)
            return
        headers = 28 if len(client) == 2 else 48
        if answer.method == wire.BINDING or answer.code in (400, 401, 420, 438):
            # Nobody has proven to be there: what they send may have another's address on it.
            assert len(data) + headers <= 2 * (len(request) + headers)

    def _check_tables(self) -> None:
        tables, ports = self.server.allocations, self.server._lifecycle._ports
        held = list(tables.by_id.values())
        assert {each.id for each in held} == self.ports.keys()
        assert {each.client: each for each in held} == tables.by_client
        assert {each.username: each for each in held} == tables.by_username
        assert len(ports) + sum(1 + len(each.refused_ports) for each in held) == len(PORTS)
        assert all(self.ports[each.id] == each.port for each in held)
        assert len(held) <= CONFIG.max_allocations
        assert Counter(_network(each.client) for each in held) == Counter(tables.by_network)
        assert all(count <= (CONFIG.max_allocations_per_address or count) for count in tables.by_network.values())
        live = [(each, channel) for each in held for channel in each.channels.values() if channel.live]
        assert {(each.client, channel.number): channel for each, channel in live} == tables.live_channels
        assert {(each.id, channel.peer): channel for each, channel in live} == tables.live_peers
        assert all(each.channels.keys() == {c.number for c in each.peers.values()} for each in held)
        assert all(len(each.channels) <= CONFIG.max_channels for each in held)
        assert len(tables.deadlines) == len(held) + sum(len(each.channels) for each in held)
        kernel = {key: (entry.port, entry.peer, entry.until) for key, entry in self.kernel.by_channel.items()}
        assert kernel == {
            (each.client, channel.number): (
                each.port,
                channel.peer,
                min(tables.deadlines[each.id, channel.number], tables.deadlines[each.id, None]),
            )
            for each, channel in live
        }
