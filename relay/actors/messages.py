"""What actors are told."""

from collections.abc import Sequence
from typing import NamedTuple

from relay.core.addresses import AllocationId, RelayedPort
from relay.core.portal.commands import ConnectionId
from relay.core.portal.refusal import Refusal
from relay.core.trains import Arrival


class FromClients(NamedTuple):
    """What arrived on the port that clients talk to, in one batch."""

    arrivals: Sequence[Arrival]
    is_flood: bool = False
    """Whether more arrives there than can be taken."""


class FromPeers(NamedTuple):
    """What arrived on an allocation's relayed addresses, in one batch."""

    allocation: AllocationId
    arrivals: Sequence[Arrival]


class Tick(NamedTuple):
    """A deadline of the core has come."""


class Failed(NamedTuple):
    """A thread that worked for the actor failed: so has the actor."""

    error: Exception


class AllocationFailed(NamedTuple):
    """What serves an allocation can't go on."""

    allocation: AllocationId
    error: BaseException


class AllocationClosed(NamedTuple):
    """The sockets of an allocation are closed."""

    allocation: AllocationId
    port: RelayedPort


class Drain(NamedTuple):
    """Take on no new allocation."""


class AreYouThere(NamedTuple):
    """Whoever asks wants to know whether messages are still worked off."""


class PortalConnected(NamedTuple):
    """The portal answered the upgrade with 101."""

    connection: ConnectionId


class PortalRefused(NamedTuple):
    """The portal answered the upgrade with something else."""

    connection: ConnectionId
    refusal: Refusal


class PortalSaid(NamedTuple):
    """The portal sent a text message."""

    connection: ConnectionId
    text: str


class PortalSentOther(NamedTuple):
    """The portal sent a message or frame of another kind."""

    connection: ConnectionId
    kind: str


class PortalLost(NamedTuple):
    """There is no connection to the portal, or none any more."""

    connection: ConnectionId
    reason: str


class LeavePortal(NamedTuple):
    """Leave the portal's channel."""
