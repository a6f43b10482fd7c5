"""A network that loses, doubles, delays and reorders datagrams, and is cut now and then."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeAlias

from tests.simulation.clock import Scheduler
from tests.simulation.wire import Address

Receive: TypeAlias = Callable[[bytes, Address, int], None]
"""Takes a datagram, where it is from, and its traffic class."""

CALM_LOSS = 0.02
"""The largest share of lost datagrams with which who waits for an answer is still owed one."""

LONGEST_DETOUR = 4.0
"""Seconds by which a datagram may come late."""


@dataclass(slots=True)
class Link:
    """How someone is connected to the rest."""

    loss: float = 0.0
    double: float = 0.0
    detour: float = 0.0
    """Share of datagrams that come up to seconds late."""
    delay: float = 0.01
    jitter: float = 0.02
    is_cut: bool = False
    calm_since: float = 0.0
    """Since when all that is sent may be relied upon to arrive at the second or third attempt."""

    @property
    def is_calm(self) -> bool:
        return not self.is_cut and self.loss <= CALM_LOSS


class Place(NamedTuple):
    """Someone at an address."""

    owner: int
    receive: Receive
    link: Link


class Relayed(NamedTuple):
    """Where the network ends at the relay."""

    hosts: frozenset[str]
    from_client: Receive
    from_peer: Callable[[bytes, Address, int, Address], None]
    """Has as its last argument the relayed address that was sent to."""


class Network:
    """All addresses, and what is on its way between them."""

    def __init__(self, scheduler: Scheduler, random: Random) -> None:
        self.sent = 0
        self.doubled = 0
        self.lost = 0
        self.strayed = 0
        """Arrived where nobody is any more."""
        self.delivered = 0
        self.relay: Relayed | None = None
        self._places: dict[Address, Place] = {}
        self._scheduler = scheduler
        self._random = random
        self._loopback = Link(delay=1e-4, jitter=0.0)

    @property
    def under_way(self) -> int:
        return self.sent + self.doubled - self.lost - self.strayed - self.delivered

    def settle_at(self, address: Address, owner: int, receive: Receive, link: Link) -> None:
        self._places[address] = Place(owner, receive, link)

    def leave(self, address: Address) -> None:
        """Let nobody be at an address any more: so a NAT forgets a mapping."""
        self._places.pop(address, None)

    def owner_of(self, address: Address) -> int | None:
        place = self._places.get(address)
        return None if place is None else place.owner

    def send(self, data: bytes, source: Address, destination: Address, traffic_class: int, link: Link | None = None) -> None:
        """Send a datagram over the link of whoever sends it, or, from the relay, of whoever it is for."""
        self.sent += 1
        if link is None:
            place = self._places.get(destination)
            link = self._loopback if place is None else place.link
        draw = self._random.random
        if link.is_cut or draw() < link.loss:
            self.lost += 1
            return
        copies = 1
        if link.double and draw() < link.double:
            self.doubled += 1
            copies = 2
        for _ in range(copies):
            delay = link.delay + link.jitter * draw()
            if link.detour and draw() < link.detour:
                delay += LONGEST_DETOUR * draw()
            self._scheduler.after(delay, self._arrive, data, source, destination, traffic_class)

    def _arrive(self, data: bytes, source: Address, destination: Address, traffic_class: int) -> None:
        relay = self.relay
        place = self._places.get(destination)
        if place is not None:
            self.delivered += 1
            place.receive(data, source, traffic_class)
        elif relay is not None and destination[0] in relay.hosts:
            self.delivered += 1
            if destination[1] == 3478:
                relay.from_client(data, source, traffic_class)
            else:
                relay.from_peer(data, source, traffic_class, destination)
        else:
            self.strayed += 1
