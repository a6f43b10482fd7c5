"""Invariants of the relay's tables and counters, at any time and at the end."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from relay.core.counters import DropReason
from relay.core.events import AllocationCreated, AllocationFreed, ChannelBound, ChannelRefreshed
from relay.core.server import Server
from tests.simulation.clock import BrokenError
from tests.simulation.machine import Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

_BY_NAME = {
    "unbound channel": (DropReason.UNBOUND_CHANNEL,),
    "unbound peer": (DropReason.UNBOUND_PEER,),
    "short": (DropReason.SHORT_CHANNEL_DATA,),
    "flood": (DropReason.FLOOD,),
    "early limit": (DropReason.EARLY_LIMIT,),
}
"""Drops with a different name in the referee."""


def check_tables(machine: Machine) -> None:
    """Compare the core's and the kernel's tables with the model.

    Raises:
        BrokenError: they differ.
    """
    tables, holdings, now = machine.server.allocations, machine.referee.holdings, machine.now
    _same("allocations", tables.by_id.keys(), holdings.by_id.keys())
    _same("clients", tables.by_client.keys(), holdings.by_client.keys())
    _same("usernames", tables.by_username.keys(), holdings.by_username.keys())
    live = {
        (held.client, channel.number): (held.id, channel.peer)
        for held in holdings.by_client.values()
        for channel in held.channels.values()
        if channel.is_live(now)
    }
    outside = {key: to for key, to in live.items() if not machine.referee.is_inside(to[1])}
    inside = {key: to for key, to in live.items() if key not in outside}
    for channels, right in ((tables.live_channels, outside), (tables.inside_channels, inside)):
        found = {(client, n): (each.allocation, each.peer) for client, of in channels.items() for n, each in of.items()}
        _same("live channels", found, right)
    _same("live peers", {(id_, peer) for id_, of in tables.live_peers.items() for peer in of}, set(live.values()))
    ports = {held.ports[-1]: held.id for held in holdings.by_client.values() if held.is_established}
    _same("ports", tables.by_port, ports)
    kept = {
        (held.id, channel.number, channel.peer)
        for held in holdings.by_client.values()
        for channel in held.channels.values()
        if channel.is_kept(now)
    }
    held = {(id_, n, each.peer) for id_, held in tables.by_id.items() for n, each in held.channels.items()}
    _same("channels", held, kept)
    _same("sockets", machine.sockets, {held.ports[-1]: id_ for id_, held in holdings.by_id.items() if held.is_established})
    _same("free ports", len(machine.server.free_ports), holdings.free_ports(even=False))
    if machine.setting.offloads:
        kernel = machine.kernel
        _same(
            "the kernel's channels",
            {key: (machine.sockets[each.port], each.peer) for key, each in kernel.by_channel.items()},
            live,
        )
        _same("the kernel's peers", kernel.by_peer.values(), kernel.by_channel.values())


def check_counters(machine: Machine) -> None:
    """Compare the core's counters with the observed packets.

    Raises:
        BrokenError: they differ.
    """
    counters, referee = machine.server.counters, machine.referee
    _same("packets to peers", [counters.to_peer_packets, counters.to_peer_bytes], referee.to_peer)
    _same("packets to clients", [counters.to_client_packets, counters.to_client_bytes], referee.to_client)
    _same("early packets", [counters.early_held, counters.early_relayed], referee.early_counts)
    answers = {(int(method), 0): n for method, n in counters.successes.items()}
    answers |= {(int(method), int(code)): n for (method, code), n in counters.errors.items()}
    _same("answers", answers, dict(referee.answers))
    withheld = {(int(method), int(code or 0)): n for (method, code), n in counters.withheld.items()}
    _same("withheld", withheld, dict(referee.withheld))
    _same("freed", {str(reason): n for reason, n in counters.allocations_freed.items() if n}, dict(referee.frees))
    _same("made", counters.allocations_made, referee.established)
    if machine.setting.tells:
        _check_told(machine)
    for name, reasons in _BY_NAME.items():
        _same(f"drops for {name}", sum(counters.drops[reason] for reason in reasons), referee.drops[name])


def _check_told(machine: Machine) -> None:
    """Compare events with counters."""
    told, counters = machine.told, machine.server.counters
    _same("allocations told of", told[AllocationCreated], counters.allocations_made)
    ends = told[AllocationCreated] - told[AllocationFreed]
    held = machine.referee.holdings.by_client.values()
    _same("ends told of", ends, sum(each.is_established for each in held))
    _same("channels told of", told[ChannelBound] + told[ChannelRefreshed], counters.channels_bound)
    to_peer, to_client = machine.referee.told_bytes
    for each in machine.server.allocations.by_id.values():
        to_peer += each.to_peer_bytes + sum(channel.to_peer_bytes for channel in each.channels.values())
        to_client += each.to_client_bytes + sum(channel.to_client_bytes for channel in each.channels.values())
    _same("bytes told of", [to_peer, to_client], [counters.to_peer_bytes, counters.to_client_bytes])


def check_quiet(world: "World") -> None:
    """Check that no state is left.

    Raises:
        BrokenError: state is left.
    """
    machine = world.machine
    if world.network.under_way:
        raise BrokenError(f"{world.network.under_way} datagrams are still on their way")
    fresh = dict(_sizes(Server(machine.config, machine.random)))
    for path, size in _sizes(machine.server):
        if size != fresh.get(path, 0):
            raise BrokenError(f"after quiet, {path} has {size} entries, and had {fresh.get(path, 0)} at the start")
    if machine.server.poll_timeout() is not None:
        raise BrokenError(f"after quiet, the relay wants to be woken at {machine.server.poll_timeout()}")
    kernel = machine.kernel
    left = (machine.sockets, kernel.by_channel, kernel.by_peer)
    if any(left):
        raise BrokenError(f"after quiet, the machine still has {left}")
    if world.link.channel.drain():
        raise BrokenError("after quiet, the portal's channel has commands left")


def _sizes(server: object) -> Iterator[tuple[str, int]]:
    """Return the size of each container reachable from an object, by path.

    Counters, the cache of peers and the history of refused requests, which is bounded, stay.
    """
    seen: set[int] = set()
    to_do: list[tuple[str, Any]] = [("server", server)]
    while to_do:
        path, each = to_do.pop()
        if id(each) in seen or not type(each).__module__.startswith("relay."):
            continue
        seen.add(id(each))
        for name in (*getattr(each, "__dict__", ()), *getattr(type(each), "__slots__", ())):
            value = getattr(each, name, None)
            at = f"{path}.{name}"
            if isinstance(value, dict | list | set | tuple) and name not in ("counters", "_judged"):
                yield at, _entries(value)
            elif name not in ("counters", "_counters", "history", "_history"):
                to_do.append((at, value))


def _entries(container: Any) -> int:  # noqa: ANN401 - any container
    """Return the number of elements in a container and its nested containers."""
    if not isinstance(container, dict | list | set | tuple):
        return 0
    inner = container.values() if isinstance(container, dict) else container
    return len(container) + sum(_entries(each) for each in inner)


def _same(what: str, seen: object, right: object) -> None:
    if not (seen == right if isinstance(seen, dict | list | int) else set(seen) == set(right)):  # type: ignore[call-overload] # collections
        raise BrokenError(f"{what}: the relay has {_only(seen, right)}, but {_only(right, seen)} is right")


def _only(one: object, other: object) -> object:
    """Return the elements in only the first container, if possible."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: value for key, value in one.items() if other.get(key) != value}
    if isinstance(one, int | list):
        return one
    return set(one) - set(other)  # type: ignore[call-overload] # both are collections here
