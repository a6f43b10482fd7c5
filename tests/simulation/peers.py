"""Peers of clients. A peer may talk to many clients from a single address."""

from collections import deque
from random import Random

from tests.simulation.clock import BrokenError, Scheduler
from tests.simulation.network import Link, Network
from tests.simulation.parties import Post
from tests.simulation.wire import Address


class Peer:
    """Replies to packets, and sends packets to recent relayed addresses, including ended allocations."""

    def __init__(self, id_: int, address: Address, seed: str, scheduler: Scheduler, network: Network, post: Post) -> None:
        self.id = id_
        self.address = address
        self.link = Link()
        self.got = 0
        self._random = Random(f"{seed} peer {id_}")
        self._heard: deque[tuple[Address, int]] = deque(maxlen=30)
        """Relayed addresses and their clients."""
        self._scheduler = scheduler
        self._network = network
        self._post = post
        network.settle_at(address, id_, self.receive, self.link)

    def receive(self, data: bytes, source: Address, _: int) -> None:
        if source[1] == 3478:
            raise BrokenError(f"peer {self.id} got something from the port that clients talk to")
        self.got += 1
        letter = self._post.open(data, self.id)
        if letter is None:
            return
        self._heard.append((source, letter.sender))
        draw = self._random.random()
        if draw < 0.4:
            for _ in range(self._random.choice((1, 1, 3))):
                self._say(source, letter.sender)
        elif draw < 0.5:
            self._scheduler.after(self._random.choice((1, 30, 400, 1000)), self._say_to_someone)

    def _say_to_someone(self) -> None:
        if self._heard:
            self._say(*self._random.choice(self._heard))

    def _say(self, relayed: Address, to: int) -> None:
        payload = b"" if self._random.random() < 0.01 else self._post.write(self.id, to)
        self._network.send(payload, self.address, relayed, self._random.choice((0, 0, 0xB8, 1)), self.link)
