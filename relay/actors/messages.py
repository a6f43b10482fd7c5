"""What actors tell the server actor."""

from collections.abc import Sequence
from typing import NamedTuple

from relay.core.addresses import AllocationId, RelayedPort
from relay.net.udp import Datagram


class FromClients(NamedTuple):
    """Datagrams that arrived on the port that clients talk to."""

    datagrams: Sequence[Datagram]


class FromPeers(NamedTuple):
    """Datagrams that arrived on an allocation's relayed addresses."""

    allocation: AllocationId
    datagrams: Sequence[Datagram]


class Tick(NamedTuple):
    """A deadline of the core has come."""


class AllocationFailed(NamedTuple):
    """What serves an allocation can't go on."""

    allocation: AllocationId
    error: BaseException


class AllocationClosed(NamedTuple):
    """The sockets of an allocation are closed."""

    allocation: AllocationId
    port: RelayedPort
