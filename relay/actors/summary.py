"""What is counted, for people to read."""

import dataclasses
from collections.abc import Sequence

from relay import __version__
from relay.core.counters import SIZE_SHIFT, Counters, histogram
from relay.core.portal.channel import PortalChannel
from relay.net.udp import UdpCounters
from relay.ops.metrics.sources import Look, Sources


def summary_of(sources: Sources, uptime: float) -> dict[str, object]:
    """Give the state of everything in numbers, read without asking any actor.

    Args:
        sources: where they are.
        uptime: seconds since the start.
    """
    counters, carried_out = sources.counters, sources.carried_out
    inbox, portal = sources.inbox(), sources.portal()
    return {
        "version": __version__,
        "uptime_seconds": round(uptime, 1),
        "ready": sources.is_ready(),
        **({} if portal is None else _portal(portal)),
        "allocations": len(sources.tables.by_id),
        "live_channels": len(sources.tables.live_channels),
        "server_inbox": 0 if inbox is None else len(inbox),
        "dropped_late": sources.dropped_late(),
        "to_peer_packets": counters.to_peer_packets,
        "to_client_packets": counters.to_client_packets,
        "to_peer_sizes": _readable(histogram(counters.to_peer_sizes)),
        "to_client_sizes": _readable(histogram(counters.to_client_sizes)),
        **_fields_of(counters),
        "bind_errors": carried_out.bind_errors,
        "late_sends": carried_out.late_sends,
        "faults": carried_out.faults,
        **_fields_of(carried_out.udp),
        "kernel_drops": sources.kernel_drops(),
        "log_lines_lost": sources.lines_lost(),
        "wall_clock_moved_seconds": round(Look(sources).wall_clock_moved, 1),
        **({} if sources.datapath is None else sources.datapath.state()),
    }


def _portal(portal: PortalChannel) -> dict[str, object]:
    return {
        "portal": portal.state.value,
        "portal_joins": portal.joins,
        "portal_oddities": portal.oddities,
        "portal_faults": portal.faults,
    }


def _fields_of(counters: Counters | UdpCounters) -> dict[str, object]:
    """Give all that is counted, but for sizes and sockets."""
    values = {field.name: getattr(counters, field.name) for field in dataclasses.fields(counters)}
    return {name: value for name, value in values.items() if not isinstance(value, list | set)}


def _readable(sizes: Sequence[int]) -> dict[str, int]:
    return {f"{at << SIZE_SHIFT}+": count for at, count in enumerate(sizes) if count}
