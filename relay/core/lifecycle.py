"""How an allocation comes to be, and how it ends; `relay.core.server` has the table of its states."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from relay.core.addresses import AllocationId, ClientAddress, Family, SocketAddress, network_of, socket_address
from relay.core.allocations import Allocation, Allocations, AllocationState, ChannelBinding
from relay.core.answers import Answers, Recipient
from relay.core.attributes import (
    ADDRESS_ERROR_CODE,
    LIFETIME,
    XOR_MAPPED_ADDRESS,
    XOR_RELAYED_ADDRESS,
    AddressErrorValue,
    Attribute,
)
from relay.core.authentication import ErrorCode
from relay.core.commands import BindPort, Commands, Drained, FreeAllocation
from relay.core.config import ServerConfig
from relay.core.counters import Counters, FreeReason
from relay.core.credentials import integrity_key, parse_username, password_of
from relay.core.events import AllocationCreated, AllocationFreed, ChannelExpired, Limit, LimitReached
from relay.core.ports import PortPool
from relay.core.randomness import RandomSource
from relay.core.stun import Method

BIND_TIMEOUT = 5
"""Seconds to wait for a report on sockets. Far longer than a bind takes; a client repeats its Allocate for 39.5 s."""

_QUOTAS = (Limit.ALLOCATIONS, Limit.ALLOCATIONS_OF_ADDRESS)


class BindRefusal(StrEnum):
    """Why sockets could not be bound."""

    PORT = "port"
    """This port can't be had: another may."""
    MACHINE = "machine"
    """The machine has no socket, descriptor or thread to give: another port won't help."""


class AllocationRequest(NamedTuple):
    """An Allocate that passed all checks."""

    client: ClientAddress
    username: str
    transaction_id: bytes
    fingerprint: bool
    families: tuple[Family, ...]
    missing_families: tuple[Family, ...]
    even_port: bool
    lifetime: int


class Lifecycle:
    """Makes allocations and frees them."""

    def __init__(
        self,
        config: ServerConfig,
        tables: Allocations,
        answers: Answers,
        counters: Counters,
        commands: Commands,
        random: RandomSource,
    ) -> None:
        self._config = config
        self._tables = tables
        self._answers = answers
        self._counters = counters
        self._commands = commands
        self._random = random
        self._ports = PortPool(config.ports)
        self._public = {family: socket_address(host, 0)[0] for family, host in config.public_hosts.items()}
        # Of the one Allocate that is just being answered, most often. An allocation itself holds no secret.
        self._keys: dict[AllocationId, bytes] = {}
        self._next_id = 1
        self._draining = False

    def begin(self, request: AllocationRequest, key: bytes | None, now: float) -> ErrorCode | None:
        """Make an allocation, to be answered once its sockets are bound; or give the error that stands against it.

        ``key`` signs the answer; None derives it then.

        The allocation that its username had (roaming) is freed once nothing stands against the new one; its ports and its
        place count as free.
        """
        replaced = self._tables.by_username.get(request.username)
        limit = self._limit_reached(request, replaced)
        if limit is not None:
            return self._refuse(request.client, limit)
        if replaced is not None:
            self.free(replaced, FreeReason.REPLACED)
        port = self._ports.draw(self._random, even=request.even_port)
        assert port is not None, "one was counted above"  # noqa: S101
        allocation = Allocation(
            AllocationId(self._next_id),
            request.client,
            request.username,
            request.transaction_id,
            request.families,
            request.missing_families,
            port,
            request.even_port,
            request.lifetime,
            request.fingerprint,
            now,
        )
        self._next_id += 1
        if key is not None:
            self._keys[allocation.id] = key
        self._tables.add(allocation, now + BIND_TIMEOUT)
        self._commands.append(BindPort(allocation.id, port, allocation.families))
        return None

    def _limit_reached(self, request: AllocationRequest, replaced: Allocation | None) -> Limit | None:
        """Tell what stands against an allocation that is to take the place of another, or of none."""
        if self._draining:
            return Limit.DRAINING
        regained = () if replaced is None else (replaced.port, *replaced.refused_ports)
        if not self._ports.count(even=request.even_port) and not any(
            port % 2 == 0 or not request.even_port for port in regained
        ):
            return Limit.PORTS
        if len(self._tables.by_id) - (replaced is not None) >= self._config.max_allocations:
            return Limit.ALLOCATIONS
        most = self._config.max_allocations_per_address
        if most is not None:
            network = network_of(request.client)
            makes_room = replaced is not None and network_of(replaced.client) == network
            if self._tables.by_network.get(network, 0) - makes_room >= most:
                return Limit.ALLOCATIONS_OF_ADDRESS
        return None

    def establish(self, allocation: Allocation, now: float) -> None:
        """Answer the Allocate of an allocation whose sockets are all bound."""
        allocation.state = AllocationState.ESTABLISHED
        self._give_back_refused_ports(allocation)
        self._tables.extend(allocation, now + allocation.lifetime)
        self._counters.allocations_made += 1
        if AllocationCreated in self._commands.watched:
            relayed = tuple(self._relayed(allocation, family) for family in allocation.families)
            self._commands.append(
                AllocationCreated(
                    allocation.id, allocation.client, relayed, allocation.missing_families, allocation.lifetime
                )
            )
        allocation.success = self._answers.succeed(self._recipient(allocation), self._granted(allocation))

    def try_another_port(self, allocation: Allocation) -> None:
        """Go on with another port than the one the machine refused; without any left, answer 508."""
        self._counters.ports_refused += 1
        port = self._ports.draw(self._random, even=allocation.even_port)
        if port is None:
            self.free(allocation, FreeReason.REFUSED)
            return
        allocation.refused_ports.append(allocation.port)
        allocation.port = port
        self._commands.append(BindPort(allocation.id, port, allocation.families))

    def free(self, allocation: Allocation, reason: FreeReason) -> None:
        """Free an allocation: out of all tables, its ports to the pool, its sockets to be closed."""
        self._tables.remove(allocation)
        self._ports.give_back(allocation.port)
        self._give_back_refused_ports(allocation)
        self._counters.allocations_freed[reason] += 1
        self._commands.append(FreeAllocation(allocation.id, reason))
        if allocation.state is AllocationState.ESTABLISHED:
            if AllocationFreed in self._commands.watched:
                self._commands.append(_freed(allocation, reason))
        elif reason in (FreeReason.REFUSED, FreeReason.FAILED):
            self._answers.refuse(self._recipient(allocation), self._refuse(allocation.client, Limit.SOCKETS))
        self._keys.pop(allocation.id, None)
        self._note_if_drained()

    def drain(self) -> None:
        """Make no allocation any more, and say when the last one is gone; told again, do nothing."""
        if not self._draining:
            self._draining = True
            self._note_if_drained()

    def expire(self, now: float) -> None:
        """Do all that is due at ``now``."""
        for at, (id_, number) in self._tables.deadlines.pop_due(now):
            allocation = self._tables.by_id[id_]
            if number is None:
                binding = allocation.state is AllocationState.BINDING
                self.free(allocation, FreeReason.REFUSED if binding else FreeReason.EXPIRED)
            elif allocation.channels[number].live:
                self._cool_channel(allocation.channels[number], at)
            else:
                self._tables.unbind_channel(allocation, allocation.channels[number])

    def _cool_channel(self, binding: ChannelBinding, expired_at: float) -> None:
        self._tables.cool_channel(binding, expired_at)
        if ChannelExpired in self._commands.watched:
            self._commands.append(ChannelExpired(binding.allocation, binding.client, binding.number, binding.peer))

    def _refuse(self, client: ClientAddress, limit: Limit) -> ErrorCode:
        """Tell of a limit, and give the error that a client is answered for it."""
        code = ErrorCode.ALLOCATION_QUOTA_REACHED if limit in _QUOTAS else ErrorCode.INSUFFICIENT_CAPACITY
        if LimitReached in self._commands.watched:
            self._commands.append(LimitReached(client, limit, code))
        return code

    def _note_if_drained(self) -> None:
        if self._draining and not self._tables.by_id:
            self._commands.append(Drained())

    def _give_back_refused_ports(self, allocation: Allocation) -> None:
        for port in allocation.refused_ports:
            self._ports.give_back(port)
        allocation.refused_ports.clear()

    def _granted(self, allocation: Allocation) -> Iterator[tuple[Attribute[Any], Any]]:
        for family in allocation.families:
            yield XOR_RELAYED_ADDRESS, self._relayed(allocation, family)
        yield XOR_MAPPED_ADDRESS, allocation.client
        yield LIFETIME, allocation.lifetime
        for family in allocation.missing_families:
            yield ADDRESS_ERROR_CODE, AddressErrorValue(family, ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED)

    def _relayed(self, allocation: Allocation, family: Family) -> SocketAddress:
        host, port = self._public[family], allocation.port
        return (host, port) if family is Family.IPV4 else (host, port, 0, 0)

    def _recipient(self, allocation: Allocation) -> Recipient:
        key = self._keys.pop(allocation.id, None)
        if key is None:
            username = parse_username(allocation.username)
            assert username is not None, "an allocation's username was authenticated"  # noqa: S101
            key = integrity_key(username.text, self._config.realm, password_of(username, self._config.secret))
        return Recipient(
            allocation.client,
            Method.ALLOCATE,
            allocation.transaction_id,
            allocation.fingerprint,
            key,
            authenticated=True,
        )


def _freed(allocation: Allocation, reason: FreeReason) -> AllocationFreed:
    return AllocationFreed(
        allocation.id,
        allocation.client,
        reason,
        allocation.made_at,
        allocation.to_peer_bytes,
        allocation.to_client_bytes,
    )
