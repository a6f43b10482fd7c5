"""The start and the end of allocations; `relay.core.server` has the table of their states."""

import itertools
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from relay.core.addresses import (
    AllocationId,
    ChannelNumber,
    ClientAddress,
    Family,
    PeerAddress,
    RelayedPort,
    SocketAddress,
    network_of,
)
from relay.core.allocation import CHANNEL_GRACE_PERIOD, Allocation, AllocationState, ChannelBinding
from relay.core.allocations import Allocations
from relay.core.attributes import (
    ADDRESS_ERROR_CODE,
    LIFETIME,
    XOR_MAPPED_ADDRESS,
    XOR_RELAYED_ADDRESS,
    AddressErrorValue,
    Attribute,
)
from relay.core.commands import BindPort, Commands, Drained, FreeAllocation
from relay.core.config import ServerConfig
from relay.core.counters import Counters, FreeReason
from relay.core.data import Datagram
from relay.core.early import EarlyData
from relay.core.errors import ErrorCode
from relay.core.events import AllocationCreated, AllocationFreed, ChannelExpired, Limit
from relay.core.overload import CHANNELS_PER_EXPIRY, COST_OF_FREEING, EXPIRIES
from relay.core.ports import PortPool
from relay.core.randomness import RandomSource
from relay.core.responses import Responder, ResponseContext, limit_error
from relay.core.stun import Method

BIND_TIMEOUT = 5
"""Seconds to wait for a report on sockets. A bind is far quicker. A client retransmits its Allocate for 39.5 s."""


class BindRefusal(StrEnum):
    """Causes of a failed bind."""

    PORT = "port"
    """The port is unavailable. Another port may be available."""
    MACHINE = "machine"
    """The machine lacks a socket, a descriptor or a thread. Another port would fail too."""


class Lifecycle:
    """Creates allocations and frees them."""

    def __init__(  # noqa: PLR0913, PLR0917 - all that an allocation concerns
        self,
        config: ServerConfig,
        tables: Allocations,
        early: EarlyData,
        responder: Responder,
        counters: Counters,
        commands: Commands,
        random: RandomSource,
    ) -> None:
        self._config = config
        self._tables = tables
        self._early = early
        self._responder = responder
        self._counters = counters
        self._commands = commands
        self._random = random
        self.ports = PortPool(config.ports)
        self._next_id = 1
        self._draining = False
        self._is_late = False
        """Whether the last portion of passed deadlines left some."""
        self._held_ports: dict[ClientAddress, list[RelayedPort]] = {}
        """Ports of ended allocations of which the kernel still has channels."""

    def export(self) -> dict[str, Any]:
        """Return the state besides the tables as plain data. Ports that the kernel holds count as free."""
        return {
            "ports": self.ports.export(),
            "held_ports": list(itertools.chain(*self._held_ports.values())),
            "next_id": self._next_id,
            "draining": self._draining,
            "late": self._is_late,
        }

    def restore(self, exported: dict[str, Any]) -> None:
        """Continue with the state of another relay, after its tables."""
        by_id = self._tables.by_id.values()
        used = {port for each in by_id for port in (each.port, *each.refused_ports)}
        self.ports.restore(exported["ports"], used, self._config.ports)
        self.ports.give_back(*exported["held_ports"])
        self._next_id, self._draining, self._is_late = exported["next_id"], exported["draining"], exported["late"]

    def begin(
        self,
        context: ResponseContext,
        families: tuple[Family, ...],
        missing_families: tuple[Family, ...],
        *,
        even_port: bool,
        lifetime: int,
    ) -> None:
        """Create an allocation for a valid Allocate. The response follows when its sockets are bound.

        Free the previous allocation of the same username (roaming) once no limit applies to the new allocation. The
        previous ports and the previous place count as free.

        Raises:
            RequestError: a limit is reached.
        """
        replaced = self._tables.by_username.get(context.username)
        self._check_limits(context.client, replaced, even_port=even_port)
        if replaced is not None:
            self.free(replaced, FreeReason.REPLACED)
        port = self.ports.draw(self._random, even=even_port)
        assert port is not None, "a free port was counted above"  # noqa: S101
        allocation = Allocation(
            AllocationId(self._next_id),
            context.client,
            context.username,
            context.transaction_id,
            families,
            missing_families,
            port,
            even_port,
            lifetime,
            context.fingerprint,
            context.now,
        )
        self._next_id += 1
        self._tables.add(allocation, context.now + BIND_TIMEOUT)
        self._commands.append(BindPort(allocation.id, port, families))

    def _check_limits(self, client: ClientAddress, replaced: Allocation | None, *, even_port: bool) -> None:
        """Raise 486 or 508 if a limit prevents an allocation, which may replace another allocation."""
        if self._draining:
            raise limit_error(client, Limit.DRAINING)
        # The kernel gives back a port only later, if it has many channels.
        is_freed_at_once = replaced is not None and not self._tables.is_removal_long(replaced)
        regained = (replaced.port, *replaced.refused_ports) if replaced is not None and is_freed_at_once else ()
        if not self.ports.count(even=even_port) and not any(port % 2 == 0 or not even_port for port in regained):
            raise limit_error(client, Limit.PORTS)
        if len(self._tables.by_id) - (replaced is not None) >= self._config.max_allocations:
            raise limit_error(client, Limit.ALLOCATIONS)
        most = self._config.max_allocations_per_address
        if most is not None:
            network = network_of(client)
            makes_room = replaced is not None and network_of(replaced.client) == network
            if self._tables.by_network.get(network, 0) - makes_room >= most:
                raise limit_error(client, Limit.ALLOCATIONS_OF_ADDRESS)

    def establish(self, allocation: Allocation, now: float) -> None:
        """Send the success response for an allocation whose sockets are all bound."""
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
        allocation.success = self._responder.succeed(self._context_of(allocation), self._granted(allocation))

    def try_another_port(self, allocation: Allocation) -> None:
        """Replace the port that the machine refused. Without another free port, respond with 508."""
        self._counters.ports_refused += 1
        port = self.ports.draw(self._random, even=allocation.even_port)
        if port is None:
            self.free(allocation, FreeReason.REFUSED)
            return
        self._tables.replace_port(allocation, port)
        self._commands.append(BindPort(allocation.id, port, allocation.families))

    def free(self, allocation: Allocation, reason: FreeReason) -> None:
        """Free an allocation: remove it from all tables, return its ports to the pool, close its sockets."""
        self._tables.remove(allocation)
        self._held_ports.setdefault(allocation.client, []).append(allocation.port)
        self._give_back_held_ports()
        self._give_back_refused_ports(allocation)
        self._counters.allocations_freed[reason] += 1
        self._commands.append(FreeAllocation(allocation.id, reason))
        if allocation.state is AllocationState.ESTABLISHED:
            if AllocationFreed in self._commands.watched:
                self._commands.append(_freed(allocation, reason))
        elif reason in (FreeReason.REFUSED, FreeReason.FAILED, FreeReason.KICKED):
            self._responder.reject(self._context_of(allocation), limit_error(allocation.client, Limit.SOCKETS))
        self._report_if_drained()

    def drain(self) -> None:
        """Reject new allocations from now on, and report the end of the last allocation. A second call does nothing."""
        if not self._draining:
            self._draining = True
            self._report_if_drained()

    def resume(self) -> None:
        """Make new allocations again. Without a drain, do nothing."""
        self._draining = False

    def handle_timeout(self, now: float) -> None:
        """Handle a portion of the passed deadlines, and of the kernel's work."""
        self._is_late = False
        self.catch_up(now)
        if self._tables.is_kernel_behind:
            self._tables.update_kernel()
            self._give_back_held_ports()

    def catch_up(self, now: float) -> None:
        """Handle passed deadlines before an input. After a portion that left some, only `handle_timeout` goes on."""
        # First: the other deadlines are those of allocations.
        self._early.expire(now)
        if not self._is_late:
            self._handle_deadlines(now)

    def catch_up_with(self, allocation: Allocation | None, now: float, *bindings: ChannelBinding | None) -> None:
        """Handle the passed deadlines of an allocation and of some channels, in case deadlines are late."""
        if allocation is None:
            return
        if allocation.ends <= now:
            binding = allocation.state is AllocationState.BINDING
            self.free(allocation, FreeReason.REFUSED if binding else FreeReason.EXPIRED)
            return
        for each in bindings:
            if each is not None and each.live and each.until <= now:
                self._tables.expire_channel(allocation, each)
                self._report_expired(each)
            if each is not None and each.until + CHANNEL_GRACE_PERIOD <= now and allocation.expired.get(each.number) is each:
                self._tables.unbind_channel(allocation, each)

    def expire_channel(self, binding: ChannelBinding, now: float) -> None:
        """End the life of a channel early."""
        self._tables.cut_channel(self._tables.by_id[binding.allocation], binding, now)
        self._report_expired(binding)

    def before_client_data(self, datagram: Datagram, now: float) -> None:
        """Handle passed deadlines before a client's datagram, and in any case those of its channel and allocation."""
        self.catch_up(now)
        if self._is_late and (allocation := self._tables.by_client.get(ClientAddress(datagram[1]))):
            number = ChannelNumber(int.from_bytes(datagram[0][:2], "big"))
            self.catch_up_with(allocation, now, allocation.live.get(number))

    def before_peer_data(self, datagram: Datagram, now: float, id_: AllocationId) -> None:
        """Handle passed deadlines before a peer's datagram, and in any case those of its channel and allocation."""
        self.catch_up(now)
        if self._is_late and (allocation := self._tables.by_id.get(id_)):
            self.catch_up_with(allocation, now, allocation.live_peers.get(PeerAddress(datagram[1])))

    def _handle_deadlines(self, now: float) -> None:
        """Handle passed deadlines in their order, until their cost is `EXPIRIES`."""
        left = EXPIRIES
        for at, id_ in self._tables.deadlines.pop_due(now):
            allocation = self._tables.by_id[id_]
            if allocation.ends <= at:
                left -= COST_OF_FREEING + allocation.channel_count // CHANNELS_PER_EXPIRY
                self.catch_up_with(allocation, at)
            else:
                expired = self._tables.expire_channels(allocation, at, left)
                for each in expired:
                    self._report_expired(each)
                left -= 1 + len(expired) + self._tables.end_grace_periods(allocation, at, left)
            if left <= 0:
                break
        self._is_late = self._tables.deadlines.earliest <= now

    def _report_expired(self, binding: ChannelBinding) -> None:
        if ChannelExpired in self._commands.watched:
            self._commands.append(ChannelExpired(binding.allocation, binding.client, binding.number, binding.peer))

    def _give_back_held_ports(self) -> None:
        for client in [each for each in self._held_ports if not self._tables.is_in_kernel(each)]:
            self.ports.give_back(*self._held_ports.pop(client))

    def _report_if_drained(self) -> None:
        if self._draining and not self._tables.by_id:
            self._commands.append(Drained())

    def _give_back_refused_ports(self, allocation: Allocation) -> None:
        self.ports.give_back(*allocation.refused_ports)
        allocation.refused_ports.clear()

    def _granted(self, allocation: Allocation) -> Iterator[tuple[Attribute[Any], Any]]:
        for family in allocation.families:
            yield XOR_RELAYED_ADDRESS, self._relayed(allocation, family)
        yield XOR_MAPPED_ADDRESS, allocation.client
        yield LIFETIME, allocation.lifetime
        for family in allocation.missing_families:
            yield ADDRESS_ERROR_CODE, AddressErrorValue(family, ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED)

    def _relayed(self, allocation: Allocation, family: Family) -> SocketAddress:
        host, port = self._config.public_hosts[family], allocation.port
        return (host, port) if family is Family.IPV4 else (host, port, 0, 0)

    def _context_of(self, allocation: Allocation) -> ResponseContext:
        """Return the context of the response to the Allocate. The allocation itself holds no key."""
        user = self._responder.keys(allocation.username)
        assert user is not None, "the username of an allocation was authenticated"  # noqa: S101
        return ResponseContext(
            allocation.client,
            Method.ALLOCATE,
            allocation.made_at,
            allocation.transaction_id,
            allocation.fingerprint,
            user.key,
            allocation.username,
        )


def _freed(allocation: Allocation, reason: FreeReason) -> AllocationFreed:
    channels = allocation.channels.values()
    return AllocationFreed(
        allocation.id,
        allocation.client,
        reason,
        allocation.made_at,
        allocation.to_peer_bytes + sum(each.to_peer_bytes for each in channels),
        allocation.to_client_bytes + sum(each.to_client_bytes for each in channels),
    )
