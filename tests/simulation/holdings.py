"""Allocations and channels with their lifetimes by the rules of the RFCs, derived from packets at the relay's sockets.

The model stores times and durations. Its only event is the end of allocations.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.simulation.wire import Address

CHANNEL_LIVES = 600
CHANNEL_KEPT = 900
BIND_WAIT = 5
EARLY_WAIT = 1.0
NONCE_LIVES = 3600


@dataclass(slots=True)
class Channel:
    """A binding of a number and a peer."""

    number: int
    peer: Address
    bound: float

    def is_live(self, now: float) -> bool:
        return now < self.bound + CHANNEL_LIVES

    def is_kept(self, now: float) -> bool:
        return now < self.bound + CHANNEL_KEPT


@dataclass(slots=True, eq=False)
class Allocation:
    """A client's allocation."""

    client: Address
    username: str
    key: bytes
    transaction: bytes
    fingerprint: bool
    families: tuple[int, ...]
    missing: tuple[int, ...]
    even: bool
    lifetime: int
    ends: float
    id: int = 0
    ports: list[int] = field(default_factory=list)
    """The last port is the allocated port; earlier ports were in use."""
    is_established: bool = False
    is_free: bool = False
    success: bytes = b""
    channels: dict[int, Channel] = field(default_factory=dict)
    by_peer: dict[Address, Channel] = field(default_factory=dict)

    def live_channel(self, number: int, now: float) -> Channel | None:
        channel = self.channels.get(number)
        return channel if channel is not None and now < channel.bound + CHANNEL_LIVES else None

    def live_peer(self, peer: Address, now: float) -> Channel | None:
        channel = self.by_peer.get(peer)
        return channel if channel is not None and now < channel.bound + CHANNEL_LIVES else None

    def bind(self, number: int, peer: Address, now: float) -> Channel | None:
        """Bind or refresh a channel; return None if the number or the peer is reserved."""
        for held in (self.channels.get(number), self.by_peer.get(peer)):
            if held is not None and held.is_kept(now) and (held.number, held.peer) != (number, peer):
                return None
        for held in (self.channels.get(number), self.by_peer.get(peer)):
            if held is not None:
                self.unbind(held)
        channel = self.channels[number] = self.by_peer[peer] = Channel(number, peer, now)
        return channel

    def unbind(self, channel: Channel) -> None:
        self.channels.pop(channel.number, None)
        self.by_peer.pop(channel.peer, None)

    def drop_family(self, family: int) -> None:
        self.families = tuple(each for each in self.families if each != family)
        for channel in list(self.channels.values()):
            if (2 if ":" in channel.peer[0] else 1) == family:
                self.unbind(channel)


class Holdings:
    """All allocations."""

    def __init__(self, ports: range) -> None:
        self.by_client: dict[Address, Allocation] = {}
        self.by_username: dict[str, Allocation] = {}
        self.by_id: dict[int, Allocation] = {}
        """Allocations with requested sockets."""
        self.by_port: dict[int, Allocation] = {}
        """Taken ports, including ports in use by other programs until the response."""
        self._ports = ports
        self._free = [sum(port % 2 == odd for port in ports) for odd in (0, 1)]
        self._ends: list[tuple[float, int, Allocation]] = []
        self._sequence = 0

    def free_ports(self, *, even: bool) -> int:
        return self._free[0] if even else sum(self._free)

    def add(self, allocation: Allocation) -> None:
        self.by_client[allocation.client] = allocation
        self.by_username[allocation.username] = allocation
        self.end_at(allocation, allocation.ends)

    def end_at(self, allocation: Allocation, moment: float) -> None:
        allocation.ends = moment
        self._sequence += 1
        heapq.heappush(self._ends, (moment, self._sequence, allocation))

    def take_port(self, allocation: Allocation, port: int) -> bool:
        """Assign a port to an allocation; return False for an unsuitable port."""
        if port not in self._ports or port in self.by_port or (allocation.even and port % 2):
            return False
        allocation.ports.append(port)
        self.by_port[port] = allocation
        self._free[port % 2] -= 1
        return True

    def return_refused_ports(self, allocation: Allocation) -> None:
        for port in allocation.ports[:-1]:
            self._return(port)
        del allocation.ports[:-1]

    def free(self, allocation: Allocation) -> None:
        allocation.is_free = True
        del self.by_client[allocation.client]
        del self.by_username[allocation.username]
        self.by_id.pop(allocation.id, None)
        for port in allocation.ports:
            self._return(port)

    def due(self, now: float) -> Iterator[Allocation]:
        """Yield expired allocations; the caller frees each before the next."""
        while self.earliest_end() <= now:
            yield self._ends[0][2]

    def earliest_end(self) -> float:
        ends = self._ends
        while ends and (ends[0][2].is_free or ends[0][2].ends != ends[0][0]):
            heapq.heappop(ends)
        return ends[0][0] if ends else math.inf

    def _return(self, port: int) -> None:
        del self.by_port[port]
        self._free[port % 2] += 1
