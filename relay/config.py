"""The settings of one relay process, and their checks."""

import itertools
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

from relay.core.addresses import Family
from relay.core.config import MAX_CHANNELS, MAX_CHANNELS_IN_ALL, UNAUTHENTICATED_BURST, UNAUTHENTICATED_RATE
from relay.core.credentials import RelaySecret
from relay.core.peers import Network
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.net.endpoint import Endpoint
from relay.net.proxy import Proxy

SERVICE_PORT = 3478
"""The port for clients (RFC 8656 §4). There is no option, because clients expect this port."""

LOWEST_PORT = 49152
HIGHEST_PORT = 65535
"""The dynamic ports (RFC 6335 §6), which RFC 8656 §7.2 recommends for relayed addresses."""

UNPRIVILEGED = 1024

HTTP_OPTIONS = {"health": "--health-check-addr", "control": "--control-endpoint", "metrics": "--metrics-addr"}
"""The option of each HTTP address."""

HEALTH = Endpoint("0.0.0.0", 8080)  # noqa: S104 - orchestrators probe from other machines
CONTROL = Endpoint("127.0.0.1", 9999)

ANY_CPU = -1
"""The CPU on which the process starts."""

LIVE_TIMEOUT = 3.0
"""Seconds. Orchestrators must wait longer than this for `/livez`."""

_BROADCAST = IPv4Address("255.255.255.255")
_THIS_NETWORK = IPv4Network("0.0.0.0/8")


class UsageError(Exception):
    """A usage error. The message is one line: the wrong value, the accepted values, and the fix."""


class LogFormat(StrEnum):
    """The format of log lines."""

    HUMAN = "human"
    JSON = "json"


class DiscoveryMethod(StrEnum):
    """The cloud metadata service that knows the public addresses of this machine."""

    GCE_METADATA = "gce_metadata"
    AWS_EC2_METADATA = "aws_ec2_metadata"
    AZURE_IMDS = "azure_imds"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds for which parts of a relay wait. No option sets them."""

    live: float = LIVE_TIMEOUT
    """The server actor must respond within this time for `/livez` to report the relay alive."""
    close_port: float = 0.5
    """The server actor waits this long for a port that is being closed and is needed again. Closing takes 0.3 ms."""
    release_core: float = 1.0
    """Shutdown waits this long for a thread that processes packets. A batch takes a few milliseconds."""
    stop_listener: float = 0.5
    """Shutdown waits this long for a listener. It is woken from its read at once, and may be in the core."""
    stop_portal: float = 1.0
    """Shutdown waits this long for the portal actor. It never blocks, so this allows for a slow machine."""
    stop_server: float = 2.0
    """Shutdown waits this long for the server actor to finish its message and to close the allocations."""
    look_at_neighbours: float = 1.0
    """The CPU time of other processes is read this often."""


@dataclass(frozen=True, slots=True)
class PortalAccess:
    """The portal of a Firezone network, and the token for joining the network."""

    url: PortalUrl
    token: PortalToken
    proxy: Proxy | None = None
    token_file: Path | None = None
    """The file that is read again for each attempt to join."""


class AttachMode(StrEnum):
    """The point in the kernel at which the XDP program is attached."""

    DRIVER = "driver"
    """In the driver of the interface, before the network stack."""
    GENERIC = "generic"
    """In the network stack: works with every driver, and is slower."""
    AUTO = "auto"
    """In drivers that are known to support XDP, else in the network stack."""


@dataclass(frozen=True, slots=True)
class OffloadConfig:
    """The interfaces on which the kernel relays channels.

    Raises:
        UsageError: there is no interface, or an interface is repeated.
    """

    interfaces: tuple[str, ...]
    """By name."""
    mode: AttachMode = AttachMode.AUTO

    def __post_init__(self) -> None:
        if not self.interfaces:
            raise UsageError("--ebpf-offloading has no interface: use the interface that receives the clients' packets")
        twice = {name for name in self.interfaces if self.interfaces.count(name) > 1}
        if twice:
            raise UsageError(f"--ebpf-offloading has {min(twice)} twice: use each interface once")


@dataclass(frozen=True, slots=True)
class OtlpConfig:
    """The OpenTelemetry collector for metrics."""

    endpoint: str | None
    """The URL of the collector. None: OpenTelemetry's own variables contain the URL."""
    interval: float
    """Seconds between two pushes."""


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one relay process.

    Raises:
        UsageError: settings are invalid or contradict each other.
    """

    public_ip4: IPv4Address | None = None
    public_ip6: IPv6Address | None = None
    bind_ip4: IPv4Address | None = None
    bind_ip6: IPv6Address | None = None
    """Unset: the public address if this machine has it, else all addresses."""
    lowest_port: int = LOWEST_PORT
    highest_port: int = HIGHEST_PORT
    health: Endpoint = HEALTH
    control: Endpoint = CONTROL
    metrics: Endpoint | None = None
    """None: only the control address serves metrics."""
    control_hostnames: tuple[str, ...] = ()
    """Hostnames accepted in requests to the control address, besides IP addresses and localhost."""
    secret: RelaySecret | None = None
    """Unset: a random secret."""
    rng_seed: int | None = None
    allow_peers: tuple[Network, ...] = ()
    deny_peers: tuple[Network, ...] = ()
    max_allocations: int | None = None
    """Unset: the number of ports."""
    max_allocations_per_address: int | None = None
    """Unset: no limit per address."""
    max_channels: int = MAX_CHANNELS
    """Per allocation."""
    max_channels_in_all: int = MAX_CHANNELS_IN_ALL
    unauthenticated_rate: int = UNAUTHENTICATED_RATE
    """Responses per second to one unauthenticated source address. 0: no limit."""
    unauthenticated_burst: int = UNAUTHENTICATED_BURST
    """Maximum burst of responses to one unauthenticated source address."""
    name: str | None = None
    """The name of this relay for operators and the portal."""
    portal: PortalAccess | None = None
    """None: the relay is standalone."""
    drain_timeout: float = 0
    """Seconds for which allocations continue after SIGTERM."""
    cpu: int | None = ANY_CPU
    """The CPU for all threads. None: the kernel chooses."""
    switch_interval: float = 0.5
    """Seconds for which a thread may hold the interpreter while other threads wait (`sys.setswitchinterval`)."""
    offload: OffloadConfig | None = None
    """None: no offload."""
    otlp: OtlpConfig | None = None
    """None: metrics are not pushed."""
    handover_socket: Path | None = None
    """The Unix socket at which a successor can take this relay over. None: no successor can."""
    service_port: int = SERVICE_PORT
    timeouts: Timeouts = Timeouts()

    def __post_init__(self) -> None:
        if self.public_ip4 is None and self.public_ip6 is None:
            raise UsageError(
                "no public address: use --public-ip4-addr, --public-ip6-addr or --listen-address-discovery-method"
            )
        _check_addresses("4", self.public_ip4, self.bind_ip4)
        _check_addresses("6", self.public_ip6, self.bind_ip6)
        if self.lowest_port < UNPRIVILEGED:
            raise UsageError(f"--lowest-port {self.lowest_port} is reserved for services: use {UNPRIVILEGED} or higher")
        if self.lowest_port > self.highest_port:
            raise UsageError(f"--lowest-port {self.lowest_port} is above --highest-port {self.highest_port}: swap them")
        if self.service_port in self.ports:
            raise UsageError(
                f"ports {self.lowest_port}-{self.highest_port} include {self.service_port} (for clients): use other ports"
            )
        for (option, at), (other, other_at) in itertools.combinations(self.http.items(), 2):
            if at.overlaps(other_at):
                raise UsageError(
                    f"{HTTP_OPTIONS[option]} {at} and {HTTP_OPTIONS[other]} {other_at} overlap: use different ports"
                )

    @property
    def ports(self) -> range:
        """The ports for allocations."""
        return range(self.lowest_port, self.highest_port + 1)

    @property
    def http(self) -> dict[str, Endpoint]:
        """The HTTP addresses, by name."""
        given = {"health": self.health, "control": self.control, "metrics": self.metrics}
        return {name: at for name, at in given.items() if at is not None}

    @property
    def capacity(self) -> int:
        """The maximum number of allocations."""
        return min(len(self.ports), self.max_allocations or len(self.ports))

    @property
    def public_hosts(self) -> dict[Family, str]:
        """The hosts of relayed addresses, by family, IPv4 first."""
        given = ((Family.IPV4, self.public_ip4), (Family.IPV6, self.public_ip6))
        return {family: str(address) for family, address in given if address is not None}


def _check_addresses(version: str, public: IPv4Address | IPv6Address | None, bind: IPv4Address | IPv6Address | None) -> None:
    if public is not None and (fault := _fault(public, is_public=True)):
        raise UsageError(f"--public-ip{version}-addr {public} is {fault}: use the address at which clients reach this relay")
    if bind is not None and public is None:
        raise UsageError(f"--bind-ip{version}-addr has no effect without --public-ip{version}-addr: set both")
    if bind is not None and (fault := _fault(bind, is_public=False)):
        raise UsageError(f"--bind-ip{version}-addr {bind} is {fault}: use an address of this machine")


def _fault(address: IPv4Address | IPv6Address, *, is_public: bool) -> str | None:
    """Return the reason why no relay can use an address, or why clients can't send to a public address, if there is one."""
    faults = {
        "the unspecified address": is_public and address.is_unspecified,
        "a multicast address": address.is_multicast,
        "the broadcast address": address == _BROADCAST,
    }
    if is_public and isinstance(address, IPv6Address):
        faults["an IPv4-mapped address"] = address.ipv4_mapped is not None
        faults["link-local"] = address.is_link_local or address.scope_id is not None
    elif is_public:
        faults["an address of no host"] = address in _THIS_NETWORK
    return next((fault for fault, applies in faults.items() if applies), None)
