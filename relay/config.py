"""What the relay is told at its start: the settings of one process, checked."""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address

from relay.core.addresses import Family
from relay.core.config import MAX_CHANNELS, UNAUTHENTICATED_BURST, UNAUTHENTICATED_RATE
from relay.core.credentials import RelaySecret
from relay.core.peers import Network
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.net.proxy import Proxy

SERVICE_PORT = 3478
"""Where clients talk to the relay (RFC 8656 §4). Not an option: every client knows it."""

LOWEST_PORT = 49152
HIGHEST_PORT = 65535
"""The dynamic ports (RFC 6335 §6), which RFC 8656 §7.2 recommends for relayed addresses."""

UNPRIVILEGED = 1024

ANY_CPU = -1
"""The CPU that the process happens to be on at its start."""

_BROADCAST = IPv4Address("255.255.255.255")
_NO_HOST = IPv4Network("0.0.0.0/8")


class BadUseError(Exception):
    """The relay can't be run as asked. The message is one line that says what is wrong and what to do."""


class LogFormat(StrEnum):
    """How a log line looks."""

    HUMAN = "human"
    JSON = "json"


class DiscoveryMethod(StrEnum):
    """Who is asked for the public addresses of this machine."""

    GCE_METADATA = "gce_metadata"
    AWS_EC2_METADATA = "aws_ec2_metadata"
    AZURE_IMDS = "azure_imds"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of this machine to listen on."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ip_address(self.host).is_loopback

    def overlaps(self, other: "Endpoint") -> bool:
        """Tell whether the two can't be listened on at once; port 0 is any that is free."""
        hosts = (ip_address(self.host), ip_address(other.host))
        same_host = hosts[0] == hosts[1] or any(host.is_unspecified for host in hosts)
        return self.port == other.port != 0 and hosts[0].version == hosts[1].version and same_host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PortalAccess:
    """How to join a Firezone network."""

    url: PortalUrl
    token: PortalToken
    name: str | None = None
    """What people call this relay, for the portal to show."""
    proxy: Proxy | None = None


class AttachMode(StrEnum):
    """Where on the way of a packet the kernel relays it."""

    DRIVER = "driver"
    """In the driver of the interface, before anything else."""
    GENERIC = "generic"
    """Behind it: with every driver, at a higher price."""
    AUTO = "auto"
    """In drivers that are known to do it, else behind them."""


@dataclass(frozen=True, slots=True)
class OffloadConfig:
    """Where the kernel relays channels.

    Raises:
        BadUseError: an interface is named twice, or none is.
    """

    interfaces: tuple[str, ...]
    """By name."""
    mode: AttachMode = AttachMode.AUTO

    def __post_init__(self) -> None:
        if not self.interfaces:
            raise BadUseError("--ebpf-offloading names no interface: give the one that clients' packets come by")
        twice = {name for name in self.interfaces if self.interfaces.count(name) > 1}
        if twice:
            raise BadUseError(f"--ebpf-offloading names {min(twice)} twice: name it once")


@dataclass(frozen=True, slots=True)
class OtlpConfig:
    """How metrics are pushed to an OpenTelemetry collector."""

    endpoint: str | None
    """Its URL; None if OpenTelemetry's own variables say it."""
    interval: float
    """Seconds from one push to the next."""


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one relay process.

    Raises:
        BadUseError: they contradict each other, or can't work.
    """

    public_ip4: IPv4Address | None = None
    public_ip6: IPv6Address | None = None
    bind_ip4: IPv4Address | None = None
    bind_ip6: IPv6Address | None = None
    """Without them: the public address if this machine has it, else all addresses."""
    lowest_port: int = LOWEST_PORT
    highest_port: int = HIGHEST_PORT
    health: Endpoint = Endpoint("0.0.0.0", 8080)  # noqa: S104 - for probes from outside, as operators have it
    control: Endpoint = Endpoint("127.0.0.1", 9999)
    control_hostnames: tuple[str, ...] = ()
    """By which the control address may be asked, besides its addresses and localhost."""
    secret: RelaySecret | None = None
    """Without it, one is made at random."""
    rng_seed: int | None = None
    allow_peers: tuple[Network, ...] = ()
    deny_peers: tuple[Network, ...] = ()
    max_allocations: int | None = None
    """Without it: as many as there are ports."""
    max_allocations_per_address: int | None = None
    """Without it: as many as there may be in all."""
    max_channels: int = MAX_CHANNELS
    """Of each allocation."""
    unauthenticated_rate: int = UNAUTHENTICATED_RATE
    """Answers a second to each source address that has proven nothing; 0 for no limit."""
    unauthenticated_burst: int = UNAUTHENTICATED_BURST
    """Such answers at once."""
    portal: PortalAccess | None = None
    """Without it, the relay stands alone."""
    drain_timeout: float = 0
    """Seconds for which allocations live on after SIGTERM."""
    cpu: int | None = ANY_CPU
    """The CPU for all threads; None leaves them wherever the kernel puts them."""
    switch_interval: float = 0.5
    """Seconds for which a thread may keep the interpreter while others wait (`sys.setswitchinterval`)."""
    offload: OffloadConfig | None = None
    """Without it, the kernel relays nothing."""
    otlp: OtlpConfig | None = None
    """Without it, metrics are pushed nowhere."""
    service_port: int = SERVICE_PORT

    def __post_init__(self) -> None:
        if self.public_ip4 is None and self.public_ip6 is None:
            raise BadUseError(
                "no public address: give --public-ip4-addr or --public-ip6-addr, or --listen-address-discovery-method"
            )
        _check_addresses("4", self.public_ip4, self.bind_ip4)
        _check_addresses("6", self.public_ip6, self.bind_ip6)
        if self.lowest_port < UNPRIVILEGED:
            raise BadUseError(f"--lowest-port {self.lowest_port} is below {UNPRIVILEGED}: those ports are for services")
        if self.lowest_port > self.highest_port:
            raise BadUseError(f"--lowest-port {self.lowest_port} is above --highest-port {self.highest_port}: swap them")
        if self.service_port in self.ports:
            raise BadUseError(f"--lowest-port and --highest-port enclose {self.service_port}, where clients are answered")
        if self.health.overlaps(self.control):
            raise BadUseError(
                f"--health-address {self.health} and --control-address {self.control} are the same: give one another port"
            )

    @property
    def ports(self) -> range:
        """The ports that allocations get."""
        return range(self.lowest_port, self.highest_port + 1)

    @property
    def capacity(self) -> int:
        """How many allocations there can be at once."""
        return min(len(self.ports), self.max_allocations or len(self.ports))

    @property
    def public_hosts(self) -> dict[Family, str]:
        """The hosts of relayed addresses, by family, IPv4 first."""
        given = ((Family.IPV4, self.public_ip4), (Family.IPV6, self.public_ip6))
        return {family: str(address) for family, address in given if address is not None}


def _check_addresses(version: str, public: IPv4Address | IPv6Address | None, bind: IPv4Address | IPv6Address | None) -> None:
    if public is not None:
        wrong = _public_fault(public)
        if wrong is not None:
            raise BadUseError(
                f"--public-ip{version}-addr {public} is {wrong}: give the address at which clients reach this relay"
            )
    if bind is not None:
        if public is None:
            raise BadUseError(f"--bind-ip{version}-addr does nothing without --public-ip{version}-addr: give both or none")
        if _fault(bind) is not None:
            raise BadUseError(f"--bind-ip{version}-addr {bind} is {_fault(bind)}: give an address of this machine")


def _public_fault(address: IPv4Address | IPv6Address) -> str | None:
    """Say why an address is none that others could send to."""
    if address.is_unspecified:
        return "the unspecified address"
    if isinstance(address, IPv4Address):
        return "an address of no host" if address in _NO_HOST else _fault(address)
    if address.ipv4_mapped is not None:
        return "an IPv4 address in disguise"
    if address.is_link_local or address.scope_id is not None:
        return "link-local"
    return _fault(address)


def _fault(address: IPv4Address | IPv6Address) -> str | None:
    if address.is_multicast:
        return "a multicast address"
    if address == _BROADCAST:
        return "the broadcast address"
    return None
