"""What is shown of the relay itself.

It is an explicit list, field by field: what is not in it is not shown, whatever else a setting may come to have.
"""

from collections.abc import Mapping, Sequence

from relay.config import ANY_CPU, Config
from relay.core.addresses import Family
from relay.core.portal.channel import PortalChannel
from relay.status import model
from relay.status.census import Findings


def config_of(config: Config, bind_hosts: Mapping[Family, str]) -> model.Config:
    """Show the settings that are no secret."""
    portal, offload = config.portal, config.offload
    proxy = None if portal is None else portal.proxy
    return {
        "public_addresses": list(config.public_hosts.values()),
        "bind_addresses": list(bind_hosts.values()),
        "service_port": config.service_port,
        "lowest_port": config.lowest_port,
        "highest_port": config.highest_port,
        "max_allocations": config.capacity,
        "max_allocations_per_address": config.max_allocations_per_address,
        "max_channels": config.max_channels,
        "unauthenticated_rate": config.unauthenticated_rate,
        "unauthenticated_burst": config.unauthenticated_burst,
        "health_address": str(config.health),
        "control_address": str(config.control),
        "control_hostnames": list(config.control_hostnames),
        "portal_url": None if portal is None else portal.url.text,
        "name": None if portal is None else portal.name,
        "proxy": None if proxy is None else f"{proxy.host}:{proxy.port}",
        "drain_timeout": config.drain_timeout,
        "cpu_affinity": {None: "off", ANY_CPU: "auto"}.get(config.cpu, str(config.cpu)),
        "switch_interval": config.switch_interval,
        "allow_peers": [str(network) for network in config.allow_peers],
        "deny_peers": [str(network) for network in config.deny_peers],
        "ebpf_offloading": [] if offload is None else list(offload.interfaces),
        "ebpf_attach_mode": None if offload is None else offload.mode.value,
        "otlp": config.otlp is not None,
    }


def portal_of(portal: PortalChannel | None, now: float) -> model.Portal | None:
    """Show how it is with the portal; ``now`` is monotonic."""
    if portal is None:
        return None
    since = portal.entered_at
    return {
        "state": portal.state.value,
        "has_begun": portal.has_begun,
        "state_age": None if since is None else seconds(now - since),
        "joins": portal.joins,
        "last_failure": portal.last_failure,
    }


def seconds(span: float) -> float:
    """Give a span of time as it is shown: never below 0, since what is looked at goes on meanwhile."""
    return round(max(0.0, span), 1)


def flows_of(relayed: Sequence[int], by_kernel: Sequence[int]) -> tuple[model.Flow, model.Flow]:
    """Show what was relayed to peers and to clients, and how much of that the kernel relayed by itself."""
    return (
        {"packets": relayed[0], "bytes": relayed[1], "xdp_packets": by_kernel[0], "xdp_bytes": by_kernel[1]},
        {"packets": relayed[2], "bytes": relayed[3], "xdp_packets": by_kernel[2], "xdp_bytes": by_kernel[3]},
    )


def rates_of(findings: Findings) -> tuple[model.Rate, model.Rate] | tuple[None, None]:
    """Show how much is relayed in a second to peers and to clients."""
    if findings.before is None:
        return None, None
    over = findings.latest.at - findings.before.at
    rates = [round((now - then) / over, 1) for now, then in zip(findings.latest.all, findings.before.all, strict=True)]
    return model.Rate(packets=rates[0], bytes=rates[1]), model.Rate(packets=rates[2], bytes=rates[3])
