"""A client's requests, retransmitted at the intervals of RFC 8489 §6.2.1 until a response arrives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TypeAlias

from tests.simulation import wire
from tests.simulation.clock import BrokenError, Scheduler
from tests.simulation.network import Link
from tests.simulation.portal import Credential
from tests.simulation.wire import Address, Wire

RTO, REPEATS, LAST_WAIT = 0.5, 7, 16
"""Seconds before the first retransmission; number of transmissions; RTOs of waiting after the last transmission."""

TIMEOUT = RTO * (2 ** (REPEATS - 1) - 1 + LAST_WAIT)

Then: TypeAlias = Callable[[Wire | None], None]
"""Called with the response, or with None after a timeout."""


@dataclass(slots=True)
class Transaction:
    """A pending request."""

    method: int
    attributes: tuple[tuple[int, bytes], ...]
    then: Then
    data: bytes
    nonce: bytes | None
    key: bytes | None
    begun: float
    addresses: list[Address] = field(default_factory=list)
    """The source of each transmission: a NAT may rebind in between."""
    tries: int = 1


class Transactions:
    """All requests of a client."""

    def __init__(
        self,
        scheduler: Scheduler,
        random: Random,
        link: Link,
        send: Callable[[bytes], None],
        is_outdated: Callable[[Credential], bool],
        is_withheld: Callable[[bytes], bool],
    ) -> None:
        self.fingerprint = False
        self.impatience = 0.0
        """Share of requests that are duplicated immediately."""
        self.without_nonce = False
        """Whether credentials are sent before the first nonce, as by Firezone's client."""
        self.disturbed_at = 0.0
        """The last time at which responses could not be expected."""
        self.timeouts = 0
        self.nonce: bytes | None = None
        self.credential: Credential | None = None
        self.address: Address = ("0.0.0.0", 0)
        self._under_way: dict[bytes, Transaction] = {}
        self._scheduler = scheduler
        self._random = random
        self._link = link
        self._send = send
        self._is_outdated = is_outdated
        self._is_withheld = is_withheld

    def __len__(self) -> int:
        return len(self._under_way)

    def be_disturbed(self, until: float) -> None:
        """Expect no responses before a time, if later than the known time."""
        self.disturbed_at = max(self.disturbed_at, until)

    def ask(self, method: int, attributes: tuple[tuple[int, bytes], ...], then: Then) -> None:
        """Send a request; answer a challenge with the credential."""
        self._begin(method, attributes, then, 1)

    def forget(self) -> None:
        """Stop waiting for responses."""
        self._under_way.clear()

    def take(self, answer: Wire) -> bool:
        """Process a response; return False without a pending request.

        Raises:
            BrokenError: a client cannot use the response.
        """
        asked = self._under_way.get(answer.transaction)
        if asked is None or (self.credential is not None and self._is_outdated(self.credential)):
            # Another relay does not know this credential, and cannot sign a valid response.
            return False
        del self._under_way[answer.transaction]
        if answer.method != asked.method or answer.kind not in (wire.SUCCESS, wire.ERROR):
            raise BrokenError(f"{self.address} asked for method {asked.method} and got {answer}")
        if asked.key is not None and not answer.is_signed_with(asked.key):
            raise BrokenError(f"{self.address} got answer {answer.code} that it can't trust")
        mapped = answer.get(wire.MAPPED_ADDRESS)
        if mapped is not None and wire.read_address(mapped, answer.transaction) not in asked.addresses:
            raise BrokenError(f"{asked.addresses} is told that it is {wire.read_address(mapped, answer.transaction)}")
        if answer.code == 438 or (answer.code == 401 and asked.nonce is None):
            self.nonce = answer.get(wire.NONCE)
            if asked.tries > 5:
                raise BrokenError(f"{self.address} is challenged without end")
            self._begin(asked.method, asked.attributes, asked.then, asked.tries + 1)
        else:
            asked.then(answer)
        return True

    def _begin(self, method: int, attributes: tuple[tuple[int, bytes], ...], then: Then, tries: int) -> None:
        transaction = self._random.randbytes(12)
        # The XOR of an IPv6 address depends on the transaction.
        written = tuple((type_, _rewrite(type_, value, transaction)) for type_, value in attributes)
        credential, key = self.credential, None
        if method != wire.BINDING and credential is not None and (self.nonce is not None or self.without_nonce):
            key = credential.key
            written += ((wire.USERNAME, credential.username.encode()), (wire.REALM, b"firezone"))
            if self.nonce is not None:
                written += ((wire.NONCE, self.nonce),)
        data = wire.write(wire.REQUEST, method, transaction, written, key, fingerprint=self.fingerprint)
        self._under_way[transaction] = Transaction(
            method, attributes, then, data, self.nonce, key, self._scheduler.now, tries=tries
        )
        self._repeat(transaction)

    def _repeat(self, transaction: bytes) -> None:
        asked = self._under_way.get(transaction)
        if asked is None:
            return
        copies = len(asked.addresses) + 1
        if copies <= REPEATS:
            asked.addresses.append(self.address)
            self._send(asked.data)
            if self._random.random() < self.impatience:
                self._send(asked.data)
            wait = RTO * (2 ** (copies - 1) if copies < REPEATS else LAST_WAIT)
            self._scheduler.after(wait, self._repeat, transaction)
            return
        del self._under_way[transaction]
        self.timeouts += 1
        if (
            self._link.is_calm
            and max(self.disturbed_at, self._link.calm_since) < asked.begun
            and not self._is_withheld(transaction)
        ):
            raise BrokenError(f"{asked.addresses}: method {asked.method} is not answered within {TIMEOUT} s")
        asked.then(None)


def _rewrite(type_: int, value: bytes, transaction: bytes) -> bytes:
    """Encode a peer's address from text for a transaction."""
    if type_ != wire.PEER_ADDRESS:
        return value
    host, port = value.decode().split()
    address: Address = (host, int(port), 0, 0) if ":" in host else (host, int(port))
    return wire.address(address, transaction)


def peer_attribute(peer: Address) -> tuple[int, bytes]:
    return wire.PEER_ADDRESS, f"{peer[0]} {peer[1]}".encode()
