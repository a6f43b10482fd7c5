"""What the core is told, from the settings and from what this machine is."""

import random

from relay import __version__
from relay.config import Config
from relay.core.addresses import Family
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret
from relay.core.peers import PeerPolicy
from relay.ops.machine import own_addresses


def server_config(config: Config, secret: RelaySecret, hosts: dict[Family, str], *, offloads: bool) -> ServerConfig:
    """Give the settings of the core.

    Args:
        config: what was asked for.
        secret: what credentials are made with.
        hosts: where sockets are bound.
        offloads: whether the kernel relays, too.
    """
    public = config.public_hosts
    return ServerConfig(
        secret=secret,
        public_hosts=public,
        ports=config.ports,
        peers=PeerPolicy(
            relay_addresses=own_addresses() | frozenset(hosts.values()) | frozenset(public.values()),
            service_ports=frozenset((config.service_port, config.health.port, config.control.port)),
            relayed_ports=config.ports,
            public_addresses=frozenset(public.values()),
            allow=config.allow_peers,
            deny=config.deny_peers,
        ),
        max_allocations=config.capacity,
        max_allocations_per_address=config.max_allocations_per_address,
        max_channels=config.max_channels,
        unauthenticated_rate=config.unauthenticated_rate,
        unauthenticated_burst=config.unauthenticated_burst,
        software=f"firezone-relay/{__version__}",
        offloads=offloads,
    )


def random_source(seed: int | None) -> random.Random:
    """Give where random numbers come from: with a seed, from that, for tests."""
    return random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311 - asked for
