"""The server matches a model of allocations, channels and their lifetimes for random inputs.

The model stores only times and durations, and derives the current state from them. The model has no events, no heap and no
state machine, and its constants are its own.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.core import early
from relay.core.addresses import (
    AllocationId,
    ChannelNumber,
    ClientAddress,
    Family,
    PeerAddress,
    SocketAddress,
    network_of,
)
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    EVEN_PORT,
    LIFETIME,
    NONCE,
    REALM,
    REQUESTED_ADDRESS_FAMILY,
    USERNAME,
    XOR_PEER_ADDRESS,
    XOR_RELAYED_ADDRESS,
)
from relay.core.commands import (
    OFFLOAD_COMMANDS,
    BindPort,
    Command,
    Drained,
    FreeAllocation,
    InstallChannel,
    RemoveChannel,
    SendToClient,
    SendToPeer,
)
from relay.core.counters import DropReason
from relay.core.credentials import Credential, integrity_key, mint
from relay.core.lifecycle import BindRefusal
from relay.core.server import Server
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import (
    FORBIDDEN_PEER,
    HOSTS,
    PEER,
    PEER6,
    SECRET,
    START,
    UDP,
    Answer,
    AttributeValue,
    Portion,
    Twins,
    answer_in,
    channel_data,
    of_kind,
    relay_with,
    the,
)
from tests.support.examples import examples

PORTS = range(50001, 50006)
QUOTA = 4
BIND_WAIT = 5
CHANNEL_LIVES = 600
CHANNEL_KEPT = 900
NONCE_LIVES = 3600
EARLY_WAITS = 1
EARLY_COSTS = 1024 + 4
"""Bytes that count for an early packet without payload."""
EARLY_OF_CLIENT = 4 * EARLY_COSTS
EARLY_OF_ALL = 12 * EARLY_COSTS + 1
EARLY_SHARE = 2
"""Limits that random inputs reach."""
DROPPED = 0
"""Instead of an error code: the request was handled before, and gets no response."""

ADDRESSES: list[SocketAddress] = [
    ("203.0.113.1", 1000),
    ("203.0.113.1", 1001),
    ("203.0.113.2", 1000),
    ("2001:db8:5::5", 1000, 0, 0),
    ("2001:db8:5::6", 1000, 0, 0),
    ("2001:db8:6::6", 1000, 0, 0),
    ("203.0.113.3", 1000),
]
PEERS = [
    PEER,
    PeerAddress((PEER[0], PEER[1] + 1)),
    PEER6,
    PeerAddress((PEER6[0], PEER6[1] + 1, 0, 0)),
    FORBIDDEN_PEER,
    PeerAddress((HOSTS[Family.IPV4], PORTS[0])),
    PeerAddress((HOSTS[Family.IPV6], PORTS[1], 0, 0)),
]
NUMBERS = [0x4000, 0x4001, 0x7FFF, 0x3FFF]


class User(NamedTuple):
    """A user with a valid or invalid credential."""

    credential: Credential
    expiry: int
    right_password: bool = True

    @property
    def key(self) -> bytes:
        password = self.credential.password if self.right_password else "wrong"
        return integrity_key(self.credential.username, "firezone", password)

    @property
    def right_key(self) -> bytes:
        return integrity_key(self.credential.username, "firezone", self.credential.password)


def user(salt: str, valid_for: int, *, right_password: bool = True) -> User:
    expiry = int(START.unix) + valid_for
    return User(mint(SECRET, expiry, salt), expiry, right_password)


FOREVER = 100_000_000
USERS = [
    *(user(salt, FOREVER) for salt in "abcdefg"),
    user("short", 700),
    user("late", -1),
    user("a", FOREVER, right_password=False),
]


class Sent(NamedTuple):
    """A sent request, kept for retransmission."""

    data: bytes
    method: Method
    transaction_id: bytes
    user: User
    address: ClientAddress
    nonce_made: float | None
    families: tuple[Family, ...] = ()
    even: bool = False
    reserve: bool = False
    lifetime: int | None = None
    family: Family | None = None
    number: int = 0
    peer: PeerAddress = PEER


@dataclass
class ModelChannel:
    peer: PeerAddress
    bound: float

    def live(self, now: float) -> bool:
        return now < self.bound + CHANNEL_LIVES

    def kept(self, now: float) -> bool:
        return now < self.bound + CHANNEL_KEPT


@dataclass
class ModelAllocation:
    id: AllocationId
    request: Sent
    families: tuple[Family, ...]
    ports: list[int]
    """The last port is the allocated port; earlier ports were in use."""
    ends: float
    answer: bytes | None = None
    channels: dict[int, ModelChannel] = field(default_factory=dict)

    @property
    def username(self) -> str:
        return self.request.user.credential.username


@dataclass
class EarlyChannel:
    """Payloads that wait for a ChannelBind."""

    since: float
    payloads: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(EARLY_COSTS + len(each) for each in self.payloads)


class Mirror:
    """The kernel's double, which knows only its commands."""

    def __init__(self) -> None:
        self.channels: dict[tuple[ClientAddress, int], tuple[int, PeerAddress, float]] = {}
        """Relayed port, peer and expiry, by client and number."""

    def take(self, commands: list[Command]) -> list[Command]:
        """Execute the kernel's commands; return the remaining commands."""
        for command in commands:
            match command:
                case InstallChannel(client, number, port, peer, until, inside):
                    assert inside is is_inside(peer)
                    self.channels[client, number] = port, peer, until
                case RemoveChannel(client, number, port, peer):
                    assert self.channels.pop((client, number))[:2] == (port, peer)
        return [each for each in commands if not isinstance(each, OFFLOAD_COMMANDS)]


def families_of(peer: SocketAddress) -> Family:
    return Family.IPV6 if ":" in peer[0] else Family.IPV4


def is_inside(peer: SocketAddress) -> bool:
    return peer[0] in HOSTS.values()


def network(address: SocketAddress) -> str:
    """Return the network shared by a customer's addresses; here, a text prefix is sufficient."""
    return address[0].rpartition("::")[0] or address[0]


def granted(asked: int | None) -> int:
    return 600 if asked is None or asked < 600 else min(asked, 3600)


class ServerMachine(RuleBasedStateMachine):
    """Sends the server the inputs of clients, peers, sockets and the clock, and predicts the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.of_address = self.of_channels = QUOTA
        self.start()
        self.mirror = Mirror()
        self.seen = self.relay.now.monotonic
        """Time of the last input; the server has not yet noticed later deadlines."""
        self.allocations: dict[ClientAddress, ModelAllocation] = {}
        self.gone: list[AllocationId] = [AllocationId(10_000)]
        self.history: list[Sent] = []
        self.over: set[bytes] = set()
        """Requests that made or deleted an allocation: repeating them must have no effect."""
        self.nonces: dict[ClientAddress, tuple[bytes, float]] = {}
        self.expected_frees: list[AllocationId] = []
        self.expected_508s: list[ModelAllocation] = []
        self.own: frozenset[str] = frozenset()
        """Addresses of this machine."""
        self.is_draining = self.has_drained = False
        self.early: dict[tuple[AllocationId, int], EarlyChannel] = {}
        self.drops: Counter[DropReason] = Counter()
        self.written: list[Portion] | None = None
        """The part of the state that a successor has read already."""
        self.was_early = [0, 0]
        """Early packets that waited, and early packets that were relayed."""

    def start(self) -> None:
        self.relay = relay_with(
            ports=PORTS,
            max_allocations=QUOTA,
            max_allocations_per_address=self.of_address,
            max_channels=self.of_channels,
            offloads=True,
        )

    # State derived by the model.

    @property
    def now(self) -> float:
        return self.relay.now.monotonic

    def by_id(self) -> dict[AllocationId, ModelAllocation]:
        return {each.id: each for each in self.allocations.values()}

    def free_ports(self) -> set[int]:
        return set(PORTS) - {port for each in self.allocations.values() for port in each.ports}

    def deadlines(self) -> list[float]:
        """Each deadline after the last input."""
        ends = [each.ends for each in self.allocations.values()]
        for each in self.allocations.values():
            for channel in each.channels.values():
                moments = (channel.bound + CHANNEL_LIVES, channel.bound + CHANNEL_KEPT)
                ends.append(next(at for at in moments if at > self.seen))
        if self.early:
            ends.append(min(each.since for each in self.early.values()) + EARLY_WAITS)
        return ends

    def free(self, allocation: ModelAllocation) -> None:
        del self.allocations[allocation.request.address]
        self.gone.append(allocation.id)
        self.expected_frees.append(allocation.id)

    def catch_up(self) -> None:
        """Expire due allocations and channels, as each input does."""
        self.seen = self.now
        for key, waiting in tuple(self.early.items()):
            if waiting.since + EARLY_WAITS <= self.now:
                self.drops[DropReason.UNBOUND_CHANNEL] += len(waiting.payloads)
                del self.early[key]
        for each in sorted(self.allocations.values(), key=lambda each: each.ends):
            if each.ends <= self.now:
                self.free(each)
                if each.answer is None:
                    self.expected_508s.append(each)
            else:
                each.channels = {number: c for number, c in each.channels.items() if c.kept(self.now)}

    def settle(self, commands: list[Command]) -> list[Command]:
        """Check the ended allocations, update the mirror, and return the remaining commands."""
        commands = self.mirror.take(commands)
        assert sorted(each.allocation for each in of_kind(FreeAllocation, commands)) == sorted(self.expected_frees)
        rest: list[Command] = [each for each in commands if not isinstance(each, FreeAllocation | Drained)]
        drains = self.is_draining and not self.has_drained and not self.allocations
        assert len(of_kind(Drained, commands)) == drains
        self.has_drained |= drains
        for each in self.expected_508s:
            sent = next(c for c in of_kind(SendToClient, rest) if c.data[8:20] == each.request.transaction_id)
            rest.remove(sent)
            self.check_answer(answer_in([sent]), each.request, 508)
        self.expected_frees.clear()
        self.expected_508s.clear()
        return rest

    def check_answer(self, answer: Answer, request: Sent, code: int | None) -> None:
        assert answer.code == code
        assert answer.client == request.address
        assert answer.message.method == request.method
        assert answer.message.transaction_id == request.transaction_id
        assert answer.message.integrity_holds(request.user.right_key)
        nonce = answer.get(NONCE)
        assert (nonce is not None) is (code in (401, 438))
        if nonce is not None:
            self.nonces[request.address] = nonce, self.now

    # Requests: expected responses and effects.

    def expect(self, request: Sent) -> int | None:
        """Return the error code of the response, or None for a success."""
        if request.nonce_made is None:
            return 401
        # Nonces have a resolution of one second.
        if int(self.now) - int(request.nonce_made) >= NONCE_LIVES:
            return 438
        if request.user.expiry < self.relay.now.unix or not request.user.right_password:
            return 401
        by_method = {
            Method.ALLOCATE: self.expect_allocate,
            Method.REFRESH: self.expect_refresh,
            Method.CREATE_PERMISSION: self.expect_of_peer,
            Method.CHANNEL_BIND: self.expect_bind,
        }
        return by_method[request.method](request)

    def expect_allocate(self, request: Sent) -> int | None:
        existing = self.allocations.get(request.address)
        if existing is not None:
            return None if self.repeats(existing, request) else 437
        if request.reserve or request.data in self.over:
            return 508 if request.reserve else DROPPED
        username = request.user.credential.username
        replaced = [each for each in self.allocations.values() if each.username == username]
        ports = self.free_ports().union(*(each.ports for each in replaced))
        if self.is_draining or not any(port % 2 == 0 or not request.even for port in ports):
            return 508
        if len(self.allocations) - len(replaced) >= QUOTA:
            return 486
        rest = [each for each in self.allocations.values() if each not in replaced]
        if sum(network(each.request.address) == network(request.address) for each in rest) >= self.of_address:
            return 486
        for each in replaced:
            self.free(each)
        self.over.add(request.data)
        return None

    def repeats(self, existing: ModelAllocation, request: Sent) -> bool:
        same_transaction = existing.request.transaction_id == request.transaction_id
        return same_transaction and existing.username == request.user.credential.username

    def expect_refresh(self, request: Sent) -> int | None:
        allocation = self.allocations.get(request.address)
        deletes = request.lifetime == 0
        if allocation is None or (allocation.answer is None and not deletes):
            return 437
        if allocation.username != request.user.credential.username and not deletes:
            return 441
        if request.family is not None and request.family not in allocation.families:
            return 443
        if not deletes:
            allocation.ends = self.now + granted(request.lifetime)
            return None
        if request.data in self.over:
            # Answered again, without an effect.
            return None
        self.over.add(request.data)
        if request.family is None or allocation.families == (request.family,):
            self.free(allocation)
        else:
            allocation.families = tuple(each for each in allocation.families if each is not request.family)
            allocation.channels = {
                number: channel
                for number, channel in allocation.channels.items()
                if families_of(channel.peer) is not request.family
            }
        return None

    def expect_of_peer(self, request: Sent) -> int | None:
        allocation = self.allocations.get(request.address)
        if allocation is None or allocation.answer is None:
            return 437
        if allocation.username != request.user.credential.username:
            return 441
        if request.method is Method.CHANNEL_BIND and not 0x4000 <= request.number <= 0x7FFF:
            return 400
        if families_of(request.peer) not in allocation.families:
            return 443
        return 403 if request.peer == FORBIDDEN_PEER or request.peer[0] in self.own else None

    def expect_bind(self, request: Sent) -> int | None:
        code = self.expect_of_peer(request)
        if code is not None:
            return code
        channels = self.allocations[request.address].channels
        if any((n == request.number) is not (c.peer == request.peer) for n, c in channels.items()):
            return 400
        if request.number not in channels and len(channels) >= self.of_channels:
            return 508
        channels[request.number] = ModelChannel(request.peer, self.now)
        return None

    def send(self, request: Sent) -> None:
        self.catch_up()
        before = self.allocations.get(request.address)
        code = self.expect(request)
        commands = self.relay.receive(request.data, request.address)
        # The response and all other effects follow the kernel's commands.
        assert not commands or not isinstance(commands[-1], OFFLOAD_COMMANDS)
        rest = self.settle(commands)
        if code == DROPPED:
            assert rest == []
            return
        if code is None and request.method is Method.ALLOCATE:
            if before is None:
                (bind,) = rest
                assert isinstance(bind, BindPort)
                self.begin(request, bind)
            elif before.answer is None:
                assert rest == []
            else:
                assert rest == [SendToClient(before.answer, request.address)]
            return
        if code is None and request.method is Method.CHANNEL_BIND:
            assert before is not None
            payloads = self.early.pop((before.id, request.number), EarlyChannel(self.now)).payloads
            assert rest[:-1] == [sent for each in payloads for sent in self.relayed(before, each, request.peer)]
            self.was_early[1] += len(payloads)
            rest = rest[-1:]
        (sent,) = rest
        answer = answer_in([sent])
        self.check_answer(answer, request, code)
        if code is None and request.method is Method.REFRESH:
            assert answer.get(LIFETIME) == (0 if request.lifetime == 0 else granted(request.lifetime))

    def begin(self, request: Sent, bind: BindPort) -> None:
        assert bind.families == request.families
        assert bind.port in self.free_ports()
        assert bind.port % 2 == 0 or not request.even
        assert bind.allocation not in self.gone
        self.allocations[request.address] = ModelAllocation(
            bind.allocation, request, request.families, [bind.port], self.now + BIND_WAIT
        )

    def make(
        self,
        method: Method,
        who: User,
        address: SocketAddress,
        attributes: list[AttributeValue],
        **of_model: Any,  # noqa: ANN401 - fields of Sent
    ) -> None:
        """Send a request, and keep the request for retransmission."""
        client = ClientAddress(address)
        nonce = self.nonces.get(client)
        proof: list[AttributeValue] = [(USERNAME, who.credential.username), (REALM, "firezone")]
        if nonce is not None:
            proof.append((NONCE, nonce[0]))
        transaction_id = self.relay.new_transaction_id()
        data = encode(MessageClass.REQUEST, method, transaction_id, [*attributes, *proof], key=who.key)
        request = Sent(data, method, transaction_id, who, client, nonce and nonce[1])
        request = request._replace(**of_model)
        self.history.append(request)
        self.send(request)

    # Rules.

    @initialize(
        data=st.data(),
        dual=st.lists(st.booleans(), max_size=3),
        of_address=st.sampled_from([1, 2, QUOTA]),
        of_channels=st.sampled_from([1, 2, QUOTA]),
    )
    def some_are_here_already(self, data: st.DataObject, dual: list[bool], of_address: int, of_channels: int) -> None:
        self.of_address, self.of_channels = of_address, of_channels
        self.start()
        for each in dual:
            self.allocate_as_clients_do(data, each)

    @rule(
        who=st.sampled_from(USERS),
        address=st.sampled_from(ADDRESSES),
        family=st.sampled_from(["default", "IPv4", "IPv6", "dual"]),
        port=st.sampled_from(["any", "any", "even", "reserve"]),
        lifetime=st.sampled_from([None, 0, 601, 3600, 9999]),
    )
    def allocate(self, who: User, address: SocketAddress, family: str, port: str, lifetime: int | None) -> None:
        attributes = [UDP]
        families: tuple[Family, ...] = (Family.IPV4,)
        if family == "dual":
            attributes.append((ADDITIONAL_ADDRESS_FAMILY, 2))
            families = (Family.IPV4, Family.IPV6)
        elif family != "default":
            families = (Family.IPV4 if family == "IPv4" else Family.IPV6,)
            attributes.append((REQUESTED_ADDRESS_FAMILY, families[0]))
        if port != "any":
            attributes.append((EVEN_PORT, port == "reserve"))
        if lifetime is not None:
            attributes.append((LIFETIME, lifetime))
        self.make(
            Method.ALLOCATE,
            who,
            address,
            attributes,
            families=families,
            even=port == "even",
            reserve=port == "reserve",
            lifetime=lifetime,
        )

    @rule(data=st.data(), dual=st.booleans())
    def allocate_as_clients_do(self, data: st.DataObject, dual: bool) -> None:  # noqa: FBT001
        """Get a nonce, an allocation and channels, because random requests alone rarely succeed."""
        address = data.draw(st.sampled_from(ADDRESSES))
        who = USERS[ADDRESSES.index(address)]
        for _ in range(2):
            self.allocate(who, address, "dual" if dual else "default", "any", 3600)
        allocation = self.allocations.get(ClientAddress(address))
        if allocation is not None and allocation.answer is None:
            self.report(allocation, "bound")
            for number, peer in zip(NUMBERS, data.draw(st.permutations(PEERS)), strict=False):
                self.request_channel(who, address, number, peer)

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        """Retransmit a request, perhaps after many later requests."""
        made_something = [each.request for each in self.allocations.values()]
        requests = [*made_something, *self.history[-20:]]
        self.send(requests[data.draw(st.integers(0, len(requests) - 1))])

    @precondition(lambda self: self.allocations)
    @rule(
        data=st.data(),
        lifetime=st.sampled_from([None, 0, 0, 1, 601, 3600, 9999]),
        family=st.sampled_from([None, None, Family.IPV4, Family.IPV6]),
    )
    def refresh(self, data: st.DataObject, lifetime: int | None, family: Family | None) -> None:
        attributes: list[AttributeValue] = [] if lifetime is None else [(LIFETIME, lifetime)]
        if family is not None:
            attributes.append((REQUESTED_ADDRESS_FAMILY, family))
        who, address = self.someone(data)
        self.make(Method.REFRESH, who, address, attributes, lifetime=lifetime, family=family)

    @precondition(lambda self: self.allocations)
    @rule(data=st.data(), peer=st.sampled_from(PEERS))
    def create_permission(self, data: st.DataObject, peer: PeerAddress) -> None:
        who, address = self.someone(data)
        self.make(Method.CREATE_PERMISSION, who, address, [(XOR_PEER_ADDRESS, peer)], peer=peer)

    @precondition(lambda self: self.allocations)
    @rule(data=st.data(), number=st.sampled_from(NUMBERS), peer=st.sampled_from(PEERS))
    def bind_channel(self, data: st.DataObject, number: int, peer: PeerAddress) -> None:
        who, address = self.someone(data)
        self.request_channel(who, address, number, peer)

    @precondition(lambda self: any(each.channels for each in self.allocations.values()))
    @rule(data=st.data())
    def bind_channel_again(self, data: st.DataObject) -> None:
        """Refresh a channel, perhaps in its grace period."""
        allocation = self.any_of(data, [each for each in self.allocations.values() if each.channels])
        number = data.draw(st.sampled_from(sorted(allocation.channels)))
        request = allocation.request
        self.request_channel(request.user, request.address, number, allocation.channels[number].peer)

    def request_channel(self, who: User, address: SocketAddress, number: int, peer: PeerAddress) -> None:
        attributes: list[AttributeValue] = [(CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer)]
        self.make(Method.CHANNEL_BIND, who, address, attributes, number=number, peer=peer)

    @precondition(lambda self: self.allocations)
    @rule(data=st.data(), to=st.sampled_from(ADDRESSES), port=st.sampled_from(["any", "even", "even"]))
    def roam(self, data: st.DataObject, to: SocketAddress, port: str) -> None:
        """Allocate from another address, perhaps without a free port."""
        who = self.any_of(data, self.allocations.values()).request.user
        for _ in range(2):
            self.allocate(who, to, "default", port, None)

    @precondition(lambda self: self.allocations)
    @rule(data=st.data(), who=st.sampled_from(USERS), lifetime=st.sampled_from([0, 0, 600]))
    def refresh_with_new_credentials(self, data: st.DataObject, who: User, lifetime: int) -> None:
        """Send a request for an allocation that was created with other credentials."""
        address = self.any_of(data, self.allocations.values()).request.address
        for _ in range(2):
            self.make(Method.REFRESH, who, address, [(LIFETIME, lifetime)], lifetime=lifetime)

    def any_of(self, data: st.DataObject, allocations: Iterable[ModelAllocation]) -> ModelAllocation:
        """Choose by address, to keep failure reports short."""
        return self.allocations[data.draw(st.sampled_from([each.request.address for each in allocations]))]

    def someone(self, data: st.DataObject) -> tuple[User, SocketAddress]:
        """Choose the sender of a request, mostly a client with an allocation."""
        request = self.any_of(data, self.allocations.values()).request
        match data.draw(st.sampled_from(["owner", "owner", "owner", "other user", "anyone"])):
            case "owner":
                return request.user, request.address
            case "other user":
                return data.draw(st.sampled_from(USERS)), request.address
        return data.draw(st.sampled_from(USERS)), data.draw(st.sampled_from(ADDRESSES))

    @precondition(lambda self: any(each.answer is None for each in self.allocations.values()))
    @rule(data=st.data(), what=st.sampled_from(["bound", "bound", "port", "machine"]))
    def report_on_sockets(self, data: st.DataObject, what: str) -> None:
        """Report in any order, independent of the requests."""
        self.report(self.any_of(data, [each for each in self.allocations.values() if each.answer is None]), what)

    def report(self, allocation: ModelAllocation, what: str) -> None:
        self.catch_up()
        alive = allocation.id in self.by_id()
        if what == "bound":
            rest = self.relay.report_bound(allocation.id)
        else:
            rest = self.relay.report_refused(allocation.id, BindRefusal(what))
        if not alive:
            assert self.settle(rest) == []
        elif what == "bound":
            self.check_established(allocation, self.settle(rest))
        else:
            even = allocation.request.even
            left = {port for port in self.free_ports() if not even or port % 2 == 0} if what == "port" else set()
            if not left:
                self.free(allocation)
                self.expected_508s.append(allocation)
                assert self.settle(rest) == []
                return
            bind = the(BindPort, self.settle(rest))
            assert (bind.allocation, bind.families) == (allocation.id, allocation.families)
            assert bind.port in left
            allocation.ports.append(bind.port)

    def check_established(self, allocation: ModelAllocation, rest: list[Command]) -> None:
        answer = answer_in(rest)
        self.check_answer(answer, allocation.request, None)
        allocation.answer = answer.data
        allocation.ports = allocation.ports[-1:]
        lifetime = granted(allocation.request.lifetime)
        allocation.ends = self.now + lifetime
        assert answer.get(LIFETIME) == lifetime
        relayed = [address[:2] for address in answer.get_all(XOR_RELAYED_ADDRESS)]
        assert relayed == [(HOSTS[family], allocation.ports[0]) for family in allocation.families]

    @rule(data=st.data(), what=st.sampled_from(["bound", "port", "machine", "failed", "kicked"]))
    def report_on_what_is_gone(self, data: st.DataObject, what: str) -> None:
        """Send a late or repeated report."""
        settled = [
            each.id for each in self.allocations.values() if each.answer is not None and what not in {"failed", "kicked"}
        ]
        id_ = data.draw(st.sampled_from([*self.gone, *settled]))
        self.catch_up()
        match what:
            case "bound":
                commands = self.relay.report_bound(id_)
            case "failed":
                commands = self.relay.report_failed(id_)
            case "kicked":
                commands = self.relay.kick(id_)
            case _:
                commands = self.relay.report_refused(id_, BindRefusal(what))
        assert self.settle(commands) == []

    @precondition(lambda self: len(self.allocations) > 2)
    @rule(data=st.data(), kicked=st.booleans())
    def an_allocation_fails_or_is_kicked(self, data: st.DataObject, *, kicked: bool) -> None:
        allocation = self.any_of(data, self.allocations.values())
        self.catch_up()
        if allocation.id in self.by_id():
            self.free(allocation)
            if allocation.answer is None:
                self.expected_508s.append(allocation)
        end = self.relay.kick if kicked else self.relay.report_failed
        assert self.settle(end(allocation.id)) == []

    @rule(address=st.sampled_from(ADDRESSES), number=st.sampled_from(NUMBERS[:3]), payload=st.binary(max_size=5))
    def client_sends(self, address: SocketAddress, number: int, payload: bytes) -> None:
        self.check_to_peer(ClientAddress(address), number, payload)

    def check_to_peer(self, client: ClientAddress, number: int, payload: bytes) -> None:
        self.catch_up()
        allocation = self.allocations.get(client)
        channel = None if allocation is None else allocation.channels.get(number)
        rest = self.settle(self.relay.receive(channel_data(number, payload), client))
        if allocation is None or channel is None or not channel.live(self.now):
            assert rest == []
            self.wait_for_bind(allocation, number, payload)
        else:
            assert rest == self.relayed(allocation, payload, channel.peer)

    def relayed(self, allocation: ModelAllocation, payload: bytes, peer: PeerAddress) -> list[Command]:
        """Return the commands for a payload to a peer outside, or to a client of this relay."""
        established = [each for each in self.allocations.values() if each.answer is not None]
        others = [each for each in established if is_inside(peer) and each.ports[-1] == peer[1]]
        if not others:
            return [SendToPeer(allocation.id, payload, peer)]
        (other,) = others
        source = (peer[0], allocation.ports[-1], *peer[2:])
        for number, channel in other.channels.items():
            if channel.peer == source and channel.live(self.now):
                return [SendToClient(channel_data(number, payload), other.request.address)]
        self.drops[DropReason.UNBOUND_PEER] += 1
        return []

    def wait_for_bind(self, allocation: ModelAllocation | None, number: int, payload: bytes) -> None:
        if allocation is None or allocation.answer is None:
            self.drops[DropReason.UNBOUND_CHANNEL] += 1
            return
        of_client = sum(each.size for (id_, _), each in self.early.items() if id_ == allocation.id)
        left = EARLY_OF_ALL - sum(each.size for each in self.early.values())
        if of_client >= EARLY_OF_CLIENT or of_client >= left // EARLY_SHARE:
            self.drops[DropReason.EARLY_LIMIT] += 1
            return
        self.was_early[0] += 1
        self.early.setdefault((allocation.id, number), EarlyChannel(self.now)).payloads.append(payload)

    @precondition(lambda self: self.allocations)
    @rule(
        data=st.data(),
        number=st.sampled_from(NUMBERS[:3]),
        peer=st.sampled_from(PEERS),
        payloads=st.lists(st.binary(max_size=5), max_size=6),
        seconds=st.sampled_from([0, 0, 0.5, 0.75, 1]),
        again=st.booleans(),
    )
    def client_sends_before_it_binds(
        self,
        data: st.DataObject,
        number: int,
        peer: PeerAddress,
        payloads: list[bytes],
        seconds: float,
        again: bool,  # noqa: FBT001
    ) -> None:
        """Send on a channel that is perhaps unbound, let time pass, perhaps begin a new allocation, and bind the channel."""
        request = self.any_of(data, self.allocations.values()).request
        for payload in payloads:
            self.check_to_peer(request.address, number, payload)
        self.relay.pass_time(seconds)
        if again:
            self.make(Method.REFRESH, request.user, request.address, [(LIFETIME, 0)], lifetime=0)
            self.allocate(request.user, request.address, "default", "any", None)
            allocation = self.allocations.get(request.address)
            if allocation is not None and allocation.answer is None:
                self.report(allocation, "bound")
        self.request_channel(request.user, request.address, number, peer)

    @rule(data=st.data(), peer=st.sampled_from(PEERS), payload=st.binary(max_size=5))
    def peer_sends(self, data: st.DataObject, peer: PeerAddress, payload: bytes) -> None:
        self.check_to_client(data.draw(st.sampled_from([*self.gone[-3:], *self.by_id()])), peer, payload)

    def check_to_client(self, id_: AllocationId, peer: PeerAddress, payload: bytes) -> None:
        self.catch_up()
        allocation = self.by_id().get(id_)
        bound = {} if allocation is None else {c.peer: n for n, c in allocation.channels.items() if c.live(self.now)}
        rest = self.settle(self.relay.receive_from_peer(id_, payload, peer))
        if allocation is None or peer not in bound:
            assert rest == []
            self.drops[DropReason.UNBOUND_PEER] += 1
        else:
            assert rest == [SendToClient(channel_data(bound[peer], payload), allocation.request.address)]

    @precondition(lambda self: len(self.allocations) > 1)
    @rule(data=st.data(), numbers=st.permutations(NUMBERS[:3]), family=st.sampled_from(Family), one_way=st.booleans())
    def clients_meet_inside(
        self,
        data: st.DataObject,
        numbers: list[int],
        family: Family,
        one_way: bool,  # noqa: FBT001
    ) -> None:
        """Bind channels of two clients, or of a client and itself, to the relayed addresses of each other, and use them."""
        pair = [self.any_of(data, self.allocations.values()) for _ in range(2)]
        ends = [(HOSTS[family], each.ports[-1]) for each in pair]
        peers = [PeerAddress(end if family is Family.IPV4 else (*end, 0, 0)) for end in ends]
        ways = list(zip(pair, numbers[:2], reversed(peers), strict=True))[one_way:]
        for allocation, number, peer in ways:
            self.request_channel(allocation.request.user, allocation.request.address, number, peer)
        for allocation, number, peer in ways:
            self.check_to_peer(allocation.request.address, number, b"inside")
            self.check_to_client(allocation.id, peer, b"by a socket")

    @precondition(lambda self: self.allocations)
    @rule(data=st.data())
    def every_channel_is_used(self, data: st.DataObject) -> None:
        """Send in both directions on each channel of an allocation, including channels in the grace period."""
        allocation = self.any_of(data, self.allocations.values())
        for number, channel in tuple(allocation.channels.items()):
            self.check_to_peer(allocation.request.address, number, b"to peer")
            self.check_to_client(allocation.id, channel.peer, b"to client")

    @rule(most=st.integers(0, 5))
    def a_handover_begins(self, most: int) -> None:
        """Write the state of some allocations. All other rules may follow."""
        self.written = self.relay.begin_handover(most)

    @precondition(lambda self: self.written)
    @rule()
    def another_process_takes_over(self) -> None:
        """Continue with another server, which has read all of the state, beside the former."""
        assert self.written is not None
        self.catch_up()
        self.wake()
        former = self.relay.server
        if isinstance(former, Twins):
            # A third server would make the test slow.
            return
        self.relay.hand_over(self.written)
        self.written = None
        self.relay.server.handle_own_addresses(self.own, self.relay.now)
        self.mirror = Mirror()
        assert self.settle(self.relay.drain()) == []
        self.relay.server = cast(Server, Twins(former, self.relay.server))

    @rule(hosts=st.sampled_from([(), (), (PEER[0],), (PEER6[0],), (PEER[0], PEER6[0])]))
    def own_addresses_change(self, hosts: tuple[str, ...]) -> None:
        """Addresses of peers come to this machine, or go. Channels to them end as if they had expired."""
        self.catch_up()
        self.own = frozenset(hosts)
        for each in self.allocations.values():
            for channel in each.channels.values():
                if channel.peer[0] in self.own and channel.live(self.now):
                    channel.bound = self.now - CHANNEL_LIVES
        self.relay.server.handle_own_addresses(self.own, self.relay.now)
        assert self.settle(self.relay.drain()) == []

    @rule(drains=st.sampled_from([False, False, True]))
    def operator_drains_or_resumes(self, drains: bool) -> None:  # noqa: FBT001
        self.catch_up()
        handle = self.relay.server.handle_drain if drains else self.relay.server.handle_resume
        was_draining = self.is_draining
        if drains:
            self.is_draining, self.has_drained = True, self.has_drained and was_draining
        handle(self.relay.now)
        assert self.settle(self.relay.drain()) == []
        self.is_draining = drains

    @rule(address=st.sampled_from(ADDRESSES), garbage=st.binary(max_size=40))
    def strangers_send_garbage(self, address: SocketAddress, garbage: bytes) -> None:
        self.catch_up()
        # Not 64–127, the first bytes of channel numbers.
        data = garbage if not garbage or not 64 <= garbage[0] < 128 else b"\xff" + garbage
        assert self.settle(self.relay.receive(data, address)) == []

    @rule(seconds=st.sampled_from([0.5, 0.5, 1, 1, 4.5, 5, 60, 60, 299.5, 300, 599.5, 600, 3600]), woken=st.booleans())
    def time_passes(self, seconds: float, woken: bool) -> None:  # noqa: FBT001
        self.relay.pass_time(seconds)
        if woken:
            self.wake()

    @precondition(lambda self: self.allocations)
    @rule(
        data=st.data(), off=st.sampled_from([-0.25, 0, 0, 0.25]), then=st.sampled_from(["wake", "client", "peer", "nothing"])
    )
    def time_passes_to_a_deadline(self, data: st.DataObject, off: float, then: str) -> None:
        """Advance the clock to just before, exactly at, or just after a deadline."""
        ahead = sorted(at for at in self.deadlines() if at + off >= self.now)
        if not ahead:
            self.wake()
            return
        # Mostly the next deadline, to avoid simultaneous ends.
        self.relay.pass_time(data.draw(st.sampled_from([ahead[0], ahead[0], *ahead])) + off - self.now)
        allocation = self.any_of(data, self.allocations.values())
        match then:
            case "wake":
                self.wake()
            case "client":
                for number in tuple(allocation.channels) or (0x4000,):
                    self.check_to_peer(allocation.request.address, number, b"client")
            case "peer":
                for peer in tuple(channel.peer for channel in allocation.channels.values()) or (PEER,):
                    self.check_to_client(allocation.id, peer, b"peer")

    def wake(self) -> None:
        self.catch_up()
        assert self.settle(self.relay.wake()) == []
        timeout = self.relay.server.poll_timeout()
        assert timeout is None or timeout > self.now

    # Invariants after every step.

    @invariant()
    def allocations_are_those_of_the_model(self) -> None:
        tables = self.relay.server.allocations
        assert {id_: each.client for id_, each in tables.by_id.items()} == {
            each.id: client for client, each in self.allocations.items()
        }
        assert {client: each.id for client, each in tables.by_client.items()} == {
            client: each.id for client, each in self.allocations.items()
        }
        assert {username: each.id for username, each in tables.by_username.items()} == {
            each.username: each.id for each in self.allocations.values()
        }
        assert tables.by_port == {each.ports[-1]: each.id for each in self.allocations.values() if each.answer is not None}
        assert tables.by_network == Counter(network_of(client) for client in self.allocations)
        assert all(tables.by_id[each.id] is each for each in tables.by_client.values())
        assert all(tables.by_id[each.id] is each for each in tables.by_username.values())

    @invariant()
    def channels_are_those_of_the_model(self) -> None:
        tables = self.relay.server.allocations
        for client, allocation in self.allocations.items():
            real = tables.by_client[client]
            assert {number: each.peer for number, each in real.channels.items()} == {
                number: each.peer for number, each in allocation.channels.items()
            }
            assert {peer: each.number for peer, each in (real.live_peers | real.expired_peers).items()} == {
                each.peer: number for number, each in allocation.channels.items()
            }
            assert all(each.live is allocation.channels[number].live(self.seen) for number, each in real.channels.items())

    @invariant()
    def only_live_channels_are_where_packets_are_looked_up(self) -> None:
        tables = self.relay.server.allocations
        live = [
            (client, allocation.id, number, channel.peer)
            for client, allocation in self.allocations.items()
            for number, channel in allocation.channels.items()
            if channel.live(self.seen)
        ]
        for table, is_of_table in ((tables.live_channels, False), (tables.inside_channels, True)):
            found = {(client, number) for client, channels in table.items() for number in channels}
            assert found == {(client, number) for client, _, number, peer in live if is_inside(peer) is is_of_table}
        assert {(id_, peer) for id_, of in tables.live_peers.items() for peer in of} == {(i, p) for _, i, _, p in live}
        assert tables.channels - tables.expired == len(live)
        assert tables.channels == sum(len(each.channels) for each in self.allocations.values())
        for client, id_, number, peer in live:
            table = tables.inside_channels if is_inside(peer) else tables.live_channels
            binding = table[client][ChannelNumber(number)]
            assert binding is tables.live_peers[id_][peer]
            assert binding is tables.by_id[id_].channels[binding.number]

    @invariant()
    def the_kernel_relays_what_the_sockets_would_and_for_as_long(self) -> None:
        assert self.mirror.channels == {
            (client, number): (
                allocation.ports[-1],
                channel.peer,
                min(channel.bound + CHANNEL_LIVES, allocation.ends),
            )
            for client, allocation in self.allocations.items()
            for number, channel in allocation.channels.items()
            if channel.live(self.seen)
        }

    @invariant()
    def every_port_is_in_the_pool_or_used_once(self) -> None:
        used = [port for each in self.allocations.values() for port in each.ports]
        assert sorted([*self.relay.server.free_ports, *used]) == list(PORTS)
        for client, each in self.allocations.items():
            real = self.relay.server.allocations.by_client[client]
            assert [*real.refused_ports, real.port] == each.ports

    @invariant()
    def early_packets_are_those_of_the_model(self) -> None:
        counters = self.relay.counters
        assert [counters.early_held, counters.early_relayed] == self.was_early
        for reason in (DropReason.UNBOUND_CHANNEL, DropReason.EARLY_LIMIT, DropReason.UNBOUND_PEER):
            assert counters.drops[reason] == self.drops[reason]

    @invariant()
    def the_wake_up_is_the_earliest_deadline(self) -> None:
        deadlines = self.deadlines()
        assert self.relay.server.poll_timeout() == (min(deadlines) if deadlines else None)
        assert len(self.relay.server.allocations.deadlines) == len(self.allocations) + bool(self.early)

    def teardown(self) -> None:
        """Expire everything: all tables must be empty."""
        while (at := self.relay.server.poll_timeout()) is not None:
            self.relay.pass_time(max(0, at - self.now))
            self.wake()
        tables = self.relay.server.allocations
        assert not self.allocations
        assert not self.mirror.channels
        assert not any((tables.by_id, tables.by_client, tables.by_username, tables.by_network))
        assert not any((tables.by_port, tables.live_channels, tables.live_peers, tables.inside_channels))
        assert len(tables.deadlines) == 0
        assert sorted(self.free_ports()) == list(PORTS)
        self.every_port_is_in_the_pool_or_used_once()


@pytest.fixture(scope="module", autouse=True)
def reachable_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early, "EARLY_CLIENT_BYTES", EARLY_OF_CLIENT)
        patch.setattr(early, "EARLY_BYTES", EARLY_OF_ALL)
        patch.setattr(early, "EARLY_SHARE", EARLY_SHARE)
        yield


TestServer = ServerMachine.TestCase
# A run takes seconds, but shrinking a failure may take minutes.
pytestmark = pytest.mark.timeout(600)
TestServer.settings = examples(60, stateful_step_count=60, report_multiple_bugs=False)
