"""Allowed and denied peer addresses.

A relay sends packets from inside the operator's network to addresses that clients choose, so clients must not reach internal
services. The rules apply in this order: the relay's own service ports are always denied; then ``deny``; then ``allow``; then
the relay's own addresses (allowed only in the port range of allocations, where two clients of one relay meet); then the
table of defaults below.

The rules judge an IPv6 address that embeds an IPv4 address by the IPv4 address. Relays without this rule could be made to
connect to their own loopback interface. ``ipaddress.is_global`` is wrong for ``::127.0.0.1`` and ``64:ff9b::7f00:1``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from types import MappingProxyType

from relay.core.addresses import Family, host_number

Network = IPv4Network | IPv6Network

DENIED_BY_DEFAULT: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # "this host": Linux sends 0.0.0.0 to itself
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, with the metadata service of most clouds
        "192.0.0.0/24",  # IETF protocol assignments, with Oracle's metadata service
        "100.100.100.200/32",  # Alibaba's metadata service
        "168.63.129.16/32",  # Azure's platform service
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, with the limited broadcast
        "::/128",  # unspecified
        "::1/128",  # loopback
        "64:ff9b:1::/48",  # local-use NAT64 (RFC 8215), in which the position of the IPv4 address is unknown
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local, withdrawn (RFC 3879)
        "fd00:ec2::/32",  # AWS's metadata, time and name services
        "fd20:ce::/32",  # Google's metadata service
        "ff00::/8",  # multicast
    )
)
"""Without RFC 1918 and unique local addresses: peers of a Firezone network may have such addresses."""

# Everything below is in numbers: objects of ipaddress would take 15 µs a peer, and a CreatePermission may have dozens.
_Host = tuple[Family, int]
_Masks = tuple[tuple[int, int], ...]

_BEFORE_LAST_32_BITS = frozenset(
    int(IPv6Address(prefix)) >> 32
    for prefix in (
        "::ffff:0:0",  # mapped
        "::ffff:0:0:0",  # translated
        "::",  # compatible
        "64:ff9b::",  # NAT64
    )
)
MAY_EMBED = ("::", "64:ff9b::", "2001::", "2001:0:", "2002:")
"""Beginnings of all addresses that embed an IPv4 address, in the spelling of RFC 5952."""
_SIX_TO_FOUR = 0x2002
_TEREDO = 0x2001_0000
_LOOPBACK = 1
"""The number of ::1. The unspecified address is 0."""


class PeerRule(StrEnum):
    """The rule that denies a peer."""

    OWN_PORT = "own_port"
    """The relay itself uses the port."""
    DENIED = "denied"
    """`PeerPolicy.deny`."""
    OWN_ADDRESS = "own_address"
    """An address of this machine, but not a public address with a port of allocations."""
    NEVER_A_PEER = "never_a_peer"
    """`DENIED_BY_DEFAULT`."""


def embedded_addresses(number: int) -> tuple[int, ...]:
    """Return the IPv4 addresses that an IPv6 address embeds.

    Embedded addresses are IPv4-mapped, -compatible and -translated (RFC 4291 §2.5.5, RFC 2765), NAT64 (RFC 6052), 6to4 (RFC
    3056) and Teredo (RFC 4380: its server's address and, inverted, its client's).
    """
    if number <= _LOOPBACK:
        return ()
    if number >> 32 in _BEFORE_LAST_32_BITS:
        return (number & 0xFFFFFFFF,)
    if number >> 112 == _SIX_TO_FOUR:
        return (number >> 80 & 0xFFFFFFFF,)
    if number >> 96 == _TEREDO:
        return (number >> 64 & 0xFFFFFFFF, ~number & 0xFFFFFFFF)
    return ()


def _masks(networks: Iterable[Network]) -> Mapping[Family, _Masks]:
    """Return the networks of each family as numbers."""
    masks = {
        family: tuple((int(each.network_address), int(each.netmask)) for each in networks if each.version == version)
        for family, version in ((Family.IPV4, 4), (Family.IPV6, 6))
    }
    return MappingProxyType(masks)


def _within(number: int, networks: _Masks) -> bool:
    for network, mask in networks:  # noqa: SIM110 - half the cost of any()
        if number & mask == network:
            return True
    return False


_IPV4 = Family.IPV4

_DENIED = _masks(DENIED_BY_DEFAULT)

_DENIED_OCTETS = frozenset(
    octet for octet in range(256) for number, mask in _DENIED[_IPV4] if (octet << 24 ^ number) & mask & 0xFF000000 == 0
)
"""First octets of IPv4 addresses that may be in `DENIED_BY_DEFAULT`."""


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """The rules of one relay."""

    relay_addresses: frozenset[str] = frozenset()
    """All addresses of this machine, including public and bound addresses, as text."""

    service_ports: frozenset[int] = frozenset()
    """The relay's own ports."""

    relayed_ports: range = range(0)
    """Ports of allocations."""

    public_addresses: frozenset[str] = frozenset()
    """The hosts of relayed addresses, as text."""

    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()

    _own: frozenset[_Host] = field(init=False, repr=False, compare=False)
    _public: frozenset[_Host] = field(init=False, repr=False, compare=False)
    _allowed: Mapping[Family, _Masks] = field(init=False, repr=False, compare=False)
    _denied: Mapping[Family, _Masks] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Convert everything to numbers."""
        for name, hosts in (("_own", self.relay_addresses), ("_public", self.public_addresses)):
            object.__setattr__(self, name, frozenset(map(host_number, hosts)))
        for name, networks in (("_allowed", self.allow), ("_denied", self.deny)):
            object.__setattr__(self, name, _masks(networks))

    def rule_against(self, family: Family, host: int, port: int | None) -> PeerRule | None:
        """Return the rule that denies a peer, or None if the peer is allowed.

        Args:
            family: the peer's family.
            host: the peer's host as a number.
            port: the peer's port. None: a rule must deny all ports of the host.
        """
        if family is _IPV4:
            is_own_port = port in self.service_ports and self._is_this_machine(family, host)
            return PeerRule.OWN_PORT if is_own_port else self._judge_alone(family, host, port)
        # An embedding address may be the relay's own address. The rules then judge the embedding address.
        embedded = () if self._is_this_machine(family, host) else embedded_addresses(host)
        judged = [(Family.IPV4, each) for each in embedded] or [(family, host)]
        if port in self.service_ports and any(self._is_this_machine(*each) for each in judged):
            return PeerRule.OWN_PORT
        # An operator may deny an embedding IPv6 range, so deny checks both forms. Allow checks only the embedded form.
        if _within(host, self._denied[family]):
            return PeerRule.DENIED
        for each in judged:
            rule = self._judge_alone(*each, port)
            if rule is not None:
                return rule
        return None

    def _judge_alone(self, family: Family, host: int, port: int | None) -> PeerRule | None:
        if _within(host, self._denied[family]):
            return PeerRule.DENIED
        if _within(host, self._allowed[family]):
            return None
        if (family, host) in self._own:
            is_relayed = (family, host) in self._public and (port is None or port in self.relayed_ports)
            return None if is_relayed else PeerRule.OWN_ADDRESS
        is_unknown = family is _IPV4 and host >> 24 not in _DENIED_OCTETS
        return None if is_unknown or not _within(host, _DENIED[family]) else PeerRule.NEVER_A_PEER

    def _is_this_machine(self, family: Family, host: int) -> bool:
        is_loopback = host >> 24 == 127 if family is Family.IPV4 else host == _LOOPBACK  # noqa: PLR2004 - 127.0.0.0/8
        return is_loopback or host == 0 or (family, host) in self._own
