"""The configuration of the core."""

from dataclasses import dataclass

from relay.core.addresses import Family, SocketAddress, family_of
from relay.core.credentials import FIREZONE_REALM, RelaySecret
from relay.core.peers import PeerPolicy

MAX_CHANNELS = 4096
"""All channel numbers of RFC 8656 §12. Clients that follow the RFC never reach this limit."""

MAX_CHANNELS_IN_ALL = 262_144
"""16 for each of 16,384 clients; 130 MB. A Firezone client has a few."""

ASSURED_CHANNELS = 16
"""Channels that an allocation may have even if all allocations have `ServerConfig.max_channels_in_all`: nobody can take them
away by binding many."""

UNAUTHENTICATED_RATE = 500
UNAUTHENTICATED_BURST = 5000
"""Several times the need of an office with thousands of clients behind one address: docs/limits.md."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The settings of one relay."""

    secret: RelaySecret
    public_hosts: dict[Family, str]
    """The host of relayed addresses for each served family. At least one entry, IPv4 first."""
    ports: range
    """Ports of relayed addresses."""
    peers: PeerPolicy
    max_allocations: int
    """Concurrent allocations, at least 1. Further requests get 486."""
    software: str
    """The value of SOFTWARE."""
    max_channels: int = MAX_CHANNELS
    """Channels of one allocation, including grace periods; at least 1. Further requests get 508."""
    max_channels_in_all: int = MAX_CHANNELS_IN_ALL
    """Channels of all allocations, with the same response. `ASSURED_CHANNELS` of each allocation are exempt."""
    max_allocations_per_address: int | None = None
    """Concurrent allocations of one IPv4 address or IPv6 /64. Further requests get 486. None: no limit."""
    realm: str = FIREZONE_REALM
    unauthenticated_rate: int = UNAUTHENTICATED_RATE
    """Responses per second to one unauthenticated source address (`relay.core.limiter`). 0: no limit."""
    unauthenticated_burst: int = UNAUTHENTICATED_BURST
    """Burst of these responses; at least 1."""
    offloads: bool = False
    """Whether the kernel relays channels. The core then appends `OffloadCommand`."""

    def is_relayed(self, address: SocketAddress) -> bool:
        """Check whether an address is a relayed address of this relay, with or without an allocation."""
        return address[1] in self.ports and address[0] == self.public_hosts.get(family_of(address))
