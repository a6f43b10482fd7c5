"""Fills the public addresses that were not given."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple, Protocol, TypeVar

from relay.config import DiscoveryMethod
from relay.discovery.aws import Aws
from relay.discovery.azure import Azure
from relay.discovery.gce import Gce
from relay.discovery.metadata import Metadata, shown
from relay.ops.machine import own_addresses

Address = TypeVar("Address", IPv4Address, IPv6Address)


class Addresses(NamedTuple):
    """At which this machine is reached from outside; by the names that a `Config` has for them."""

    public_ip4: IPv4Address | None
    public_ip6: IPv6Address | None


class Service(Protocol):
    """What a cloud knows of this machine."""

    def ip4(self) -> list[str]:
        """Give its IPv4 addresses, the first one first; none if there are none."""

    def ip6(self) -> list[str]:
        """Give its IPv6 addresses, likewise."""


_SERVICES: dict[DiscoveryMethod, Callable[[Metadata], Service]] = {
    DiscoveryMethod.GCE_METADATA: Gce,
    DiscoveryMethod.AWS_EC2_METADATA: Aws,
    DiscoveryMethod.AZURE_IMDS: Azure,
}


def discover(
    method: DiscoveryMethod,
    ip4: IPv4Address | None,
    ip6: IPv6Address | None,
    *,
    metadata: Metadata | None = None,
    has_ip6: Callable[[], bool] | None = None,
) -> Addresses:
    """Give the public addresses: those that were given, and for the others what the cloud says.

    Args:
        method: whom to ask. With both addresses given, nobody is asked.
        ip4: as given.
        ip6: as given.
        metadata: the service, if it is not where it always is.
        has_ip6: tells whether this machine talks IPv6 to others; the public address is of no use to one that doesn't.

    Raises:
        BadUseError: the service can't be asked, what it says is no address, or there is none, neither given nor said.
    """
    if ip4 is not None and ip6 is not None:
        return Addresses(ip4, ip6)
    metadata = metadata or Metadata(method.value)
    service = _SERVICES[method](metadata)
    if ip4 is None:
        ip4 = _first(metadata, service.ip4(), IPv4Address)
    if ip6 is None and (has_ip6 or _has_ip6)():
        ip6 = _first(metadata, service.ip6(), IPv6Address)
    if ip4 is None and ip6 is None:
        raise metadata.fault("this machine has none there: assign it one.")
    return Addresses(ip4, ip6)


def _first(metadata: Metadata, said: list[str], kind: type[Address]) -> Address | None:
    """Give the first address that others can reach: there are internal ones among them."""
    for text in said:
        try:
            address = kind(text)
        except ValueError as fault:
            raise metadata.fault(f"{shown(text)} is no address: is this machine there?") from fault
        if address.is_global and not address.is_multicast:
            return address
    return None


def _has_ip6() -> bool:
    addresses = (ip_address(each) for each in own_addresses())
    return any(each.version == 6 and not each.is_link_local and not each.is_loopback for each in addresses)  # noqa: PLR2004
