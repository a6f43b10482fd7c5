"""The addresses and routes of this machine that a relay needs, and their problems."""

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from relay.config import Config
from relay.core.addresses import Family
from relay.logger import Logger
from relay.net.routes import has_address, own_addresses, source_toward
from relay.ops.machine import UNSPECIFIED
from relay.ops.totals import NotReady

_INTERNET = {Family.IPV4: "198.41.0.4", Family.IPV6: "2001:503:ba3e::2:30"}
"""A root name server, for routes to the internet. It gets no packet."""

_PRIVATE = tuple(
    ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("::1/128", "fc00::/7", "fe80::/10"),
    )
)
"""Clients on the internet can't reach these. Unlike `ipaddress.is_private`, without the ranges for documentation."""

_NO_ADDRESS = {Family.IPV4: NotReady.NO_IPV4_ADDRESS, Family.IPV6: NotReady.NO_IPV6_ADDRESS}
_NO_ROUTE = {Family.IPV4: NotReady.NO_IPV4_ROUTE, Family.IPV6: NotReady.NO_IPV6_ROUTE}

_log = Logger("relay.ops.addresses")


def relay_addresses(own: frozenset[str], config: Config, hosts: Mapping[Family, str]) -> frozenset[str]:
    """Return the addresses of this machine, with the public addresses and the addresses of the sockets."""
    return own.union(hosts.values(), config.public_hosts.values())


def relayed_hosts(config: Config, hosts: Mapping[Family, str]) -> dict[Family, str]:
    """Return the addresses for sockets of allocations: the public address instead of all addresses, once available.

    The arguments and exceptions are those of `unreachable`.
    """
    return {
        family: public if hosts[family] == UNSPECIFIED[family] and has_address(family, public) else hosts[family]
        for family, public in config.public_hosts.items()
    }


def with_several_addresses(own: frozenset[str], hosts: Mapping[Family, str]) -> frozenset[Family]:
    """Return the families with several addresses, if the sockets are bound to all."""
    return frozenset(
        family for family, host in hosts.items() if host == UNSPECIFIED[family] and len(_outward(own, family)) > 1
    )


def _outward(own: frozenset[str], family: Family) -> list[str]:
    """Return the addresses reachable from outside."""
    parsed = [ip_address(each) for each in own]
    version = int("46"[family - 1])
    return sorted(str(each) for each in parsed if each.version == version and not (each.is_loopback or each.is_link_local))


def unreachable(config: Config, hosts: Mapping[Family, str]) -> dict[NotReady, str]:
    """Return the reasons why clients can't reach the relay, each with its cause and its fix.

    Args:
        config: the settings of the relay.
        hosts: the addresses of its sockets, or of the sockets of allocations.

    Raises:
        OSError: no descriptor is free, or a sandbox forbids the query.
    """
    found: dict[NotReady, str] = {}
    for family, public in config.public_hosts.items():
        host = hosts[family]
        if host != UNSPECIFIED[family] and not has_address(family, host):
            found[_NO_ADDRESS[family]] = f"this machine does not have {host}: add it to an interface, or restart the relay"
        elif not _is_private(public):
            # Behind a NAT, the packets of all clients take the way to the public address: some networks have no other route.
            client = _INTERNET[family] if has_address(family, public) else public
            if source_toward(family, client, host) is None:
                mend = f"add a default route, or remove --public-ip{'46'[family - 1]}-addr"
                found[_NO_ROUTE[family]] = f"no {family} route to the internet: {mend}"
    return found


def warn_about_addresses(config: Config, hosts: Mapping[Family, str]) -> None:
    """Log the public and bound addresses that may cause problems, with the arguments and exceptions of `unreachable`."""
    own = own_addresses()
    for family, public in config.public_hosts.items():
        version = "46"[family - 1]
        if _is_private(public) and not ip_address(public).is_loopback:
            mend = f"give --public-ip{version}-addr the address at which clients reach this relay"
            _log.warning("the public address is private: clients on the internet can't reach it", address=public, mend=mend)
        if hosts[family] != UNSPECIFIED[family]:
            continue
        source = source_toward(family, _INTERNET[family], hosts[family]) or "ADDRESS"
        if (config.bind_ip4, config.bind_ip6)[family - 1] is None:
            mend = "without a NAT, give this machine the address; the relay needs no restart"
            _log.warning("the public address is not on this machine: assuming a 1:1 NAT", address=public, mend=mend)
        several = _outward(own, family)
        if len(several) > 1:
            mend = f"give --bind-ip{version}-addr {source}, or another address to which the NAT forwards"
            _log.warning("several addresses: relayed packets may leave from the wrong one", addresses=several, mend=mend)


def _is_private(host: str) -> bool:
    return any(ip_address(host) in network for network in _PRIVATE)
