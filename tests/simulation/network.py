"""A network that loses, duplicates, delays and reorders datagrams, and is sometimes partitioned."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeAlias

from tests.simulation.clock import Scheduler
from tests.simulation.wire import Address

Receive: TypeAlias = Callable[[bytes, Address, int], None]
"""Receives a datagram with its source and its traffic class."""

CALM_LOSS = 0.02
"""The largest loss rate at which a client must still get a response."""

LONGEST_DETOUR = 4.0
"""Maximum delay of a datagram in seconds."""


@dataclass(slots=True)
class Link:
    """The link of a party to the network."""

    loss: float = 0.0
    double: float = 0.0
    detour: float = 0.0
    """Share of datagrams with a delay of up to several seconds."""
    delay: float = 0.01
    jitter: float = 0.02
    is_cut: bool = False
    calm_since: float = 0.0
    """Time since which the second or third retransmission is certain to arrive."""

    @property
    def is_calm(self) -> bool:
        return not self.is_cut and self.loss <= CALM_LOSS


class Place(NamedTuple):
    """A party at an address."""

    owner: int
    receive: Receive
    link: Link


class Relayed(NamedTuple):
    """The relay's end of the network."""

    hosts: frozenset[str]
    from_client: Receive
    from_peer: Callable[[bytes, Address, int, Address], None]
    """The last argument is the destination, a relayed address."""


class Network:
    """All addresses, and the datagrams in flight."""

    def __init__(self, scheduler: Scheduler, random: Random) -> None:
        self.sent = 0
        self.doubled = 0
        self.lost = 0
        self.strayed = 0
        """Number of datagrams to addresses without a party."""
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
        """Remove the party at an address, as when a NAT drops a mapping."""
        self._places.pop(address, None)

    def owner_of(self, address: Address) -> int | None:
        place = self._places.get(address)
        return None if place is None else place.owner

    def send(self, data: bytes, source: Address, destination: Address, traffic_class: int, link: Link | None = None) -> None:
        """Send a datagram over the sender's link, or over the receiver's link if the relay sends."""
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
        elif relay is not None and destination[0] in relay.hosts and source[0] not in relay.hosts:
            # The NAT in front of the relay does not return the relay's own packets.
            self.delivered += 1
            if destination[1] == 3478:
                relay.from_client(data, source, traffic_class)
            else:
                relay.from_peer(data, source, traffic_class, destination)
        else:
            self.strayed += 1
