"""A core server with a clock controlled by tests, and clients that exchange bytes with the server."""

import dataclasses
import json
import operator
from collections.abc import Container, Iterable
from random import Random
from typing import Any, NamedTuple, TypeAlias, TypeVar

from relay.core.addresses import (
    AllocationId,
    ClientAddress,
    Family,
    PeerAddress,
    RelayedPort,
    SocketAddress,
    socket_address,
)
from relay.core.attributes import (
    CHANNEL_NUMBER,
    ERROR_CODE,
    LIFETIME,
    NONCE,
    REALM,
    REQUESTED_TRANSPORT,
    USERNAME,
    XOR_PEER_ADDRESS,
    Attribute,
)
from relay.core.commands import BindPort, Command, HandIn, SendToClient
from relay.core.config import ServerConfig
from relay.core.counters import Counters
from relay.core.credentials import RelaySecret, integrity_key, mint
from relay.core.data import Datagram
from relay.core.events import CORE_EVENTS, CoreEvent
from relay.core.handover import Rest, Row
from relay.core.lifecycle import BindRefusal
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.core.stun import Message, MessageClass, Method, decode, encode
from relay.core.timestamp import Timestamp

T = TypeVar("T")
AttributeValue: TypeAlias = tuple[Attribute[Any], Any]

SECRET = RelaySecret("the secret of the relay under test")
START = Timestamp(monotonic=1000.0, unix=1_700_000_000.0)
HOSTS = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8::1"}
CONFIG = ServerConfig(
    secret=SECRET,
    public_hosts=HOSTS,
    ports=range(50000, 50100),
    peers=PeerPolicy(),
    max_allocations=50,
    software="relay under test",
)

CLIENT = ("203.0.113.5", 40000)
OTHER_CLIENT = ("203.0.113.6", 40000)
CLIENT6: SocketAddress = ("2001:db8:5::5", 40000, 0, 0)
PEER = PeerAddress(("198.51.100.9", 5000))
OTHER_PEER = PeerAddress(("198.51.100.10", 5000))
PEER6 = PeerAddress(("2001:db8:9::9", 5000, 0, 0))
FORBIDDEN_PEER = PeerAddress(("127.0.0.1", 5000))
CHANNEL = 0x4000
OTHER_CHANNEL = 0x4001

UDP: AttributeValue = (REQUESTED_TRANSPORT, 17)


def with_rest(server: Server, commands: Iterable[Command], now: Timestamp) -> list[Command]:
    """Return commands, with the commands of datagrams that are handed in again in their place."""
    done: list[Command] = []
    for command in commands:
        if not isinstance(command, HandIn):
            done.append(command)
            continue
        for datagram in command.datagrams:
            relayed = server.handle_client_datagram(datagram, now)
            done += with_rest(server, [*([] if relayed is None else [relayed]), *server.drain()], now)
    return done


class Answer(NamedTuple):
    """A response of the relay."""

    data: bytes
    client: ClientAddress
    message: Message

    @property
    def code(self) -> int | None:
        """The error code; None for a success response."""
        if self.message.message_class is MessageClass.SUCCESS:
            return None
        error = self.message.get(ERROR_CODE)
        assert error is not None
        return error.code

    def get(self, attribute: Attribute[T]) -> T | None:
        return self.message.get(attribute)

    def get_all(self, attribute: Attribute[T]) -> list[T]:
        return list(self.message.get_all(attribute))


def of_kind(kind: type[T], commands: Iterable[Command]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


def the(kind: type[T], commands: Iterable[Command]) -> T:
    """Return the only command of a type."""
    (command,) = of_kind(kind, commands)
    return command


def answer_in(commands: Iterable[Command]) -> Answer:
    """Decode the only response among commands."""
    sent = the(SendToClient, commands)
    message = decode(sent.data)
    assert isinstance(message, Message)
    return Answer(sent.data, sent.client, message)


def channel_data(number: int, payload: bytes, *, length: int | None = None) -> bytes:
    """Return a ChannelData frame, by default with the correct length."""
    stated = len(payload) if length is None else length
    return number.to_bytes(2, "big") + stated.to_bytes(2, "big") + payload


def opaque(type_: int) -> Attribute[bytes]:
    """Return an attribute definition for unknown attributes or invalid values."""
    return Attribute(type_, f"{type_:#06x}", lambda value, _: value, lambda value, _: value)


class Events(list[CoreEvent]):
    """Events that are equal only if their types are equal too. As named tuples, they compare only their fields."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and [*map(repr, self)] == [*map(repr, other)]


Portion: TypeAlias = tuple[str, list[Row]]
"""Rows of allocations or of requests that are over."""


def begin_handover(server: Server, most: int | None = None) -> list[Portion]:
    """Return the written state of some allocations, as a successor reads it. Inputs may follow."""
    handover = server.handover
    ids = handover.begin()
    rows = handover.allocations(ids[:most])
    portions: list[Portion] = [("allocations", rows), ("counts", [[row[0], *handover.counts(row[0])] for row in rows])]
    while replays := handover.replays():
        portions.append(("replays", replays))
    return [(kind, json.loads(json.dumps(rows))) for kind, rows in portions]


def hand_over(server: Server, portions: list[Portion], successor: Server) -> None:
    """Let a fresh server read the state of another. The counters go on, so that tests can compare."""
    rest = json.loads(json.dumps(server.handover.rest()))
    server.handover.end()
    read_state(successor, portions, rest)
    written = {id_: counts for kind, rows in portions if kind == "counts" for id_, *counts in rows}
    unchanged = written.keys() - {row[0] for row in rest["allocations"]} - set(rest["ended"])
    successor.handover.add_counts(
        [id_, *map(operator.sub, server.handover.counts(id_), written[id_])] for id_ in sorted(unchanged)
    )
    for each in dataclasses.fields(Counters):
        count, new = getattr(server.counters, each.name), getattr(successor.counters, each.name)
        if isinstance(count, int):
            setattr(successor.counters, each.name, count)
        elif isinstance(count, dict):
            new.update(count)
        else:
            new[:] = count


def read_state(server: Server, portions: list[Portion], rest: Rest) -> None:
    """Let a fresh server read the state of another."""
    for kind, rows in portions:
        if kind == "allocations":
            server.handover.read_allocations(rows)
        elif kind == "replays":
            server.handover.read_replays(rows)
    server.handover.read_rest(rest)


class Twins:
    """A server and its successor, which get the same inputs and must return the same, byte for byte."""

    def __init__(self, former: Server, successor: Server) -> None:
        self._former = former
        self._successor = successor

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of the successor
        attribute, of_former = getattr(self._successor, name), getattr(self._former, name)
        if not callable(attribute):
            return attribute

        def both(*arguments: Any) -> Any:  # noqa: ANN401
            result = attribute(*arguments)
            assert of_former(*arguments) == result
            return result

        return both


class Relay:
    """A core server and its clock."""

    def __init__(self, config: ServerConfig = CONFIG, seed: int = 1) -> None:
        self.config = config
        self.random = Random(seed)
        self.server = Server(config, self.random)
        self.now = START
        self.events: list[CoreEvent] = []
        """Watched events, separate from all other commands."""
        self._transactions = 0

    @property
    def counters(self) -> Counters:
        return self.server.counters

    def begin_handover(self, most: int | None = None) -> list[Portion]:
        """Return the written state of some allocations, as a successor reads it. Inputs may follow."""
        return begin_handover(self.server, most)

    def hand_over(self, portions: list[Portion], **changes: Any) -> None:  # noqa: ANN401 - the fields of ServerConfig
        """Continue with a fresh server that reads the state of this relay."""
        self.config = dataclasses.replace(self.config, **changes)
        random = Random(1)
        successor = Server(self.config, random)
        random.setstate(self.random.getstate())
        self.random = random
        hand_over(self.server, portions, successor)
        self.server = successor

    def watch(self, *kinds: type[CoreEvent]) -> None:
        self.server.watch(frozenset(kinds))

    def drain(self) -> list[Command]:
        """Return all commands except the events, which are stored in `events`."""
        drained = self.server.drain()
        self.events += [each for each in drained if isinstance(each, CORE_EVENTS)]
        return [each for each in drained if not isinstance(each, CORE_EVENTS)]

    def take_events(self) -> "Events":
        events, self.events = self.events, []
        return Events(events)

    def pass_time(self, seconds: float) -> None:
        """Advance the clock without a call of the server."""
        self.now = Timestamp(self.now.monotonic + seconds, self.now.unix + seconds)

    def wake(self) -> list[Command]:
        self.server.handle_timeout(self.now)
        return self.drain()

    def receive(self, data: bytes, client: SocketAddress) -> list[Command]:
        return self.receive_batch([(data, client, 0, 0)])

    def receive_batch(self, batch: Iterable[Datagram], *, is_flood: bool = False) -> list[Command]:
        """Pass datagrams of clients to the server, like the server actor."""
        commands: list[Command] = []
        for datagram in self.server.shed(batch) if is_flood else batch:
            relayed = self.server.handle_client_datagram(datagram, self.now)
            commands += [*([] if relayed is None else [relayed]), *self.drain()]
        return with_rest(self.server, commands, self.now)

    def receive_from_peer(self, allocation: AllocationId, data: bytes, peer: PeerAddress) -> list[Command]:
        return self.receive_batch_from_peers(allocation, [(data, peer, 0, 0)])

    def receive_batch_from_peers(self, allocation: AllocationId, batch: Iterable[Datagram]) -> list[Command]:
        """Pass datagrams of peers to the server, like the server actor."""
        commands: list[Command] = []
        for datagram in batch:
            relayed = self.server.handle_peer_datagram(datagram, self.now.monotonic, allocation)
            commands += [*([] if relayed is None else [relayed]), *self.drain()]
        return commands

    def report_bound(self, allocation: AllocationId) -> list[Command]:
        self.server.handle_bound(allocation, self.now)
        return self.drain()

    def report_refused(self, allocation: AllocationId, refusal: BindRefusal = BindRefusal.PORT) -> list[Command]:
        self.server.handle_bind_refused(allocation, refusal, self.now)
        return self.drain()

    def report_failed(self, allocation: AllocationId) -> list[Command]:
        self.server.handle_allocation_failed(allocation, self.now)
        return self.drain()

    def kick(self, allocation: AllocationId) -> list[Command]:
        self.server.handle_kick(allocation, self.now)
        return self.drain()

    def new_transaction_id(self) -> bytes:
        self._transactions += 1
        return self._transactions.to_bytes(12, "big")


def relay_with(*, seed: int = 1, **changes: Any) -> Relay:  # noqa: ANN401 - the fields of ServerConfig
    """Return a relay with changes of `CONFIG`."""
    return Relay(dataclasses.replace(CONFIG, **changes), seed)


class Allocated(NamedTuple):
    """An allocation from the view of its client."""

    id: AllocationId
    port: RelayedPort
    answer: Answer


class Client:
    """A client with an address and a credential. Its requests contain the last received nonce."""

    def __init__(
        self, relay: Relay, address: SocketAddress = CLIENT, *, salt: str = "salt", valid_for: int = 1_000_000
    ) -> None:
        self.relay = relay
        self.address = ClientAddress(address)
        self.credential = mint(SECRET, int(relay.now.unix) + valid_for, salt)
        self._nonce: bytes | None = None

    @property
    def key(self) -> bytes:
        return integrity_key(self.credential.username, self.relay.config.realm, self.credential.password)

    @property
    def nonce(self) -> bytes:
        if self._nonce is None:
            self.take_nonce()
        assert self._nonce is not None
        return self._nonce

    def take_nonce(self) -> None:
        """Request a new nonce without authentication."""
        data = encode(MessageClass.REQUEST, Method.ALLOCATE, self.relay.new_transaction_id(), [])
        self._nonce = answer_in(self.send(data)).get(NONCE)

    def write(
        self,
        method: int,
        *attributes: AttributeValue,
        transaction_id: bytes | None = None,
        leave_out: Container[Attribute[Any]] = (),
        key: bytes | None = None,
        fingerprint: bool = False,
    ) -> bytes:
        """Return an authenticated request, without the attributes in ``leave_out``."""
        proof: tuple[AttributeValue, ...] = (
            (USERNAME, self.credential.username),
            (REALM, self.relay.config.realm),
            (NONCE, self.nonce),
        )
        return encode(
            MessageClass.REQUEST,
            method,
            transaction_id or self.relay.new_transaction_id(),
            [*attributes, *(each for each in proof if each[0] not in leave_out)],
            key=key or self.key,
            fingerprint=fingerprint,
        )

    def send(self, data: bytes) -> list[Command]:
        return self.relay.receive(data, self.address)

    def ask(self, method: int, *attributes: AttributeValue, fingerprint: bool = False) -> Answer:
        return answer_in(self.send(self.write(method, *attributes, fingerprint=fingerprint)))

    def begin_allocate(self, *attributes: AttributeValue) -> BindPort:
        """Request an allocation, and leave the bind of its port pending."""
        return the(BindPort, self.send(self.write(Method.ALLOCATE, UDP, *attributes)))

    def allocate(self, *attributes: AttributeValue) -> Allocated:
        bind = self.begin_allocate(*attributes)
        answer = answer_in(self.relay.report_bound(bind.allocation))
        assert answer.code is None
        return Allocated(bind.allocation, bind.port, answer)

    def refresh(self, lifetime: int, *attributes: AttributeValue) -> Answer:
        return self.ask(Method.REFRESH, (LIFETIME, lifetime), *attributes)

    def create_permission(self, *peers: PeerAddress) -> Answer:
        return self.ask(Method.CREATE_PERMISSION, *((XOR_PEER_ADDRESS, peer) for peer in peers))

    def bind_channel(self, number: int = CHANNEL, peer: PeerAddress = PEER) -> Answer:
        return self.ask(Method.CHANNEL_BIND, (CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer))

    def send_on_channel(self, payload: bytes, number: int = CHANNEL) -> list[Command]:
        return self.send(channel_data(number, payload))


def peer_at(host: str, port: int) -> PeerAddress:
    """Return the address of a peer from a textual host."""
    return PeerAddress(socket_address(host, port))
