"""Which peer addresses may be relayed to.

A relay sends packets from inside the operator's network to wherever a client says, so it must not reach what only the
operator's own machines may. In order: a service port of the relay itself is refused, always; then ``deny``; then
``allow``; then the relay's own address (a peer only where allocations are: two clients of one relay meet there); then
the table of defaults below.

An IPv6 address that stands for an IPv4 one is judged by that one: every relay that forgot this could be made to talk to
its own loopback interface. ``ipaddress.is_global`` can't judge it: it calls ``::127.0.0.1`` and ``64:ff9b::7f00:1`` global.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from relay.core.addresses import PeerAddress

Address = IPv4Address | IPv6Address
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
        "64:ff9b:1::/48",  # local-use NAT64 (RFC 8215): where the IPv4 address is, only the operator knows
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local, withdrawn (RFC 3879)
        "fd00:ec2::/32",  # AWS's metadata, time and name services
        "fd20:ce::/32",  # Google's metadata service
        "ff00::/8",  # multicast
    )
)
"""RFC 1918 and unique local addresses are not here: the peers of a Firezone network may well live there."""

# As numbers: fifteen comparisons of networks would take 20 µs, half of what a ChannelBind takes in all.
_DENIED = {
    version: tuple((int(each.network_address), int(each.netmask)) for each in DENIED_BY_DEFAULT if each.version == version)
    for version in (4, 6)
}

# Likewise numbers: a CreatePermission may have dozens of peers.
_BEFORE_LAST_32_BITS = frozenset(
    int(IPv6Address(prefix)) >> 32
    for prefix in (
        "::ffff:0:0",  # mapped
        "::ffff:0:0:0",  # translated
        "::",  # compatible
        "64:ff9b::",  # NAT64
    )
)
_SIX_TO_FOUR = 0x2002
_TEREDO = 0x2001_0000
_LOOPBACK = 1
"""Before it is the unspecified address."""

MOST_JUDGED = 4096
"""Decisions that are kept; then all are forgotten. To decide again costs 5 µs."""


class PeerRule(StrEnum):
    """What a peer is refused by."""

    OWN_PORT = "own_port"
    """The relay itself answers there."""
    DENIED = "denied"
    """`PeerPolicy.deny` has it."""
    OWN_ADDRESS = "own_address"
    """An address of this machine, or not a port of allocations at its public one."""
    NEVER_A_PEER = "never_a_peer"
    """`DENIED_BY_DEFAULT` has it."""


def judged_addresses(address: Address) -> tuple[Address, ...]:
    """Give the addresses that decide on an address: those it embeds, or itself if it embeds none.

    Embedded are IPv4-mapped, -compatible and -translated (RFC 4291 §2.5.5, RFC 2765), NAT64 (RFC 6052), 6to4 (RFC 3056)
    and Teredo (RFC 4380: its server's address and, inverted, its client's).
    """
    if isinstance(address, IPv4Address):
        return (address,)
    number = int(address)
    if number <= _LOOPBACK:
        return (address,)
    if number >> 32 in _BEFORE_LAST_32_BITS:
        return (IPv4Address(number & 0xFFFFFFFF),)
    if number >> 112 == _SIX_TO_FOUR:
        return (IPv4Address(number >> 80 & 0xFFFFFFFF),)
    if number >> 96 == _TEREDO:
        return (IPv4Address(number >> 64 & 0xFFFFFFFF), IPv4Address(~number & 0xFFFFFFFF))
    return (address,)


def _read(host: str) -> Address:
    """Read a host as sockets spell it; ip_address would try one family after the other."""
    return IPv6Address(host) if ":" in host else IPv4Address(host)


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return bool(networks) and any(address in network for network in networks)


def _is_denied_by_default(address: Address) -> bool:
    number = int(address)
    return any(number & mask == network for network, mask in _DENIED[address.version])


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """The rules of one relay."""

    relay_addresses: frozenset[str] = frozenset()
    """Every address that reaches this machine, the public ones included, as text."""

    service_ports: frozenset[int] = frozenset()
    """Ports on which the relay itself answers."""

    relayed_ports: range = range(0)
    """Ports that allocations get."""

    public_addresses: frozenset[str] = frozenset()
    """The hosts of relayed addresses, as text."""

    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()

    _judged: dict[tuple[str, int | None], PeerRule | None] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    """What was decided of late, by host and port, None for all ports: clients ask for the same peers every few minutes."""

    def rule_against(self, peer: PeerAddress) -> PeerRule | None:
        """Give what a peer is refused by; None if it may be relayed to."""
        return self._rule_against(peer[0], peer[1])

    def rule_against_host(self, peer: PeerAddress) -> PeerRule | None:
        """Give what all ports of a peer's host are refused by; None if some may be relayed to."""
        return self._rule_against(peer[0], None)

    def _rule_against(self, host: str, port: int | None) -> PeerRule | None:
        key = (host, port)
        if key in self._judged:
            return self._judged[key]
        rule = self._judge(_read(host), port)
        if len(self._judged) >= MOST_JUDGED:
            self._judged.clear()
        self._judged[key] = rule
        return rule

    def _judge(self, address: Address, port: int | None) -> PeerRule | None:
        # A relay may itself have an address that embeds IPv4; then that address is what counts.
        judged = judged_addresses(address)
        if judged[0] is not address and self._is_this_machine(address):
            judged = (address,)
        if port in self.service_ports and any(self._is_this_machine(each) for each in judged):
            return PeerRule.OWN_PORT
        # An operator may mean an IPv6 range that embeds IPv4 as such; so deny looks at both forms, and allow does not.
        if _within(address, self.deny):
            return PeerRule.DENIED
        for each in judged:
            rule = self._judge_alone(each, port)
            if rule is not None:
                return rule
        return None

    def _judge_alone(self, address: Address, port: int | None) -> PeerRule | None:
        if _within(address, self.deny):
            return PeerRule.DENIED
        if _within(address, self.allow):
            return None
        text = str(address)
        if text in self.relay_addresses:
            is_relayed = text in self.public_addresses and (port is None or port in self.relayed_ports)
            return None if is_relayed else PeerRule.OWN_ADDRESS
        return PeerRule.NEVER_A_PEER if _is_denied_by_default(address) else None

    def _is_this_machine(self, address: Address) -> bool:
        # In numbers, since newer Pythons say of ::ffff:127.0.0.1, too, that it is loopback: then nobody would look into it.
        number = int(address)
        is_loopback = number >> 24 == 127 if address.version == 4 else number == _LOOPBACK  # noqa: PLR2004 - IPv4, 127.0.0.0/8
        return is_loopback or number == 0 or str(address) in self.relay_addresses
