"""A core server whose time stands still until a test moves it, and clients that talk to it in bytes."""

import dataclasses
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
from relay.core.commands import BindPort, Command, SendToClient
from relay.core.config import ServerConfig
from relay.core.counters import Counters
from relay.core.credentials import RelaySecret, integrity_key, mint
from relay.core.events import CORE_EVENTS, CoreEvent
from relay.core.instant import Instant
from relay.core.lifecycle import BindRefusal
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.core.stun import Message, MessageClass, Method, decode, encode

T = TypeVar("T")
AttributeValue: TypeAlias = tuple[Attribute[Any], Any]

SECRET = RelaySecret("the secret of the relay under test")
START = Instant(monotonic=1000.0, unix=1_700_000_000.0)
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


class Answer(NamedTuple):
    """What the relay said to a request."""

    data: bytes
    client: ClientAddress
    message: Message

    @property
    def code(self) -> int | None:
        """The error code; None for a success."""
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
    """Give the only command of a kind."""
    (command,) = of_kind(kind, commands)
    return command


def answer_in(commands: Iterable[Command]) -> Answer:
    """Read the only answer among commands."""
    sent = the(SendToClient, commands)
    message = decode(sent.data)
    assert isinstance(message, Message)
    return Answer(sent.data, sent.client, message)


def channel_data(number: int, payload: bytes, *, length: int | None = None) -> bytes:
    """Write a ChannelData frame, by default with the true length."""
    stated = len(payload) if length is None else length
    return number.to_bytes(2, "big") + stated.to_bytes(2, "big") + payload


def opaque(type_: int) -> Attribute[bytes]:
    """Give a row for an attribute that the relay does not know, or whose value is to be wrong."""
    return Attribute(type_, f"{type_:#06x}", lambda value, _: value, lambda value, _: value)


class Events(list[CoreEvent]):
    """Events, of which those of different kinds are not equal though their fields are: tuples would be."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and [*map(repr, self)] == [*map(repr, other)]


class Relay:
    """A core server and its time."""

    def __init__(self, config: ServerConfig = CONFIG, seed: int = 1) -> None:
        self.config = config
        self.server = Server(config, Random(seed))
        self.now = START
        self.events: list[CoreEvent] = []
        """What it told of, if it was asked to; kept apart from the commands that tests look at."""
        self._transactions = 0

    @property
    def counters(self) -> Counters:
        return self.server.counters

    def watch(self, *kinds: type[CoreEvent]) -> None:
        self.server.watch(frozenset(kinds))

    def drain(self) -> list[Command]:
        """Take all commands but the events, which are kept."""
        drained = self.server.drain()
        self.events += [each for each in drained if isinstance(each, CORE_EVENTS)]
        return [each for each in drained if not isinstance(each, CORE_EVENTS)]

    def take_events(self) -> "Events":
        events, self.events = self.events, []
        return Events(events)

    def pass_time(self, seconds: float) -> None:
        """Let time pass without telling the server."""
        self.now = Instant(self.now.monotonic + seconds, self.now.unix + seconds)

    def wake(self) -> list[Command]:
        self.server.handle_timeout(self.now)
        return self.drain()

    def receive(self, data: bytes, client: SocketAddress) -> list[Command]:
        self.server.handle_client_arrival((data, client, 0, 0), self.now)
        return self.drain()

    def receive_from_peer(self, allocation: AllocationId, data: bytes, peer: PeerAddress) -> list[Command]:
        self.server.handle_peer_arrival(allocation, (data, peer, 0, 0), self.now)
        return self.drain()

    def report_bound(self, allocation: AllocationId) -> list[Command]:
        self.server.handle_bound(allocation, self.now)
        return self.drain()

    def report_refused(self, allocation: AllocationId, refusal: BindRefusal = BindRefusal.PORT) -> list[Command]:
        self.server.handle_bind_refused(allocation, refusal, self.now)
        return self.drain()

    def report_failed(self, allocation: AllocationId) -> list[Command]:
        self.server.handle_allocation_failed(allocation, self.now)
        return self.drain()

    def new_transaction_id(self) -> bytes:
        self._transactions += 1
        return self._transactions.to_bytes(12, "big")


def relay_with(*, seed: int = 1, **changes: Any) -> Relay:  # noqa: ANN401 - the fields of ServerConfig
    """Make a relay whose settings differ from `CONFIG`."""
    return Relay(dataclasses.replace(CONFIG, **changes), seed)


class Allocated(NamedTuple):
    """An allocation as its client sees it."""

    id: AllocationId
    port: RelayedPort
    answer: Answer


class Client:
    """Someone with an address and a credential; each request bears the last nonce that it was given."""

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
        """Get a new nonce, as any stranger could."""
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
        """Write a request with the proof of who sent it, but for the attributes that are left out."""
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
        """Ask for an allocation, and leave it waiting for its sockets."""
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
    """Spell the address of a peer that is given as text."""
    return PeerAddress(socket_address(host, port))
