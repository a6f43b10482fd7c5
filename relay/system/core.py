"""The configuration of the core, from the settings and the addresses of this machine."""

import random

from relay import __version__
from relay.config import Config
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret
from relay.core.peers import PeerPolicy


def server_config(config: Config, secret: RelaySecret, addresses: frozenset[str], *, offloads: bool) -> ServerConfig:
    """Return the configuration of the core, on a machine with some addresses."""
    public = config.public_hosts
    return ServerConfig(
        secret=secret,
        public_hosts=public,
        ports=config.ports,
        peers=PeerPolicy(
            relay_addresses=addresses,
            service_ports=frozenset((config.service_port, *(each.port for each in config.http.values()))),
            relayed_ports=config.ports,
            public_addresses=frozenset(public.values()),
            allow=config.allow_peers,
            deny=config.deny_peers,
        ),
        max_allocations=config.capacity,
        max_allocations_per_address=config.max_allocations_per_address,
        max_channels=config.max_channels,
        max_channels_in_all=config.max_channels_in_all,
        unauthenticated_rate=config.unauthenticated_rate,
        unauthenticated_burst=config.unauthenticated_burst,
        software=f"firezone-relay/{__version__}",
        offloads=offloads,
    )


def random_source(seed: int | None) -> random.Random:
    """Return the source of random numbers. A seed makes them predictable, for tests."""
    return random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311 - for tests
