"""Allocations and their channel bindings: the tables of the relay, and the only functions that write to them.

Everything in them is plain data, and refers to the rest by id or number: it can be written out and read back.

A channel binding passes through two states (RFC 8656 §12): live, in which it relays; and cooling, in which it relays
nothing, and its number and its peer can only be bound to each other again. Both are in the tables of their allocation;
only live ones are in the two tables that packets are looked up in.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeAlias

from relay.core.addresses import (
    AllocationId,
    ChannelNumber,
    ClientAddress,
    Family,
    PeerAddress,
    RelayedPort,
    family_of,
    network_of,
)
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.core.deadlines import Deadlines

CHANNEL_LIFETIME = 600
"""Seconds for which a channel binding relays (RFC 8656 §12)."""

CHANNEL_COOL_DOWN = 300
"""Seconds for which its number and its peer are then kept for each other (RFC 8656 §12)."""

DeadlineKey: TypeAlias = tuple[AllocationId, ChannelNumber | None]
"""A channel of an allocation, or with None the allocation itself."""


@dataclass(slots=True)
class ChannelBinding:
    """A channel number and a peer, bound to each other in one allocation.

    What was relayed for it is counted as in `relay.core.counters.Counters`; what the kernel relayed is not in it.
    """

    allocation: AllocationId
    client: ClientAddress
    number: ChannelNumber
    peer: PeerAddress
    live: bool = False
    to_peer_packets: int = 0
    to_peer_bytes: int = 0
    to_client_packets: int = 0
    to_client_bytes: int = 0


class AllocationState(Enum):
    """How far an allocation has come."""

    BINDING = "binding"
    """Its Allocate is not answered yet: the sockets are not all bound."""
    ESTABLISHED = "established"


@dataclass(slots=True)
class Allocation:
    """A client's claim on a relayed port."""

    id: AllocationId
    client: ClientAddress
    username: str
    transaction_id: bytes
    """Of the Allocate that made it: a request that bears it is a retransmission (RFC 8656 §7.2)."""
    families: tuple[Family, ...]
    """Of its relayed addresses, IPv4 first."""
    missing_families: tuple[Family, ...]
    """Asked for and not served here: reported in the answer."""
    port: RelayedPort
    even_port: bool
    lifetime: int
    """Seconds, as granted last."""
    fingerprint: bool
    """Whether the Allocate bore a FINGERPRINT, and so shall its answer."""
    made_at: float
    """Monotonic seconds: when its Allocate came."""
    state: AllocationState = AllocationState.BINDING
    refused_ports: list[RelayedPort] = field(default_factory=list)
    """Tried and refused by the machine; kept from the pool until the allocation is answered."""
    success: bytes = b""
    """The answer that established it, for retransmissions of the request."""
    channels: dict[ChannelNumber, ChannelBinding] = field(default_factory=dict)
    peers: dict[PeerAddress, ChannelBinding] = field(default_factory=dict)
    cut_short: dict[ChannelNumber, float] = field(default_factory=dict)
    """Live channels that would last longer than it does, so that the kernel was told its end for theirs; and their own."""
    to_peer_packets: int = 0
    """This and the next three are what was relayed for channels that are gone, without those in `channels`."""
    to_peer_bytes: int = 0
    to_client_packets: int = 0
    to_client_bytes: int = 0


class Offload(Protocol):
    """Where commands go that keep the kernel's tables in step with these."""

    def append(self, command: OffloadCommand, /) -> None:
        """Take a command."""


class Allocations:
    """The tables. Look-ups are open to all; changes go through the methods.

    Args:
        offload: is told what the kernel shall relay; None if it relays nothing.
    """

    def __init__(self, offload: Offload | None = None) -> None:
        self._offload = offload
        self.by_id: dict[AllocationId, Allocation] = {}
        self.by_client: dict[ClientAddress, Allocation] = {}
        self.by_username: dict[str, Allocation] = {}
        self.by_network: dict[str, int] = {}
        """How many there are of each client address, by `network_of`."""
        self.live_channels: dict[tuple[ClientAddress, int], ChannelBinding] = {}
        """Where a client's ChannelData goes: one look-up a packet."""
        self.live_peers: dict[tuple[AllocationId, PeerAddress], ChannelBinding] = {}
        """Where a peer's datagram goes: one look-up a packet."""
        self.deadlines: Deadlines[DeadlineKey] = Deadlines()

    def add(self, allocation: Allocation, deadline: float) -> None:
        """Enter an allocation."""
        self.by_id[allocation.id] = allocation
        self.by_client[allocation.client] = allocation
        self.by_username[allocation.username] = allocation
        network = network_of(allocation.client)
        self.by_network[network] = self.by_network.get(network, 0) + 1
        self.deadlines.set((allocation.id, None), deadline)

    def extend(self, allocation: Allocation, deadline: float) -> None:
        """Move the end of an allocation that is established."""
        self.deadlines.set((allocation.id, None), deadline)
        # No channel is cut short by this: each lifetime that is granted is as long as a channel's, at least.
        cut_short, allocation.cut_short = allocation.cut_short, {}
        for number, until in cut_short.items():
            self._install(allocation, allocation.channels[number], until)

    def remove(self, allocation: Allocation) -> None:
        """Take an allocation and all its channels out of every table."""
        for binding in tuple(allocation.channels.values()):
            self.unbind_channel(allocation, binding)
        self.deadlines.discard((allocation.id, None))
        del self.by_id[allocation.id]
        del self.by_client[allocation.client]
        del self.by_username[allocation.username]
        network = network_of(allocation.client)
        self.by_network[network] -= 1
        if not self.by_network[network]:
            del self.by_network[network]

    def bind_channel(self, allocation: Allocation, number: ChannelNumber, peer: PeerAddress, now: float) -> bool:
        """Bind a channel, or refresh it; False if its number or its peer is bound to another."""
        binding = allocation.channels.get(number)
        if binding is not allocation.peers.get(peer):
            return False
        if binding is None:
            binding = ChannelBinding(allocation.id, allocation.client, number, peer)
            allocation.channels[number] = binding
            allocation.peers[peer] = binding
        binding.live = True
        self.live_channels[allocation.client, number] = binding
        self.live_peers[allocation.id, peer] = binding
        until = now + CHANNEL_LIFETIME
        self.deadlines.set((allocation.id, number), until)
        self._install(allocation, binding, until)
        return True

    def cool_channel(self, binding: ChannelBinding, expired_at: float) -> None:
        """Stop a live channel from relaying."""
        self._uninstall(self.by_id[binding.allocation], binding)
        self.deadlines.set((binding.allocation, binding.number), expired_at + CHANNEL_COOL_DOWN)

    def unbind_channel(self, allocation: Allocation, binding: ChannelBinding) -> None:
        """Forget a channel, live or cooling."""
        self._uninstall(allocation, binding)
        self.deadlines.discard((allocation.id, binding.number))
        del allocation.channels[binding.number]
        del allocation.peers[binding.peer]
        allocation.to_peer_packets += binding.to_peer_packets
        allocation.to_peer_bytes += binding.to_peer_bytes
        allocation.to_client_packets += binding.to_client_packets
        allocation.to_client_bytes += binding.to_client_bytes

    def remove_family(self, allocation: Allocation, family: Family) -> None:
        """Take one of its relayed addresses, and the channels to peers of that family, from a dual allocation."""
        allocation.families = tuple(each for each in allocation.families if each is not family)
        for binding in tuple(allocation.channels.values()):
            if family_of(binding.peer) is family:
                self.unbind_channel(allocation, binding)

    def _install(self, allocation: Allocation, binding: ChannelBinding, until: float) -> None:
        """Have the kernel relay a channel until its end, or for as long as its allocation is sure to last."""
        if self._offload is None:
            return
        end = self.deadlines[allocation.id, None]
        if until > end:
            allocation.cut_short[binding.number] = until
        else:
            allocation.cut_short.pop(binding.number, None)
        self._offload.append(InstallChannel(binding.client, binding.number, allocation.port, binding.peer, min(until, end)))

    def _uninstall(self, allocation: Allocation, binding: ChannelBinding) -> None:
        if binding.live:
            binding.live = False
            del self.live_channels[binding.client, binding.number]
            del self.live_peers[binding.allocation, binding.peer]
            allocation.cut_short.pop(binding.number, None)
            if self._offload is not None:
                self._offload.append(RemoveChannel(binding.client, binding.number, allocation.port, binding.peer))
