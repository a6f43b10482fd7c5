"""Allocations and channel bindings as plain data. They refer to each other by id or number, so the tables can be serialized.

A channel binding has two states (RFC 8656 §12). A live binding relays packets. In its grace period an expired binding relays
nothing, and its number and its peer can only be bound to each other again. An allocation has its bindings of both states.

The peer of an inside channel is a relayed address of this relay, with or without an allocation.
"""

from dataclasses import dataclass, field
from enum import Enum

from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, Family, PeerAddress, RelayedPort
from relay.core.counters import DropReason

CHANNEL_LIFETIME = 600
"""Seconds for which a channel binding relays (RFC 8656 §12)."""

CHANNEL_GRACE_PERIOD = 300
"""Seconds of the grace period: number and peer stay reserved for each other (RFC 8656 §12)."""


@dataclass(slots=True)
class ChannelBinding:
    """A channel number and a peer, bound to each other in one allocation.

    The counters work as in `relay.core.counters.Counters`. They exclude packets that the kernel relayed.
    """

    allocation: AllocationId
    client: ClientAddress
    number: ChannelNumber
    port: RelayedPort
    peer: PeerAddress
    inside: bool = False
    until: float = 0.0
    """Monotonic time of the expiry. The grace period begins then."""
    live: bool = False
    to_peer_packets: int = 0
    to_peer_bytes: int = 0
    to_client_packets: int = 0
    to_client_bytes: int = 0


class AllocationState(Enum):
    """The state of an allocation."""

    BINDING = "binding"
    """The sockets are not all bound, and the Allocate is unanswered."""
    ESTABLISHED = "established"


@dataclass(slots=True)
class Allocation:
    """A client's claim on a relayed port."""

    id: AllocationId
    client: ClientAddress
    username: str
    transaction_id: bytes
    """The transaction id of the Allocate. A request with the same id is a retransmission (RFC 8656 §7.2)."""
    families: tuple[Family, ...]
    """The families of the relayed addresses, IPv4 first."""
    missing_families: tuple[Family, ...]
    """Requested families without service. The response reports them."""
    port: RelayedPort
    even_port: bool
    lifetime: int
    """The last granted lifetime in seconds."""
    fingerprint: bool
    """Whether the Allocate and its response have a FINGERPRINT."""
    made_at: float
    """Monotonic time of the Allocate."""
    ends: float = 0.0
    """Monotonic time of its end."""
    state: AllocationState = AllocationState.BINDING
    refused_ports: list[RelayedPort] = field(default_factory=list)
    """Ports that the machine refused. They return to the pool after the response."""
    success: bytes = b""
    """The success response, for retransmissions of the request."""
    live: dict[ChannelNumber, ChannelBinding] = field(default_factory=dict)
    """Live channels. Every bind gives the same lifetime and moves its channel to the end, so the first expires first."""
    outside: dict[ChannelNumber, ChannelBinding] = field(default_factory=dict)
    inside: dict[ChannelNumber, ChannelBinding] = field(default_factory=dict)
    """Inside channels, and above all other channels, of `live`."""
    live_peers: dict[PeerAddress, ChannelBinding] = field(default_factory=dict)
    expired: dict[ChannelNumber, ChannelBinding] = field(default_factory=dict)
    """Channels in their grace period, which ends first for the first."""
    expired_peers: dict[PeerAddress, ChannelBinding] = field(default_factory=dict)
    cut_short: dict[ChannelNumber, None] = field(default_factory=dict)
    """Channels that would outlive the allocation. The kernel has the end of the allocation for them."""
    to_peer_packets: int = 0
    """This counter and the next three have the totals of removed channels. They exclude `channels`."""
    to_peer_bytes: int = 0
    to_client_packets: int = 0
    to_client_bytes: int = 0
    drops: dict[DropReason, int] = field(default_factory=dict)
    """Dropped datagrams of the client, and of peers."""

    @property
    def channels(self) -> dict[ChannelNumber, ChannelBinding]:
        """A copy of the channels in both states. Any thread may call this."""
        return {**self.expired, **self.live}

    def held(self, number: ChannelNumber, peer: PeerAddress) -> tuple[ChannelBinding | None, ChannelBinding | None]:
        """Return the channel with a number and the channel with a peer, in either state."""
        return (
            self.live.get(number) or self.expired.get(number),
            self.live_peers.get(peer) or self.expired_peers.get(peer),
        )

    @property
    def channel_count(self) -> int:
        """Channels in both states."""
        return len(self.expired) + len(self.live)
