"""What happens in the core, for whoever watches: told among the commands, in their order.

Nothing is told of unless someone wants to hear of it (`Server.watch`): an event that nobody wants is not even made. None of
them bears a username: it is half of a credential.
"""

from enum import StrEnum
from typing import NamedTuple, TypeAlias, get_args

from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, Family, PeerAddress, SocketAddress
from relay.core.authentication import ErrorCode, Reason
from relay.core.counters import FreeReason
from relay.core.peers import PeerRule
from relay.core.stun import Method


class Limit(StrEnum):
    """What a request was refused for that nothing was wrong with."""

    ALLOCATIONS = "allocations"
    """There are as many as there may be at once (486)."""
    ALLOCATIONS_OF_ADDRESS = "allocations_of_address"
    """The client's address has as many as one may have at once (486)."""
    CHANNELS = "channels"
    """The allocation has as many as one may have (508)."""
    PORTS = "ports"
    """No port of the range is free (508)."""
    SOCKETS = "sockets"
    """The machine had no port, descriptor or thread to give, or did not say so in time (508)."""
    DRAINING = "draining"
    """The relay is about to end (508)."""


class AllocationCreated(NamedTuple):
    """An Allocate was answered with success."""

    allocation: AllocationId
    client: ClientAddress
    relayed: tuple[SocketAddress, ...]
    """Its relayed addresses, IPv4 first."""
    missing_families: tuple[Family, ...]
    """Asked for and not served here."""
    lifetime: int
    """Seconds."""


class AllocationRefreshed(NamedTuple):
    """A Refresh has moved the end of an allocation."""

    allocation: AllocationId
    client: ClientAddress
    lifetime: int
    """Seconds from now on."""


class RelayedAddressDeleted(NamedTuple):
    """A Refresh has deleted one of an allocation's two relayed addresses (RFC 8656 §8.1)."""

    allocation: AllocationId
    client: ClientAddress
    family: Family


class AllocationFreed(NamedTuple):
    """An allocation that had been created is no more, nor are its channels."""

    allocation: AllocationId
    client: ClientAddress
    reason: FreeReason
    made_at: float
    """Monotonic seconds."""
    to_peer_bytes: int
    """Of payload, relayed here; the kernel counts for itself what it relays."""
    to_client_bytes: int


class ChannelBound(NamedTuple):
    """A channel relays from now on."""

    allocation: AllocationId
    client: ClientAddress
    number: ChannelNumber
    peer: PeerAddress


class ChannelRefreshed(NamedTuple):
    """A channel that relays goes on for longer."""

    allocation: AllocationId
    client: ClientAddress
    number: ChannelNumber
    peer: PeerAddress


class ChannelExpired(NamedTuple):
    """A channel relays no more, since it was not refreshed; its allocation is still there."""

    allocation: AllocationId
    client: ClientAddress
    number: ChannelNumber
    peer: PeerAddress


class PeerRefused(NamedTuple):
    """A client asked for a peer that packets are never relayed to (403)."""

    allocation: AllocationId
    client: ClientAddress
    method: Method
    peer: PeerAddress
    rule: PeerRule


class LimitReached(NamedTuple):
    """An Allocate or a ChannelBind that nothing was wrong with was refused."""

    client: ClientAddress
    limit: Limit
    code: ErrorCode


class RequestRefused(NamedTuple):
    """A client that proved who it is asked for what is wrong or not to be had here; no other event tells of that."""

    client: ClientAddress
    method: Method
    code: ErrorCode
    reason: Reason | None = None
    """None if the code says it all."""


class Answered(NamedTuple):
    """A request was answered: comes for each, after what follows from the request."""

    client: ClientAddress
    method: Method
    code: ErrorCode | None
    """None is success."""
    reason: Reason | None = None
    """None if the code says it all."""


CoreEvent: TypeAlias = (
    AllocationCreated
    | AllocationRefreshed
    | RelayedAddressDeleted
    | AllocationFreed
    | ChannelBound
    | ChannelRefreshed
    | ChannelExpired
    | PeerRefused
    | LimitReached
    | RequestRefused
    | Answered
)

CORE_EVENTS: tuple[type[CoreEvent], ...] = get_args(CoreEvent)
