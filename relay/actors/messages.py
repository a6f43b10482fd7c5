"""The messages of actors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from relay.core.addresses import AllocationId, Family
from relay.core.data import Datagram
from relay.core.portal.events import ConnectionEvent


class ClientDatagrams(NamedTuple):
    """One batch of datagrams that arrived on the port for clients."""

    batch: Sequence[Datagram]
    is_flood: bool = False
    """Whether more datagrams arrive there than the relay can handle."""


class PeerDatagrams(NamedTuple):
    """One batch of datagrams that arrived on the relayed addresses of an allocation."""

    batch: Sequence[Datagram]
    allocation: AllocationId


class Tick(NamedTuple):
    """A deadline of the core has passed."""


class Failed(NamedTuple):
    """The actor failed while another thread ran its code."""

    error: Exception


class AllocationFailed(NamedTuple):
    """A socket or the reader of an allocation failed."""

    allocation: AllocationId
    error: BaseException


class Kick(NamedTuple):
    """End an allocation at an operator's request: the reply is whether it existed."""

    allocation: AllocationId


class OwnAddresses(NamedTuple):
    """The addresses of this machine have changed."""

    addresses: frozenset[str]
    """All addresses."""
    hosts: Mapping[Family, str]
    """The addresses for sockets of allocations."""
    several: frozenset[Family]
    """The families of which sockets are bound to several addresses."""


class Drain(NamedTuple):
    """Make no new allocations."""


class Resume(NamedTuple):
    """Make new allocations again."""


class Execute(NamedTuple):
    """Call a function with the actor, in its turn, and reply with the result."""

    function: Callable[[Any], object]


class Ping(NamedTuple):
    """A check that the actor still handles messages: the reply is empty."""


class OffloadedLinks(NamedTuple):
    """The interfaces with the XDP program, for a successor."""

    content: dict[str, Any]
    """Plain data: whether an operator wants offload, and a row of each interface."""
    descriptors: list[int]
    """A new descriptor of each link."""


NO_LINKS: Final = OffloadedLinks({"wanted": True, "links": []}, [])


class PortalEvent(NamedTuple):
    """An event of a connection to the portal."""

    link: object
    """The connection, which may have been abandoned meanwhile."""
    event: ConnectionEvent


class JoinPortal(NamedTuple):
    """A request to join the portal's channel."""


class Succeeded(NamedTuple):
    """Another process takes this relay's place at the portal."""


class LeavePortal(NamedTuple):
    """A request to leave the portal's channel."""
