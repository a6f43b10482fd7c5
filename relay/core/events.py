"""Events of the core, for the log. The core appends events to the commands, in order.

The core appends only watched events (`Server.watch`). No event has a username, because a username is half of a credential.
"""

from enum import StrEnum
from typing import NamedTuple, TypeAlias, get_args

from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, Family, PeerAddress, SocketAddress
from relay.core.counters import FreeReason
from relay.core.errors import ErrorCode, Reason
from relay.core.peers import PeerRule
from relay.core.stun import Method


class Limit(StrEnum):
    """The limit that a valid request exceeded."""

    ALLOCATIONS = "allocations"
    """The maximum of concurrent allocations (486)."""
    ALLOCATIONS_OF_ADDRESS = "allocations_of_address"
    """The maximum of concurrent allocations of the client's address (486)."""
    CHANNELS = "channels"
    """The maximum of channels of the allocation (508)."""
    CHANNELS_IN_ALL = "channels_in_all"
    """The maximum of channels of all allocations (508)."""
    PORTS = "ports"
    """No port of the range is free (508)."""
    SOCKETS = "sockets"
    """The machine lacks a port, a descriptor or a thread, or did not report in time (508)."""
    DRAINING = "draining"
    """The relay is draining (508)."""


class AllocationCreated(NamedTuple):
    """An Allocate succeeded."""

    allocation: AllocationId
    client: ClientAddress
    relayed: tuple[SocketAddress, ...]
    """Its relayed addresses, IPv4 first."""
    missing_families: tuple[Family, ...]
    """Requested families without service."""
    lifetime: int
    """Seconds."""


class AllocationRefreshed(NamedTuple):
    """A Refresh has extended an allocation."""

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
    """An established allocation and its channels have ended."""

    allocation: AllocationId
    client: ClientAddress
    reason: FreeReason
    made_at: float
    """Monotonic seconds."""
    to_peer_bytes: int
    """Relayed payload. The kernel counts its own packets separately."""
    to_client_bytes: int


class _ChannelEvent(NamedTuple):
    allocation: AllocationId
    client: ClientAddress
    number: ChannelNumber
    peer: PeerAddress


class ChannelBound(_ChannelEvent):
    """A channel was bound, and relays."""

    __slots__ = ()


class ChannelRefreshed(_ChannelEvent):
    """A live channel was refreshed."""

    __slots__ = ()


class ChannelExpired(_ChannelEvent):
    """A channel has expired without a refresh, or its peer's address is this machine's now. Its allocation continues."""

    __slots__ = ()


class PeerRefused(NamedTuple):
    """A client requested a denied peer (403)."""

    allocation: AllocationId
    client: ClientAddress
    method: Method
    peer: PeerAddress
    rule: PeerRule


class LimitReached(NamedTuple):
    """A valid Allocate or ChannelBind exceeded a limit."""

    client: ClientAddress
    limit: Limit
    code: ErrorCode


class RequestRefused(NamedTuple):
    """An authenticated client sent an invalid or unsupported request. No other event reports the request."""

    client: ClientAddress
    method: Method
    code: ErrorCode
    reason: Reason | None = None
    """None if the code has only one reason."""


class Answered(NamedTuple):
    """A response was sent. Each response has this event, after the other events of its request."""

    client: ClientAddress
    method: Method
    code: ErrorCode | None
    """None: success."""
    reason: Reason | None = None
    """None if the code has only one reason."""


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
