"""An address of this machine to listen on."""

from dataclasses import dataclass
from ipaddress import ip_address

from relay.core.addresses import show


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of this machine to listen on."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        return ip_address(self.host).is_loopback

    def overlaps(self, other: "Endpoint") -> bool:
        """Check whether one process can't listen on both endpoints. Port 0 means any free port."""
        hosts = (ip_address(self.host), ip_address(other.host))
        same_host = hosts[0] == hosts[1] or any(host.is_unspecified for host in hosts)
        return self.port == other.port != 0 and hosts[0].version == hosts[1].version and same_host

    def __str__(self) -> str:
        return show((self.host, self.port))
