"""The reference model of the relay: the expected outputs for all inputs.

The referee decodes all datagrams. From the RFCs and its own tables it derives the expected responses, the relayed packets
and the end of allocations. `settle` compares the relay's commands with these expectations.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from relay.core.commands import BindPort, Command, Drained, FreeAllocation, SendToClient, SendToPeer, cut
from relay.core.events import AllocationFreed
from tests.simulation import wire
from tests.simulation.budgets import Budgets
from tests.simulation.clock import BrokenError
from tests.simulation.holdings import BIND_WAIT, CHANNEL_LIVES, EARLY_WAIT, NONCE_LIVES, Allocation, Channel, Holdings
from tests.simulation.requests import Judge
from tests.simulation.setting import Setting
from tests.simulation.wire import Address, Wire

REQUESTS_OF_FLOOD = 16
"""Handled requests per batch of a flood: of each client, and of all addresses without an allocation."""

EARLY_OF_CLIENT, EARLY_OF_ALL, EARLY_COSTS = 512 << 10, 8 << 20, 1024
"""Bytes of waiting data, and bytes that each datagram counts in addition."""

WITHHELD_KEPT = 8192
"""Number of stored transactions, more than are ever pending."""


class Rules(NamedTuple):
    """The configuration of the relay."""

    secret: str
    hosts: dict[int, str]
    """Hosts of relayed addresses by family."""
    setting: Setting
    is_forbidden: Callable[[Address], bool]
    """Whether packets to a peer are forbidden."""


class Expected(NamedTuple):
    """An expected response."""

    client: Address
    request: Wire
    code: int
    key: bytes | None
    """The integrity key of the response."""
    values: tuple[tuple[int, bytes], ...] = ()
    """Required attributes."""
    establishes: Allocation | None = None
    repeats: bytes = b""
    """The required bytes of the response, if it is a repetition."""


Relayed = tuple[bytes, int]
"""Payload and traffic class."""


class Referee:
    """The expected outputs of the relay."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.holdings = Holdings(rules.setting.ports)
        self.answers: Counter[tuple[int, int]] = Counter()
        """Responses by method and code, 0 for success."""
        self.withheld: Counter[tuple[int, int]] = Counter()
        """Rate-limited responses by method and code."""
        self.withheld_of: dict[bytes, None] = {}
        """The last transactions with a rate-limited response."""
        self.budgets = Budgets(rules.setting.rate, rules.setting.burst)
        self.drops: Counter[str] = Counter()
        self.inside: Counter[str] = Counter()
        """Packets between allocations of this relay."""
        self.to_peer = [0, 0]
        """Packets and bytes to peers; below, to clients."""
        self.to_client = [0, 0]
        self.told_bytes = [0, 0]
        """Bytes to peers and to clients, summed over all `AllocationFreed` events."""
        self.frees: Counter[str] = Counter()
        self.established = 0
        self.is_draining = False
        self.has_drained = False
        self.bound: list[tuple[Allocation, Channel]] = []
        """Channels that were bound or refreshed since the last `clear`."""
        self.early: dict[tuple[int, int], tuple[float, list[tuple[bytes, int]]]] = {}
        """ChannelData and traffic classes that wait for a ChannelBind, by allocation and number, with the first arrival."""
        self.early_sizes: Counter[int] = Counter()
        """The size of the waiting data, by allocation."""
        self.early_counts = [0, 0]
        """Datagrams that waited, and datagrams that were relayed afterwards."""
        self.nonces: dict[bytes, tuple[Address, int]] = {}
        self.over: set[bytes | None] = set()
        """MESSAGE-INTEGRITY of the requests that made or deleted an allocation."""
        self._last_id = 0
        self._judge = Judge(self)
        self._checks: dict[type, Callable[[Any, float], None]] = {
            SendToPeer: self._check_to_peer,
            SendToClient: self._check_to_client,
            BindPort: self._check_bind,
            FreeAllocation: self._check_free,
            Drained: self._check_drained,
            AllocationFreed: self._add_told,
        }
        self._owed: deque[Expected] = deque()
        self._ending: list[tuple[Allocation, str]] = []
        self._binding: deque[Allocation] = deque()
        self._relaying: dict[tuple[object, object], deque[Relayed]] = defaultdict(deque)

    # Inputs.

    def pass_time(self, now: float) -> None:
        for key, (since, waiting) in [*self.early.items()]:
            if since + EARLY_WAIT <= now:
                self.drops["unbound channel"] += len(waiting)
                self._take_early(key)
        holdings = self.holdings
        for allocation in holdings.due(now):
            if allocation.is_established:
                self.end(allocation, "expired")
            else:
                self.end(allocation, "refused")
                self.owe(Expected(allocation.client, self._request_of(allocation), 508, allocation.key))

    def lose_peers(self, hosts: frozenset[str], now: float) -> None:
        """End the live channels to some hosts, as if they had expired."""
        self.pass_time(now)
        for allocation in self.holdings.by_id.values():
            for channel in allocation.channels.values():
                if channel.peer[0] in hosts and channel.is_live(now):
                    channel.bound = now - CHANNEL_LIVES

    def take_from_client(self, data: bytes, client: Address, traffic_class: int, now: float, unix: float) -> None:
        self.pass_time(now)
        if data and 64 <= data[0] < 128:
            relayed = self.relayed_to_peer(data, client, now)
            if relayed is not None:
                self._owe_to_peer(*relayed, traffic_class, now)
            else:
                self._let_wait(data, client, traffic_class, now)
        elif data and data[0] < 4:
            request = wire.read(data) if client[1] and len(data) <= 1500 else None
            if request is None or request.kind != wire.REQUEST:
                self.drops["STUN"] += 1
            else:
                self._judge.judge(request, client, now, unix)
        else:
            self.drops["no protocol"] += 1

    def check_shed(self, batch: Iterable[tuple[bytes, Address]], kept: Iterable[tuple[bytes, Address]]) -> None:
        """Check the datagrams that remain of a batch in a flood: only surplus requests are dropped.

        Raises:
            BrokenError: the remaining datagrams differ.
        """
        left: dict[object, int] = {}
        right = []
        for data, client in batch:
            if data and data[0] < 4:
                sender = client if client in self.holdings.by_client else "strangers"
                left[sender] = left.get(sender, REQUESTS_OF_FLOOD) - 1
                if left[sender] < 0:
                    self.drops["flood"] += 1
                    continue
            right.append((data, client))
        if right != [*kept]:
            raise BrokenError("in a flood, other datagrams are left than those that must be")

    def take_from_peer(self, allocation: int, data: bytes, peer: Address, traffic_class: int, now: float) -> None:
        self.pass_time(now)
        self._owe_to_client(allocation, peer, data, traffic_class, now)

    def take_bound(self, allocation: int, now: float) -> None:
        self.pass_time(now)
        bound = self.holdings.by_id.get(allocation)
        if bound is not None and not bound.is_established:
            bound.is_established = True
            self.established += 1
            self.holdings.end_at(bound, now + bound.lifetime)
            self.holdings.return_refused_ports(bound)
            request = self._request_of(bound)
            relayed = (self.address_of(bound, family) for family in bound.families)
            self.owe(
                Expected(
                    bound.client,
                    request,
                    0,
                    bound.key,
                    (
                        *((wire.RELAYED_ADDRESS, wire.address(each, bound.transaction)) for each in relayed),
                        (wire.MAPPED_ADDRESS, wire.address(bound.client, bound.transaction)),
                        (wire.LIFETIME, bound.lifetime.to_bytes(4, "big")),
                        *((wire.ADDRESS_ERROR, bytes((family, 0, 4, 40))) for family in bound.missing),
                    ),
                    establishes=bound,
                )
            )

    def take_refused(self, allocation: int, now: float, *, only_port: bool) -> None:
        self.pass_time(now)
        refused = self.holdings.by_id.get(allocation)
        if refused is None or refused.is_established:
            return
        if only_port and self.holdings.free_ports(even=refused.even):
            self._binding.append(refused)
            return
        self.end(refused, "refused")
        self.owe(Expected(refused.client, self._request_of(refused), 508, refused.key))

    def take_failed(self, allocation: int, now: float, reason: str) -> None:
        self.pass_time(now)
        failed = self.holdings.by_id.get(allocation)
        if failed is not None:
            self.end(failed, reason)
            if not failed.is_established:
                self.owe(Expected(failed.client, self._request_of(failed), 508, failed.key))

    def _owe_to_peer(self, allocation: Allocation, peer: Address, payload: bytes, traffic_class: int, now: float) -> None:
        self.count(self.to_peer, payload)
        other = self.holdings.by_port.get(peer[1]) if self.is_inside(peer) else None
        if other is None or not other.is_established:
            self._relaying[allocation.id, peer].append((payload, traffic_class))
        else:
            source = self.address_of(allocation, 2 if ":" in peer[0] else 1)
            before = self.to_client[0]
            self._owe_to_client(other.id, source, payload, traffic_class, now)
            self.inside["delivered" if self.to_client[0] > before else "dropped"] += 1

    def _owe_to_client(self, allocation: int, peer: Address, payload: bytes, traffic_class: int, now: float) -> None:
        relayed = self.relayed_to_client(allocation, peer, now)
        if relayed is not None:
            client, number = relayed
            self.count(self.to_client, payload)
            self._relaying[client, number].append((wire.channel_data(number, payload), traffic_class))

    def is_inside(self, peer: Address) -> bool:
        """Check whether a permitted peer is a relayed address of this relay."""
        return peer[0] in self.rules.hosts.values()

    # ChannelData before its ChannelBind.

    def _let_wait(self, data: bytes, client: Address, traffic_class: int, now: float) -> None:
        """Let valid ChannelData of a client with an allocation wait for a ChannelBind."""
        allocation = self.holdings.by_client.get(client)
        is_valid = len(data) >= 4 and 4 + (data[2] << 8 | data[3]) <= len(data)
        if is_valid and allocation is not None and allocation.is_established:
            self.drops["unbound channel"] -= 1
            size = self.early_sizes[allocation.id]
            if size >= min(EARLY_OF_CLIENT, (EARLY_OF_ALL - self.early_sizes.total()) // 8):
                self.drops["early limit"] += 1
                return
            self.early_sizes[allocation.id] = size + len(data) + EARLY_COSTS
            self.early_counts[0] += 1
            _, waiting = self.early.setdefault((allocation.id, data[0] << 8 | data[1]), (now, []))
            waiting.append((data, traffic_class))

    def relay_early(self, allocation: Allocation, channel: Channel, now: float) -> None:
        for data, traffic_class in self._take_early((allocation.id, channel.number)):
            self.early_counts[1] += 1
            self._owe_to_peer(allocation, channel.peer, data[4 : 4 + (data[2] << 8 | data[3])], traffic_class, now)

    def _take_early(self, key: tuple[int, int]) -> list[tuple[bytes, int]]:
        _, waiting = self.early.pop(key, (0.0, []))
        self.early_sizes[key[0]] -= sum(len(data) + EARLY_COSTS for data, _ in waiting)
        self.early_sizes += Counter()  # without zeros
        return waiting

    # Relayed packets. These methods are also called for packets that the kernel relays.

    def relayed_to_peer(self, data: bytes, client: Address, now: float) -> tuple[Allocation, Address, bytes] | None:
        """Return the destination of ChannelData, or None if the datagram must be dropped."""
        end = 4 + (data[2] << 8 | data[3]) if len(data) >= 4 else math.inf
        if end > len(data):
            self.drops["short"] += 1
            return None
        allocation = self.holdings.by_client.get(client)
        channel = None if allocation is None else allocation.live_channel(data[0] << 8 | data[1], now)
        if allocation is None or channel is None or allocation.ends <= now:
            self.drops["unbound channel"] += 1
            return None
        return allocation, channel.peer, data[4 : int(end)]

    def relayed_to_client(self, allocation: int, peer: Address, now: float) -> tuple[Address, int] | None:
        """Return the client and the channel for data of a peer, or None if the datagram must be dropped."""
        held = self.holdings.by_id.get(allocation)
        channel = None if held is None else held.live_peer(peer, now)
        if held is None or channel is None or held.ends <= now:
            self.drops["unbound peer"] += 1
            return None
        return held.client, channel.number

    @staticmethod
    def count(counter: list[int], payload: bytes) -> None:
        counter[0] += 1
        counter[1] += len(payload)

    # Expectations.

    def owe(self, expected: Expected) -> None:
        self.answers[expected.request.method, expected.code] += 1
        self._owed.append(expected)

    def owe_answer(
        self, client: Address, request: Wire, code: int, key: bytes | None, values: tuple[tuple[int, bytes], ...]
    ) -> None:
        self.owe(Expected(client, request, code, key, values))

    def owe_again(self, client: Address, request: Wire, key: bytes, answer: bytes) -> None:
        self.owe(Expected(client, request, 0, key, repeats=answer))

    def withhold(self, request: Wire, code: int) -> None:
        self.withheld[request.method, code] += 1
        self.withheld_of[request.transaction] = None
        if len(self.withheld_of) > WITHHELD_KEPT:
            del self.withheld_of[next(iter(self.withheld_of))]

    def begin(self, allocation: Allocation, now: float) -> None:
        allocation.ends = now + BIND_WAIT
        self.holdings.add(allocation)
        self._binding.append(allocation)

    def end(self, allocation: Allocation, reason: str) -> None:
        self.holdings.free(allocation)
        self.frees[reason] += 1
        self._ending.append((allocation, reason))

    def knows_nonce(self, nonce: bytes, client: Address, now: float) -> bool:
        about = self.nonces.get(nonce)
        return about is not None and about[0] == client and int(now) - about[1] < NONCE_LIVES

    def made_nonce(self, nonce: bytes, client: Address) -> bool:
        """Return whether this relay made a nonce for a client, however long ago."""
        about = self.nonces.get(nonce)
        return about is not None and about[0] == client

    def address_of(self, allocation: Allocation, family: int) -> Address:
        host, port = self.rules.hosts[family], allocation.ports[-1]
        return (host, port) if family == 1 else (host, port, 0, 0)

    # Outputs.

    def settle(self, commands: Iterable[Command], now: float) -> None:
        """Compare all commands with the expectations.

        Raises:
            BrokenError: a command differs or is missing.
        """
        for command in commands:
            check = self._checks.get(type(command))
            if check is not None:
                check(command, now)
        if self._owed or self._ending or self._binding or any(self._relaying.values()):
            relayed = {flow: len(left) for flow, left in self._relaying.items() if left}
            raise BrokenError(f"left out: {[*self._owed, *self._ending, *self._binding]}, packets {relayed}")
        if len(self._relaying) > 64:
            self._relaying.clear()
        if self.is_draining and not self.has_drained and not self.holdings.by_client:
            raise BrokenError("no allocation is left, and the relay does not say that it has drained")

    def _check_to_peer(self, command: SendToPeer, _: float) -> None:
        self._check_relayed((command.allocation, command.peer), command)

    def _check_to_client(self, command: SendToClient, now: float) -> None:
        data, client = command.data, command.client
        if data[0] < 64:
            self._check_answer(data, client, now)
        else:
            self._check_relayed((client, data[0] << 8 | data[1]), command)

    def _check_relayed(self, flow: tuple[object, object], command: SendToPeer | SendToClient) -> None:
        owed = self._relaying.get(flow)
        for datagram in cut(command.data, command.segment_size):
            if not owed:
                raise BrokenError(f"relayed to {flow} what must not be: {datagram[:40].hex()}")
            if owed.popleft() != (datagram, command.traffic_class):
                raise BrokenError(f"relayed to {flow} out of order, altered or marked otherwise: {datagram[:40].hex()}")

    def _check_answer(self, data: bytes, client: Address, now: float) -> None:
        if not self._owed:
            raise BrokenError(f"an answer to {client} that nobody asked for: {data.hex()}")
        expected = self._owed.popleft()
        if expected.repeats:
            if (client, data) != (expected.client, expected.repeats):
                raise BrokenError(f"a repeated request of {client} is not answered as the first was")
            return
        answer = wire.read(data)
        what = f"{client}'s request of method {expected.request.method}"
        if answer is None or client != expected.client or answer.transaction != expected.request.transaction:
            raise BrokenError(f"{what} is not answered next, but with {data.hex()}")
        wrong = _what_is_wrong(answer, expected)
        if wrong:
            raise BrokenError(f"{what}: its answer {answer.code or 'of success'} {wrong}")
        if expected.code in (401, 438):
            self._note_nonce(answer, client, now)
        if expected.establishes is not None:
            expected.establishes.success = data

    def _note_nonce(self, answer: Wire, client: Address, now: float) -> None:
        nonce = answer.get(wire.NONCE)
        if nonce is None or answer.get(wire.REALM) != b"firezone":
            raise BrokenError(f"a challenge of {client} without a nonce or a realm")
        self.nonces.pop(nonce, None)
        self.nonces[nonce] = client, int(now)
        oldest = next(iter(self.nonces))
        if self.nonces[oldest][1] < now - 2 * NONCE_LIVES:
            del self.nonces[oldest]

    def _check_bind(self, command: BindPort, _: float) -> None:
        id_, port, families = command.allocation, command.port, command.families
        if not self._binding:
            raise BrokenError(f"port {port} is asked for, for nobody")
        allocation = self._binding.popleft()
        if allocation.ports and id_ != allocation.id:
            raise BrokenError(f"another port is tried for {id_}, not for {allocation.id}")
        if not allocation.ports:
            if id_ <= self._last_id:
                raise BrokenError(f"the id {id_} is used again")
            allocation.id = self._last_id = id_
            self.holdings.by_id[id_] = allocation
        if families != allocation.families or not self.holdings.take_port(allocation, port):
            raise BrokenError(f"port {port}/{families} is not one that {allocation} may have")

    def _check_free(self, command: FreeAllocation, _: float) -> None:
        id_, reason = command.allocation, str(command.reason)
        # Several allocations may end at once, in any order.
        for ending in self._ending:
            if (ending[0].id, ending[1]) == (id_, reason):
                self._ending.remove(ending)
                return
        raise BrokenError(f"allocation {id_} is freed ({reason}), and is not over")

    def _add_told(self, event: AllocationFreed, _: float) -> None:
        self.told_bytes[0] += event.to_peer_bytes
        self.told_bytes[1] += event.to_client_bytes

    def _check_drained(self, _: Drained, __: float) -> None:
        if not self.is_draining or self.has_drained or self.holdings.by_client:
            raise BrokenError("the relay says that it has drained, and has not")
        self.has_drained = True

    @staticmethod
    def _request_of(allocation: Allocation) -> Wire:
        """Return the known parts of the Allocate request of an allocation."""
        return Wire(wire.REQUEST, wire.ALLOCATE, allocation.transaction, [], b"", None, allocation.fingerprint)


def _what_is_wrong(answer: Wire, expected: Expected) -> str:
    """Return the first error in a response, or an empty string."""
    kind = wire.ERROR if expected.code else wire.SUCCESS
    if (answer.kind, answer.method, answer.code) != (kind, expected.request.method, expected.code):
        return f"should be {expected.code or 'one of success'}"
    if answer.mac is not None if expected.key is None else not answer.is_signed_with(expected.key):
        return "is not signed as it has to be"
    if answer.fingerprint != expected.request.fingerprint:
        return "has a FINGERPRINT, or should have one"
    for type_, value in expected.values:
        if value not in answer.get_all(type_):
            return f"has {type_:#06x} other than {value.hex()}"
    return ""
