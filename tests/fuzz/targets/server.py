"""The server: inputs of clients, peers, sockets and time in any order. Its tables must remain consistent."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random

from relay.core.addresses import AllocationId, ClientAddress, RelayedPort, host_number
from relay.core.allocation import Allocation, AllocationState, ChannelBinding
from relay.core.commands import BindPort, Command, Drained, FreeAllocation, RemoveChannel, SendToClient, SendToPeer, cut
from relay.core.counters import FreeReason
from relay.core.data import Datagram
from relay.core.early import EARLY_DEADLINE
from relay.core.events import CORE_EVENTS, ChannelExpired, RelayedAddressDeleted
from relay.core.lifecycle import BindRefusal
from relay.core.overload import EARLY_OVERHEAD
from relay.core.server import Server
from relay.core.timestamp import Timestamp
from relay.net.grouping import grouped
from tests.fuzz.reader import Reader
from tests.fuzz.relays import (
    CHANNEL,
    CONFIG,
    EARLY_BYTES,
    EARLY_CLIENT_BYTES,
    EXPIRIES,
    HOSTS,
    KERNEL_PORTION,
    MIXED_SENDS,
    PORTS,
    SECRET,
    START,
    proof,
    small_turns,
    username,
)
from tests.simulation import wire
from tests.simulation.kernel import Kernel
from tests.simulation.wire import Address
from tests.support.core import with_rest

MODULES = (
    "relay.core.server",
    "relay.core.requests",
    "relay.core.lifecycle",
    "relay.core.allocations",
    "relay.core.data",
    "relay.core.authentication",
    "relay.core.responses",
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
    (HOSTS[next(iter(HOSTS))], 50005),
)
TCP = (wire.TRANSPORT, b"\x06\0\0\0")
EVEN_AND_NEXT = (wire.EVEN_PORT, b"\x80")
NUMBERS = (CHANNEL, CHANNEL + 1, 0x7FFF, 0x3FFF, 0x8000)
LIFETIMES = (0, 1, 600, 601, 3600, 3601, 0xFFFFFFFF)
MOMENTS = (0.0, 0.001, 1.0, 4.999, 5.0, 299.0, 300.0, 599.999, 600.0, 601.0, 900.0, 3600.0)
FAMILIES = (b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0", b"\1")
METHODS = (wire.ALLOCATE, wire.REFRESH, wire.CHANNEL_BIND, wire.CREATE_PERMISSION, wire.BINDING, 0x006, 0xFFF)
_MOST_TURNS = 100
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
_MANY = bytes((16, 0, 0))
_MIXED = bytes((13, 0, 0, 40))
_EARLY = bytes((14, 0, 0xF3, 31))
_REPLAYS = bytes((15, 0, 0, 15, 1, 0, 15, 0, 1, 15, 2, 1))
_NOW = bytes((6, 0, 1))
_TWO_CLIENTS = _ALLOCATE * 2 + _BOUND + bytes((1, 2, 5, 0, 0, 6)) * 2 + _BOUND
# The seed of the server gives these allocations the ports 50001 and 50005, which are among PEERS.
_TWO = _ALLOCATE * 2 + _BOUND + bytes((1, 2, 2, 0, 0, 6)) * 2 + _BOUND
_MEET = _TWO + bytes((1, 0, 0, 2, 0, 0, 0, 10, 1, 2, 2, 2, 0, 0, 0, 3))

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
    _MEET + _SEND + _SEND_TRAIN + bytes((4, 2, 0, 3, 65, 66, 67, 0, 0)) + _DELETE + bytes((4, 2, 0, 3, 65, 66, 67, 0, 0)),
    _OPEN + _MANY + _MIXED * 2 + bytes((13, 0, 0x1C, 90, 13, 0, 0x0C, 90, 13, 0, 2, 250, 6, 1, 1)) + _MIXED + _DELETE + _NOW,
    _ALLOCATE * 2 + _BOUND + _MIXED + _EARLY * 2 + _MANY + _EARLY + _LATER,
    _OPEN
    + _MANY
    + _REPLAYS
    + _DELETE
    + _REPLAYS
    + _ALLOCATE * 2
    + _BOUND
    + _REPLAYS
    + bytes((1, 2, 0, 0, 0, 6)) * 2
    + _REPLAYS,
    _OPEN + _MANY + bytes((6, 8, 0)) + _SEND + _RECEIVE + _MIXED + _MANY + _NOW + bytes((6, 6, 0)) + _MANY + _DELETE + _NOW,
    _OPEN + _MANY + bytes((17, 1)) + _SEND + _MANY + bytes((17, 0)) + _MANY + bytes((17, 6, 17, 7)) + _DELETE + _OPEN,
    _ALLOCATE_BOTH * 2
    + _BOUND
    + _BIND_CHANNEL_IPV6
    + bytes((16, 1, 1))
    + bytes((1, 1, 1, 1, 0, 0x18, 0, 0))
    + _NOW
    + _REPLAYS,
    _TWO_CLIENTS + bytes((16, 2, 5, 6, 2, 0)) + _BIND_CHANNEL + bytes((1, 2, 5, 1, 0, 8, 0)) + _REFRESH * 3 + _NOW,
    bytes(range(256)),
)


def run(data: bytes) -> None:
    with small_turns():
        _Sequence(data).run()


def _network(client: Address) -> str:
    """Return the IPv4 address or IPv6 /64. All IPv6 addresses of this target contain ``::``."""
    return client[0].partition("::")[0] + (":0" if len(client) > 2 else "")


class _Sequence:
    """A relay and a sequence of actions."""

    def __init__(self, data: bytes) -> None:
        self.reader = Reader(data)
        self.server = Server(CONFIG, Random(1))
        self.server.watch(frozenset(CORE_EVENTS))
        self.kernel = Kernel()
        self.now = START
        self.nonces: dict[Address, bytes] = {}
        self.last = b""
        self.answered: Counter[str] = Counter()
        """Responses to unauthenticated clients, by network."""
        self.waiting: list[BindPort] = []
        self.ids: list[AllocationId] = [AllocationId(0)]
        self.ports: dict[AllocationId, RelayedPort] = {}
        self.has_drained = False
        self.is_same = True
        """Whether the tables are unchanged."""
        self.peers = CONFIG.peers
        self.tally: Counter[str] = Counter()
        """Packets to peers and clients, effects of requests, and ends of allocations and channels."""
        self.over: list[bytes] = []
        """Requests that made or deleted an allocation or a relayed address."""
        self.largest = 0
        """Size of the largest batch as early data."""
        self.unique: dict[bytes, bool] = {}
        """Payloads that were sent once, and whether they were relayed."""
        self.mixed: Counter[tuple[Address, float]] = Counter()
        """Packets from batches of several channels, by client and moment."""
        self._deeds: tuple[Callable[[], None], ...] = (
            self._send_raw, self._ask, self._ask, self._repeat, self._send_on_channel, self._send_from_peer, self._pass_time,
            self._report_bound, self._report_bound, self._report_refused, self._report_failed, self._send_batch, self._drain,
            self._send_mixed, self._flood, self._replay, self._bind_many, self._change_addresses,
        )  # fmt: skip

    def run(self) -> None:
        deeds = 0
        while self.reader and deeds < 200:
            deeds += 1
            self.reader.choose(self._deeds)()
            self._settle()
        self._pass(8000.0)
        self._wake()
        tables = self.server.allocations
        held = (tables.by_id, tables.by_client, tables.by_username, tables.by_port, tables.live_peers)
        channels = (tables.live_channels, tables.inside_channels)
        left = [each for each in (*held, *channels, tables.deadlines, self.ports, self.kernel.by_channel) if len(each)]
        assert left == []
        assert self.server.poll_timeout() is None

    # Actions.

    def _send_raw(self) -> None:
        self._send(self.reader.choose(CLIENTS), self.reader.blob())

    def _ask(self) -> None:
        self._send(*self._request())

    def _repeat(self) -> None:
        """Repeat the last request from any client, truncated or with a changed byte."""
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
        """Return ChannelData, or a GRO batch of ChannelData."""
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
        batch: Sequence[Datagram] = [arrival] * (1 + (more & 3) if more & 0x20 else 1)
        for datagram in batch if more & 0x40 else grouped(batch):
            relayed = self.server.handle_peer_datagram(datagram, self.now.monotonic, allocation)
            self._settle([] if relayed is None else [relayed])

    def _send_batch(self) -> None:
        reader = self.reader
        arrivals: list[Datagram] = []
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
            self._wake()

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
        id_ = self.reader.choose(self.ids)
        if id_ % 2:
            self.server.handle_allocation_failed(id_, self.now)
        else:
            self.server.handle_kick(id_, self.now)

    def _drain(self) -> None:
        # Rarely, because a drain rejects most later requests.
        match self.reader.byte():
            case 0xD7:
                self.server.handle_drain(self.now)
            case 0xD8:
                self.server.handle_resume(self.now)
                self._settle()
                self.has_drained = False

    # Greedy clients.

    def _send_mixed(self) -> None:
        """Send a GRO batch of several channels, with or without Bindings among them."""
        reader = self.reader
        client, how, count = reader.choose(CLIENTS), reader.byte(), reader.byte()
        channels = 2 + (how & 1)
        # Bindings have 20 bytes, and the datagrams of a batch have the same size.
        pieces = [wire.channel_data(NUMBERS[n % channels], self._once(b"" if how & 2 else b"%16d")) for n in range(count)]
        if how & 4 and not how & 2:
            binding = wire.write(wire.REQUEST, wire.BINDING, bytes(12), ())
            pieces = [piece for each in pieces for piece in ((binding,) * (how >> 3 & 3) + (each,))]
        if len(pieces) > channels:
            before = self.tally["packets"]
            self._take([(b"".join(pieces), client, len(pieces[0]), 0)])
            self.mixed[client, self.now.monotonic] += self.tally["packets"] - before
            assert self.mixed[client, self.now.monotonic] <= MIXED_SENDS

    def _flood(self) -> None:
        """Send data of channels that may be unbound."""
        reader = self.reader
        client, how, count = reader.choose(CLIENTS), reader.byte(), reader.byte()
        size = 16 + (how & 0xF0) * 8
        frames = [
            wire.channel_data(CHANNEL + n % (1 + (how & 0xF)), self._once(b"%%%dd" % size)) for n in range(count & 0x1F)
        ]
        self._take([(each, client, 0, 0) for each in frames])
        self._check_early()

    def _once(self, form: bytes) -> bytes:
        """Return a payload that no other packet has, or an empty payload."""
        payload = form % len(self.unique) if form else form
        if payload:
            self.unique[payload] = False
        return payload

    def _replay(self) -> None:
        """Repeat a request that was handled, from any address, after everything that is due."""
        client = self.reader.choose(CLIENTS)
        self._wake()
        if self.over:
            before = self._state()
            self._send(client, self.reader.choose(self.over))
            assert self._state() == before

    def _state(self) -> object:
        return [
            (each.id, each.ends, each.families, [(n, channel.live, channel.until) for n, channel in each.channels.items()])
            for each in self.server.allocations.by_id.values()
        ]

    def _bind_many(self) -> None:
        """Bind as many channels as an allocation may have, and more."""
        client, name = self.reader.choose(CLIENTS), self.reader.choose(USERNAMES)
        key = wire.long_term_key(name, SECRET) if ":" in name else b"key"
        for n in range(CONFIG.max_channels + 1):
            channel = (wire.CHANNEL_NUMBER, (CHANNEL + n).to_bytes(2, "big") + b"\0\0")
            peer = (wire.PEER_ADDRESS, wire.address((PEERS[0][0], PEERS[0][1] + n), bytes(12)))
            attributes = (channel, peer, *proof(name, self.nonces.get(client, b"")))
            self._send(client, wire.write(wire.REQUEST, wire.CHANNEL_BIND, bytes(12), attributes, key))

    def _change_addresses(self) -> None:
        """Let addresses of peers come to this machine, or go."""
        which = self.reader.byte()
        own = frozenset(PEERS[n][0] for n in range(3) if which >> n & 1) | _PUBLIC
        self.peers = replace(self.peers, relay_addresses=own)
        self.server.handle_own_addresses(own, self.now)
        self._settle()
        self._wake()
        live = [peer for peers in self.server.allocations.live_peers.values() for peer in peers]
        assert all(self.peers.rule_against(*host_number(peer[0]), peer[1]) is None for peer in live)

    def _wake(self) -> None:
        """Wake the relay up until nothing is due. Each turn is short."""
        for _ in range(_MOST_TURNS):
            before = self.tally.copy()
            self.server.handle_timeout(self.now)
            self._settle()
            done = self.tally - before
            assert done["expired"] <= 2 * EXPIRIES
            assert done["freed"] <= 1
            assert done["removed"] <= 2 * (EXPIRIES + KERNEL_PORTION)
            at = self.server.poll_timeout()
            if at is None or at > self.now.monotonic:
                return
        raise AssertionError("the relay never finishes the work that is due")

    def _send(self, client: Address, data: bytes) -> None:
        before = self.tally["effects"]
        self._take([(data, client, 0, 0)])
        if self.tally["effects"] > before:
            assert data not in self.over
            self.over.append(data)

    def _take(self, batch: Sequence[Datagram], *, is_flood: bool = False) -> None:
        mark = len(self.server.allocations.by_id)
        about = batch[0][:2] if len(batch) == 1 else None
        for datagram in self.server.shed(batch) if is_flood else grouped(batch):
            self.largest = max(self.largest, len(datagram[0]) + len(cut(datagram[0], datagram[2])) * EARLY_OVERHEAD)
            relayed = self.server.handle_client_datagram(datagram, self.now)
            is_known = mark == len(self.server.allocations.by_id)
            self._settle([] if relayed is None else [relayed], about=about if is_known else None)

    def _pass(self, seconds: float) -> None:
        self.now = Timestamp(self.now.monotonic + seconds, self.now.unix + seconds)
        self.is_same = False

    # Invariants.

    def _settle(self, returned: Sequence[Command] = (), about: tuple[bytes, Address] | None = None) -> None:
        while commands := with_rest(self.server, [*returned, *self.server.drain()], self.now):
            returned = ()
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
                else:
                    self._check_once(each[4:] for each in cut(data, segment))
            case SendToPeer(allocation, data, peer, segment):
                self._check_once(cut(data, segment))
                assert allocation in self.ports
                assert self.peers.rule_against(*host_number(peer[0]), peer[1]) is None
                assert peer[0] not in _PUBLIC or peer[1] not in self.server.allocations.by_port
                held = self.server.allocations.by_id.get(allocation)
                assert held is None or held.ends > self.now.monotonic
                channel = None if held is None else held.live_peers.get(peer)
                assert channel is None or channel.until > self.now.monotonic
            case BindPort(allocation, port):
                assert port in PORTS
                assert port not in self.ports.values() or self.ports.get(allocation) == port
                self.tally["effects"] += 1
                self.ports[allocation] = port
                self.waiting.append(command)
                self.ids.append(allocation)
            case FreeAllocation(allocation, reason):
                self.tally["freed"] += 1
                self.tally["effects"] += reason is FreeReason.DELETED
                del self.ports[allocation]
                self.waiting = [each for each in self.waiting if each.allocation != allocation]
            case Drained():
                assert not self.has_drained
                assert not self.server.allocations.by_id
                self.has_drained = True
            case RelayedAddressDeleted():
                self.tally["effects"] += 1
            case ChannelExpired():
                self.tally["expired"] += 1
            case RemoveChannel():
                self.tally["removed"] += 1
            case _:
                pass

    def _check_once(self, payloads: Iterable[bytes]) -> None:
        self.tally["packets"] += 1
        for each in payloads:
            assert not self.unique.get(each)
            if each in self.unique:
                self.unique[each] = True

    def _check_early(self) -> None:
        """Check the limits of early data. The last datagram or batch may exceed them."""
        early = self.server._early  # noqa: SLF001 - no output shows it
        sizes: Counter[AllocationId] = Counter()
        for (allocation, _), channel in early._channels.items():  # noqa: SLF001
            sizes[allocation] += channel.size
        assert sizes == early._sizes  # noqa: SLF001
        assert sizes.total() == early._size <= EARLY_BYTES + self.largest  # noqa: SLF001
        assert all(each <= EARLY_CLIENT_BYTES + self.largest for each in sizes.values())

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
            # Half a token of tolerance for rounding.
            assert self.answered[network] <= CONFIG.unauthenticated_burst + earned + 0.5
        if about is None:
            return
        request, source = about
        if source != client:
            # Time has passed: a pending allocation of another client has timed out.
            assert (answer.method, answer.code) == (wire.ALLOCATE, 508)
            return
        headers = 28 if len(client) == 2 else 48
        if answer.method == wire.BINDING or answer.code in (400, 401, 420, 438):
            # The source address of an unauthenticated request may be forged, so amplification must be limited.
            assert len(data) + headers <= 2 * (len(request) + headers)

    def _check_tables(self) -> None:
        tables = self.server.allocations
        held = list(tables.by_id.values())
        assert {each.id for each in held} == self.ports.keys()
        assert {each.client: each for each in held} == tables.by_client
        assert {each.username: each for each in held} == tables.by_username
        # The kernel may still have channels of a port that is not free.
        behind = len(PORTS) - len(self.server.free_ports) - sum(1 + len(each.refused_ports) for each in held)
        assert behind >= 0
        assert not behind or tables.is_kernel_behind
        assert all(self.ports[each.id] == each.port for each in held)
        assert len(held) <= CONFIG.max_allocations
        assert Counter(_network(each.client) for each in held) == Counter(tables.by_network)
        assert all(count <= (CONFIG.max_allocations_per_address or count) for count in tables.by_network.values())
        all_live = [(each, channel) for each in held for channel in each.channels.values() if channel.live]
        assert {each.client: each.outside for each in held} == tables.live_channels
        assert {each.client: each.inside for each in held} == tables.inside_channels
        assert {each.id: each.live_peers for each in held} == tables.live_peers
        assert {each.port: each.id for each in held if each.state is AllocationState.ESTABLISHED} == tables.by_port
        assert all(each.live == each.outside | each.inside for each in held)
        assert all((channel.peer[0] in _PUBLIC) is (channel.number in each.inside) for each, channel in all_live)
        assert all(each.live.keys() == {c.number for c in each.live_peers.values()} for each in held)
        assert all(each.expired.keys() == {c.number for c in each.expired_peers.values()} for each in held)
        assert all(channel.live is (number in each.live) for each in held for number, channel in each.channels.items())
        assert tables.channels == sum(each.channel_count for each in held)
        assert tables.expired == sum(len(each.expired) for each in held)
        assert all(len(each.channels) <= CONFIG.max_channels for each in held)
        has_early = tables.deadlines.get(EARLY_DEADLINE) is not None
        assert len(tables.deadlines) == len(held) + has_early
        assert self.server.counters.early_relayed + has_early <= self.server.counters.early_held
        self._check_kernel(all_live)

    def _check_kernel(self, all_live: Iterable[tuple[Allocation, ChannelBinding]]) -> None:
        """Check that the kernel relays the live channels, and besides only channels that it is about to remove."""
        tables = self.server.allocations
        left = dict(self.kernel.by_channel)
        for each, channel in all_live:
            entry = left.pop((each.client, channel.number))
            assert (entry.port, entry.peer) == (each.port, channel.peer)
            right = min(channel.until, each.ends)
            assert entry.until == right or (tables.is_kernel_behind and entry.until < right)
        used: dict[int, Address] = {each.port: each.client for each in tables.by_id.values()}
        assert all(tables.is_in_kernel(client) for client, _ in left)
        # A deleted family leaves the port to its allocation.
        assert all(used.get(entry.port, client) == client for (client, _), entry in left.items())
