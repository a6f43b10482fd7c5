"""Packets exactly at deadlines, which random times would rarely hit."""

from random import Random

from tests.simulation.clock import Scheduler
from tests.simulation.holdings import CHANNEL_KEPT, CHANNEL_LIVES, Allocation, Channel
from tests.simulation.machine import HOSTS, Machine
from tests.simulation.network import Network
from tests.simulation.parties import Post
from tests.simulation.properties import check_tables
from tests.simulation.wire import channel_data

SHARE = 0.2
"""Share of channels with a probe at the end."""

LOOKS = 0.05
"""Share of these channels with a check of the tables at the removal, which is slow."""

TICK = 2**-10


class Probes:
    """Sends packets in both directions when channels and their allocations end."""

    def __init__(self, machine: Machine, scheduler: Scheduler, network: Network, post: Post, seed: str) -> None:
        self._machine = machine
        self._scheduler = scheduler
        self._network = network
        self._post = post
        self._random = Random(f"{seed} probes")

    def plan(self, allocation: Allocation, channel: Channel) -> None:
        """Schedule probes around a channel's expiry."""
        if self._random.random() > SHARE:
            return
        ends = min(channel.bound + CHANNEL_LIVES, allocation.ends)
        for moment in (ends - TICK, ends, ends + TICK):
            self._scheduler.at(moment, self._probe, allocation, channel)
        if self._random.random() < LOOKS:
            for moment in (channel.bound + CHANNEL_KEPT - TICK, channel.bound + CHANNEL_KEPT):
                self._scheduler.at(moment, self._look)

    def _probe(self, allocation: Allocation, channel: Channel) -> None:
        machine = self._machine
        client, peer = self._network.owner_of(allocation.client), machine.owner_of(channel.peer)
        if machine.is_over or client is None or peer is None:
            return
        machine.from_client(channel_data(channel.number, self._post.write(client, peer)), allocation.client, 0)
        is_ipv6 = ":" in channel.peer[0]
        port = allocation.ports[-1]
        relayed = (HOSTS[2], port, 0, 0) if is_ipv6 else (HOSTS[1], port)
        machine.from_peer(self._post.write(peer, client), channel.peer, 0, relayed)

    def _look(self) -> None:
        machine = self._machine
        if not machine.is_over:
            machine.wake()
            check_tables(machine)
