"""What a server is told once, at its start."""

from dataclasses import dataclass

from relay.core.addresses import Family
from relay.core.credentials import FIREZONE_REALM, RelaySecret
from relay.core.peers import PeerPolicy

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
    realm: str = FIREZONE_REALM
    unauthenticated_rate: int = UNAUTHENTICATED_RATE
    """Answers a second to a source address that has proven nothing (`relay.core.limiter`); 0 for no limit."""
    unauthenticated_burst: int = UNAUTHENTICATED_BURST
    """Such answers at once; at least 1."""
    offloads: bool = False
    """Whether the kernel relays channels, too: then there are commands that tell it which."""
