"""One relay in several processes, each of which takes the former over."""

import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from relay.core.credentials import Credential, RelaySecret, mint
from relay.net.handover import Message, close_all, connect, network_of
from tests.support.program import Program
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until

HOST: Final = "127.0.0.77"
SECRET: Final = "the secret of relays that are handed over"

CHANNEL: Final = 0x4000

MOST_UNDER_WAY: Final = 200
"""Packets. An overloaded relay may drop packets, with or without a handover."""

Starter: TypeAlias = Callable[..., Program]
Allocator: TypeAlias = Callable[[], TurnClient]


def credential_of(user: str) -> Credential:
    return mint(RelaySecret(SECRET), int(time.time()) + 10_000, user)


class HalfSuccessor:
    """A successor that goes no further than to some step.

    Args:
        path: the Unix socket of the relay.
        hosts: the public addresses.
        health: the health address.
    """

    def __init__(self, path: Path, hosts: Sequence[str] = (HOST,), health: str = f"{HOST}:8080") -> None:
        self._hosts = hosts
        self._health = health
        link = connect(path)
        assert link is not None
        self.link = link
        self.messages: list[Message] = []

    def go(self, step: str) -> None:
        """Follow the protocol to a step."""
        if step == "connected":
            return
        offer = self.receive("offer")
        if step == "offered":
            return
        self.link.send("hello", self.hello())
        while True:
            message = self.receive("group", "pages", "links", "some", "replays", "ready?", "rest")
            if message.kind == step:
                return
            if message.kind == "some":
                self.link.send("some")
            elif message.kind == "ready?":
                self.link.send("ready")
            elif message.kind == "rest":
                break
        if step == "decided":
            assert os.eventfd_read(offer.descriptors[0]) == 1

    def receive(self, *kinds: str) -> Message:
        self.messages.append(self.link.receive(*kinds, timeout=30))
        return self.messages[-1]

    def hello(self) -> dict[str, Any]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            network = network_of(opened)
        settings = {
            "public addresses": list(self._hosts),
            "bound addresses": list(self._hosts),
            "health address": self._health,
            "control address": "127.0.0.1:0",
            "portal": None,
        }
        ports = [49152, 65535]
        return {"settings": settings, "ports": ports, "network": network, "now": time.monotonic(), "descriptors": 60000}

    def close(self) -> None:
        for each in self.messages:
            close_all(each.descriptors)
        self.link.close()


class Traffic:
    """Numbered packets of clients to one peer and back, as many at once as any relay can hold."""

    def __init__(self, clients: list[TurnClient], peer: socket.socket) -> None:
        self._clients = clients
        self._peer = peer
        self._is_over = threading.Event()
        self.sent = 0
        self.to_peer: list[tuple[int, int]] = []
        self.to_clients: list[tuple[int, int]] = []
        self._threads = [
            threading.Thread(target=self._send),
            threading.Thread(target=self._receive_at_peer),
            *(threading.Thread(target=self._receive_at, args=(number,)) for number in range(len(clients))),
        ]
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Send no more, and wait until all packets have arrived."""
        self._is_over.set()
        for each in self._threads:
            each.join()

    def check(self) -> None:
        """Check that each packet has arrived once, each way, for each client."""
        for received in (self.to_peer, self.to_clients):
            assert len(received) == self.sent
            assert Counter(received).most_common(1)[0][1] == 1
            assert {index for index, _ in received} == set(range(len(self._clients)))

    def _send(self) -> None:
        number = 0
        while not self._is_over.is_set():
            for index, client in enumerate(self._clients):
                client.send(CHANNEL, struct.pack("!II", index, number))
                self._peer.sendto(struct.pack("!II", index, number), client.relayed)
                self.sent += 1
            number += 1
            wait_until(lambda: 2 * self.sent - len(self.to_peer) - len(self.to_clients) < MOST_UNDER_WAY)
        for index, client in enumerate(self._clients):
            client.send(CHANNEL, b"end")
            self._peer.sendto(b"end", self._clients[index].relayed)

    def _receive_at_peer(self) -> None:
        ends = 0
        while ends < len(self._clients):
            data = self._peer.recv(100)
            if data == b"end":
                ends += 1
            else:
                self.to_peer.append(struct.unpack("!II", data))

    def _receive_at(self, index: int) -> None:
        while (data := self._clients[index].receive()[1]) != b"end":
            self.to_clients.append(struct.unpack("!II", data))
