"""Greedy clients: thousands of channels, batches of many channels, floods of early data, mass deletion, old requests."""

from random import Random
from typing import TYPE_CHECKING

from tests.simulation import wire
from tests.simulation.machine import HOSTS
from tests.simulation.network import Link
from tests.simulation.portal import Credential
from tests.simulation.strangers import NOBODY
from tests.simulation.wire import Address

if TYPE_CHECKING:
    from tests.simulation.world import World

CHANNELS = (40, 40, 300, 300, 2000)
"""Fewer and more than the relay ends in one turn."""

CHANNELS_IN_KERNEL = 200
"""Not more than the kernel removes in one turn, with offload and few ports: a roaming client gets 508 if all ports are in
use and the port of its former allocation is not free at once."""

FLOOD = 600
"""Datagrams of a channel before its ChannelBind, more than the relay holds for a client."""

EVERY = 300.0
"""Average seconds between two greedy clients."""


class Greedy:
    """A client with a credential that wants everything. It roams, and somebody repeats its requests from its old address."""

    def __init__(self, world: "World", random: Random) -> None:
        self._world = world
        self._random = random
        self._credential: Credential | None = None
        self._nonce: bytes | None = None
        self._is_served = False
        self._address: Address = ("", 0)
        self._effects: list[tuple[bytes, Address]] = []
        """Requests that make or delete an allocation, with their source."""

    def appear(self) -> None:
        """Allocate, and go on with each response."""
        self._credential = self._world.credential(3600)
        if self._credential is not None:
            self._move()
            self._world.scheduler.after(20, self._move)
            for seconds in (30, 300, 700):
                self._world.scheduler.after(seconds, self._repeat_all)

    def _move(self) -> None:
        is_ipv6 = 1 not in self._world.parameters.setting.families
        host, port = self._random.randrange(1, 200), self._random.randrange(1024, 65536)
        self._address = (f"2001:db8:7:{host:x}::1", port, 0, 0) if is_ipv6 else (f"198.18.1.{host}", port)
        self._nonce = None
        self._is_served = False
        self._world.network.settle_at(self._address, NOBODY, self._receive, Link())
        self._world.scheduler.after(60, self._world.network.leave, self._address)
        self._allocate()

    def _allocate(self) -> None:
        self._ask(wire.ALLOCATE, wire.UDP, *((wire.IPV6_ONLY,) if len(self._address) > 2 else ()))

    def _receive(self, data: bytes, _: Address, __: int) -> None:
        answer = wire.read(data) if data[0] < 64 else None
        if answer is None:
            return
        if answer.code == 401 and answer.method == wire.ALLOCATE and self._nonce is None:
            self._nonce = answer.get(wire.NONCE)
            self._allocate()
        elif answer.code == 0 and answer.method == wire.ALLOCATE and not self._is_served:
            # A response may come twice. Two batches at once would have one share.
            self._is_served = True
            setting = self._world.parameters.setting
            is_scarce = setting.offloads and len(setting.ports) < self._world.parameters.clients
            count = CHANNELS_IN_KERNEL if is_scarce else self._random.choice(CHANNELS)
            for number in range(count):
                self._bind(number)
            self._world.scheduler.after(2, self._send_batch)
            self._world.scheduler.after(3, self._flood, count)
            self._world.scheduler.after(3.5, self._bind, count)
            if self._random.random() < 0.5:
                self._world.scheduler.after(4, self._ask, wire.REFRESH, (wire.LIFETIME, bytes(4)))

    def _peer(self, number: int) -> Address:
        is_ipv6 = len(self._address) > 2
        return (
            (f"2001:db8:8::{number + 1:x}", 9, 0, 0) if is_ipv6 else (f"198.51.{100 + number // 200}.{number % 200 + 1}", 9)
        )

    def _bind(self, number: int) -> None:
        transaction = self._random.randbytes(12)
        peer = (wire.PEER_ADDRESS, wire.address(self._peer(number), transaction))
        channel = (wire.CHANNEL_NUMBER, (0x4000 + number).to_bytes(2, "big") + b"\0\0")
        self._ask(wire.CHANNEL_BIND, channel, peer, transaction=transaction)

    def _ask(self, method: int, *attributes: tuple[int, bytes], transaction: bytes | None = None) -> None:
        credential, nonce = self._credential, self._nonce
        assert credential is not None
        proof = () if nonce is None else (
            (wire.USERNAME, credential.username.encode()), (wire.REALM, b"firezone"), (wire.NONCE, nonce)
        )  # fmt: skip
        key = None if nonce is None else credential.key
        data = wire.write(wire.REQUEST, method, transaction or self._random.randbytes(12), (*attributes, *proof), key)
        if nonce is not None and method in (wire.ALLOCATE, wire.REFRESH):
            self._effects.append((data, self._address))
        self._send(data, self._address)

    def _send(self, data: bytes, source: Address) -> None:
        relay: Address = (HOSTS[2], 3478, 0, 0) if len(source) > 2 else (HOSTS[1], 3478)
        self._world.network.send(data, source, relay, 0, Link())

    def _send_batch(self) -> None:
        """Send a GRO batch whose datagrams are of eight channels in turn."""
        pieces = [wire.channel_data(0x4000 + number % 8, b"") for number in range(self._random.choice((64, 400)))]
        self._world.machine.receive_at_once([(b"".join(pieces), self._address, len(pieces[0]), 0)])

    def _flood(self, number: int) -> None:
        """Send data of an unbound channel."""
        data = wire.channel_data(0x4000 + number, b"")
        self._world.machine.receive_at_once([(data, self._address, 0, 0)] * FLOOD)

    def _repeat_all(self) -> None:
        for data, source in self._effects:
            self._send(data, source)
