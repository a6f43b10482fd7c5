"""Strangers send invalid packets, replayed packets, and requests with other usernames."""

from random import Random
from typing import TYPE_CHECKING

from tests.simulation import wire
from tests.simulation.machine import HOSTS
from tests.simulation.network import Link
from tests.simulation.wire import Address

if TYPE_CHECKING:
    from tests.simulation.world import World

NOBODY = 0xFFFFFFFF
"""The strangers' channel number, which has no receiver."""


class Strangers:
    """Senders without credentials."""

    def __init__(self, world: "World", random: Random) -> None:
        self._world = world
        self._random = random

    def appear(self) -> None:
        """Run a random action of a stranger."""
        if self._random.random() < 0.2:
            self._forge()
        else:
            self._make_noise()

    def _make_noise(self) -> None:
        world, random = self._world, self._random
        number = random.choice((0x4000, 0x4001, 0x7FFF))
        seen = [data for _, what, _, data in world.trace.tail if what == "in"]
        replayed = random.choice(seen) if seen else b""
        data = random.choice(
            (
                random.randbytes(random.randrange(60)),
                wire.channel_data(number, random.randbytes(random.randrange(40))),
                wire.write(wire.REQUEST, wire.BINDING, random.randbytes(12), ()),
                wire.write(wire.REQUEST, wire.ALLOCATE, random.randbytes(12), (wire.UDP,)),
                wire.write(wire.INDICATION, wire.BINDING, random.randbytes(12), ()),
                replayed,
                replayed[: random.randrange(len(replayed) + 1)],
            )
        )
        port = random.choice(world.machine.setting.ports) if random.random() < 0.3 else 3478
        address = self._address()
        # Sometimes more requests than the rate limit allows.
        for _ in range(100 if random.random() < 0.03 else 1):
            world.network.send(data, address, self._relay(address, port), 0, Link())

    def _forge(self) -> None:
        """Get a nonce, and send a request with a client's username and a guessed password."""
        world, random = self._world, self._random
        credential = random.choice(world.clients).asking.credential
        address = self._address()
        if credential is None or not address[1]:
            return

        def receive(data: bytes, _: Address, __: int) -> None:
            world.network.leave(address)
            answer = wire.read(data)
            nonce = None if answer is None else answer.get(wire.NONCE)
            if nonce is not None:
                proof = ((wire.USERNAME, credential.username.encode()), (wire.REALM, b"firezone"), (wire.NONCE, nonce))
                ask(wire.write(wire.REQUEST, method, random.randbytes(12), (wire.UDP, *proof), random.randbytes(16)))

        def ask(data: bytes) -> None:
            world.network.send(data, address, self._relay(address, 3478), 0, Link())

        method = random.choice((wire.ALLOCATE, wire.REFRESH, wire.CHANNEL_BIND))
        world.network.settle_at(address, NOBODY, receive, Link())
        # The response may be missing.
        world.scheduler.after(10, world.network.leave, address)
        ask(wire.write(wire.REQUEST, method, random.randbytes(12), (wire.UDP,)))

    def _address(self) -> Address:
        """Choose a stranger's address: separate, or behind a client NAT at an unused port."""
        random = self._random
        families = self._world.parameters.setting.families
        is_among_clients = random.random() < 0.2
        host = random.randrange(1, 1 + (self._world.parameters.nats if is_among_clients else 30))
        port = random.randrange(1024) if is_among_clients else random.randrange(65536)
        if random.choice(families) == 1:
            return (f"203.0.113.{host}" if is_among_clients else f"198.18.0.{host}", port)
        return (f"2001:db8:{5 if is_among_clients else 6}:{host:x}::{1 + port % 7}", port, 0, 0)

    def _relay(self, address: Address, port: int) -> Address:
        return (HOSTS[2], port, 0, 0) if ":" in address[0] else (HOSTS[1], port)
