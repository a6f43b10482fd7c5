"""TURN clients, their requests and their packets."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from tests.simulation import wire
from tests.simulation.clock import BrokenError, Scheduler
from tests.simulation.network import Link, Network
from tests.simulation.parties import Post
from tests.simulation.portal import Credential
from tests.simulation.profiles import Profile
from tests.simulation.transactions import Transactions, peer_attribute
from tests.simulation.wire import Address, Wire

_FAMILIES = {1: {1}, 2: {2}, 3: {1, 2}}


class Surroundings(Protocol):
    """A client's access to the world."""

    @property
    def seed(self) -> int: ...

    @property
    def scheduler(self) -> Scheduler: ...

    @property
    def network(self) -> Network: ...

    @property
    def post(self) -> Post: ...

    def credential(self, seconds: float) -> Credential | None:
        """Request a credential from the portal; None without a relay."""

    @property
    def patience(self) -> float:
        """Maximum seconds until a client has an allocation under good conditions."""

    def is_outdated(self, credential: Credential) -> bool:
        """Return whether the credential's relay has stopped."""

    def is_withheld(self, transaction: bytes) -> bool:
        """Return whether the rate limit of the address suppressed a response."""

    def new_address(self, *, is_ipv6: bool) -> Address:
        """Return an unused address."""

    def choose_peer(self, client: "Client", family: int) -> Address | None:
        """Return a peer to talk to."""

    def call(self, client: "Client", peer: Address) -> None:
        """Let a peer that is a client of the same relay bind a channel back to the client."""

    def owner_of(self, address: Address) -> int | None:
        """Return the party at an address, or behind a relayed address."""

    def note(self, what: str, about: object) -> None:
        """Write an entry to the trace."""


@dataclass(slots=True)
class Bound:
    """A client's view of a channel."""

    number: int
    peer: Address
    at: float
    is_bound: bool = False


class Client:
    """A client of the relay."""

    def __init__(self, id_: int, profile: Profile, world: Surroundings) -> None:
        self.id = id_
        self.profile = profile
        self.link = Link()
        self.random = Random(f"{world.seed} client {id_}")
        self.asking = Transactions(world.scheduler, self.random, self.link, self._send, world.is_outdated, world.is_withheld)
        self.asking.fingerprint = profile.fingerprint
        self.asking.impatience = profile.impatience
        self.asking.without_nonce = profile.first_shows_credential
        self.relayed: dict[int, Address] = {}
        """Relayed addresses by family; empty without an allocation."""
        self.channels: dict[int, Bound] = {}
        self.is_active = False
        self.wants_since: float | None = None
        """Time since which the client has waited for an allocation."""
        self.refusals: set[int] = set()
        """Error codes since the last allocation."""
        self.recovered: Counter[int] = Counter()
        """Number of allocations after an error, by code."""
        self.sessions = 0
        self.sent = 0
        self.got = 0
        self._era = 0
        self._asks = profile.asks
        self._scheduler = world.scheduler
        self._network = world.network
        self._post = world.post
        self._world = world

    @property
    def address(self) -> Address:
        return self.asking.address

    # Sessions.

    def begin(self) -> None:
        """Run sessions until stopped."""
        self.is_active = True
        self.sessions += 1
        self._new_era()
        if not self.profile.stays or not self.address[1]:
            self._move()
        self.asking.credential = None
        self._scheduler.after(self.random.expovariate(1 / self.profile.session), self._end_session, self.sessions)
        self._want_credential()

    def stop(self) -> None:
        """Start no further sessions."""
        if self.is_active:
            self._end_session(self.sessions)
        # A pausing client does not return.
        self.sessions += 1

    def move(self) -> None:
        """Change the address unnoticed, because a NAT has dropped the old mapping."""
        if self.address[1]:
            self._move()

    def hear_of_relay(self) -> None:
        """Start again with a new relay."""
        if self.is_active:
            self._new_era()
            self._want_credential()

    def check(self) -> None:
        """Check whether the client has an allocation in time.

        Raises:
            BrokenError: the client has waited too long.
        """
        if self.wants_since is not None and self.link.is_calm:
            since = max(self.wants_since, self.link.calm_since, self.asking.disturbed_at)
            if self._scheduler.now - since > self._world.patience:
                raise BrokenError(f"client {self.id} ({self.profile.name}) has had no allocation since {since}")

    def _end_session(self, session: int) -> None:
        if session != self.sessions or not self.is_active:
            return
        leaves = self.profile.leaves and bool(self.relayed)
        self._new_era()
        if leaves:
            self.asking.ask(wire.REFRESH, ((wire.LIFETIME, bytes(4)),), lambda _: None)
        self.is_active = False
        pause = self.random.expovariate(1 / self.profile.pause)
        self._scheduler.after(pause, self._begin_again, session)

    def _begin_again(self, session: int) -> None:
        if session == self.sessions and self._world.credential(1) is not None:
            self.begin()
        elif session == self.sessions:
            self._scheduler.after(60, self._begin_again, session)

    def _new_era(self) -> None:
        """Reset the state of an allocation."""
        self._era += 1
        self.asking.forget()
        self.relayed.clear()
        self.channels.clear()
        self.wants_since = None

    def _move(self) -> None:
        self._network.leave(self.address)
        self.asking.address = self._world.new_address(is_ipv6=self.profile.is_ipv6)
        self._network.settle_at(self.address, self.id, self.receive, self.link)

    def _later(self, seconds: float, deed: Callable[[], None]) -> None:
        """Run an action if the client still has the same allocation."""
        self._scheduler.after(seconds, self._if_still, self._era, deed)

    def _if_still(self, era: int, deed: Callable[[], None]) -> None:
        if era == self._era:
            deed()

    # Allocations.

    def _want_credential(self) -> None:
        self.asking.credential = self._world.credential(self.profile.credential_lives)
        if self.asking.credential is None:
            self.wants_since = None
            self._later(5 + 5 * self.random.random(), self._want_credential)
        else:
            self._allocate()

    def _allocate(self) -> None:
        """Request an allocation until success."""
        since = self.wants_since
        self._new_era()
        self.wants_since = self._scheduler.now if since is None else since
        attributes: tuple[tuple[int, bytes], ...] = (wire.UDP,)
        if self._asks > 1:
            attributes += (wire.DUAL,) if self._asks == 3 else (wire.IPV6_ONLY,)
        if self.profile.even_port:
            attributes += (wire.EVEN,)
        if self.profile.lifetime is not None:
            attributes += ((wire.LIFETIME, self.profile.lifetime.to_bytes(4, "big")),)
        self.asking.ask(wire.ALLOCATE, attributes, self._take_allocated)
        if self.profile.roams_after and self.random.random() < 0.2:
            # The first request may still be pending at the relay.
            self._later(0.5 * self.random.random(), self._roam)

    def _take_allocated(self, answer: Wire | None) -> None:
        self._world.note("allocate", (self.id, answer and answer.code))
        match None if answer is None else answer.code:
            case None:
                self._later(1 + self.random.random(), self._allocate)
            case 0 if answer is not None:
                self._begin_relaying(answer)
            case 437:
                # An earlier allocation exists, perhaps with other credentials.
                if self.random.random() < 0.3:
                    self._try_to_use()
                self.asking.ask(wire.REFRESH, ((wire.LIFETIME, bytes(4)),), lambda _: self._allocate())
            case 401:
                self._later(1, self._want_credential)
            case 440 if self._asks != 3:
                # Try the other family, because the relay supports at least one.
                self.refusals.add(440)
                self._asks = 3 - self._asks
                self._allocate()
            case 486 | 508 as code:
                self.refusals.add(code)
                self.asking.be_disturbed(self._scheduler.now)
                self._later(10 + 20 * self.random.random(), self._allocate)
            case code:
                raise BrokenError(f"client {self.id} ({self.profile.name}) is refused an allocation with {code}")

    def _try_to_use(self) -> None:
        """Check that an allocation of other credentials cannot be used with the current credentials."""
        self.asking.ask(wire.REFRESH, ((wire.LIFETIME, (3000).to_bytes(4, "big")),), lambda _: None)
        peer = self._world.choose_peer(self, 1)
        if peer is not None:
            channel = (wire.CHANNEL_NUMBER, b"\x70\0\0\0")
            self.asking.ask(wire.CHANNEL_BIND, (channel, peer_attribute(peer)), lambda _: None)

    def _begin_relaying(self, answer: Wire) -> None:
        self.wants_since = None
        self.recovered.update(self.refusals)
        self.refusals.clear()
        for value in answer.get_all(wire.RELAYED_ADDRESS):
            relayed = wire.read_address(value, answer.transaction)
            self.relayed[2 if ":" in relayed[0] else 1] = relayed
        missing = {value[0] for value in answer.get_all(wire.ADDRESS_ERROR)}
        if self.relayed.keys() | missing != _FAMILIES[self._asks] or self.relayed.keys() & missing:
            raise BrokenError(f"client {self.id} asked for {self._asks} and got {self.relayed}, without {missing}")
        lifetime = answer.number(wire.LIFETIME) or 0
        if self.profile.refreshes:
            self._later(lifetime - 60, self._refresh)
        else:
            self._later(lifetime + 1, self._allocate)
        if self.profile.roams_after:
            self._later(self.random.expovariate(1 / self.profile.roams_after), self._roam)
        if self._asks == 3 and self.random.random() < 0.1:
            self._later(100 * self.random.random(), self._drop_family)
        for n in range(self.profile.channels):
            self._later(0.2 * n, lambda n=n: self._bind_new(0x4000 + n))  # type: ignore[misc] # mypy takes n for a parameter
        self._later(1 + self.random.expovariate(1 / self.profile.gap), self._talk)

    def _refresh(self) -> None:
        lifetime = (self.profile.lifetime or 600).to_bytes(4, "big")
        self.asking.ask(wire.REFRESH, ((wire.LIFETIME, lifetime),), self._take_refreshed)

    def _take_refreshed(self, answer: Wire | None) -> None:
        if answer is not None and answer.code == 0:
            self._later((answer.number(wire.LIFETIME) or 0) - 60, self._refresh)
        elif answer is not None and answer.code == 401:
            self._later(1, self._want_credential)
        else:
            self._allocate()

    def _roam(self) -> None:
        """Continue from another address with the same username."""
        self._move()
        self._allocate()

    def _drop_family(self) -> None:
        """Delete one of two relayed addresses."""
        family = self.random.choice((1, 2))
        attributes = ((wire.LIFETIME, bytes(4)), (wire.REQUESTED_FAMILY, bytes((family, 0, 0, 0))))
        self.asking.ask(wire.REFRESH, attributes, lambda answer: self._take_dropped(answer, family))

    def _take_dropped(self, answer: Wire | None, family: int) -> None:
        if answer is not None and answer.code == 0:
            self.relayed.pop(family, None)
            for number in [n for n, each in self.channels.items() if (2 if ":" in each.peer[0] else 1) == family]:
                del self.channels[number]
            if not self.relayed:
                # The last relayed address is deleted.
                self._allocate()

    # Channels.

    def _bind_new(self, number: int) -> None:
        """Bind a channel to an available peer."""
        families = list(self.relayed)
        if not families:
            return
        # Without a relayed address of the peer's family, the client gets 443.
        peer = self._world.choose_peer(self, self.random.choice(families if self.random.random() < 0.97 else (1, 2)))
        if peer is None or any(peer == each.peer for each in self.channels.values()):
            return
        if self.random.random() < 0.3:
            self.asking.ask(wire.CREATE_PERMISSION, (peer_attribute(peer),), lambda _: None)
        self._bind(Bound(number, peer, self._scheduler.now))

    def bind_back(self, peer: Address) -> None:
        """Bind a channel to a client of the same relay."""
        if all(peer != each.peer for each in self.channels.values()):
            self._bind(Bound(0x4F00, peer, self._scheduler.now))

    def _bind(self, bound: Bound) -> None:
        channel = (wire.CHANNEL_NUMBER, bound.number.to_bytes(2, "big") + b"\0\0")
        self.asking.ask(
            wire.CHANNEL_BIND, (channel, peer_attribute(bound.peer)), lambda answer: self._take_bound(bound, answer)
        )
        if self.profile.is_hasty:
            for _ in range(self.random.choice((1, 3, 6))):
                self.say(bound.number, self._world.owner_of(bound.peer))

    def _take_bound(self, bound: Bound, answer: Wire | None) -> None:
        code = None if answer is None else answer.code
        if code == 0:
            bound.at, bound.is_bound = self._scheduler.now, True
            self.channels[bound.number] = bound
            self._world.call(self, bound.peer)
            self._later(self.profile.rebinds_after * (0.9 + 0.2 * self.random.random()), lambda: self._rebind(bound))
        elif code == 437:
            self._allocate()
        elif code == 401:
            self._later(1, self._want_credential)
        elif code in (400, 403, 508):
            # Temporary: the number or the peer is reserved, the machine has the peer's address, or the limit is reached.
            self.channels.pop(bound.number, None)
            self._later(100 + 100 * self.random.random(), lambda: self._bind_new(bound.number))
        elif code is None:
            self._later(1, lambda: self._bind(bound))

    def _rebind(self, bound: Bound) -> None:
        if self.channels.get(bound.number) is not bound:
            return
        if self.profile.swaps and self.random.random() < 0.5:
            del self.channels[bound.number]
            self._bind_new(bound.number)
        else:
            self._bind(bound)

    # Packets.

    def receive(self, data: bytes, source: Address, _: int) -> None:
        if source[1] != 3478:
            raise BrokenError(f"client {self.id} got something from {source}")
        if data[0] < 64:
            answer = wire.read(data)
            if answer is None:
                raise BrokenError(f"client {self.id} got what is no answer: {data.hex()}")
            self.asking.take(answer)
            return
        if len(data) != 4 + (data[2] << 8 | data[3]):
            raise BrokenError(f"client {self.id} got ChannelData with a wrong length")
        self.got += 1
        letter = self._post.open(data[4:], self.id)
        number = data[0] << 8 | data[1]
        if letter is not None and number in self.channels and letter.receiver == self.id and self.random.random() < 0.2:
            self.say(number, letter.sender)

    def say(self, number: int, to: int | None) -> None:
        """Send a packet on a channel, sometimes with padding."""
        draw = self.random.random()
        payload = b"" if to is None or draw < 0.01 else self._post.write(self.id, to)
        self.sent += 1
        self._send(wire.channel_data(number, payload, bytes(-len(payload) % 4) if draw < 0.2 else b""))

    def _talk(self) -> None:
        """Send a few packets on a channel, and more later, including on channels that may have expired meanwhile."""
        bound = [each for each in self.channels.values() if each.is_bound]
        if bound:
            channel = self.random.choice(bound)
            to = self._world.owner_of(channel.peer)
            for _ in range(self.random.choice((1, 1, 2, 5))):
                self.say(channel.number, to)
        elif self.random.random() < 0.1:
            self.asking.ask(wire.BINDING, (), lambda _: None)
        self._later(self.random.expovariate(1 / self.profile.gap), self._talk)

    def _send(self, data: bytes) -> None:
        marks = self.random.choice((0, 0, 0, 0xB8, 2)) if data[0] >= 64 else 0
        host = "2001:db8::1" if self.profile.is_ipv6 else "192.0.2.1"
        self._network.send(
            data, self.address, (host, 3478, 0, 0) if self.profile.is_ipv6 else (host, 3478), marks, self.link
        )
