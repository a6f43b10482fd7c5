"""What a server is told once, at its start."""

from dataclasses import dataclass

from relay.core.addresses import Family
from relay.core.credentials import FIREZONE_REALM, RelaySecret
from relay.core.peers import PeerPolicy

MAX_CHANNELS = 4096
"""As many as RFC 8656 §12 has numbers for: what follows it can't be refused one."""

UNAUTHENTICATED_RATE = 500
UNAUTHENTICATED_BURST = 5000
"""What an office of some thousand clients behind one address needs, several times: docs/limits.md."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The settings of one relay."""

    secret: RelaySecret
    public_hosts: dict[Family, str]
    """The host of relayed addresses, for each family served; at least one, IPv4 first."""
    ports: range
    """Ports that allocations get."""
    peers: PeerPolicy
    max_allocations: int
    """At once; one more is answered 486. At least 1."""
    software: str
    """The value of SOFTWARE."""
    max_channels: int = MAX_CHANNELS
    """Of one allocation, those that cool down among them; one more is answered 508. At least 1."""
    max_allocations_per_address: int | None = None
    """At once, of clients with one IPv4 address or the same first 64 bits of an IPv6 one; one more is answered 486. None is
    without limit."""
    realm: str = FIREZONE_REALM
    unauthenticated_rate: int = UNAUTHENTICATED_RATE
    """Answers a second to a source address that has proven nothing (`relay.core.limiter`); 0 for no limit."""
    unauthenticated_burst: int = UNAUTHENTICATED_BURST
    """Such answers at once; at least 1."""
    offloads: bool = False
    """Whether the kernel relays channels, too: then there are commands that tell it which."""
