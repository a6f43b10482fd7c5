"""One relay in several processes, each of which takes the former over."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from relay.core.credentials import Credential, RelaySecret, mint
from relay.net.handover import Message, close_all, connect, network_of
from tests.support.program import Program
from tests.support.turn_client import TurnClient

HOST: Final = "127.0.0.77"
SECRET: Final = "the secret of relays that are handed over"

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
